"""View encoder and epipolar attention against brute force; any size, any pose, memory."""

import copy
import itertools
import pickle
import time

import pytest
import torch
from refusals import refused
from torch import nn

from ct_nb.drr2ct.epipolar_attention import EpipolarAttention, EpipolarNeighbours, squares
from ct_nb.drr2ct.view_encoder import (
    ViewBlock,
    ViewPyramid,
    WindowAttention,
    head_count,
    sinusoidal_positions,
    top_k_tokens,
    window_labels,
)
from ct_nb.layers.camera import camera_tokens
from ct_nb.physics.epipolar import nearest_on_epipolar_line
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid

SMALL = dict(channels=(16, 32, 48, 64), lifted=(4, 8, 12), depths=(2, 1, 1, 1))


def cameras(azimuth, batch=1, detector=(64, 64), **settings):
    "Geometry (batch,) whose scans differ by a small tilt."
    stack = [
        ConeBeam.orbit(
            list(azimuth),
            [4.0 * b + 3.0 * v for v in range(len(azimuth))],
            detector_shape=detector,
            pixel_mm=512 / detector[0],
            **settings,
        )
        for b in range(batch)
    ]
    return ConeBeam.stack(stack).to(torch.float32)


def awake(module):
    "The module with weights where a fresh one has zeros."
    torch.manual_seed(5)
    for layer in module.modules():
        if isinstance(layer, EpipolarAttention):
            nn.init.normal_(layer.out.weight, std=layer.out.in_features**-0.5)
            if layer.gate is not None:
                nn.init.normal_(layer.gate)
        if isinstance(layer, ViewBlock):
            nn.init.normal_(layer.camera.weight, std=0.1)
    return module


def pyramid(**settings):
    torch.manual_seed(0)
    return awake(ViewPyramid(2, **{**SMALL, **settings}))


# ---- windows


def dense_windows(attention, x, kept):
    "All pairs of tokens, one by one."
    n, rows, columns, c = x.shape
    size = [min(attention.window, rows), min(attention.window, columns)]
    shift = [attention.shift if full > s else 0 for full, s in zip((rows, columns), size)]
    q, k, v = (t.view(n, rows, columns, attention.heads, -1) for t in attention.qkv(x).chunk(3, -1))
    out = torch.zeros_like(v)

    def home(r, c):
        return ((r - shift[0]) // size[0], (c - shift[1]) // size[1])

    for b, r, c in itertools.product(range(n), range(rows), range(columns)):
        if not kept[b, r, c]:
            continue
        seen = [
            (s, t)
            for s, t in itertools.product(range(rows), range(columns))
            if home(s, t) == home(r, c) and kept[b, s, t]
        ]
        for head in range(attention.heads):
            logits = torch.stack(
                [
                    q[b, r, c, head] @ k[b, s, t, head] / q.shape[-1] ** 0.5
                    + attention.bias[
                        (s - r + attention.window - 1) * (2 * attention.window - 1)
                        + t
                        - c
                        + attention.window
                        - 1,
                        head,
                    ]
                    for s, t in seen
                ]
            )
            out[b, r, c, head] = sum(
                w * v[b, s, t, head] for w, (s, t) in zip(logits.softmax(0), seen)
            )
    return attention.out(out.flatten(3)) * kept[..., None]


@pytest.mark.parametrize(
    "rows, columns, window, shift",
    [(4, 8, 4, 0), (4, 8, 4, 2), (5, 7, 4, 2), (3, 6, 4, 2), (6, 6, 5, 1), (2, 2, 8, 4)],
)
@pytest.mark.parametrize("count", [None, 5, 1])
def test_windows_equal_their_definition(rows, columns, window, shift, count):
    torch.manual_seed(rows + columns)
    attention = WindowAttention(4, 2, window, shift).double()
    x = torch.randn(2, rows, columns, 4, dtype=torch.float64)
    kept = top_k_tokens(x, count)
    everyone = torch.ones(x.shape[:3], dtype=torch.bool)
    assert torch.allclose(
        attention(x, kept),
        dense_windows(attention, x, everyone if kept is None else kept),
        atol=1e-12,
    )


@pytest.mark.parametrize("count", [None, 7])
def test_windows_gradients_are_right_and_padding_has_none(count):
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, 4, 2).double()
    x = torch.randn(1, 5, 7, 4, dtype=torch.float64, requires_grad=True)
    kept = top_k_tokens(x, count)
    assert torch.autograd.gradcheck(lambda x: attention(x, kept), x)
    attention(x, kept).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_labels_say_who_shares_a_piece():
    for rows, columns, size, shift in (
        (8, 8, (4, 4), (2, 2)),
        (7, 9, (4, 4), (2, 1)),
        (3, 9, (3, 4), (0, 2)),
    ):
        labels = window_labels(rows, columns, size, shift)
        assert (labels != 4).sum() == rows * columns and all(
            n % w == 0 for n, w in zip(labels.shape, size)
        )


def test_packing_kept_tokens_leaves_out_only_what_is_not_kept():
    "All tokens kept by a mask go through the packed path and give what the plain path gives."
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 4, 2)
    x = torch.randn(2, 9, 8, 8)
    assert torch.allclose(
        attention(x, torch.ones(2, 9, 8, dtype=torch.bool)), attention(x), atol=1e-5
    )
    assert torch.equal(attention(x, torch.zeros(2, 9, 8, dtype=torch.bool)), torch.zeros_like(x))


def test_strongest_takes_the_largest_norms():
    x = torch.randn(3, 4, 5, 6)
    kept, norm = top_k_tokens(x, 7), x.norm(dim=-1)
    assert (kept.flatten(1).sum(1) == 7).all() and all(
        norm[b][kept[b]].min() >= norm[b][~kept[b]].max() for b in range(3)
    )
    assert (
        top_k_tokens(x, 20) is None
        and top_k_tokens(x, 10**9) is None
        and top_k_tokens(x, None) is None
    )


def test_positions_at_any_size():
    like = torch.zeros(())
    for rows, columns, channels in ((8, 8, 16), (8, 40, 18), (56, 64, 96), (8, 8, 3)):
        code = sinusoidal_positions(rows, columns, channels, like)
        assert code.shape == (rows, columns, channels) and code.abs().max() <= 1
        if channels >= 16:
            assert torch.pdist(code.flatten(0, 1)[:2048]).min() > 1e-3
    assert torch.allclose(
        sinusoidal_positions(40, 24, 16, like)[4:-4, 8:-8],
        sinusoidal_positions(32, 8, 16, like),
        atol=1e-6,
    )


# ---- the pyramid


@pytest.mark.parametrize("rows, columns", [(32, 32), (96, 64), (64, 224)])
@pytest.mark.parametrize("azimuth", [(0.0,), (0.0, 90.0, 45.0)])
def test_sizes_and_numbers_of_views(rows, columns, azimuth):
    features = pyramid(depths=(1, 2, 1, 1))(
        torch.randn(2, len(azimuth), 2, rows, columns), cameras(azimuth, 2, (rows, columns))
    )
    assert [tuple(f.shape) for f in features] == [
        (2, len(azimuth), c, rows // s, columns // s) for c, s in zip((4, 8, 12), (4, 8, 16))
    ]
    assert all(f.isfinite().all() for f in features)


def test_every_parameter_gets_a_gradient():
    net = pyramid(epipolar_strides=(4, 8, 16, 32))
    sum(
        f.square().mean() for f in net(torch.randn(1, 2, 2, 64, 64), cameras((0.0, 90.0)))
    ).backward()
    assert not [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not [name for name, p in net.named_parameters() if not p.grad.any()]


def test_checkpointing_changes_no_value_and_no_gradient():
    x = torch.randn(2, 2, 2, 64, 64)
    where = cameras((0.0, 90.0), 2)
    results = []
    for settings in ({}, {"checkpoint": True}):
        net, y = pyramid(**settings), x.clone().requires_grad_(True)
        features = net(y, where)
        sum(f.square().mean() for f in features).backward()
        results.append([*features, y.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointing_keeps_less():
    "Bytes that autograd holds between the passes."

    def held(**settings):
        net, total = pyramid(**settings), [0]

        def pack(t):
            total[0] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(1, 2, 2, 64, 64), cameras((0.0, 90.0)))
        return total[0]

    assert held(checkpoint=True) < 0.5 * held()


@pytest.mark.parametrize("count", [64, 65, 10**6])
def test_keeping_all_tokens_is_keeping_none_back(count):
    x = torch.randn(1, 2, 2, 64, 64)
    where = cameras((0.0, 90.0))
    assert all(
        torch.equal(a, b) for a, b in zip(pyramid()(x, where), pyramid(keep_tokens=count)(x, where))
    )


def test_fewer_tokens_only_from_stride_8_on():
    net = pyramid(keep_tokens=9)
    assert [stage[0].keep_tokens for stage in net.stages] == [None, 9, 9, 9]
    features = net(torch.randn(1, 2, 2, 64, 64), cameras((0.0, 90.0)))
    assert all(f.isfinite().all() for f in features) and not torch.equal(
        features[1], pyramid()(torch.randn(1, 2, 2, 64, 64), cameras((0.0, 90.0)))[1]
    )
    sum(f.square().mean() for f in features).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_tokens_that_are_not_kept_pass_the_attention_unchanged():
    torch.manual_seed(0)
    block = ViewBlock(8, 2, 4, 2, 4, keep_tokens=6)
    x = torch.randn(2, 8, 8, 8)
    nn.init.zeros_(block.mlp[-1].weight), nn.init.zeros_(block.mlp[-1].bias)
    changed = (block(x, torch.zeros(2, 4)) != x).any(-1)
    assert torch.equal(changed, top_k_tokens(x, 6))


def test_a_fresh_pyramid_lets_views_alone_and_a_trained_one_does_not_mind_their_order():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 2, 64, 64)
    where = cameras((0.0, 90.0, 30.0))
    fresh, net = ViewPyramid(2, **SMALL), pyramid()
    with torch.no_grad():
        assert all(
            torch.allclose(a[:, :1], b, atol=1e-5)
            for a, b in zip(fresh(x, where), fresh(x[:, :1], where.select([0])))
        )
        order = [2, 0, 1]
        assert all(
            torch.allclose(a[:, order], b, atol=1e-4)
            for a, b in zip(net(x, where), net(x[:, order], where.select(order)))
        )
        changed = x.clone()
        changed[:, 1] += 1
        talks = net(changed, where)[2][:, 0] - net(x, where)[2][:, 0]
        silent = pyramid(epipolar_strides=())
        assert talks.abs().max() > 1e-3 and torch.allclose(
            silent(changed, where)[2][:, 0], silent(x, where)[2][:, 0], atol=1e-5
        )


def test_every_stage_hears_the_camera():
    "With the rays silenced, another camera still changes every stage's output."
    net = pyramid(epipolar_strides=())
    nn.init.zeros_(net.rays.weight)
    x, stages = torch.randn(1, 1, 2, 64, 64), []
    hooks = [
        stage[-1].register_forward_hook(lambda _, inputs, output: stages.append(output))
        for stage in net.stages
    ]
    with torch.no_grad():
        net(x, cameras((0.0,))), net(x, cameras((90.0,)))
    assert len(hooks) == 4 and all(
        (a - b).abs().max() > 1e-3 for a, b in zip(stages[:4], stages[4:])
    )
    x = torch.randn(1, 8, 8, 16)
    for block in (stage[0] for stage in pyramid().stages[:1]):
        assert not torch.equal(block(x, torch.zeros(1, 32)), block(x, torch.ones(1, 32)))


def test_batch_equals_one_by_one():
    x = torch.randn(2, 2, 2, 64, 64)
    where = cameras((0.0, 90.0), 2)
    net = pyramid()
    with torch.no_grad():
        together = net(x, where)
        alone = [net(x[b : b + 1], where[[b]]) for b in range(2)]
    assert all(torch.allclose(t, torch.cat(a), atol=1e-4) for t, a in zip(together, zip(*alone)))


def test_heads_fit_the_channels():
    assert [
        head_count(c, h)
        for c, h in (
            (96, 3),
            (192, 6),
            (384, 12),
            (768, 24),
            (16, 3),
            (32, 6),
            (64, 24),
            (12, 3),
            (50, 3),
        )
    ] == [3, 6, 12, 24, 1, 2, 4, 1, 2]


def test_three_channels_and_one_depth_stand_for_four():
    a = ViewPyramid(2, (8, 12, 16), (4, 8, 12), 1)
    b = ViewPyramid(2, (8, 12, 16, 16), (4, 8, 12), (1, 1, 1, 1))
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(channels=(8, 8)), "channels"),
        (dict(depths=(1, 0, 1, 1)), "depths"),
        (dict(heads=(1, 1)), "heads"),
        (dict(lifted=(4, 4)), "lifted"),
        (dict(epipolar_strides=(5,)), "epipolar_strides"),
        (dict(window=1), "window"),
        (dict(keep_tokens=0), "keep_tokens"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(settings, words):
    with pytest.raises(ValueError, match=f"^{words}: must be"):
        ViewPyramid(2, **{**SMALL, **settings})


def test_images_that_do_not_fit_are_a_sentence():
    with pytest.raises(ValueError, match="multiples of 32"):
        pyramid()(torch.zeros(1, 2, 2, 100, 64), cameras((0.0, 90.0), 1, (100, 64)))
    with refused("geometry"):
        pyramid()(torch.zeros(1, 2, 2, 64, 64), cameras((0.0, 90.0, 30.0)))


def test_it_is_still_fast():
    """Processor time of forward and backward, so that a busy machine does not fail it; the bound is
    two cores for 0.35 s.
    """
    net = ViewPyramid(2, (16, 32, 64, 64), (4, 24, 48), (1, 1, 1, 1))
    x = torch.randn(2, 2, 2, 256, 256)
    where = cameras((0.0, 90.0), 2, (256, 256))
    taken = []
    for _ in range(3):
        start = time.process_time()
        sum(f.square().mean() for f in net(x, where)).backward()
        taken.append(time.process_time() - start)
    print(f"{min(taken):.3f} s")
    assert min(taken) <= 0.7


# ---- epipolar neighbours


def test_a_line_crosses_only_the_first_tokens_of_its_list():
    """Every point of a token's ray is shown, in every other view, by one of its h + w − 1 nearest
    tokens.
    """
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        angles = (
            torch.rand(2, 3, generator=generator) * torch.tensor([[360.0], [70.0]])
            - torch.tensor([[180.0], [35.0]])
        ).tolist()
        where = ConeBeam.stack([ConeBeam.orbit(*angles, detector_shape=(128, 192), pixel_mm=3.0)])
        lists = EpipolarNeighbours(8 + 12 - 1)(where, (8, 12))[0]
        rays = where.pixel_centers_mm((8, 12))[0].flatten(1, 2)
        along = torch.linspace(0.5, 0.85, 40, dtype=torch.float64)[:, None]
        for i, token in itertools.product(range(3), (0, 17, 50, 95)):
            uv, depth = where.project_points(
                where.source_mm[0, i] + along * (rays[i, token] - where.source_mm[0, i])
            )
            for o, j in enumerate(j for j in range(3) if j != i):
                place = (uv[0, j] / 16).floor().long()
                seen = (
                    (depth[0, j] > 0)
                    & (place >= 0).all(-1)
                    & (place < torch.tensor([12, 8])).all(-1)
                )
                assert set((place[seen, 1] * 12 + place[seen, 0]).tolist()) <= set(
                    lists[i, token, o].tolist()
                )


@pytest.mark.parametrize(
    "azimuth, elevation",
    [((0.0, 90.0), 0.0), ((0.0, 90.0), (10.0, -15.0)), ((20.0, 75.0), (0.0, 25.0))],
)
def test_a_point_lit_in_space_is_found_in_both_views(azimuth, elevation):
    """Seen with the projector's own eyes: the brightest token of each view is among the neighbours
    of the brightest token of the other.
    """
    elevation = [elevation] * 2 if isinstance(elevation, float) else list(elevation)
    where = ConeBeam.stack([ConeBeam.orbit(list(azimuth), elevation, grid=Grid.cube(32))]).to(
        torch.float32
    )
    lists = EpipolarNeighbours(32)(where, (16, 16))[0, :, :, 0]
    generator = torch.Generator().manual_seed(1)
    for z, y, x in torch.randint(6, 26, (12, 3), generator=generator).tolist():
        mu = torch.zeros(1, 32, 32, 32)
        mu[0, z, y, x] = 1.0
        first, second = (
            nn.functional.avg_pool2d(project(mu, where)[0][:, None], 16)
            .flatten(1)
            .argmax(1)
            .tolist()
        )
        assert second in lists[0, first] and first in lists[1, second]


def test_lists_are_those_of_the_geometry_in_the_order_of_the_views():
    where = cameras((0.0, 90.0, 40.0), 2)
    lists = EpipolarNeighbours(5)(where, (4, 4))
    assert lists.shape == (2, 3, 16, 2, 5) and lists.dtype == torch.int64
    for i in range(3):
        for o, j in enumerate(j for j in range(3) if j != i):
            assert torch.equal(lists[:, i, :, o], nearest_on_epipolar_line(where, i, j, (4, 4), 5))


def test_no_other_view_no_neighbours_and_never_more_than_there_are():
    assert EpipolarNeighbours(8)(cameras((0.0,)), (4, 4)).shape == (1, 1, 16, 0, 8)
    assert EpipolarNeighbours(99)(cameras((0.0, 90.0)), (2, 4)).sort(-1).values.flatten(
        0, 3
    ).unique(dim=0).tolist() == [list(range(8))]
    with pytest.raises(ValueError, match="neighbours"):
        EpipolarNeighbours(0)


def test_lists_are_remembered_by_pose_and_forgotten_when_it_moves():
    find, where = EpipolarNeighbours(4), cameras((0.0, 90.0), 3)
    first = find(where, (4, 4))
    assert find.searches == 3
    assert torch.equal(find(where[[2, 0, 2]], (4, 4)), first[[2, 0, 2]]) and find.searches == 3
    assert find(where, (2, 4)).shape[2] == 8 and find.searches == 6  # another image size
    nudged = ConeBeam(
        where.source_mm + torch.tensor([0.0, 0.0, 40.0]),
        where.detector_center_mm,
        where.column_step_mm,
        where.row_step_mm,
        where.detector_shape,
        where.grid,
    )
    assert not torch.equal(find(nudged, (4, 4)), first) and find.searches == 9
    assert torch.equal(find(nudged.select([1, 0]), (4, 4))[:, 0], find(nudged, (4, 4))[:, 1])
    where.source_mm.add_(torch.tensor([0.0, 0.0, 30.0]))  # in place, under the list's feet
    assert torch.equal(find(where, (4, 4)), EpipolarNeighbours(4)(where, (4, 4)))


def test_the_memory_is_bounded_and_stays_behind_when_copied():
    one = 2 * 16 * 1 * 4 * 4  # bytes of a scan's lists
    find = EpipolarNeighbours(4, limit_bytes=3 * one)
    for tilt in range(6):
        find(ConeBeam.stack([ConeBeam.orbit([0.0, 90.0], [float(tilt), 0.0])]), (4, 4))
    assert len(find.cache) == 3 and find.searches == 6
    find(ConeBeam.stack([ConeBeam.orbit([0.0, 90.0], [5.0, 0.0])]), (4, 4))
    assert find.searches == 6  # the last one is still there
    where = cameras((0.0, 90.0), 5)
    assert torch.equal(
        EpipolarNeighbours(4, limit_bytes=0)(where, (4, 4)), EpipolarNeighbours(4)(where, (4, 4))
    )
    assert (
        all(
            len(c.cache) == 0 and c.neighbours == 4
            for c in (copy.deepcopy(find), pickle.loads(pickle.dumps(find)))
        )
        and len(find.cache) == 3
    )


# ---- epipolar attention


def dense_views(block, x, where):
    "All pairs of tokens of all views, with masks."
    b, v, c, h, w = x.shape
    n = h * w
    lists = EpipolarNeighbours(block.find.neighbours)(where, (h, w))
    around = squares(h, w, block.side)
    own, other = torch.zeros(2, b, v * n, v * n, dtype=torch.bool)
    for s, i, t in itertools.product(range(b), range(v), range(n)):
        own[s, i * n + t, i * n + around[t]] = True
        for o, j in enumerate(j for j in range(v) if j != i):
            other[s, i * n + t, j * n + lists[s, i, t, o]] = True
    tokens = block.norm(x.permute(0, 1, 3, 4, 2).reshape(b, v * n, c))
    parts = []
    for layer, mask in ((block.own, own), (block.other, other))[: 1 if v == 1 else 2]:
        q, k, values = (
            t.view(b, v * n, block.heads, -1).transpose(1, 2) for t in layer(tokens).chunk(3, -1)
        )
        parts.append(
            (
                (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
                    ~mask[:, None], -torch.inf
                ),
                values,
            )
        )
    if block.gate is None or v == 1:
        seen = torch.cat([logits for logits, _ in parts], -1).softmax(-1) @ torch.cat(
            [values for _, values in parts], -2
        )
    else:
        share = block.gate.sigmoid()[:, None, None]
        seen = (1 - share) * (parts[0][0].softmax(-1) @ parts[0][1]) + share * (
            parts[1][0].softmax(-1) @ parts[1][1]
        )
    return x + block.out(seen.transpose(1, 2).reshape(b, v * n, c)).view(b, v, h, w, c).permute(
        0, 1, 4, 2, 3
    )


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("views", [1, 2, 4])
def test_equals_dense_attention_with_a_mask(gate, views):
    torch.manual_seed(views)
    block = awake(EpipolarAttention(8, 2, neighbours=5, gate=gate, own=3)).double()
    where = cameras((0.0, 90.0, 30.0, 140.0)[:views], 2).to(torch.float64)
    x = torch.randn(2, views, 8, 4, 5, dtype=torch.float64)
    assert (block(x, where) - dense_views(block, x, where)).abs().max() < 1e-12


def test_squares_are_whole_and_hold_their_token():
    for rows, columns, side in ((4, 6, 3), (5, 5, 4), (2, 7, 5), (1, 1, 5)):
        lists = squares(rows, columns, side)
        for token, one in enumerate(lists.tolist()):
            places = [divmod(t, columns) for t in one]
            assert (
                len(set(one)) == len(one) == min(side, rows) * min(side, columns) and token in one
            )
            for axis, size in ((0, min(side, rows)), (1, min(side, columns))):
                assert (
                    len({p[axis] for p in places})
                    == size
                    == max(p[axis] for p in places) - min(p[axis] for p in places) + 1
                )


@pytest.mark.parametrize("gate", [True, False])
def test_who_is_not_a_neighbour_changes_nothing(gate):
    block = awake(EpipolarAttention(8, 2, neighbours=6, gate=gate, own=3))
    where = cameras((0.0, 80.0, 150.0))
    torch.manual_seed(0)
    x, asking = torch.randn(1, 3, 8, 8, 8), 27
    lists = EpipolarNeighbours(6)(where, (8, 8))[0, 0, asking]
    before = block(x, where)[0, 0].flatten(1)[:, asking]
    allowed = {(0, t) for t in squares(8, 8, 3)[asking].tolist()} | {
        (o + 1, t) for o in (0, 1) for t in lists[o].tolist()
    }
    for view, token in itertools.product(range(3), range(64)):
        y = x.clone()
        y.flatten(3)[0, view, :, token] += 5 * torch.randn(8)
        moved = not torch.equal(block(y, where)[0, 0].flatten(1)[:, asking], before)
        assert moved == ((view, token) in allowed), (view, token)


def test_a_fresh_block_is_the_identity_and_still_learns():
    block = EpipolarAttention(8, 2)
    x = torch.randn(1, 2, 8, 4, 4)
    y = block(x, cameras((0.0, 90.0)))
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert block.out.weight.grad.any()


def test_a_closed_gate_is_one_view():
    """σ(g) → 0: what the other views say is not heard; σ(g) → 1: the token's own surroundings are
    not.
    """
    torch.manual_seed(0)
    block = awake(EpipolarAttention(8, 2))
    where = cameras((0.0, 90.0))
    x = torch.randn(1, 2, 8, 4, 4)
    with torch.no_grad():
        block.gate.fill_(-200.0)
        assert torch.allclose(block(x, where)[:, :1], block(x[:, :1], where.select([0])), atol=1e-6)
        block.gate.fill_(200.0)
        y = x.clone()
        y[:, 1] += 1.0 * torch.randn(8, 4, 4)
        assert not torch.allclose(block(x, where)[:, 0], block(y, where)[:, 0], atol=1e-3)
    assert block.gate.shape == (2,) and EpipolarAttention(8, 2, gate=False).gate is None


FAR = dict(source_to_isocenter_mm=1e7, source_to_detector_mm=1e7 + 500)


@pytest.mark.parametrize(
    "name, where",
    {
        "parallel": ConeBeam.orbit([0.0, 90.0], **FAR),
        "parallel and tilted": ConeBeam.orbit([0.0, 90.0, 30.0], [0.0, 20.0, -10.0], **FAR),
        "one source": ConeBeam.orbit([0.0, 0.0]),
        "opposite": ConeBeam.orbit([0.0, 180.0]),
        "along the body": ConeBeam.orbit([0.0, 0.0], [0.0, 90.0]),
        "one view": ConeBeam.orbit([0.0]),
    }.items(),
)
@pytest.mark.parametrize("gate", [True, False])
def test_corner_cases_are_finite(name, where, gate):
    where = ConeBeam.stack([where]).to(torch.float32)
    block = awake(EpipolarAttention(8, 2, gate=gate))
    x = torch.randn(1, where.views, 8, 8, 8, requires_grad=True)
    answer = block(x, where)
    answer.square().sum().backward()
    assert answer.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())


def test_parallel_lines_are_rows_and_one_source_asks_the_same_place():
    n, rows = torch.arange(64), torch.arange(64)[:, None] // 8
    parallel = EpipolarNeighbours(8)(ConeBeam.stack([ConeBeam.orbit([0.0, 90.0], **FAR)]), (8, 8))[
        0
    ]
    assert (parallel[:, :, 0] // 8 == rows).all()
    same = EpipolarNeighbours(4)(ConeBeam.stack([ConeBeam.orbit([30.0, 30.0])]), (8, 8))[0]
    assert (same[:, :, 0, 0] == n).all()


def test_gradients_are_right():
    torch.manual_seed(0)
    block = awake(EpipolarAttention(4, 2, neighbours=3, own=2)).double()
    where = cameras((0.0, 90.0)).to(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: block(x, where),
        torch.randn(1, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True),
    )


def test_memory_grows_with_the_neighbours_and_not_with_the_square_of_the_tokens():
    """The largest tensor kept for the way back, for four times the tokens: four times as large, not
    sixteen.
    """

    def largest(side):
        sizes = []
        block = awake(EpipolarAttention(8, 2, neighbours=16))

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(torch.randn(1, 2, 8, side, side), cameras((0.0, 90.0), detector=(256, 256)))
        return max(sizes)

    assert largest(32) <= 4.1 * largest(16)


def test_a_geometry_that_does_not_fit_is_a_sentence():
    block = EpipolarAttention(8, 2)
    for where in (cameras((0.0,)), cameras((0.0, 90.0), 2), ConeBeam.orbit([0.0, 90.0])):
        with refused("geometry"):
            block(torch.zeros(1, 2, 8, 4, 4), where)
    with pytest.raises(ValueError, match="heads"):
        EpipolarAttention(9, 2)


def test_camera_tokens_are_of_order_one():
    tokens = camera_tokens(cameras((0.0, 90.0, -170.0), 2, (256, 256)))
    assert (
        tokens.shape == (2, 3, 12)
        and tokens.abs().max() < 4
        and torch.allclose(
            camera_tokens(cameras((0.0, 90.0), 2, (256, 256))), tokens[:, :2], atol=1e-5
        )
    )
