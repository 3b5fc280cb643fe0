"""The CT encoder: shapes, label maps, input checks, position embeddings and configuration."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import REAL_CT
from refusals import refused

import ct_nb.ct_encoder.encoder as module
from ct_nb.ct_encoder.encoder import (
    CTEncoder,
    CTEncoderConfig,
    EncoderBlock,
    FeaturePyramid,
    Positions,
    body_box,
    patch_embedding,
    prepare_scan,
)
from ct_nb.data.hounsfield import CTReadError
from ct_nb.data.read import read_ct
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Grid, Volume

SMOKE = CTEncoderConfig.preset("smoke")
REAL = REAL_CT


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(config=SMOKE, **settings):
    torch.manual_seed(0)
    return CTEncoder(config, **settings)


def inputs(batch=2, size=SMOKE.size, seed=0):
    labels = torch.randint(
        0, 21, (batch, *(n // 4 for n in size)), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    return 400 * random(seed, batch, *size), labels.repeat_interleave(4, 1).repeat_interleave(
        4, 2
    ).repeat_interleave(4, 3)


# shapes


@pytest.mark.parametrize("size", [(16, 32, 32), (4, 8, 8), (20, 48, 16), (4, 40, 24)])
def test_any_size_that_the_patch_divides(size):
    hu, labels = inputs(size=size)
    grid = tuple(n // p for n, p in zip(size, SMOKE.patch))
    n = int(np.prod(grid))
    said = seeded().eval()(hu, labels)
    assert (
        said.grid == grid
        and said.tokens.shape == (2, n, 32)
        and said.step_embeddings.shape == (2, n, 32)
        and said.overlaps.shape == (2, n, 22)
    )
    assert (
        said.scan_features.shape == (2, 32) == said.global_embedding.shape
        and said.region_features.shape == (2, 21, 32) == said.region_embeddings.shape
    )
    assert [m.shape[2:] for m in said.pyramid] == [
        grid,
        (grid[0], -(-grid[1] // 2), -(-grid[2] // 2)),
    ]
    assert all(torch.isfinite(t).all() for t in said if torch.is_tensor(t))


def test_the_designs_size_by_shape():
    with torch.device("meta"):
        model = CTEncoder(embed_dim=768, depth=12, num_heads=12, num_regions=20, patch=(4, 16, 16))
        said = model(torch.empty(1, 64, 512, 512))
    assert (
        said.tokens.shape == (1, 16384, 768)
        and said.grid == (16, 32, 32)
        and model.layers == [3, 6, 9, 12]
        and model.config == CTEncoderConfig()
    )
    assert [tuple(m.shape[2:]) for m in said.pyramid] == [
        (16, 32, 32),
        (16, 16, 16),
        (16, 8, 8),
        (16, 4, 4),
    ]
    assert all(
        block.slices.table.shape == (12, 32) and block.slices.weight == 0.5
        for block in model.blocks
    )
    assert 1.0e8 < sum(p.numel() for p in model.parameters()) < 1.4e8


def test_config_or_settings():
    assert (
        CTEncoder(SMOKE, depth=3).config == replace(SMOKE, depth=3)
        and len(CTEncoder(SMOKE, depth=3).blocks) == 3
    )


# the order of a block


def test_a_block_in_the_designs_order():
    torch.manual_seed(0)
    block = EncoderBlock(8, 2).double()
    x = random(0, 1, 12, 8).double()
    table = random(1, 4, 8).double()
    overlaps = random(2, 1, 12, 4).softmax(-1).double()
    a = x + block.scale[0] * block.slices(block.norms[0](x), 3)
    b = a + block.scale[1] * block.regions(block.norms[1](a), table, overlaps)
    c = b + block.scale[2] * block.narrow(F.gelu(block.wide(block.norms[2](b))))
    assert torch.allclose(block(x, 3, table, overlaps), c)
    # the other order is another network
    a = x + block.scale[1] * block.regions(block.norms[1](x), table, overlaps)
    b = a + block.scale[0] * block.slices(block.norms[0](a), 3)
    assert not torch.allclose(
        b + block.scale[2] * block.narrow(F.gelu(block.wide(block.norms[2](b)))), c
    )


# regions


def without_contents(model):
    "The same, told nothing but by patches."
    for layer in (model.contents.out, model.loudest):
        layer.weight.data.zero_()
    return model


def test_regions_hear_what_they_hold():
    """What a region holds is added to what its patches say, and the whole hears each channel of the
    regions' embeddings where it is largest; of nothing but background it hears nothing.
    """
    hu, labels = inputs()
    model = seeded().eval()
    model.measure([(hu, labels)])
    with torch.no_grad():
        told = model(hu, labels)
        untold = without_contents(seeded().eval())(hu, labels)
    held = model.contents(hu, labels, SMOKE.spacing_mm)
    assert torch.equal(told.tokens, untold.tokens) and torch.allclose(
        told.region_features - untold.region_features, held[:, 2:], atol=1e-5
    )
    largest = torch.stack([told.region_embeddings[b, told.present[b]].amax(0) for b in range(2)])
    assert torch.allclose(
        told.scan_features - untold.scan_features, held[:, 0] + model.loudest(largest), atol=1e-5
    )
    assert model.contents.usual[1 + SMOKE.body].any() and model.contents.usual[2].any()
    with torch.no_grad():
        assert torch.isfinite(model(hu, torch.zeros_like(labels)).global_embedding).all()


def test_without_a_map_there_is_one_region():
    hu, labels = inputs()
    model = without_contents(seeded().eval())
    with torch.no_grad():
        alone = model(hu)
        filled = model(hu, torch.full_like(labels, SMOKE.body))
        mixed = model(hu, torch.cat([labels[:1], torch.full_like(labels[:1], SMOKE.body)]))
    assert (
        alone.present.sum(1).tolist() == [1, 1]
        and alone.present[:, 20].all()
        and torch.equal(alone.tokens, filled.tokens)
    )
    assert (
        torch.allclose(alone.region_features[:, 20], alone.scan_features, atol=1e-5)
        and (alone.region_features[:, :20] == 0).all()
    )
    assert torch.allclose(mixed.tokens[1], alone.tokens[1], atol=1e-5) and not torch.allclose(
        mixed.tokens[0], alone.tokens[0], atol=1e-2
    )


def test_regions_stand_at_their_number():
    hu, labels = inputs()
    labels[0, 0, 0, 0] = 7
    model = without_contents(seeded().eval())
    model.pooling.loud.weight.data.zero_()  # as untrained: the mean over the region
    said = model(hu, torch.where(labels == 4, 0, labels).to(torch.uint8))
    for b in range(2):
        assert said.present[b].nonzero()[:, 0].tolist() == [
            n - 1 for n in sorted(set(labels[b].flatten().tolist()) - {0, 4})
        ]
    weights = said.overlaps[0, :, 7]
    assert torch.allclose(
        said.region_features[0, 6],
        (weights[:, None] * said.tokens[0]).sum(0) / weights.sum(),
        atol=1e-5,
    )
    assert torch.allclose(said.scan_features, said.tokens.mean(1), atol=1e-5)


def test_a_scan_does_not_hear_another_of_its_batch():
    hu, labels = inputs()
    model = seeded().eval()
    with torch.no_grad():
        assert torch.allclose(
            model(hu, labels).global_embedding[1:],
            model(hu[1:], labels[1:]).global_embedding,
            atol=1e-5,
        )


def test_the_ablation_is_another_network():
    hu, labels = inputs()
    with torch.no_grad():
        assert not torch.allclose(
            seeded().eval()(hu, labels).scan_features,
            seeded(region_form="multiplicative").eval()(hu, labels).scan_features,
            atol=1e-3,
        )


# window


def test_the_window_is_the_encoders():
    hu, labels = inputs()
    model = seeded().eval()
    hu = hu * 10
    with torch.no_grad():
        assert torch.equal(
            model(hu).scan_features, model(hu.clamp(-1024, 1024)).scan_features
        ) and not torch.equal(
            model(hu).scan_features, seeded(window="lung").eval()(hu).scan_features
        )


# positions


def test_positions_are_a_sum_of_three_curves():
    torch.manual_seed(0)
    positions = Positions(6, (3, 4, 5))
    p = positions(torch.zeros(1, 6, 3, 4, 5))[0]
    assert torch.allclose(
        p[:, 1, 2, 3], sum(c[:, i] for c, i in zip(positions.curves, (1, 2, 3)))
    ) and [tuple(c.shape) for c in positions.curves] == [(6, 3), (6, 4), (6, 5)]
    # every place is its own, axes do not get mixed up
    assert p.flatten(1).unique(dim=1).shape[1] == 60


@pytest.mark.parametrize("grid", [(6, 8, 10), (3, 2, 7), (1, 1, 1)])
def test_positions_at_other_sizes(grid):
    torch.manual_seed(0)
    positions = Positions(4, (3, 4, 5))
    ramp = [torch.arange(n).float().add(0.5).div(n) for n in (3, 4, 5)]
    with torch.no_grad():
        for curve, values in zip(positions.curves, ramp):
            curve.copy_(values)
        p = positions(torch.zeros(1, 4, *grid))[0, 0]
    # a ramp over the box stays that ramp but for the half voxels at its ends
    for axis, n in enumerate(grid):
        inner = ((torch.arange(n) + 0.5) / n).clamp(ramp[axis][0], ramp[axis][-1])
        others = tuple(a for a in range(3) if a != axis)
        assert torch.allclose(p.mean(others) - p.mean(), inner - inner.mean(), atol=1e-5)


# pyramid


def test_the_pyramid_joins_layers_top_down():
    torch.manual_seed(0)
    pyramid = FeaturePyramid(8, 6, 3).double()
    layers = [random(s, 1, 2 * 5 * 4, 8).double() for s in range(3)]
    entered = [
        enter(norm(x)).mT.view(1, 6, 2, 5, 4)
        for x, norm, enter in zip(layers, pyramid.norms, pyramid.enter)
    ]
    two = F.adaptive_avg_pool3d(entered[2], (2, 2, 1))
    one = F.adaptive_avg_pool3d(entered[1], (2, 3, 2))
    zero = entered[0]
    one = one + F.interpolate(two, size=(2, 3, 2))
    zero = zero + F.interpolate(one, size=(2, 5, 4))
    for found, expected in zip(pyramid(layers, (2, 5, 4)), (pyramid.smooth(zero), one, two)):
        assert torch.allclose(found, expected)
    changed = [layers[0], layers[1], layers[2] + random(9, 1, 40, 8).double()]
    assert all(
        not torch.allclose(a, b)
        for a, b in zip(pyramid(layers, (2, 5, 4)), pyramid(changed, (2, 5, 4)))
    )


# gradients, memory, precision


def loss_of(said):
    return (
        said.global_embedding.square().mean()
        + said.region_embeddings.square().mean()
        + said.step_embeddings.square().mean()
    )


def test_recomputing_changes_nothing_but_memory():
    hu, labels = inputs()
    found, kept = [], []
    for recompute in (False, True):
        model, numbers = seeded(recompute=recompute), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: numbers.append(t.numel()) or t, lambda t: t
        ):
            loss = loss_of(model(hu, labels))
        loss.backward()
        found.append([p.grad for p in model.parameters()]), kept.append(sum(numbers))
    assert (
        all(a is not None and torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))
        and kept[1] < 0.6 * kept[0]
    )
    # keys move once questions have
    assert all(
        g.abs().sum() > 0
        for g, (name, _) in zip(found[0], seeded().named_parameters())
        if not name.startswith("pooling.key")
    )


def test_the_same_seed_gives_the_same_bits():
    hu, labels = inputs()
    results = []
    for _ in range(2):
        model = seeded()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(hu, labels)).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_autocast():
    hu, labels = inputs()
    model = seeded()
    with torch.autocast("cpu", torch.bfloat16):
        said = model(hu, labels)
    loss_of(said).float().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (
        F.cosine_similarity(said.global_embedding.float(), model(hu, labels).global_embedding).min()
        > 0.99
    )


# configuration and weights


def test_config_round_trip_and_weights(tmp_path):
    import json

    from ct_nb.training.checkpoints import load_weights, save_weights

    model = seeded(window="lung").eval()
    save_weights(tmp_path, model, {"system": "ct_encoder", "network": model.config.to_dict()})
    config = CTEncoderConfig.from_dict(
        json.loads((tmp_path / "config.json").read_text())["network"]
    )
    assert config == model.config and config.window == "lung" and hash(config) == hash(model.config)
    torch.manual_seed(1)
    other = CTEncoder(config).eval()
    load_weights(tmp_path, other)
    hu, labels = inputs()
    with torch.no_grad():
        assert torch.equal(other(hu, labels).global_embedding, model(hu, labels).global_embedding)


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
def test_presets(name):
    config = CTEncoderConfig.preset(name)
    assert np.allclose(np.multiply(config.spacing_mm, config.size), config.side_mm)
    with torch.device("meta"):
        said = CTEncoder(config)(torch.empty(1, *config.size))
    assert said.tokens.shape[1] == np.prod(config.grid)


@pytest.mark.parametrize(
    "settings, argument",
    [
        (dict(size=(16, 30, 32)), "size"),
        (dict(size=(16, 32)), "size"),
        (dict(patch=(0, 8, 8)), "patch"),
        (dict(num_heads=3), "num_heads"),
        (dict(window="brain"), "window"),
        (dict(region_form="sum"), "region_form"),
        (dict(pyramid_levels=3), "pyramid_levels"),
        (dict(num_regions=0), "num_regions"),
    ],
)
def test_config_refuses(settings, argument):
    with refused(argument):
        replace(SMOKE, **settings)


def test_unknown_names_are_refused():
    with refused("preset"):
        CTEncoderConfig.preset("large")
    with pytest.raises(ValueError, match="unknown settings colour"):
        CTEncoderConfig.from_dict({"colour": 1})


# what the encoder refuses


@pytest.mark.parametrize(
    "change, argument",
    [
        (lambda hu, r: (hu[0], None), "hu"),
        (lambda hu, r: (hu[0, 0], None), "hu"),
        (lambda hu, r: (hu[:, None], None), "hu"),
        (lambda hu, r: (hu[:, :, :28], None), "hu"),
        (lambda hu, r: (hu[:, :0], None), "hu"),
        (lambda hu, r: (hu.short(), None), "hu"),
        (lambda hu, r: (hu, r[:, :8]), "regions"),
        (lambda hu, r: (hu, r[0]), "regions"),
        (lambda hu, r: (hu, r + 9), "regions"),
        (lambda hu, r: (hu, r.float()), "regions"),
        (lambda hu, r: (hu.clamp(-1, 1), None), "hu"),
        (lambda hu, r: (hu.index_fill(1, torch.tensor(3), torch.nan), None), "hu"),
    ],
)
def test_refused_input(change, argument):
    hu, labels = inputs()
    labels[0, 0, 0, 0], labels[0, 0, 0, 1] = 0, 20
    with refused(argument) as problem:
        seeded()(*change(hu, labels))
    assert "\n" not in str(problem.value)


# scans

SCAN = phantom(3, 40)


def test_prepare_is_the_box_about_the_body():
    hu, grid = prepare_scan(SCAN.volume, SMOKE)
    assert (
        hu.shape == SMOKE.size
        and hu.dtype == torch.float32
        and grid.shape == SMOKE.size
        and np.allclose(grid.extent_mm, 320)
    )
    assert np.abs(grid.center_mm - SCAN.volume.body_center_mm).max() <= 1 and hu.min() >= -1000.01
    moved = Volume(SCAN.volume.hu, Grid.cube(40, center_mm=(60, -40, 500)).affine)
    again, there = prepare_scan(moved, SMOKE)
    assert np.allclose(there.center_mm - grid.center_mm, (60, -40, 500)) and torch.allclose(
        again, hu, atol=1e-2
    )


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda v: Volume(v.hu - 1024, v.affine), "rescaled twice"),
        (lambda v: Volume(v.window("chest"), v.affine), "not in HU"),
        (lambda v: Volume((v.hu + 1024) / 8, v.affine), "picture|not in HU"),
        (lambda v: Volume(v.hu, np.diag([0.1, 0.1, 0.1, 1]) @ v.affine), "not in mm"),
        (lambda v: Volume(v.hu, np.diag([10, 10, 10, 1]) @ v.affine), "not in mm"),
        (lambda v: Volume(v.hu, np.diag([3.5, 3.5, 0.3, 1]) @ v.affine), "mm wide, a patient"),
        (lambda v: Volume(v.hu, np.diag([0.2, 0.2, 1, 1]) @ v.affine), "no body in it|mm wide"),
    ],
)
def test_a_scan_that_is_not_what_it_seems(spoil, words):
    with pytest.raises(CTReadError, match=words) as problem:
        prepare_scan(spoil(SCAN.volume), SMOKE, "scan.nii.gz")
    assert str(problem.value).startswith("scan.nii.gz: ") and "\n" not in str(problem.value)


def test_the_check_is_what_refuses(monkeypatch):
    """A scan 400 HU too dense still has its body where it was: nothing but the check stands in its
    way.
    """
    dense = Volume(SCAN.volume.hu + 400, SCAN.volume.affine)
    with pytest.raises(CTReadError, match="not in HU"):
        body_box(dense)
    monkeypatch.setattr(module, "check_hounsfield", lambda *a: None)
    assert np.allclose(body_box(dense), body_box(SCAN.volume), atol=10)


@pytest.mark.parametrize("name", ["cip-ct64", "lungdx-A0002", "ctfm-s0335"])
def test_real_scans_pass(name):
    path = REAL / f"{name}.nii.gz"
    if not path.is_file():
        pytest.skip("the real scans are not here")
    hu, grid = prepare_scan(read_ct(path), SMOKE)
    with torch.no_grad():
        said = seeded().eval()(hu[None])
    assert (
        torch.isfinite(said.global_embedding).all()
        and -1000.01 <= hu.min() < -900
        and hu.max() > 100
    )


@pytest.mark.parametrize(
    "patch, steps", [((4, 16, 16), 3), ((4, 8, 8), 2), ((2, 2, 2), 0), ((1, 3, 5), 0)]
)
def test_a_stem_ends_in_the_same_patches(patch, steps):
    size = tuple(2 * p for p in patch)
    for stem in (0, 4):
        tokens = patch_embedding(patch, 8, stem)
        assert tokens(torch.randn(1, 1, *size)).shape == (1, 8, 2, 2, 2) and len(
            [m for m in tokens if isinstance(m, torch.nn.GELU)]
        ) == (steps if stem else 0)
    straight = patch_embedding(patch, 8)
    bent = patch_embedding(patch, 8, 4)
    x, y = torch.randn(2, 1, 1, *size)

    def additive(f):
        return torch.allclose(f(x + y) + f(0 * x), f(x) + f(y), atol=1e-4)

    with torch.no_grad():
        assert additive(straight) and additive(bent) == (steps == 0)
