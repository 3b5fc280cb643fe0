"""The refiner: identity when untrained, its bound, geometry, patches, size, invalid arguments."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.layers.tiling import tile_starts
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import rotate
from ct_nb.physics.projector import project
from ct_nb.physics.volume import WINDOWS, Grid, hu_to_mu
from ct_nb.refine import network as refiner_module
from ct_nb.refine.network import INPUT_CHANNELS, Refiner, RefinerConfig

SMOKE = RefinerConfig.preset("smoke")


def scene(seeds=(1, 2), size=16):
    hu = torch.stack([phantom(seed, size).volume.tensor() for seed in seeds])
    soft = F.avg_pool3d(F.pad(hu[:, None], (1,) * 6, mode="replicate"), 3, 1)[:, 0]
    geometry = ConeBeam.stack(
        [ConeBeam.biplanar(grid=Grid.cube(size), detector_shape=(32, 32), pixel_mm=16.0)] * len(hu)
    ).to(torch.float32)
    return hu, soft, project(hu_to_mu(hu), geometry), geometry


@pytest.fixture(scope="module")
def chests():
    return scene()


def fresh(config=SMOKE, seed=0):
    torch.manual_seed(seed)
    return Refiner(config).eval()


def opened(config=SMOKE, last=0.5, attention=0.1):
    "A refiner without zero weights in its last layer and attention, as after training."
    net = fresh(config)
    with torch.no_grad():
        torch.nn.init.normal_(net.last.weight, std=last)
        for part in net.sharpen:
            torch.nn.init.normal_(part[0].write.weight, std=attention) if attention else None
    return net


@pytest.mark.parametrize(
    "config", [SMOKE, replace(SMOKE, patch=8), RefinerConfig(size=16, channels=(4, 6, 8), blocks=2)]
)
def test_untrained_is_the_input_bit_for_bit(chests, config):
    _, soft, xrays, geometry = chests
    wild = soft.clone()
    wild[0, 3, 3, 3] = 3000.0
    wild[1, 5, 5, 5] = -2000.0
    wild[0, 0, 0, 0] = -0.0
    with torch.no_grad():
        net = fresh(config)
        assert torch.equal(net(wild, xrays, geometry), wild)
        net.last.bias[0] = 0.1  # the smallest opening is a change
        assert not torch.equal(net(wild, xrays, geometry), wild)


def test_learns_and_does_not_jump(chests):
    """Without the scale of the last layer the first steps were hundreds of HU, the gates closed,
    and the loss stayed where it began.
    """
    truth, soft, xrays, geometry = chests
    for seed in (0, 1):
        net, losses = fresh(seed=seed).train(), []
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(25):
            loss = (net(soft, xrays, geometry) - truth).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert max(losses) < 1.1 * losses[0] and losses[-1] < 0.93 * losses[0]


def test_untrained_can_start(chests):
    truth, soft, xrays, geometry = chests
    net = fresh().train()
    (net(soft, xrays, geometry) - truth).abs().mean().backward()
    assert net.last.weight.grad[0].abs().max() > 0
    with torch.no_grad():
        torch.nn.init.normal_(net.last.weight, std=0.5)
    net.zero_grad()
    (net(soft, xrays, geometry) - truth).abs().mean().backward()
    silent = [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    # behind a layer that starts at zero
    assert all(
        "sharpen" in name and ("read" in name or "query_key_value" in name) for name in silent
    ), silent


def test_a_constant_offset_of_the_channels_has_no_effect(chests):
    truth, soft, xrays, geometry = chests
    plain, shifted = opened(), opened()
    with torch.no_grad():
        shifted.prior.last.bias += 5.0  # of every cue
        before = [net.residual(net.inputs(soft, xrays, geometry)) for net in (plain, shifted)]
        for net in (plain, shifted):
            net.centre(
                (soft[i : i + 1], xrays[i : i + 1], geometry[i : i + 1]) for i in range(len(soft))
            )
        after = [net.residual(net.inputs(soft, xrays, geometry)) for net in (plain, shifted)]
        assert (plain.inputs(soft, xrays, geometry) - plain.seen_mean).mean(
            (0, 2, 3, 4)
        ).abs().max() < 1e-4
        assert (before[0] - before[1]).abs().max() > 5 and torch.allclose(*after, atol=0.05)  # HU
        net = fresh()
        net.centre([(soft, xrays, geometry)])
        assert torch.equal(net(soft, xrays, geometry), soft) and "seen_mean" in net.state_dict()


@pytest.mark.parametrize("limit", [20.0, 800.0])
def test_bound(chests, limit):
    _, soft, xrays, geometry = chests
    net = opened(replace(SMOKE, limit_hu=limit), last=150.0)
    with torch.no_grad():
        change = (net(soft, xrays, geometry) - soft).abs().max().item()
    assert 0.8 * limit < change <= limit + 1e-3


def test_the_output_depends_on_scale_and_pose_of_the_xrays(chests):
    truth, soft, xrays, geometry = chests
    net = opened()
    with torch.no_grad():
        own = net(soft, xrays, geometry)
        for other in (
            net(soft, xrays.flip(0), geometry),
            net(soft, 1.1 * xrays, geometry),
            net(soft, xrays, rotate(geometry, [0.0, 0.0, 15.0])),
        ):
            assert (other - own).abs().mean() > 0.5
        step, dense_step = (
            net.inputs(hu, xrays, geometry)[:, 2].abs().mean()
            for hu in (truth, 1.1 * (truth + 1000) - 1000)
        )
        assert step < 0.01 * dense_step and dense_step > 0.05
        wrong_energy = fresh(replace(SMOKE, energy_kev=100.0))
        assert wrong_energy.inputs(truth, xrays, geometry)[:, 2].abs().mean() > 0.05
        assert torch.allclose(net(soft[:1], xrays[:1], geometry[0]), own[:1], atol=0.05)
        three = geometry.select([0, 1, 0])
        assert net(soft, xrays[:, [0, 1, 0]], three).shape == soft.shape


def test_agreement_with_the_x_rays_is_in_hu(chests):
    "For a uniform excess of 30 HU the step of SIRT is about −30 HU where two views pass."
    truth, _, xrays, geometry = chests
    with torch.no_grad():
        step = (
            fresh().inputs(truth.clamp_min(-1000) + 30, xrays, geometry)[0, 2, 6:10, 6:10, 6:10]
            * 100
        )
    assert -33 < step.mean() < -27


class Convolutions(Refiner):
    "Reaches two voxels."

    def residual(self, inputs):
        return 300 * torch.tanh(self.last(self.enter(inputs)))[:, :1]


class Attends(Refiner):
    def residual(self, inputs):
        return 300 * torch.tanh(self.last(self.sharpen[0][0](self.enter(inputs))))[:, :1]


def test_patches_are_the_whole_for_convolutions_and_not_for_frequency_attention():
    _, soft, xrays, geometry = scene([4], 32)
    config = replace(RefinerConfig.preset("smoke", 32), patch=16, overlap=8)
    difference = {}
    for kind in (Convolutions, Attends):
        torch.manual_seed(0)
        net = kind(config).eval()
        torch.nn.init.normal_(net.last.weight, std=0.02)
        for part in net.sharpen:
            torch.nn.init.normal_(part[0].write.weight, std=0.2)
        with torch.no_grad():
            pieces = net(soft, xrays, geometry)
            net.config = replace(config, patch=None, overlap=None)
            difference[kind] = (pieces - net(soft, xrays, geometry)).abs().max().item()
        net.config = replace(config, overlap=2)  # shallower than the convolutions reach
        if kind is Convolutions:
            with torch.no_grad():
                pieces = net(soft, xrays, geometry)
            net.config = replace(config, patch=None, overlap=None)
            with torch.no_grad():
                assert (pieces - net(soft, xrays, geometry)).abs().max() > 0.1
    assert difference[Convolutions] < 0.01 < difference[Attends]


def test_patches_of_the_whole_network_leave_no_seams(monkeypatch):
    """At the ends of blended patches, neighbouring planes differ as in the untiled volume; without
    blending they differ more. No weight of the network is zero.
    """
    size = 48
    config = RefinerConfig(
        size=48, channels=(4, 6, 8), prior_features=2, hidden=8, patch=24, overlap=8
    )
    net = opened(config)
    generator = torch.Generator().manual_seed(0)
    inputs = sum(
        weight
        * F.interpolate(
            torch.randn(1, INPUT_CHANNELS, *(size // coarse,) * 3, generator=generator),
            size=(size,) * 3,
            mode="trilinear",
        )
        for coarse, weight in ((1, 0.3), (4, 0.6), (12, 1.0))
    )
    monkeypatch.setattr(net, "inputs", lambda *arguments: inputs)
    monkeypatch.setattr(net, "check_inputs", lambda *arguments: None)

    def residual():
        return net(torch.zeros(1, size, size, size), None, None)[0]

    starts = tile_starts(size, config.patch, config.shared)
    ends = sorted({end for start in starts for end in (start, start + config.patch)} - {0, size})

    def steps(volume):
        return torch.stack(
            [
                volume.diff(dim=axis)
                .abs()
                .transpose(0, axis)
                .flatten(1)
                .mean(1)[[end - 1 for end in ends]]
                .mean()
                for axis in range(3)
            ]
        )

    def cut(predict, size, patch, *_):
        volume = torch.zeros(1, 1, size, size, size)
        for z in starts:
            for y in starts:
                for x in starts:
                    region = (..., slice(z, z + patch), slice(y, y + patch), slice(x, x + patch))
                    volume[region] = predict(z, y, x, patch)
        return volume

    with torch.no_grad():
        tiled = steps(residual())
        monkeypatch.setattr(refiner_module, "blend_tiles", cut)
        hard = steps(residual())
        net.config = replace(config, patch=None, overlap=None)
        untiled = steps(residual())
    assert (tiled < 1.03 * untiled).all(), (tiled / untiled).tolist()
    assert (hard > 1.05 * untiled).any(), (hard / untiled).tolist()


def test_the_inputs_of_a_patch_are_those_of_the_whole_volume_there():
    _, soft, xrays, geometry = scene([4], 32)
    net = opened(replace(RefinerConfig.preset("smoke", 32), patch=16))
    with torch.no_grad():
        whole = net.inputs(soft, xrays, geometry)
        corner = (16, 8, 0)
        assert torch.allclose(
            net.inputs(soft, xrays, geometry, corner), whole[..., 16:32, 8:24, :16], atol=1e-4
        )
        assert not torch.allclose(
            net.inputs(soft, xrays, geometry, (8, 8, 0)), whole[..., 16:32, 8:24, :16], atol=1e-2
        )
        assert torch.equal(
            net(soft, xrays, geometry, corner=corner),
            soft[..., 16:32, 8:24, :16]
            + net.residual(net.inputs(soft, xrays, geometry, corner))[:, 0],
        )


def test_paper_has_about_five_million_parameters():
    count = sum(p.numel() for p in Refiner(RefinerConfig.preset("paper")).parameters())
    assert 4.5e6 < count < 5.6e6


def test_config_travels():
    for name, size in (("smoke", None), ("cpu", 64), ("gpu", 128), ("paper", 256)):
        config = RefinerConfig.preset(name, size)
        assert RefinerConfig.from_dict(config.to_dict()) == config and (config.patch == 64) == (
            config.size > 64
        )
    with pytest.raises(ValueError, match="unknown settings colour"):
        RefinerConfig.from_dict({"colour": 1})


def test_deterministic(chests):
    _, soft, xrays, geometry = chests
    with torch.no_grad():
        assert torch.equal(opened()(soft, xrays, geometry), opened()(soft, xrays, geometry))


@pytest.mark.parametrize(
    "argument, call",
    [
        ("coarse_hu", lambda n, c, x, g: n(c[..., :8], x, g)),
        ("coarse_hu", lambda n, c, x, g: n(c * torch.nan, x, g)),
        ("coarse_hu", lambda n, c, x, g: n(WINDOWS["chest"].to_network(c), x, g)),
        ("window", lambda n, c, x, g: n(c, x, g, window="soft_tissue")),
        ("energy_kev", lambda n, c, x, g: n(c, x, g, energy_kev=80.0)),
        ("xrays", lambda n, c, x, g: n(c, None, g)),
        ("geometry", lambda n, c, x, g: n(c, x, None)),
        ("xrays", lambda n, c, x, g: n(c, x[:1], g)),
        ("xrays", lambda n, c, x, g: n(c, x * torch.inf, g)),
        ("xrays", lambda n, c, x, g: n(c, x, g.select([0]))),
        ("corner", lambda n, c, x, g: n(c, x, g, corner=(0, 0, 0))),
        ("patch", lambda n, c, x, g: replace(SMOKE, patch=16)),
        ("overlap", lambda n, c, x, g: RefinerConfig(size=72, patch=32, overlap=8)),
        ("size", lambda n, c, x, g: RefinerConfig(size=62)),
        ("channels", lambda n, c, x, g: replace(SMOKE, channels=(6,))),
        ("blocks", lambda n, c, x, g: replace(SMOKE, blocks=0)),
        ("limit_hu", lambda n, c, x, g: replace(SMOKE, limit_hu=0.0)),
        ("window", lambda n, c, x, g: replace(SMOKE, window="liver")),
        ("preset", lambda n, c, x, g: RefinerConfig.preset("huge")),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(chests, argument, call):
    _, soft, xrays, geometry = chests
    with refused(argument) as caught:
        call(fresh(), soft, xrays, geometry)
    assert "\n" not in str(caught.value)
