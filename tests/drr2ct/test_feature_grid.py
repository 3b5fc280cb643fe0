"""Feature grid, ray marching, trunk, bottleneck and decoders against brute force and symmetries."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.drr2ct.decoder import UNetDecoder
from ct_nb.drr2ct.network import DECODERS, make_decoder
from ct_nb.drr2ct.diffusion_decoder import DiffusionDecoder
from ct_nb.drr2ct.feature_grid import LatentGrid
from ct_nb.drr2ct.implicit import ImplicitDecoder, box_points, voxel_points
from ct_nb.drr2ct.latent_trunk import (
    LatentTrunk,
    SwinBlock3d,
    WindowAttention3d,
    from_windows,
    to_windows,
)
from ct_nb.drr2ct.ray_marching import Volumization, confident_moments, octaves, ray_samples, splat
from ct_nb.layers.blocks import keep_variance
from ct_nb.layers.latent import LOG_VARIANCE_RANGE, Latent, VariationalBottleneck
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid

POSES = ConeBeam.orbit(
    [0.0, 80.0, 35.0],
    [0.0, -8.0, 20.0],
    [0.0, 5.0, 15.0],
    grid=Grid.cube(16),
    detector_shape=(64, 64),
    pixel_mm=8.0,
)
SYMMETRIES = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(seed, *shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(module, *arguments, **settings):
    torch.manual_seed(0)
    return module(*arguments, **settings)


# samples along rays


def test_samples_lie_on_their_rays_and_inside_the_box():
    samples = ray_samples(POSES, (4, 6), 16, 40)
    points = torch.from_numpy(POSES.grid.resized(16).index_to_mm(samples.index.flip(-1).numpy()))
    along = F.normalize(points - POSES.source_mm[:, None, None], dim=-1)
    assert torch.allclose(
        along, POSES.ray_directions((4, 6)).flatten(1, 2)[:, :, None].expand_as(along), atol=1e-12
    )
    hit = samples.step > 0
    assert hit.any() and samples.index[hit].min() >= -0.5 and samples.index[hit].max() <= 15.5
    assert torch.allclose(
        samples.depth.diff(dim=-1),
        (samples.step * 20 / 160)[..., None].expand(3, 24, 39),
        atol=1e-12,
    )


def test_the_chord_is_what_the_projector_integrates():
    from ct_nb.physics.projector import project

    ones = torch.ones(16, 16, 16, dtype=torch.float64)
    # rays that enter and leave through opposite faces
    inner = ConeBeam.orbit([0.0, 90.0], grid=Grid.cube(16), detector_shape=(8, 8), pixel_mm=20.0)
    chord = ray_samples(inner, (8, 8), 16, 4).ray[..., -1].view(2, 8, 8) * 160
    assert torch.allclose(chord, project(ones, inner), rtol=1e-6)


def test_a_ray_that_misses_counts_for_nothing():
    wide = ConeBeam.orbit([0.0], grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=60.0)
    samples = ray_samples(wide, (8, 8), 16, 8)
    assert 0 < int((samples.step > 0).sum()) < 64 and all(torch.isfinite(t).all() for t in samples)
    net = seeded(Volumization, 3, 8, size=8).double()
    features = random(0, 1, 1, 3, 8, 8, dtype=torch.float64)
    changed = torch.where((samples.step > 0).view(1, 1, 1, 8, 8), features, features + 5)
    batch = ConeBeam.stack([wide])
    assert torch.equal(net(features, batch), net(changed, batch)) and not torch.equal(
        net(features, batch), net(features + 5, batch)
    )


def test_a_source_inside_the_box_and_a_ray_along_a_face():
    close = ConeBeam.orbit(
        [0.0, 45.0],
        grid=Grid.cube(16),
        detector_shape=(33, 33),
        pixel_mm=10.0,
        source_to_isocenter_mm=100.0,
        source_to_detector_mm=220.0,
    )
    samples = ray_samples(close, (33, 33), 16, 8)
    assert all(torch.isfinite(t).all() for t in samples) and (samples.step >= 0).all()
    ends = samples.step * 8 * 20
    # not behind the detector
    assert (
        ends
        <= (close.pixel_centers_mm() - close.source_mm[:, None, None]).norm(dim=-1).flatten(1)
        + 1e-9
    ).all()


# splatting


def test_splat_is_the_transpose_of_reading():
    # some outside
    values = random(0, 2, 300, 4, dtype=torch.float64).requires_grad_()
    index = 12 * uniform(1, 2, 300, 3) - 2
    other = random(2, 2, 4, 8, 8, 8, dtype=torch.float64)
    read = F.grid_sample(
        other, ((index.flip(-1) + 0.5) / 4 - 1)[:, None, None], align_corners=False
    )[:, :, 0, 0].mT
    product = (splat(values, index, 8) * other.permute(0, 2, 3, 4, 1)).sum()
    assert torch.allclose(product, (values * read).sum())
    assert torch.allclose(torch.autograd.grad(product, values)[0], read)


def test_splat_by_hand_and_its_sum():
    grid = splat(torch.tensor([[[8.0]]]), torch.tensor([[[1.25, 2.0, 0.5]]]), 4)[0, ..., 0]
    assert (
        grid[1, 2, 0] == 3
        and grid[1, 2, 1] == 3
        and grid[2, 2, 0] == 1
        and grid[2, 2, 1] == 1
        and grid.sum() == 8
    )
    values = random(0, 2, 50, 3, dtype=torch.float64)
    index = 7 * uniform(1, 2, 50, 3)
    assert torch.allclose(splat(values, index, 8).sum((1, 2, 3)), values.sum(1))


def test_splat_gradcheck():
    index = 4 * uniform(1, 1, 6, 3) - 0.5
    assert torch.autograd.gradcheck(
        lambda v: splat(v, index, 3), random(0, 1, 6, 2, dtype=torch.float64).requires_grad_()
    )


def test_moments_are_the_weighted_mean_and_variance():
    values = random(0, 1, 40, 3, dtype=torch.float64)
    weight = uniform(1, 1, 40)
    inside = torch.full((1, 40, 3), 1.0, dtype=torch.float64)  # all at one voxel
    out = confident_moments(values, weight, inside, 3)
    share = weight[0, :, None] / weight.sum()
    mean = (share * values[0]).sum(0)
    expected = torch.cat([mean, (share * (values[0] - mean).square()).sum(0), weight.sum()[None]])
    assert torch.allclose(out[0, 1, 1, 1], expected, rtol=1e-4, atol=1e-4) and not out[0, 0].any()
    assert out[..., 3:6].min() >= 0


def test_volumization_against_loops():
    net = seeded(Volumization, 3, 8, size=4, samples_per_ray=5).double()
    geometry = ConeBeam.stack([POSES.select([0, 2])])
    features = random(0, 1, 2, 3, 4, 4, dtype=torch.float64)
    where = ray_samples(geometry, (4, 4), 4, 5)
    sums = torch.zeros(4, 4, 4, 2 * 8 + 1, dtype=torch.float64)
    with torch.no_grad():
        for view, token, s in itertools.product(range(2), range(16), range(5)):
            known = torch.cat(
                [features[0, view, :, token // 4, token % 4], where.ray[0, view, token]]
            )
            t = where.depth[0, view, token, s]
            waves = torch.tensor(
                [
                    t,
                    *(math.sin(math.pi * 2**k * t) for k in range(4)),
                    *(math.cos(math.pi * 2**k * t) for k in range(4)),
                ],
                dtype=torch.float64,
            )
            x = F.silu(net.inner(F.silu(net.token(known) + net.depth(waves))))
            c = net.confidence(x).sigmoid()[0] * where.step[0, view, token]
            for voxel in itertools.product(range(4), repeat=3):
                hat = (
                    (1 - (where.index[0, view, token, s] - torch.tensor(voxel)).abs())
                    .clamp_min(0)
                    .prod()
                )
                sums[voxel] += hat * c * torch.cat([x, x * x, x.new_ones(1)])
        mean = sums[..., :8] / (sums[..., -1:] + 1e-4)
        square = sums[..., 8:16] / (sums[..., -1:] + 1e-4)
        total = sums[..., -1:]
        grid = net.mix(torch.cat([mean, square - mean**2, total.log1p()], -1))
        factor = 1
        for axis in range(3):
            factor = factor * F.silu(
                net.planes.plane(
                    (grid * total).sum(axis, keepdim=True) / (total.sum(axis, keepdim=True) + 1e-4)
                )
            )
        expected = grid * (1 + net.planes.back(factor).tanh())
        assert torch.allclose(net(features, geometry)[0].permute(1, 2, 3, 0), expected, atol=1e-10)


# symmetry, views


@pytest.mark.parametrize("order, signs", SYMMETRIES[::5] + [((1, 0, 2), (1, -1, 1))])
def test_turn_everything_and_the_grid_turns(order, signs):
    """Under the symmetries of the cube: patient, tube and detector together, the X-rays' features
    as they are.
    """
    net = seeded(Volumization, 4, 8, size=6).double()
    features = random(0, 1, 3, 4, 8, 8, dtype=torch.float64)
    centre = torch.as_tensor(POSES.grid.center_mm.copy())
    rotation = torch.zeros(3, 3, dtype=torch.float64)
    for new, old in enumerate(order):
        rotation[new, old] = signs[new]

    def turn(v):
        return v @ rotation.T

    moved = ConeBeam(
        (POSES.source_mm - centre) @ rotation.T + centre,
        (POSES.detector_center_mm - centre) @ rotation.T + centre,
        turn(POSES.column_step_mm),
        turn(POSES.row_step_mm),
        POSES.detector_shape,
        POSES.grid,
    )
    before = net(features, ConeBeam.stack([POSES]))
    after = net(features, ConeBeam.stack([moved]))
    voxels = torch.cartesian_prod(*[torch.arange(6)] * 3)  # (z, y, x)
    middle = (voxels.flip(-1) * 2 - 5).double() @ rotation.T
    there = ((middle + 5) / 2).round().long().flip(-1)
    assert torch.allclose(
        after[0][:, there[:, 0], there[:, 1], there[:, 2]], before[0].flatten(1), atol=1e-10
    )


def test_equivariance_can_fail():
    """The test above is not true of anything: a part of a turn, or a trunk with its learned
    offsets, breaks it.
    """
    net = seeded(Volumization, 4, 8, size=6).double()
    features = random(0, 1, 1, 4, 8, 8, dtype=torch.float64)

    def at(azimuth):
        return net(
            features,
            ConeBeam.stack(
                [ConeBeam.orbit([azimuth], grid=POSES.grid, detector_shape=(64, 64), pixel_mm=8.0)]
            ),
        )

    quarter = at(0.0).transpose(3, 4).flip(3)
    assert torch.allclose(at(90.0), quarter, atol=1e-10) and (at(80.0) - quarter).abs().max() > 1e-2
    trunk = seeded(LatentTrunk, 8, window=3).double()
    assert (trunk(at(90.0)) - trunk(at(0.0)).transpose(3, 4).flip(3)).abs().max() > 1e-3


@pytest.mark.parametrize("views", [[0], [0, 1], [2, 0, 1]])
def test_any_number_of_views_in_any_order(views):
    net = seeded(Volumization, 4, 8, size=8)
    features = random(0, 2, len(views), 4, 5, 7)
    geometry = ConeBeam.stack([POSES.select(views).to(torch.float32)] * 2)
    out = net(features, geometry)
    assert (
        out.shape == (2, 8, 8, 8, 8)
        and torch.isfinite(out).all()
        and out.is_contiguous(memory_format=torch.channels_last_3d)
    )
    back = list(reversed(range(len(views))))
    assert torch.allclose(net(features[:, back], geometry.select(back)), out, atol=1e-5)


def test_scans_of_a_batch_do_not_mix():
    net = seeded(Volumization, 4, 8, size=8)
    features = random(0, 2, 2, 4, 8, 8)
    geometries = [POSES.select([0, 1]).to(torch.float32), POSES.select([2, 1]).to(torch.float32)]
    together = net(features, ConeBeam.stack(geometries))
    for b in range(2):
        assert torch.allclose(
            together[b],
            net(features[b : b + 1], ConeBeam.stack(geometries[b : b + 1]))[0],
            atol=1e-5,
        )


def test_few_tokens_leave_no_holes():
    "4×4 tokens on a 16³ grid: every voxel that all views see is reached."
    plate = ConeBeam.stack(
        [
            ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(64, 64), pixel_mm=8.0).to(
                torch.float32
            )
        ]
    )
    net = seeded(Volumization, 3, 8, size=16)
    x, confidence, where = net.samples(random(0, 1, 2, 3, 4, 4), plate)
    assert x.shape[2] == 256
    total = confident_moments(
        x.flatten(1, 3),
        where.step[..., None].expand_as(confidence).flatten(1),
        where.index.flatten(1, 3),
        16,
    )[..., -1]
    assert total.min() > 0.1


def test_volumization_gradients_and_half_precision():
    net = seeded(Volumization, 4, 16, size=8)
    features = random(0, 1, 2, 4, 8, 8).requires_grad_()
    geometry = ConeBeam.stack([POSES.select([0, 1]).to(torch.float32)])
    exact = net(features, geometry)
    exact.square().mean().backward()
    assert features.grad.abs().sum() > 0 and not [
        n
        for n, p in net.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(features, geometry)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_another_geometry_than_the_features_is_a_sentence():
    net = Volumization(3, 8, size=4)
    with pytest.raises(ValueError, match="2 scans with 3 views"):
        net(torch.zeros(2, 3, 3, 4, 4), ConeBeam.stack([POSES]))
    with pytest.raises(ValueError, match="1 scans with 2 views"):
        net(torch.zeros(1, 2, 3, 4, 4), ConeBeam.stack([POSES]))
    assert octaves(torch.zeros(2, 3)).shape == (2, 3, 9)


# trunk


def dense_attention(layer, x):
    """All pairs of voxels, −∞ between those that lie in different windows of the grid cut at
    `shift` + multiples of `window`.
    """
    shape, w = x.shape[1:4], layer.window
    place = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    shift = torch.tensor([layer.shift if n > w else 0 for n in shape])
    number = torch.div(place - shift, w, rounding_mode="floor")
    same = (number[:, None] == number[None]).all(-1)
    offset = ((place[:, None] - place[None]).clamp(1 - w, w - 1) + w - 1) @ torch.tensor(
        [(2 * w - 1) ** 2, 2 * w - 1, 1]
    )
    q, k, v = (
        layer.query_key_value(x.flatten(1, 3))
        .unflatten(-1, (3, layer.heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    weight = (
        (q @ k.mT / q.shape[-1] ** 0.5 + layer.bias[:, offset])
        .masked_fill(~same, -torch.inf)
        .softmax(-1)
    )
    return layer.out((weight @ v).transpose(1, 2).flatten(2)).view_as(x)


@pytest.mark.parametrize(
    "shape, window, shift",
    [
        ((4, 4, 4), 4, 2),
        ((8, 8, 8), 4, 0),
        ((8, 8, 8), 4, 2),
        ((8, 4, 12), 4, 2),
        ((6, 6, 6), 3, 1),
        ((6, 6, 6), 2, 1),
    ],
)
def test_window_attention_is_dense_attention_with_a_mask(shape, window, shift):
    layer = seeded(WindowAttention3d, 12, 3, window, shift).double()
    x = random(1, 2, *shape, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
    assert torch.allclose(layer(x), dense_attention(layer, x), atol=1e-10)


def test_windows_come_back():
    x = random(0, 2, 8, 4, 12, 3)
    assert torch.equal(from_windows(to_windows(x, 4), (8, 4, 12)), x)
    assert torch.equal(to_windows(x, 4)[1, 1].view(4, 4, 4, 3), x[1, :4, :4, 4:8])


@pytest.mark.parametrize("size", [8, 12, 16])
def test_trunk_keeps_shape_and_layout_and_learns(size):
    trunk = seeded(LatentTrunk, 16)
    x = (
        random(0, 1, 16, size, size, size)
        .contiguous(memory_format=torch.channels_last_3d)
        .requires_grad_()
    )
    y = trunk(x)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last_3d)
    y[:, :3].square().mean().backward()
    assert torch.isfinite(x.grad).all() and not [
        n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()
    ]


def test_checkpointing_changes_nothing():
    plain = seeded(LatentTrunk, 16)
    kept = seeded(LatentTrunk, 16, checkpoint=True)
    results = []
    for trunk in (plain, kept):
        x = random(0, 1, 16, 8, 8, 8).requires_grad_()
        y = trunk(x)
        y[:, 0].square().mean().backward()
        results.append((y, x.grad, *(p.grad for p in trunk.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_new_trunk_changes_little():
    x = F.layer_norm(random(0, 1, 4, 4, 4, 32), (32,)).permute(0, 4, 1, 2, 3)
    trunk = keep_variance(seeded(LatentTrunk, 32))  # the network's own first weights
    assert (trunk(x) - x).std() < 0.5


def test_sizes_and_heads_that_do_not_divide_are_a_sentence():
    with pytest.raises(ValueError, match="multiple of the window"):
        SwinBlock3d(8, 2)(torch.zeros(1, 8, 6, 6, 6))
    with pytest.raises(ValueError, match="cannot be divided among 3 heads"):
        SwinBlock3d(8, 3)


# variational bottleneck


def test_kl_is_that_of_torch():
    latent = Latent(2 * random(0, 2, 5, 3, 3, 3), random(1, 2, 5, 3, 3, 3))
    peer = torch.distributions.kl_divergence(
        torch.distributions.Normal(latent.mean, (latent.log_variance / 2).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    assert torch.allclose(latent.kl_nats(), peer, rtol=1e-4, atol=1e-5) and torch.allclose(
        latent.kl(), peer.mean()
    )
    channels = peer.mean((0, 2, 3, 4))
    assert torch.allclose(latent.kl(1.5), channels.clamp_min(1.5).mean())
    assert Latent(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)).kl() == 0


def test_free_bits_are_free():
    mean = torch.stack([torch.full((2, 2, 2), 0.1), torch.full((2, 2, 2), 3.0)])[
        None
    ].requires_grad_()
    Latent(mean, torch.zeros_like(mean)).kl(0.5).backward()
    assert not mean.grad[0, 0].any() and (mean.grad[0, 1] > 0).all()


def test_samples_have_the_mean_and_the_variance():
    latent = Latent(
        torch.full((1, 1, 40, 40, 40), 1.5), torch.full((1, 1, 40, 40, 40), math.log(0.25))
    )
    draw = latent.sample(torch.Generator().manual_seed(0))
    assert abs(draw.mean() - 1.5) < 0.01 and abs(draw.std() - 0.5) < 0.01
    assert torch.equal(draw, latent.sample(torch.Generator().manual_seed(0)))


def test_draw_in_training_mean_in_evaluation():
    net = seeded(VariationalBottleneck, 8, 4)
    x = random(0, 1, 8, 4, 4, 4)
    latent = net(x)
    assert (
        latent.mean.shape == latent.log_variance.shape == (1, 4, 4, 4, 4)
        and net.expand(net.choose(latent)).shape == x.shape
    )
    assert not torch.equal(net.choose(latent), net.choose(latent)) and torch.equal(
        net.choose(latent, sample=False), latent.mean
    )
    net.eval()
    assert torch.equal(net.choose(net(x)), net(x).mean) and not torch.equal(
        net.choose(latent, sample=True), latent.mean
    )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_variance_is_clamped(size):
    net = VariationalBottleneck(4, 2)
    with torch.no_grad():
        net.squeeze.weight.zero_(), net.squeeze.bias.fill_(size)
    latent = net(torch.zeros(1, 4, 2, 2, 2))
    assert (
        latent.log_variance.min() >= LOG_VARIANCE_RANGE[0]
        and latent.log_variance.max() <= LOG_VARIANCE_RANGE[1]
        and torch.isfinite(latent.sample()).all()
    )
    assert torch.isfinite(Latent(*(t.half() for t in latent)).kl_nats()).all()


# decoders


def levels(channels, coarse=4, seed=0, batch=1):
    return [
        random(seed + k, batch, c, n, n, n)
        for k, (c, n) in enumerate(
            zip(channels, (coarse * 2**p for p in reversed(range(len(channels)))))
        )
    ]


@pytest.mark.parametrize(
    "name, camera", list(itertools.product(("unet", "implicit"), (False, True)))
)
def test_one_interface(name, camera):
    grids = levels((4, 8, 12), batch=2)
    geometry = ConeBeam.stack([POSES.to(torch.float32), POSES.to(torch.float32)])
    decoder = seeded(make_decoder, name, (4, 8, 12), 2, camera=camera)
    out = decoder(grids[-1], grids, geometry)
    assert out.shape == (2, 2, 16, 16, 16) and out.std() < 0.3
    out.square().mean().backward()
    assert not [
        n
        for n, p in decoder.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]


def test_the_names_of_the_decoders():
    assert (
        set(DECODERS) == {"unet", "implicit", "diffusion"}
        and DECODERS["unet"] is UNetDecoder
        and DECODERS["implicit"] is ImplicitDecoder
        and DECODERS["diffusion"] is DiffusionDecoder
    )
    with pytest.raises(ValueError, match="must be one of diffusion, implicit, unet"):
        make_decoder("gan", (4, 8))


def test_the_diffusion_decoder_behind_the_door():
    grids = levels((8,), coarse=16, batch=2)
    geometry = ConeBeam.stack([POSES.to(torch.float32), POSES.to(torch.float32)])
    decoder = seeded(make_decoder, "diffusion", (8,), sampling_steps=2, camera=True)
    target = 0.1 * random(3, 2, 1, 16, 16, 16)
    taught = decoder(grids[-1], grids, geometry, target)
    assert taught.shape == target.shape
    (taught - target).square().mean().backward()
    assert not [
        n
        for n, p in decoder.named_parameters()
        if p.requires_grad and p.grad is None and "untold" not in n
    ]
    with torch.no_grad():
        same = decoder(grids[-1], grids, geometry)
        again = decoder(grids[-1], grids, geometry)
        sample = decoder(grids[-1], grids, geometry, random=True)
    assert torch.equal(same, again) and not torch.equal(same, sample)
    with refused("sampling_steps"):
        make_decoder("diffusion", (8,), sampling_steps=251)
    with refused("outputs"):
        make_decoder("diffusion", (8,), 2)
    with refused("grids"):
        decoder(levels((8,), batch=2)[0], levels((8,), batch=2), geometry)


def test_unet_without_camera_needs_no_geometry():
    grids = levels((4, 8, 12))
    decoder = seeded(UNetDecoder, (4, 8, 12), outputs=2)
    assert torch.equal(
        decoder(grids[-1], grids), decoder(grids[-1], grids, ConeBeam.stack([POSES]))
    )
    assert not [n for n in decoder.state_dict() if "camera" in n or "modulation" in n]


@pytest.mark.parametrize("name", ["unet", "implicit"])
def test_a_decoder_that_listens_to_the_cameras(name):
    grids = levels((4, 8, 12))
    float_poses = POSES.to(torch.float32)
    decoder = keep_variance(seeded(make_decoder, name, (4, 8, 12), camera=True))
    for block in getattr(decoder, "blocks", ()):
        torch.nn.init.normal_(block.modulation.weight, std=0.3)

    def at(views):
        return decoder(grids[-1], grids, ConeBeam.stack([float_poses.select(views)]))

    assert torch.allclose(at([0, 1, 2]), at([2, 0, 1]), atol=1e-5) and not torch.allclose(
        at([0, 1]), at([0, 2]), atol=1e-5
    )
    with pytest.raises(ValueError, match="conditioned on the cameras"):
        decoder(grids[-1], grids)


# implicit decoder


def implicit(**settings):
    decoder = keep_variance(
        seeded(ImplicitDecoder, (4, 8, 12), 2, hidden=16, frequencies=3, **settings)
    )
    return decoder, levels((4, 8, 12))


@pytest.mark.parametrize("chunk", [64, 999, 4096])
def test_chunks_change_nothing(chunk):
    decoder, grids = implicit()
    with torch.no_grad():
        assert torch.equal(
            decoder.at_size(16, grids[-1], grids, chunk=chunk),
            decoder.at_size(16, grids[-1], grids),
        )


def test_chunks_in_training_have_the_same_gradients():
    decoder, grids = implicit()
    gradients = []
    for chunk in (None, 1000):
        latent = grids[-1].clone().requires_grad_()
        decoder.zero_grad()
        decoder.at_size(16, latent, grids, chunk=chunk).square().mean().backward()
        gradients.append([latent.grad, *(p.grad.clone() for p in decoder.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))


def test_other_sizes_agree_at_shared_points():
    decoder, grids = implicit()
    with torch.no_grad():
        small, large = (decoder.at_size(n, grids[-1], grids) for n in (8, 24))
        # the centres of n³ are every third of (3n)³
        assert torch.allclose(small, large[..., 1::3, 1::3, 1::3], atol=1e-5)

        def line(n):
            return torch.linspace(-1, 1, n + 1)

        # corners: those of n³ are every second of (2n)³
        def nodes(n):
            return torch.stack(
                torch.meshgrid(line(n), line(n), line(n), indexing="ij")[::-1], -1
            ).reshape(-1, 3)

        def at(n):
            return decoder.decode(grids[-1], grids, nodes(n))[0].view(n + 1, n + 1, n + 1, 2)

        assert torch.allclose(at(8), at(16)[::2, ::2, ::2], atol=1e-5)
        assert torch.equal(decoder(grids[-1], grids), decoder.at_size(16, grids[-1], grids))


def test_implicit_reads_trilinearly_at_its_points():
    """With its waves silenced, at a voxel's centre of the finest grid, the decoder is the network
    of that voxel's numbers.
    """
    decoder, grids = implicit()
    with torch.no_grad():
        decoder.local.weight[:, 12:] = 0
        out = decoder.at_size(16, grids[-1], grids)[0, :, 5, 9, 2]

        def between(grid):
            return F.interpolate(grid, size=(16,) * 3, mode="trilinear")[0, :, 5, 9, 2]

        x = decoder.latent.weight[:, :, 0, 0, 0] @ between(grids[-1]) + decoder.local.weight[
            :, :12
        ] @ torch.cat([grids[0][0, :, 5, 9, 2], between(grids[1])])
        for layer in decoder.layers:
            x = x + layer(F.silu(x))
        assert torch.allclose(out, decoder.last(F.silu(x)), atol=1e-5)


def test_points_in_millimetres():
    grid = Grid(
        (4, 6, 8),
        torch.tensor([[0.0, 3.0, 0, 5], [-2.0, 0, 0, 1], [0, 0, 4.0, -9], [0, 0, 0, 1]]).numpy(),
    )
    corner = torch.from_numpy(
        grid.index_to_mm([[-0.5, -0.5, -0.5], [7.5, 5.5, 3.5], [3.5, 2.5, 1.5]])
    )
    assert torch.allclose(
        box_points(grid, corner),
        torch.tensor([[-1.0] * 3, [1.0] * 3, [0.0] * 3], dtype=torch.float64),
    )
    assert torch.allclose(
        box_points(Grid.cube(5), Grid.cube(5).centers_mm().view(-1, 3)), voxel_points(5), atol=1e-6
    )


# the ladder


def test_a_ladder_that_ends_elsewhere():
    grid = LatentGrid((4, 8, 12), (6, 8), physical=2, size=16)
    pyramid = [
        random(k, 1, 3, c, 64 // s, 64 // s) for k, (c, s) in enumerate(((4, 4), (8, 8), (12, 16)))
    ]
    assert [
        tuple(g.shape[1:])
        for g in grid(
            pyramid, random(9, 1, 2, 16, 16, 16), ConeBeam.stack([POSES.to(torch.float32)])
        )
    ] == [(6, 16, 16, 16), (8, 8, 8, 8)]
