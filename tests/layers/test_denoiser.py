"""Biased attention against the table of all pairs, and the denoiser: its shapes, what it must listen to, what it refuses, and two of the cascade's named defects."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ct_nb.layers.denoiser as denoiser_module
import ct_nb.layers.relative_bias as attention_module
from ct_nb.layers.blocks import ResidualBlock
from ct_nb.layers.denoiser import Conditioning, Denoiser, DenoiserConfig
from ct_nb.layers.depth_prior import DEPTH_PRIOR_CHANNELS, DepthPrior, project_patch_voxels
from ct_nb.layers.embeddings import (
    PositionEmbedding,
    overlap_weights,
    regrid,
    sinusoids,
    time_embedding,
    token_grid,
)
from ct_nb.layers.lifting import lift, project_voxels
from ct_nb.layers.relative_bias import (
    BiasedAttention,
    TokenBlock,
    append_bias_columns,
    biased_attention,
    expand_axis_biases,
    relative_biases,
)
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid

SMOKE = DenoiserConfig.preset("smoke", 16)


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(module, *arguments, **settings):
    torch.manual_seed(0)
    return module(*arguments, **settings)


def beams(batch, *angles, size=16, detector=32, **settings):
    return ConeBeam.stack(
        [
            ConeBeam.orbit(
                list(angles),
                grid=Grid.cube(size),
                detector_shape=(detector, detector),
                pixel_mm=512 / detector,
                **settings,
            ).to(torch.float32)
        ]
        * batch
    )


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


# attention with a folded bias


def table_of(biases):
    "(heads, N, N) from the biases of the axes, entry by entry."
    places = list(itertools.product(*(range(b.shape[-1]) for b in biases)))
    return torch.stack(
        [
            torch.stack([sum(b[:, i, j] for b, i, j in zip(biases, p, q)) for q in places], -1)
            for p in places
        ],
        1,
    )


def naive(q, k, v, biases):
    return (q @ k.mT / q.shape[-1] ** 0.5 + table_of(biases)).softmax(-1) @ v


@pytest.mark.parametrize(
    "shape, d, e",
    [((2, 3, 4), 5, 5), ((3, 3, 3), 8, 8), ((1, 2, 6), 4, 40), ((4, 5), 3, 2), ((7,), 6, 1)],
)
def test_folded_bias_is_the_table(shape, d, e):
    leaf = lambda seed, *size: random(seed, *size, dtype=torch.float64).requires_grad_()
    q = leaf(0, 2, 3, math.prod(shape), d)
    k = leaf(1, 2, 3, math.prod(shape), d)
    v = leaf(2, 2, 3, math.prod(shape), e)
    biases = [leaf(3 + a, 3, n, n) for a, n in enumerate(shape)]
    ours = biased_attention(q, k, v, biases)
    theirs = naive(q, k, v, biases)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-12
    weight = random(9, *ours.shape, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), [q, k, v, *biases]) for y in (ours, theirs))
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    "wrong", ["scale over the bias", "rows and columns swapped", "axes swapped"]
)
def test_a_wrong_fold_is_not_the_table(wrong, monkeypatch):
    def other(q, k, biases, inner):
        if wrong == "rows and columns swapped":
            biases = [b.mT for b in biases]
        if wrong == "axes swapped":
            biases = biases[::-1]
        long_q, long_k = append_bias_columns(q, k, biases, inner)
        if wrong == "scale over the bias":
            long_q = torch.cat(
                [long_q[..., : q.shape[-1]], long_q[..., q.shape[-1] :] * q.shape[-1] ** -0.5], -1
            )
        return long_q, long_k

    q, k, v = (random(n, 1, 2, 27, 4, dtype=torch.float64) for n in range(3))
    biases = [random(3 + a, 2, 3, 3, dtype=torch.float64) for a in range(3)]
    monkeypatch.setattr(attention_module, "fold", other)
    assert (biased_attention(q, k, v, biases) - naive(q, k, v, biases)).abs().max() > 0.01


class Largest(TorchDispatchMode):
    "Remembers the most numbers that any tensor had."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))]
        )
        return made


def test_no_tensor_of_all_pairs():
    layer = seeded(BiasedAttention, 32, 2, 10)
    x = random(0, 1, 1000, 32).requires_grad_()
    with Largest() as seen:
        layer(x).square().sum().backward()
    # the longest queries, of both heads
    assert seen.numbers <= 1000 * 2 * (16 + 3 * 10 + 8) < 1000**2 / 4


def test_the_fused_kernel_is_the_one_that_runs():
    q = random(0, 1, 2, 64, 12)
    biases = [random(1 + a, 2, 4, 4) for a in range(3)]
    # raises where it cannot
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), warnings.catch_warnings(action="ignore"):
        assert torch.allclose(biased_attention(q, q, q, biases), naive(q, q, q, biases), atol=1e-5)
        assert torch.allclose(
            biased_attention(q, q, q[..., :5], biases), naive(q, q, q[..., :5], biases), atol=1e-5
        )
        # values left narrower
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*append_bias_columns(q, q, biases), q, scale=1.0)


def test_relative_biases():
    offsets = random(0, 3, 2, 9)
    full = relative_biases(offsets, 5)
    for i, j in itertools.product(range(5), repeat=2):
        assert torch.equal(full[..., i, j], offsets[..., i - j + 4])
    assert torch.equal(relative_biases(offsets, 3), full[..., 1:4, 1:4])
    for size in (0, 6):
        with refused("size"):
            relative_biases(offsets, size)


def test_unit_vectors_are_in_the_order_of_a_flattened_grid():
    place = expand_axis_biases([torch.eye(n)[None] for n in (2, 3, 4)]).view(2, 3, 4, 9)
    assert place[1, 2, 3].nonzero().flatten().tolist() == [1, 4, 8] and place.sum() == 2 * 3 * 4 * 3


def test_attention_of_a_shifted_patch_is_the_same():
    "A relative bias knows offsets only: tokens that are moved as a whole attend as before."
    layer = seeded(BiasedAttention, 8, 2, 4)
    x = random(0, 1, 27, 8)
    torch.nn.init.normal_(layer.offsets)
    small = seeded(BiasedAttention, 8, 2, 3)
    small.load_state_dict({**layer.state_dict(), "offsets": layer.offsets[..., 1:-1]})
    assert torch.allclose(layer(x), small(x), atol=1e-6)


def test_biases_that_do_not_fit():
    q = random(0, 1, 2, 8, 4)
    for biases in (
        [torch.zeros(2, 2, 2)] * 2,
        [torch.zeros(1, 2, 2)] * 3,
        [torch.zeros(2, 3, 2)] * 3,
    ):
        with refused("biases"):
            biased_attention(q, q, q, biases)
    with pytest.raises(ValueError, match="heads"):
        BiasedAttention(10, 3, 4)
    with pytest.raises(ValueError, match="cubic"):
        BiasedAttention(8, 2, 4)(torch.zeros(1, 60, 8))


# the token grid


def seen_token_sides(config, n):
    "Which grids the network's transformer is really given for a volume of n³."
    with torch.device("meta"):
        net, sides = Denoiser(config), []
        for block in net.tokens:
            block.register_forward_pre_hook(
                lambda block, inputs: sides.append(round(inputs[0].shape[1] ** (1 / 3)))
            )
        told = Conditioning(
            torch.empty(1, DEPTH_PRIOR_CHANNELS, n, n, n),
            torch.empty(1, 32),
            None,
            torch.empty(1),
            torch.empty(1, 3),
        )
        assert net(torch.empty(1, 1, n, n, n), torch.empty(1), told).shape == (1, 1, n, n, n)
    return set(sides)


def require_token_grids():
    assert [token_grid(size) for size in (64, 128, 256)] == [16, 24, 32]
    for size, side in ((16, 4), (32, 8), (64, 16), (128, 24), (256, 32)):
        assert seen_token_sides(DenoiserConfig.preset("smoke", size), size) == {side}


def test_defect_06_token_grids(monkeypatch):
    """16, 24 and 32 tokens a side for 64, 128 and 256 voxels, in the table and in the network; 16
    or 32 for 128 is the defect.
    """
    require_token_grids()
    for wrong in (16, 32):
        monkeypatch.setitem(denoiser_module.TOKEN_GRIDS, 128, wrong)
        with pytest.raises((AssertionError, ValueError)):
            require_token_grids()


def test_patches_keep_the_pitch_of_the_tokens():
    for size, n, side in ((64, 32, 8), (128, 64, 12), (128, 16, 3), (256, 64, 8), (256, 128, 16)):
        assert seen_token_sides(DenoiserConfig.preset("smoke", size), n) == {side}
    assert [DenoiserConfig.preset("smoke", size).patch_step for size in (16, 32, 64, 128, 256)] == [
        4,
        4,
        4,
        16,
        8,
    ]


@pytest.mark.parametrize(
    "source, target", [(32, 24), (24, 32), (16, 12), (8, 4), (4, 8), (5, 7), (6, 6)]
)
def test_overlaps_are_areas(source, target):
    share = overlap_weights(source, target, torch.zeros((), dtype=torch.float64))
    fine = torch.arange(source * target)  # both cells are whole numbers of these
    counted = (
        torch.zeros(target, source, dtype=torch.float64).index_put_(
            (fine // source, fine // target),
            torch.ones(len(fine), dtype=torch.float64),
            accumulate=True,
        )
        / source
    )
    assert torch.allclose(share, counted) and torch.allclose(
        share.sum(1), torch.ones(target, dtype=torch.float64)
    )
    # so the mean survives
    assert torch.allclose(share.sum(0), torch.full((source,), target / source, dtype=torch.float64))


def test_regrid():
    x = random(0, 2, 3, 8, 8, 8, dtype=torch.float64)
    assert (
        torch.allclose(regrid(x, 4), F.avg_pool3d(x, 2))
        and torch.allclose(regrid(x, 16), F.interpolate(x, scale_factor=2, mode="nearest"))
        and regrid(x, 8) is x
    )
    down = regrid(x, 6)
    assert (
        down.shape == (2, 3, 6, 6, 6)
        and regrid(down, 8).shape == x.shape
        and torch.allclose(down.mean((2, 3, 4)), x.mean((2, 3, 4)), atol=1e-7)
    )
    # a patch at whole tokens has the tokens of the whole
    assert torch.allclose(regrid(x[..., :4, 4:, :4], 3), down[..., :3, 3:, :3], atol=1e-7)
    only_z = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    assert torch.allclose(
        regrid(only_z, 6)[0, 0, :, 0, 0],
        torch.tensor([0.25, 1.5, 2.75, 4.25, 5.5, 6.75]),
        atol=1e-6,
    )


# the depth prior


def require_depth_prior():
    net = seeded(Denoiser, SMOKE)
    geometry = beams(2, 0.0, 90.0)
    xrays = 2 + random(0, 2, 2, 32, 32)
    entered = []
    net.enter.register_forward_pre_hook(lambda layer, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        told = net.condition(xrays, geometry)
        x_t = random(1, 2, 1, 16, 16, 16)
        net(x_t, torch.full((2,), 0.5), told)
    assert (
        told.prior.shape == (2, 16, 16, 16, 16)
        and net.enter.in_channels == 17
        and entered[0].shape[1] == 17
    )
    assert torch.equal(entered[0][:, :1], x_t) and torch.equal(entered[0][:, 1:], told.prior)
    # no channel repeats the others
    assert torch.linalg.matrix_rank(told.prior.transpose(0, 1).flatten(1).double()) == 16
    return net, x_t, told


def test_defect_11_depth_prior(monkeypatch):
    """16 channels of the prior are kept and concatenated: 17 in all; collapsed to one, or one of
    them repeated, is the defect.
    """
    net, x_t, told = require_depth_prior()
    for fewer in (told.prior.mean(1, keepdim=True), told.prior[:, :8]):
        with pytest.raises(ValueError, match="prior must be"):
            net(x_t, torch.full((2,), 0.5), told._replace(prior=fewer))
    with monkeypatch.context() as patched:
        patched.setattr(denoiser_module, "DEPTH_PRIOR_CHANNELS", 1)
        with pytest.raises(AssertionError):
            require_depth_prior()
    kept = DepthPrior.forward
    monkeypatch.setattr(
        DepthPrior,
        "forward",
        lambda self, *inputs: kept(self, *inputs).mean(1, keepdim=True).expand(-1, 16, -1, -1, -1),
    )
    with pytest.raises(AssertionError):
        require_depth_prior()


def test_prior_reads_the_true_rays():
    "A bright pixel changes the prior only where its ray passes; parallel rays would end elsewhere."
    prior = seeded(DepthPrior, 16, 4)
    geometry = beams(1, 25.0, source_to_isocenter_mm=500.0, source_to_detector_mm=900.0)
    for block in prior.views.blocks:
        torch.nn.init.zeros_(block.second.weight)
    # features of the pixel's 3×3 neighbourhood alone
    for up in prior.views.up:
        torch.nn.init.zeros_(up.weight)
    dark = torch.full((1, 1, 32, 32), 2.0)
    bright = dark.clone()
    bright[..., 9, 22] = 6.0
    with torch.no_grad():
        changed = (prior(bright, geometry) != prior(dark, geometry)).any(1).flatten()
    uv, _ = geometry.project_points(geometry.grid.centers_mm().reshape(1, -1, 3))
    near = ((uv[0, 0] - torch.tensor([22.5, 9.5])).abs() < 2).all(-1)  # 3×3 pixels, read bilinearly
    assert changed.any() and torch.equal(changed, near)


def test_prior_knows_the_depth():
    prior, geometry = seeded(DepthPrior, 16, 8), beams(1, 0.0)
    along = lambda: prior(torch.full((1, 1, 32, 32), 3.0), geometry)[0, :, 8, :, 8].detach()
    assert (along().amax(1) - along().amin(1)).median() > 0.2
    with torch.no_grad():
        prior.first.weight[:, 8:] = 0  # deaf to the depth
    assert (along().amax(1) - along().amin(1)).max() < 0.02


def test_prior_of_any_views_and_any_batch():
    prior = seeded(DepthPrior, 16, 4)
    geometry = beams(2, 0.0, 90.0, 40.0)
    xrays = 2 + random(0, 2, 3, 32, 32)
    order = [2, 0, 1]
    with torch.no_grad():
        whole = prior(xrays, geometry)
        assert torch.allclose(prior(xrays[:, order], geometry.select(order)), whole, atol=1e-5)
        assert torch.allclose(prior(xrays[1:], geometry[1:2]), whole[1:], atol=1e-5)
        # one geometry for all scans
        assert torch.allclose(prior(xrays, geometry[0]), whole, atol=1e-5)
        for views in ([1], [0, 1]):
            assert not torch.allclose(
                prior(xrays[:, views], geometry.select(views)), whole, atol=1e-2
            )


def test_a_view_that_does_not_see_a_voxel_has_no_say():
    prior = seeded(DepthPrior, 16, 4)
    xrays = 2 + random(0, 1, 2, 32, 32)
    narrow = beams(1, 0.0, 90.0)
    narrow = replace(
        narrow,
        column_step_mm=narrow.column_step_mm * torch.tensor([[[1.0], [0.2]]]),
        row_step_mm=narrow.row_step_mm * torch.tensor([[[1.0], [0.2]]]),
    )
    unseen = ~project_voxels(narrow, 16).seen[0, 1].view(16, 16, 16)
    with torch.no_grad():
        both = prior(xrays, narrow)[0]
        first = prior(xrays[:, :1], narrow.select([0]))[0]
        second = prior(xrays[:, 1:], narrow.select([1]))[0]
    # nobody sees it: nothing is said
    assert torch.equal(second[:, unseen], prior.last.bias[:, None].expand(-1, int(unseen.sum())))
    assert (
        0 < unseen.float().mean() < 1
        and torch.allclose(both[:, unseen], first[:, unseen], atol=1e-5)
        and not torch.allclose(both[:, ~unseen], first[:, ~unseen], atol=1e-2)
    )


def test_prior_of_a_patch_is_cut_from_the_whole():
    geometry = beams(1, 10.0, 75.0)
    whole = project_voxels(geometry, 16)
    part = project_patch_voxels(geometry, 16, (4, 8, 0, 8))
    cut = lambda t: t.unflatten(2, (16,) * 3)[:, :, 4:12, 8:16, 0:8].flatten(2, 4)
    assert all(torch.allclose(cut(a).float(), b.float(), atol=1e-5) for a, b in zip(whole, part))
    naive = project_voxels(geometry.on(Grid((8, 8, 8), patch_affine(geometry.grid, (4, 8, 0)))), 8)
    # the depth of the patch's own middle would be wrong
    assert not torch.allclose(naive.depth, cut(whole.depth), atol=0.1)
    prior = seeded(DepthPrior, 16, 4)
    with torch.no_grad():
        assert torch.allclose(
            prior(2 + random(0, 1, 2, 32, 32), geometry, (4, 8, 0, 8)),
            prior(2 + random(0, 1, 2, 32, 32), geometry)[..., 4:12, 8:16, 0:8],
            atol=1e-4,
        )


def test_voxels_are_lifted_in_portions(monkeypatch):
    "As many at a time as memory allows: the same values and gradients."
    geometry = beams(1, 10.0, 75.0)
    xrays = 2 + random(0, 1, 2, 32, 32)
    outcomes = []
    for portion in (2**20, 1000):
        monkeypatch.setattr(denoiser_module, "VOXELS_AT_ONCE", portion)
        prior = seeded(DepthPrior, 16, 4, recompute=True)
        out = prior(xrays, geometry)
        (out * random(1, *out.shape)).sum().backward()
        outcomes.append([out, *(p.grad for p in prior.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*outcomes))


def patch_affine(grid, corner):
    affine = grid.affine.copy()
    affine[:3, 3] = grid.index_to_mm(corner[::-1])
    return affine


def test_a_fine_detector_is_binned_to_the_grid():
    prior = seeded(DepthPrior, 16, 4)
    fine = 2 + random(0, 1, 1, 128, 128)
    with torch.no_grad():
        a = prior(fine, beams(1, 0.0, detector=128))
        b = prior(F.avg_pool2d(fine, 4), beams(1, 0.0))
    assert torch.allclose(a, b, atol=1e-4)


# the network


def test_a_new_network_answers_zero():
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


def test_told_nothing_is_a_condition_that_is_not_present():
    net = listening(replace(SMOKE, condition_channels=2))
    x_t = random(0, 3, 1, 16, 16, 16)
    t = torch.tensor([0.2, 0.5, 1.0])
    with torch.no_grad():
        xrays = 2 + random(1, 3, 2, 32, 32)
        beam = beams(3, 0.0, 90.0)
        extra = random(2, 3, 2, 16, 16, 16)
        told = net.condition(xrays, beam, 0 * extra)
        nothing, all_told = net(x_t, t), net(x_t, t, told)
        assert torch.equal(net(x_t, t, told.dropped()), nothing) and torch.equal(
            net(x_t, t, told.dropped(torch.zeros(3, dtype=torch.bool))), all_told
        )
        some = net(x_t, t, told.dropped(torch.tensor([False, True, False])))
        assert (
            torch.allclose(some[1], nothing[1], atol=1e-5)
            and torch.allclose(some[::2], all_told[::2], atol=1e-5)
            and (nothing - all_told).abs().amax((1, 2, 3, 4)).min() > 0.05
        )
        # the coarse volume is still told, the X-rays are not
        kept = net(x_t, t, net.condition(xrays, beam, extra).dropped())
        assert (
            torch.equal(kept, net(x_t, t, net.condition(1.5 * xrays, beam, extra).dropped()))
            and (kept - nothing).abs().amax((1, 2, 3, 4)).min() > 0.01
        )
        net.untold += 1.0  # the learned vector is what it hears instead
        assert not torch.allclose(net(x_t, t), nothing, atol=1e-3) and torch.equal(
            net(x_t, t, told), all_told
        )


def test_one_volume_does_not_change_another():
    net = listening()
    x_t = random(0, 3, 1, 16, 16, 16)
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        told = net.condition(2 + random(1, 3, 2, 32, 32), beams(3, 0.0, 90.0))
        whole = net(x_t, t, told)
        for n in range(3):
            alone = Conditioning(*(None if part is None else part[n : n + 1] for part in told))
            assert torch.allclose(
                net(x_t[n : n + 1], t[n : n + 1], alone), whole[n : n + 1], atol=1e-5
            )
        assert torch.equal(net(x_t, t, told), whole)
    # two at once where no gradient is asked for, one where it is
    single = Conditioning(*(None if part is None else part[:1] for part in told))
    assert torch.allclose(net(x_t[:1], t[:1], single), whole[:1], atol=1e-5)


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


def test_place_tells_the_axes_apart():
    place = seeded(PositionEmbedding, 3)
    axis = torch.linspace(-1, 1, 4)
    moved = (
        lambda k: place(
            torch.zeros(1, 3, 4, 4, 4),
            torch.stack([axis + (0.5 if a == k else 0) for a in range(3)])[None],
        ).detach()
        - place(torch.zeros(1, 3, 4, 4, 4), axis.expand(1, 3, 4)).detach()
    )
    for k in range(3):
        change = moved(k)
        others = [a + 2 for a in range(3) if a != k]
        assert change.abs().max() > 0.1 and torch.allclose(
            change, change.mean(others, keepdim=True).expand_as(change), atol=1e-5
        )


def test_waves():
    x = torch.tensor([[0.0, 0.5, -1.0]])
    assert (
        sinusoids(x).shape == (1, 3, 9)
        and torch.allclose(sinusoids(x)[0, 1, :3], torch.tensor([0.5, math.sin(math.pi / 4), 1.0]))
        and torch.allclose(
            sinusoids(x)[0, :, 5], torch.tensor([1.0, math.cos(math.pi / 4), 0.0]), atol=1e-6
        )
    )
    codes = time_embedding(torch.tensor([0.0, 1.0]))
    assert (
        codes.shape == (2, 64)
        and torch.allclose(codes[0], torch.cat([torch.zeros(32), torch.ones(32)]))
        and torch.allclose(codes[1, [0, 31]], torch.tensor([1.0, 100.0]).sin(), atol=1e-4)
    )


def test_patches_one_by_one_or_as_a_batch():
    net = listening(replace(SMOKE, condition_channels=1))
    xrays = 2 + random(0, 1, 2, 32, 32)
    geometry = beams(1, 0.0, 90.0)
    extra = random(1, 1, 1, 16, 16, 16)
    x_t = random(2, 2, 1, 8, 8, 8)
    corners = [(0, 8, 4), (4, 0, 8)]
    with torch.no_grad():
        told = net.condition(xrays, geometry, extra)
        cuts = [told.crop(*corner, 8) for corner in corners]
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
    """Under bf16 autocast, as the large presets train: the same answer to its precision, and finite
    gradients.
    """
    net = listening()
    xrays = 2 + random(0, 2, 2, 32, 32)
    answers = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            answers.append(
                net(
                    random(1, 2, 1, 16, 16, 16),
                    torch.tensor([0.3, 0.8]),
                    net.condition(xrays, beams(2, 0.0, 90.0)),
                ).float()
            )
    assert (answers[0] - answers[1]).square().mean().sqrt() < 0.03 * answers[
        0
    ].square().mean().sqrt()
    answers[1].square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_every_weight_learns():
    net = listening(replace(SMOKE, condition_channels=1))
    xrays = 2 + random(0, 2, 2, 32, 32)
    told = net.condition(xrays, beams(2, 0.0, 90.0), random(1, 2, 1, 16, 16, 16)).dropped(
        torch.tensor([True, False])
    )
    net(random(2, 2, 1, 16, 16, 16), torch.tensor([0.3, 0.8]), told).square().sum().backward()
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
        told = net.condition(xrays, geometry).dropped(torch.rand(3, generator=seed) < 0.25)
        loss = (net(a * bodies + b * noise, t, told) - (a * noise - b * bodies)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        losses.append(float(loss.detach()))
    return net.eval(), losses, bodies, xrays, geometry


def test_it_learns_three_bodies_by_heart(trained):
    net, losses, bodies, xrays, geometry = trained
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
    noise, t = random(8, *bodies.shape), torch.ones(3)
    with torch.no_grad():
        right, wrong, nothing = (
            float((-net(noise, t, told) - bodies).abs().mean())
            for told in (
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
        told = net.condition(xrays, geometry)
        base = net(x_t, t, told)
        for changed in (
            net(x_t, t + 0.2, told),
            net(x_t, t, told._replace(prior=told.prior.roll(1, 0))),
            net(x_t, t, told._replace(camera=net.camera(beams(3, 30.0, 120.0)))),
            net(x_t, t, told._replace(corner=told.corner + 4)),
            net(x_t, t),
            net(x_t.roll(1, 0), t, told),
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


# configuration and refusals


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
        (lambda net, x, t, told: net(x[:, 0], t, told), "x_t: must be"),
        (lambda net, x, t, told: net(x.expand(-1, 2, -1, -1, -1), t, told), "x_t: must be"),
        (
            lambda net, x, t, told: net(torch.zeros(2, 1, 32, 32, 32), t, told),
            "x_t: must be .* n = 16",
        ),
        (
            lambda net, x, t, told: net(x[..., :10, :10, :10], t, told.crop(0, 0, 0, 10)),
            "smaller multiple of 4",
        ),
        (lambda net, x, t, told: net(x, t[:1], told), r"time: must be \(2,\)"),
        (
            lambda net, x, t, told: net(x, t * 999, told),
            "time: must be normalised to 0 to 1, got 499.5",
        ),
        (lambda net, x, t, told: net(x, t * math.nan, told), "time: must be normalised"),
        (lambda net, x, t, told: net(x[..., :8, :8, :8], t), "condition: a patch of 8³"),
        (lambda net, x, t, told: net(x[:1], t[:1], told), "condition: its prior must be"),
        (
            lambda net, x, t, told: net(x, t, told._replace(extra=x)),
            "extra: this network takes none",
        ),
        (
            lambda net, x, t, told: net.condition(torch.zeros(2, 2, 32, 32), None),
            "geometry: X-rays say nothing",
        ),
        (
            lambda net, x, t, told: net.condition(torch.zeros(2, 3, 32, 32), beams(2, 0.0, 90.0)),
            r"xrays: the geometry describes .* 2, 32, 32\), got \(2, 3, 32, 32\)",
        ),
        (
            lambda net, x, t, told: net.condition(torch.zeros(2, 32, 32), beams(2, 0.0, 90.0)),
            "xrays: the geometry describes",
        ),
        (
            lambda net, x, t, told: net.condition(torch.zeros(3, 2, 32, 32), beams(2, 0.0, 90.0)),
            r"geometry: its batch shape must be \(\) or \(3,\)",
        ),
        (
            lambda net, x, t, told: net.condition(
                torch.zeros(1, 1, 30, 30), beams(1, 0.0, detector=30)
            ),
            "multiples of 4, got 30×30",
        ),
        (
            lambda net, x, t, told: net.condition(
                torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), x
            ),
            "extra: this network takes none",
        ),
        (
            lambda net, x, t, told: net.condition(
                torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), patch=(0, 0, 12, 8)
            ),
            "crop: a patch of 8³",
        ),
        (lambda net, x, t, told: told.crop(-1, 0, 0, 4), "crop: a patch of 4³"),
    ],
)
def test_what_is_refused(attempt, words):
    net = seeded(Denoiser, SMOKE)
    with torch.no_grad():
        told = net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0))
    with pytest.raises(ValueError, match=words) as problem:
        attempt(net, torch.zeros(2, 1, 16, 16, 16), torch.tensor([0.5, 0.5]), told)
    assert "\n" not in str(problem.value)


def test_a_stage_that_needs_the_coarser_one_says_so():
    net = seeded(Denoiser, replace(SMOKE, condition_channels=1))
    with refused("extra"):
        net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0))
    with pytest.raises(ValueError, match="extra"):
        net.condition(torch.zeros(2, 2, 32, 32), beams(2, 0.0, 90.0), torch.zeros(2, 1, 8, 8, 8))
