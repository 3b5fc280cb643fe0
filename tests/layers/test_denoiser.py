"""The denoiser of the diffusion models: conditions, patches, configurations and refusals."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layers_inputs import beams, random, seeded
from refusals import refused

import ct_nb.layers.denoiser as denoiser_module
import ct_nb.layers.depth_prior as depth_prior_module
import ct_nb.layers.embeddings as embeddings_module
from ct_nb.layers.blocks import ResidualBlock
from ct_nb.layers.denoiser import Conditioning, Denoiser, DenoiserConfig
from ct_nb.layers.depth_prior import DEPTH_PRIOR_CHANNELS, DepthPrior
from ct_nb.layers.embeddings import token_grid
from ct_nb.layers.relative_bias import TokenBlock

SMOKE = DenoiserConfig.preset("smoke", 16)


def listening(config=SMOKE):
    "A denoiser in which every path is open, as after training."
    net = seeded(Denoiser, config).eval()
    for block in net.modules():
        if isinstance(block, (ResidualBlock, TokenBlock)) and block.modulation is not None:
            torch.nn.init.normal_(block.modulation.weight, std=0.05)
    torch.nn.init.normal_(net.last.weight, std=0.1), torch.nn.init.normal_(
        net.finish.weight, std=0.05
    )
    return net


def token_sides(config, n):
    "Token grids that reach the transformer for a volume of n³ voxels."
    with torch.device("meta"):
        net, sides = Denoiser(config), []
        for block in net.tokens:
            block.register_forward_pre_hook(
                lambda block, inputs: sides.append(round(inputs[0].shape[1] ** (1 / 3)))
            )
        condition = Conditioning(
            torch.empty(1, DEPTH_PRIOR_CHANNELS, n, n, n),
            torch.empty(1, 32),
            None,
            torch.empty(1),
            torch.empty(1, 3),
        )
        assert net(torch.empty(1, 1, n, n, n), torch.empty(1), condition).shape == (1, 1, n, n, n)
    return set(sides)


def require_token_grids():
    assert [token_grid(size) for size in (64, 128, 256)] == [16, 24, 32]
    for size, side in ((16, 4), (32, 8), (64, 16), (128, 24), (256, 32)):
        assert token_sides(DenoiserConfig.preset("smoke", size), size) == {side}


def test_defect_06_token_grids(monkeypatch):
    """16, 24 and 32 tokens a side for 64, 128 and 256 voxels, in the table and in the network; 16
    or 32 for 128 is the defect.
    """
    require_token_grids()
    for wrong in (16, 32):
        monkeypatch.setitem(embeddings_module.TOKEN_GRIDS, 128, wrong)
        with pytest.raises((AssertionError, ValueError)):
            require_token_grids()


def test_patches_keep_the_pitch_of_the_tokens():
    for size, n, side in ((64, 32, 8), (128, 64, 12), (128, 16, 3), (256, 64, 8), (256, 128, 16)):
        assert token_sides(DenoiserConfig.preset("smoke", size), n) == {side}
    assert [DenoiserConfig.preset("smoke", size).patch_step for size in (16, 32, 64, 128, 256)] == [
        4,
        4,
        4,
        16,
        8,
    ]


def require_depth_prior():
    net = seeded(Denoiser, SMOKE)
    geometry = beams(2, 0.0, 90.0)
    xrays = 2 + random(0, 2, 2, 32, 32)
    entered = []
    net.enter.register_forward_pre_hook(lambda layer, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        condition = net.condition(xrays, geometry)
        x_t = random(1, 2, 1, 16, 16, 16)
        net(x_t, torch.full((2,), 0.5), condition)
    assert (
        condition.prior.shape == (2, 16, 16, 16, 16)
        and net.enter.in_channels == 17
        and entered[0].shape[1] == 17
    )
    assert torch.equal(entered[0][:, :1], x_t) and torch.equal(entered[0][:, 1:], condition.prior)
    # no channel repeats the others
    assert torch.linalg.matrix_rank(condition.prior.transpose(0, 1).flatten(1).double()) == 16
    return net, x_t, condition


def test_defect_11_depth_prior(monkeypatch):
    """16 channels of the prior are concatenated: 17 in all; collapsed to one, or one of
    them repeated, is the defect.
    """
    net, x_t, condition = require_depth_prior()
    for fewer in (condition.prior.mean(1, keepdim=True), condition.prior[:, :8]):
        with pytest.raises(ValueError, match="prior must be"):
            net(x_t, torch.full((2,), 0.5), condition._replace(prior=fewer))
    with monkeypatch.context() as patched:
        for module in (denoiser_module, depth_prior_module):
            patched.setattr(module, "DEPTH_PRIOR_CHANNELS", 1)
        with pytest.raises(AssertionError):
            require_depth_prior()
    forward = DepthPrior.forward
    monkeypatch.setattr(
        DepthPrior,
        "forward",
        lambda self, *inputs: forward(self, *inputs)
        .mean(1, keepdim=True)
        .expand(-1, 16, -1, -1, -1),
    )
    with pytest.raises(AssertionError):
        require_depth_prior()


def test_a_new_network_predicts_zero():
    net = seeded(Denoiser, SMOKE)
    with torch.no_grad():
        assert (
            net(
                random(0, 2, 1, 16, 16, 16),
                torch.tensor([0.0, 1.0]),
                net.condition(2 + random(1, 2, 2, 32, 32), beams(2, 0.0, 90.0)),
            )
            .abs()
            .max()
            == 0
        )


def test_no_condition_is_a_condition_that_is_not_present():
    net = listening(replace(SMOKE, condition_channels=2))
    x_t = random(0, 3, 1, 16, 16, 16)
    t = torch.tensor([0.2, 0.5, 1.0])
    with torch.no_grad():
        xrays = 2 + random(1, 3, 2, 32, 32)
        beam = beams(3, 0.0, 90.0)
        extra = random(2, 3, 2, 16, 16, 16)
        condition = net.condition(xrays, beam, 0 * extra)
        nothing, conditioned = net(x_t, t), net(x_t, t, condition)
        assert torch.equal(net(x_t, t, condition.dropped()), nothing) and torch.equal(
            net(x_t, t, condition.dropped(torch.zeros(3, dtype=torch.bool))), conditioned
        )
        some = net(x_t, t, condition.dropped(torch.tensor([False, True, False])))
        assert (
            torch.allclose(some[1], nothing[1], atol=1e-5)
            and torch.allclose(some[::2], conditioned[::2], atol=1e-5)
            and (nothing - conditioned).abs().amax((1, 2, 3, 4)).min() > 0.05
        )
        # the coarse volume remains, the X-rays do not
        dropped = net(x_t, t, net.condition(xrays, beam, extra).dropped())
        assert (
            torch.equal(dropped, net(x_t, t, net.condition(1.5 * xrays, beam, extra).dropped()))
            and (dropped - nothing).abs().amax((1, 2, 3, 4)).min() > 0.01
        )
        net.untold += 1.0  # the learned vector is what replaces the cameras
        assert not torch.allclose(net(x_t, t), nothing, atol=1e-3) and torch.equal(
            net(x_t, t, condition), conditioned
        )


def test_one_volume_does_not_change_another():
    net = listening()
    x_t = random(0, 3, 1, 16, 16, 16)
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        condition = net.condition(2 + random(1, 3, 2, 32, 32), beams(3, 0.0, 90.0))
        batch = net(x_t, t, condition)
        for n in range(3):
            alone = Conditioning(*(None if part is None else part[n : n + 1] for part in condition))
            assert torch.allclose(
                net(x_t[n : n + 1], t[n : n + 1], alone), batch[n : n + 1], atol=1e-5
            )
        assert torch.equal(net(x_t, t, condition), batch)
    # without gradients two volumes are computed at once
    single = Conditioning(*(None if part is None else part[:1] for part in condition))
    assert torch.allclose(net(x_t[:1], t[:1], single), batch[:1], atol=1e-5)


def test_coordinates_of_voxels_tokens_and_patches():
    net = seeded(Denoiser, SMOKE)
    origin = torch.zeros(1, 3)
    corner = torch.tensor([[4.0, 0.0, 8.0]])
    voxels = net._coordinates(origin, 16, 16)
    tokens = net._coordinates(origin, 16, 4)
    assert torch.allclose(voxels[0, 0], (torch.arange(16) + 0.5) / 8 - 1) and torch.allclose(
        tokens, voxels.unflatten(2, (4, 4)).mean(3)
    )
    for axis, start in enumerate((4, 0, 8)):
        assert torch.allclose(
            net._coordinates(corner, 8, 8)[0, axis], voxels[0, axis, start : start + 8]
        )


def test_patches_one_by_one_or_as_a_batch():
    net = listening(replace(SMOKE, condition_channels=1))
    xrays = 2 + random(0, 1, 2, 32, 32)
    geometry = beams(1, 0.0, 90.0)
    extra = random(1, 1, 1, 16, 16, 16)
    x_t = random(2, 2, 1, 8, 8, 8)
    corners = [(0, 8, 4), (4, 0, 8)]
    with torch.no_grad():
        condition = net.condition(xrays, geometry, extra)
        cuts = [condition.crop(*corner, 8) for corner in corners]
        t = torch.tensor([0.5])
        made = net.condition(xrays, geometry, extra, patch=(*corners[0], 8))
        for a, b in zip(cuts[0], made):
            assert torch.allclose(a, b, atol=1e-4)
        assert cuts[0].crop(4, 0, 0, 4).corner.tolist() == [[4, 8, 4]] and torch.equal(
            cuts[0].crop(4, 0, 0, 4).extra, extra[..., 4:8, 8:12, 4:8]
        )
        both = net(x_t, t.expand(2), Conditioning.joined(cuts))
        for n, cut in enumerate(cuts):
            assert torch.allclose(net(x_t[n : n + 1], t, cut), both[n : n + 1], atol=1e-5)


def test_recompute_changes_memory_and_nothing_else():
    gradients = []
    for recompute in (False, True):
        net = listening(replace(SMOKE, recompute=recompute))
        xrays = 2 + random(0, 1, 2, 32, 32)
        out = net(
            random(1, 1, 1, 16, 16, 16),
            torch.tensor([0.5]),
            net.condition(xrays, beams(1, 0.0, 90.0)),
        )
        out.square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(
        (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5))
        for a, b in zip(*gradients)
    )


def test_half_precision():
    """Under bf16 autocast, as the large presets train: the same output to its precision, and finite
    gradients.
    """
    net = listening()
    xrays = 2 + random(0, 2, 2, 32, 32)
    outputs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(
                net(
                    random(1, 2, 1, 16, 16, 16),
                    torch.tensor([0.3, 0.8]),
                    net.condition(xrays, beams(2, 0.0, 90.0)),
                ).float()
            )
    assert (outputs[0] - outputs[1]).square().mean().sqrt() < 0.03 * outputs[
        0
    ].square().mean().sqrt()
    outputs[1].square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_every_weight_learns():
    net = listening(replace(SMOKE, condition_channels=1))
    xrays = 2 + random(0, 2, 2, 32, 32)
    condition = net.condition(xrays, beams(2, 0.0, 90.0), random(1, 2, 1, 16, 16, 16)).dropped(
        torch.tensor([True, False])
    )
    net(random(2, 2, 1, 16, 16, 16), torch.tensor([0.3, 0.8]), condition).square().sum().backward()
    silent = [
        name
        for name, p in net.named_parameters()
        if p.grad is None or not (torch.isfinite(p.grad).all() and p.grad.abs().max() > 0)
    ]
    assert not silent


def scene():
    "Three smooth volumes of 16³ and X-rays that tell them apart."
    from ct_nb.physics.projector import project

    bodies = torch.tanh(
        3 * F.interpolate(random(5, 3, 1, 4, 4, 4), size=(16,) * 3, mode="trilinear")
    )
    geometry = beams(3, 0.0, 90.0)
    return bodies, project(0.01 * (1 + bodies[:, 0]), geometry), geometry


@pytest.fixture(scope="module")
def trained():
    bodies, xrays, geometry = scene()
    net = seeded(Denoiser, SMOKE)
    seed = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=120, pct_start=0.1)
    losses = []
    for _ in range(120):
        t = torch.rand(3, generator=seed) ** 0.5
        noise = torch.randn(bodies.shape, generator=seed)
        a, b = (f(t * math.pi / 2).view(-1, 1, 1, 1, 1) for f in (torch.cos, torch.sin))
        condition = net.condition(xrays, geometry).dropped(torch.rand(3, generator=seed) < 0.25)
        loss = (
            (net(a * bodies + b * noise, t, condition) - (a * noise - b * bodies)).square().mean()
        )
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        losses.append(float(loss.detach()))
    return net.eval(), losses, bodies, xrays, geometry


def test_it_overfits_three_bodies(trained):
    net, losses, bodies, xrays, geometry = trained
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
    noise, t = random(8, *bodies.shape), torch.ones(3)
    with torch.no_grad():
        right, wrong, nothing = (
            float((-net(noise, t, condition) - bodies).abs().mean())
            for condition in (
                net.condition(xrays, geometry),
                net.condition(xrays.roll(1, 0), geometry),
                None,
            )
        )
    assert right < 0.75 * min(wrong, nothing)


def test_after_training_every_input_counts(trained):
    net, _, bodies, xrays, geometry = trained
    with torch.no_grad():
        t = torch.full((3,), 0.6)
        x_t = (bodies + random(8, *bodies.shape)) / 2**0.5
        condition = net.condition(xrays, geometry)
        base = net(x_t, t, condition)
        for changed in (
            net(x_t, t + 0.2, condition),
            net(x_t, t, condition._replace(prior=condition.prior.roll(1, 0))),
            net(x_t, t, condition._replace(camera=net.camera(beams(3, 30.0, 120.0)))),
            net(x_t, t, condition._replace(corner=condition.corner + 4)),
            net(x_t, t),
            net(x_t.roll(1, 0), t, condition),
        ):
            assert (changed - base).square().mean().sqrt() > 0.002


def test_the_same_seed_is_the_same_network_bit_by_bit():
    runs = []
    for _ in range(2):
        net = seeded(Denoiser, SMOKE)
        xrays = 2 + random(0, 2, 2, 32, 32)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(3):
            loss = (
                (
                    net(
                        random(step, 2, 1, 16, 16, 16),
                        torch.tensor([0.3, 0.8]),
                        net.condition(xrays, beams(2, 0.0, 90.0)),
                    )
                    - 1
                )
                .square()
                .mean()
            )
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_presets(name, size):
    config = DenoiserConfig.preset(name, size, condition_channels=1)
    assert (
        DenoiserConfig.from_dict(config.to_dict()) == config
        and config.size == size
        and config.condition_channels == 1
    )
    with torch.device("meta"):
        net = Denoiser(config)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert {
        "smoke": millions < 0.3,
        "cpu": 0.5 < millions < 1.5,
        "gpu": 5 < millions < 50,
        "paper": 50 < millions < 200,
    }[name], millions
    assert net.enter.in_channels == 18


def test_settings_that_do_not_fit():
    for settings, words in (
        (dict(size=100), "size: must be one of 16, 32, 64, 128, 256"),
        (dict(size=128, channels=(8, 16)), "channels: 128³ voxels and 24³ tokens need 3 numbers"),
        (dict(token_channels=10, heads=3), "heads: must divide the 10"),
    ):
        with pytest.raises(ValueError, match=words):
            DenoiserConfig(**settings)
    with refused("preset"):
        DenoiserConfig.preset("huge", 64)
    with pytest.raises(ValueError, match="unknown settings depth"):
        DenoiserConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    "attempt, words",
    [
        (lambda net, x, t, condition: net(x[:, 0], t, condition), "x_t: must be"),
        (
            lambda net, x, t, condition: net(x.expand(-1, 2, -1, -1, -1), t, condition),
            "x_t: must be",
        ),
        (
            lambda net, x, t, condition: net(torch.zeros(2, 1, 32, 32, 32), t, condition),
            "x_t: must be .* n = 16",
        ),
        (
            lambda net, x, t, condition: net(x[..., :10, :10, :10], t, condition.crop(0, 0, 0, 10)),
            "smaller multiple of 4",
        ),
        (lambda net, x, t, condition: net(x, t[:1], condition), r"time: must be \(2,\)"),
        (
            lambda net, x, t, condition: net(x, t * 999, condition),
            "time: must be normalised to 0 to 1, got 499.5",
        ),
        (lambda net, x, t, condition: net(x, t * math.nan, condition), "time: must be normalised"),
        (lambda net, x, t, condition: net(x[..., :8, :8, :8], t), "condition: a patch of 8³"),
        (lambda net, x, t, condition: net(x[:1], t[:1], condition), "condition: its prior must be"),
        (
            lambda net, x, t, condition: net(x, t, condition._replace(extra=x)),
            "extra: this network takes none",
        ),
        (
            lambda net, x, t, condition: net.condition(torch.zeros(2, 2, 32, 32), None),
            "geometry: expected the ConeBeam",
        ),
        (
            lambda net, x, t, condition: net.condition(
                torch.zeros(2, 3, 32, 32), beams(2, 0.0, 90.0)
            ),
            r"xrays: the geometry describes .* 2, 32, 32\), got \(2, 3, 32, 32\)",
        ),
        (
            lambda net, x, t, condition: net.condition(torch.zeros(2, 32, 32), beams(2, 0.0, 90.0)),
            "xrays: the geometry describes",
        ),
        (
            lambda net, x, t, condition: net.condition(
                torch.zeros(3, 2, 32, 32), beams(2, 0.0, 90.0)
            ),
            r"geometry: its batch shape must be \(\) or \(3,\)",
        ),
        (
            lambda net, x, t, condition: net.condition(
                torch.zeros(1, 1, 30, 30), beams(1, 0.0, detector=30)
            ),
            "multiples of 4, got 30×30",
        ),
        (
            lambda net, x, t, condition: net.condition(
                torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), x
            ),
            "extra: this network takes none",
        ),
        (
            lambda net, x, t, condition: net.condition(
                torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), patch=(0, 0, 12, 8)
            ),
            "crop: a patch of 8³",
        ),
        (lambda net, x, t, condition: condition.crop(-1, 0, 0, 4), "crop: a patch of 4³"),
    ],
)
def test_what_is_refused(attempt, words):
    net = seeded(Denoiser, SMOKE)
    with torch.no_grad():
        condition = net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0))
    with pytest.raises(ValueError, match=words) as problem:
        attempt(net, torch.zeros(2, 1, 16, 16, 16), torch.tensor([0.5, 0.5]), condition)
    assert "\n" not in str(problem.value)


def test_a_stage_that_needs_the_coarser_one_says_so():
    net = seeded(Denoiser, replace(SMOKE, condition_channels=1))
    with refused("extra"):
        net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0))
    with pytest.raises(ValueError, match="extra"):
        net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), torch.zeros(2, 1, 8, 8, 8))
