"""The VAE of slices: exact sizes, nothing past the latent, a stored scale, a repeatable run."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import WINDOWS
from ct_nb.slices.vae import (
    LinearAutoencoder,
    SliceVAE,
    SliceVAEConfig,
    depth_to_space,
    pad_in_plane,
    space_to_depth,
)
from ct_nb.slices.vae_metrics import block_means, slice_ssim, vae_baselines, vae_scores
from ct_nb.slices.vae_tiles import decode_tiled, encode_tiled
from ct_nb.slices.vae_train import (
    VAE_PRESETS,
    VAELearner,
    VAERun,
    collate_crops,
    load_vae,
)
from ct_nb.training.checkpoints import WeightsError

CONFIGS = (
    SliceVAEConfig(fold=8, channels=(12,), blocks=1),
    SliceVAEConfig(fold=4, channels=(8, 12), blocks=1),
    SliceVAEConfig(fold=2, channels=(4, 8, 8), blocks=1),
    SliceVAEConfig(fold=1, channels=(4, 4, 4, 8), blocks=1),
)


def drawn(config=CONFIGS[1], seed=0) -> SliceVAE:
    "Random weights everywhere, as if trained: a new network is linear."
    torch.manual_seed(seed)
    vae = SliceVAE(config).eval().requires_grad_(False)
    for layer in (vae.squeeze, vae.leave):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return vae


def stack(*shape, seed=0):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def worst(a, b):
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def chest():
    return WINDOWS["chest"].to_network(phantom(3, 64).volume.tensor())[None, None]


# sizes


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 9), (2, 8, 16), (3, 23, 17), (5, 31, 8)])
def test_any_depth_and_size_come_back(config, shape):
    x, vae = stack(*shape), drawn(config)
    image, latent = vae(x)
    assert image.shape == x.shape and latent.mean.shape == latent.log_variance.shape == (
        1,
        4,
        shape[0],
        -(-shape[1] // 8),
        -(-shape[2] // 8),
    )
    assert torch.isfinite(image).all() and torch.equal(image, vae.decode(latent.mean, shape[1:]))


def test_padding_repeats_the_edge_and_is_cropped_exactly(chest):
    vae = drawn()
    part = chest[..., :20, :27, :45]
    by_hand = torch.cat([part, part[..., -1:].expand(-1, -1, -1, -1, 3)], -1)
    by_hand = torch.cat([by_hand, by_hand[..., -1:, :].expand(-1, -1, -1, 5, -1)], -2)
    assert torch.equal(pad_in_plane(part), by_hand) and torch.equal(
        vae(part)[0], vae(by_hand)[0][..., :27, :45]
    )


def test_fold_and_unfold_are_inverse_and_as_pixel_unshuffle():
    x = torch.randn(2, 3, 2, 8, 16)
    assert torch.equal(depth_to_space(space_to_depth(x, 4), 4), x)
    assert torch.equal(
        space_to_depth(x, 4)[:, :, 1], torch.nn.functional.pixel_unshuffle(x[:, :, 1], 4)
    )
    assert torch.equal(
        space_to_depth(x.contiguous(memory_format=torch.channels_last_3d), 2), space_to_depth(x, 2)
    )


# the latent is the only way


def jacobian_rank(function):
    spot = 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    return int(
        torch.linalg.matrix_rank(torch.autograd.functional.jacobian(function, spot), rtol=1e-4)
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_sixty_four_pixels_pass_through_four_numbers(config):
    vae = drawn(config)

    def through(pixels):
        return vae(pixels.view(1, 1, 1, 8, 8).clip(-1, 1))[0].flatten()

    assert jacobian_rank(through) == 4
    assert jacobian_rank(lambda pixels: through(pixels) + 0.1 * pixels) > 30  # a skip


def test_slices_help_each_other_and_one_alone_is_fine():
    vae, x = drawn(), stack(6, 16, 16)
    moved = x.clone()
    moved[:, :, 2] = stack(1, 16, 16, seed=9)[:, :, 0]
    changed = (
        (vae.encode(moved).mean - vae.encode(x).mean).abs().amax((0, 1, 3, 4)) > 1e-6
    ).tolist()
    assert changed == [True] * 5 + [False]  # two blocks see two slices to each side
    for block in (*vae.sinking[0], *vae.sinking[1]):
        block.near.share.zero_()
    changed = (
        (vae.encode(moved).mean - vae.encode(x).mean).abs().amax((0, 1, 3, 4)) > 1e-6
    ).tolist()
    assert changed == [False, False, True, False, False, False]


def test_the_linear_start_is_the_best_linear_code(chest):
    straight = LinearAutoencoder(4).fit([chest[:, :, :40], chest[:, :, 40:]])
    blocks = space_to_depth(chest, 8).movedim(1, -1).flatten(0, -2).double()
    values = torch.linalg.eigvalsh(torch.cov(blocks.T, correction=0))
    with torch.no_grad():
        error = (straight.decode(straight.encode(chest)) - chest).square().mean()
    # what the other components held
    assert float(error) == pytest.approx(float(values[:-4].sum() / 64), rel=1e-3)
    vae = SliceVAE(CONFIGS[1]).eval()
    vae.straight.load_state_dict(straight.state_dict())
    with torch.no_grad():
        assert worst(vae(chest)[0], straight.decode(straight.encode(chest))) < 1e-5


# the latents


def test_the_scale_is_that_of_draws_and_travels(tmp_path, chest):
    vae = drawn()
    with refused("batches"):
        vae.measure_scale([])
    broken = drawn()
    broken.squeeze.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="gives no scale"):
        broken.measure_scale([chest[:, :, :1]])
    # a standard deviation of 1 for every number: draws vary more than means
    vae.squeeze.bias[4:] = 0.0
    vae.measure_scale([chest[:, :, :30], chest[:, :, 30:]])
    draws = vae.encode(chest).sample(torch.Generator().manual_seed(0))
    normal = vae.to_normal(draws)
    assert normal.mean((0, 2, 3, 4)).abs().max() < 0.02 and torch.allclose(
        normal.std((0, 2, 3, 4)), torch.ones(4), atol=0.02
    )
    # the wrong formula
    assert not torch.allclose(
        vae.to_normal(vae.encode(chest).mean).std((0, 2, 3, 4)), torch.ones(4), atol=0.02
    )
    assert worst(vae.from_normal(normal), draws) < 1e-4
    other = SliceVAE(vae.config)
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.latent_scale, vae.latent_scale) and torch.equal(
        other.latent_mean, vae.latent_mean
    )


def test_training_draws_and_evaluation_does_not(chest):
    vae, x = drawn(), chest[:, :, :2]
    again = [vae.train()(x, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    assert torch.equal(vae.eval()(x)[0], vae(x)[0])


# losses and scores


def test_recomputing_gives_the_same_gradients(chest):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        vae = SliceVAE(replace(CONFIGS[1], recompute=recompute))
        torch.nn.init.normal_(vae.leave.weight, std=0.1)
        image, latent = vae(chest[:, :, :3], torch.Generator().manual_seed(0))
        (image.square().mean() + latent.kl()).backward()
        found.append(vae.widen.weight.grad)
    assert torch.equal(*found)


def test_slice_ssim_is_that_of_images():
    a, b = (
        1000 * torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    b = (a + 0.3 * b).clamp(-1024, 1024)
    a = a.clamp(-1024, 1024)
    from monai.metrics import SSIMMetric

    def unit(v):
        return ((v + 1024) / 2048)[:, None]

    peer = SSIMMetric(2, data_range=1.0, win_size=11, kernel_sigma=1.5)(unit(b), unit(a))[:, 0]
    assert torch.allclose(slice_ssim(b, a, WINDOWS["chest"]), peer, atol=1e-4)


def test_scores_of_a_constant_error(chest):
    truth = WINDOWS["chest"].to_hu(chest[0, 0]).clamp(-900, 900)
    found = vae_scores(truth + 20.48, truth, WINDOWS["chest"])
    assert (
        found["psnr"] == pytest.approx(40, abs=1e-3)
        and found["slice_psnr"] == pytest.approx(40, abs=1e-3)
        and found["mae_hu"] == pytest.approx(found["bias_hu"]) == pytest.approx(20.48, abs=1e-3)
    )
    assert np.isnan(vae_scores(truth[:4], truth[:4] + 1, WINDOWS["chest"])["ssim"])


def test_block_means_keep_means():
    x = stack(2, 16, 24)
    constant = torch.full((1, 1, 1, 13, 19), 0.3)
    assert worst(block_means(constant, 8), constant) < 1e-6 and block_means(x, 4).shape == x.shape
    assert block_means(x, 8)[0, 0, 0, 8, 11:13].mean() != x[0, 0, 0, 8, 11:13].mean()


def test_baselines_are_what_their_names_say():
    x, linear = stack(3, 21, 30), LinearAutoencoder(4)
    linear.fit([stack(3, 24, 32, seed=1)])
    with torch.no_grad():
        found = vae_baselines(x, linear)
    blocks = space_to_depth(pad_in_plane(x), 8).movedim(1, -1).reshape(-1, 64)
    weight = linear.narrow.weight.detach().reshape(4, 64)
    bias = linear.narrow.bias.detach()
    kept = (blocks @ weight.T + bias) @ linear.widen.weight.detach().reshape(
        64, 4
    ).T + linear.widen.bias.detach()
    again = depth_to_space(kept.reshape(1, 3, 3, 4, 64).movedim(-1, 1), 8)[..., :21, :30]
    assert list(found) == ["linear", "mean_4", "mean_8"] and torch.allclose(
        found["linear"], again, atol=1e-5
    )
    assert (
        all(image.shape == x.shape for image in found.values())
        and torch.equal(found["mean_4"], block_means(x, 4))
        and torch.equal(found["mean_8"], block_means(x, 8))
    )


# the run


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    "The run of the preset micro, evaluated."
    folder = tmp_path_factory.mktemp("run") / "vae"
    shutil.copytree(trained("vae"), folder)
    found = VAERun.load(folder)
    found.board = found.evaluate(progress=False)
    return found


def test_a_run_leaves_weights_scale_and_scores(run):
    config = json.loads((run.out / "config.json").read_text())
    assert (
        config["system"] == "slice_vae"
        and config["versions"]["torch"]
        and config["training"]["fingerprint"] != config["validation"]["fingerprint"]
    )
    assert not set(config["training"]["cases"]) & set(config["validation"]["cases"])
    vae = load_vae(run.out)
    assert vae.latent_scale.flatten().tolist() == pytest.approx(config["latent_scale"]) and set(
        config["latent_scale"]
    ) != {1.0}
    x = stack(2, 16, 16)
    with torch.no_grad():
        assert torch.equal(vae(x)[0], run.vae(x)[0])
    rows = list(csv.DictReader(open(run.out / "vae_scores.csv", encoding="utf-8")))
    assert [row["method"] for row in rows] == ["vae", "linear", "mean_4", "mean_8"] and float(
        rows[0]["psnr"]
    ) == pytest.approx(run.board.mean("vae", "psnr"))
    assert (
        run.board.mean("linear", "psnr")
        > run.board.mean("mean_4", "psnr")
        > run.board.mean("mean_8", "psnr")
        and "baseline, linear" in run.board.verdict()
    )
    assert {"absolute", "squared", "structure", "kl", "discriminator", "adversary"} <= set(
        run.history[-1]
    )
    with pytest.raises(WeightsError, match="'slice_vae', but 'drr2ct'"):
        from ct_nb.drr2ct.predict import load_drr2ct

        load_drr2ct(run.out)
    # two sides where an archive does not say more
    assert (
        config["test"] == config["validation"]
        and run.test is run.validation
        and config["left_out"] == []
    )


def test_perceptual_weights_join_the_loss(run, tmp_path):
    class Distance:
        def images(self, a, b):
            return (a - b).abs().mean((1, 2, 3))

    batch = collate_crops([run.crops()[0]])
    plain, with_it = (
        VAELearner(run.vae, run.settings, perceptual=distance)(batch, 0)
        for distance in (None, Distance())
    )
    assert with_it[0] > plain[0] and with_it[1]["perceptual"] > 0
    (tmp_path / "none").write_text("no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        VAERun("micro", out=tmp_path, perceptual=str(tmp_path / "none"), steps=1).open().fit(
            progress=False
        )


def test_presets_are_whole():
    for preset in VAE_PRESETS.values():
        assert (
            preset.network.latent_channels == 4
            and preset.loss.absolute
            and preset.loss.squared
            and preset.loss.structure
            and preset.loss.kl
            and preset.loss.adversary
        )
        assert 8 * max(preset.network.decoder_halo, preset.network.encoder_halo) < 512


# bad input


def test_bad_input_gets_a_sentence(chest, tmp_path):
    vae = drawn()
    bad = [
        (lambda: vae.encode(1000 * chest), "x: slices must be in network range"),
        (lambda: vae.encode(chest * torch.nan), "x: slices must be in network range"),
        (lambda: vae.encode(chest[0]), "x: slices must be a float tensor"),
        (lambda: vae.encode(chest[:, :, :0]), "x: slices must be a float tensor"),
        (
            lambda: vae.encode(torch.ones(1, 1, 2, 8, 8, dtype=torch.int16)),
            "x: slices must be a float tensor",
        ),
        (lambda: vae.decode(torch.zeros(1, 3, 2, 2, 2)), "z: latents must be"),
        (
            lambda: vae.decode(torch.zeros(1, 4, 2, 2, 2), (8, 16)),
            "size: 2×2 latents are 9 to 16 rows",
        ),
        (lambda: decode_tiled(vae, torch.zeros(1, 4, 2, 2, 2), (17, 16)), "size: 2×2 latents"),
        (lambda: encode_tiled(vae, chest[0]), "x: slices must be"),
        (lambda: SliceVAEConfig(fold=3), "fold: must be 1, 2, 4 or 8"),
        (lambda: SliceVAEConfig(fold=2, channels=(8, 8)), "channels: a fold of 2 needs 3 numbers"),
        (lambda: SliceVAEConfig(blocks=0), "blocks: must be at least 1"),
        (lambda: SliceVAEConfig(window="brain"), "window: there is none named"),
        (lambda: SliceVAEConfig.preset("huge"), "preset: must be one of"),
        (lambda: SliceVAEConfig.from_dict({"colour": 1}), "unknown settings colour"),
        (lambda: LinearAutoencoder(4).fit([]), "crops: is empty"),
        (lambda: LinearAutoencoder(4).fit([torch.zeros(1, 1, 1, 16, 16)]), "do not vary"),
        (
            lambda: slice_ssim(torch.zeros(2, 9, 20), torch.zeros(2, 9, 20), WINDOWS["chest"]),
            "at least 11×11 pixels",
        ),
        (
            lambda: replace(VAE_PRESETS["smoke"], crop=(2, 32, 32)),
            "crop: a discriminator of 2 layers needs 4",
        ),
        (lambda: VAERun("huge"), "preset: must be one of"),
        (lambda: VAERun("smoke", str(tmp_path / "none")).open(), "data: "),
    ]
    for call, sentence in bad:
        with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
            call()
