"""Slice profiles: closed forms of the operator, alignments and lengths, pairs of stacks."""

import math

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.data.read import read_ct
from ct_nb.physics.volume import Grid, get_window
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThickSliceRange,
    ThinStack,
    average_slices,
    collate_stacks,
    from_unit,
    linear_continuation,
    place_slices,
    slice_profile_matrix,
    thin_axis,
    to_unit,
    widened_axis,
)

PROFILES = [
    SliceProfile(width, shape) for width in (3.0, 5.0, 7.5) for shape in ("rectangular", "gaussian")
]


def index_box(thin: SliceAxis, thick: SliceAxis) -> np.ndarray:
    "The wrong operator: means of r neighbours by index, whatever the positions."
    ratio = int(thick.spacing_mm // thin.spacing_mm)
    matrix = np.zeros((thick.count, thin.count))
    for k in range(thick.count):
        matrix[k, k * ratio : (k + 1) * ratio] = 1 / ratio
    return matrix


class Stacks(list):
    "Stacks as a source."

    @property
    def ids(self):
        return [s.id for s in self]

    @property
    def patients(self):
        return [s.patient for s in self]


def stack(depth=40, size=(12, 10), spacing=1.0, first=100.0, seed=0, **measured) -> ThinStack:
    hu = np.random.default_rng(seed).normal(0, 100, (depth, *size)).astype(np.float32)
    return ThinStack(
        f"case-{seed}", f"case-{seed}", hu, SliceAxis(first, spacing, depth), (0.7, 0.8), **measured
    )


# ---------------------------------------------------------------- the operator
@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize(
    "thick", [SliceAxis(20.0, 5.0, 7), SliceAxis(20.5, 5.0, 7), SliceAxis(20.31, 3.3, 9)], ids=str
)
def test_the_average_of_a_ramp_is_the_ramp_at_the_centre(profile, thick):
    thin = SliceAxis(-10.0, 0.5, 200)
    averages = slice_profile_matrix(thin, thick, profile) @ (3 * thin.positions_mm + 7)
    assert np.abs(averages - (3 * thick.positions_mm + 7)).max() < 1e-9


@pytest.mark.parametrize("convention", ["slabs", "centres"])
@pytest.mark.parametrize("spacing", [0.7, 1.0, 1.3, 1.7, 2.5])
@pytest.mark.parametrize("width", [2.5, 4.0, 5.0, 8.0, 10.0])
@pytest.mark.parametrize("shape", ["rectangular", "gaussian"])
def test_a_ramp_keeps_its_value_at_the_ends_of_the_scan(convention, spacing, width, shape):
    """Whatever lies beyond the thin slices, and wherever a profile cuts a cell. Rows that are cut
    at the end and divided by their sum move the ramp.
    """
    thick = SliceAxis(100.0, 5.0, 12)
    profile = SliceProfile(width, shape)
    thin = thin_axis(thick, spacing, convention)
    ramp, wanted = (10 * (axis.positions_mm - 100) for axis in (thin, thick))
    matrix = slice_profile_matrix(thin, thick, profile)
    assert np.abs(matrix @ ramp - wanted).max() < 1e-9
    assert np.allclose(matrix.sum(1), 1)
    cut = np.diff(profile.cumulative(thin.edges_mm - thick.positions_mm[:, None]), axis=1)
    cut /= cut.sum(1, keepdims=True)
    beyond = profile.cumulative(thin.edges_mm[0] - thick.first_mm) > 0.05
    assert not beyond or abs(cut[0] @ ramp - wanted[0]) > 0.5


def test_a_parabola_of_cell_means_is_averaged_within_the_slope_of_its_ends():
    """The mean of z² over a cell is the square of its centre and s²/12; over a profile, its
    variance.
    """
    thin = SliceAxis(0.0, 1.3, 60)
    thick = SliceAxis(20.4, 5.0, 7)
    means = thin.positions_mm**2 + 1.3**2 / 12
    for profile in (SliceProfile(5.0), SliceProfile(7.1), SliceProfile(5.0, "gaussian")):
        z = np.linspace(-profile.reach_mm, profile.reach_mm, 200_001)
        variance = (profile.density(z) / profile.density(z).sum()) @ z**2
        found = slice_profile_matrix(thin, thick, profile) @ means
        # the slope of a cell at either end of the profile is that of the pair there, s/2 off
        tolerance = 2 * 1.3**3 / 8 / profile.width_mm if profile.shape == "rectangular" else 1e-2
        assert np.abs(found - thick.positions_mm**2 - variance).max() < tolerance


def test_continuation_beyond_the_ends():
    matrix = linear_continuation(4, 2, 3)
    x = np.array([5.0, 7.0, 1.0, 4.0])
    assert (matrix @ x).tolist() == [1, 3, 5, 7, 1, 4, 7, 10, 13]
    assert linear_continuation(1, 2, 1).tolist() == [[1]] * 4
    assert linear_continuation(3, 0, 0).tolist() == np.eye(3).tolist()
    thin = SliceAxis(0.0, 1.0, 10)
    thick = SliceAxis(1.0, 5.0, 2)
    wide, inside = widened_axis(thin, thick, SliceProfile(6.0))
    # the profiles reach from -2 to 9 mm, the cells from -0.5 to 9.5: two more, and one to spare
    assert (wide.first_mm, wide.count, inside) == (-3.0, 14, slice(3, 13))


def test_shares_and_first_moments_are_those_of_the_density():
    for profile in PROFILES:
        z = np.linspace(-12, 12, 120_001)
        middle = (z[1:] + z[:-1]) / 2
        weight = profile.density(middle) / profile.density(middle).sum()
        assert np.allclose(np.cumsum(weight), profile.cumulative(z[1:]), atol=1e-4)
        assert np.allclose(np.cumsum(weight * middle), profile.first_moment(z[1:]), atol=1e-3)


def test_a_naive_index_box_fails_the_ramp():
    thin = SliceAxis(0.5, 1.0, 65)
    thick = SliceAxis(20.0, 5.0, 6)
    # it ignores where the thick slices begin
    assert np.abs(index_box(thin, thick) @ thin.positions_mm - thick.positions_mm).min() > 15
    thick = SliceAxis(2.75, 5.5, 11)  # begins where the stack begins; the ratio is no whole number
    assert np.allclose(
        slice_profile_matrix(thin, thick, SliceProfile(5.5)) @ thin.positions_mm,
        thick.positions_mm,
    )
    assert np.abs(index_box(thin, thick) @ thin.positions_mm - thick.positions_mm).max() > 2
    whole = SliceAxis(2.5, 5.0, 13)  # the one case it is right for
    assert np.allclose(index_box(thin, whole), slice_profile_matrix(thin, whole, SliceProfile(5.0)))
    # and not where slices overlap
    assert (
        np.abs(index_box(thin, whole) - slice_profile_matrix(thin, whole, SliceProfile(6.5))).max()
        > 0.01
    )


def test_entries_by_hand():
    thin = SliceAxis(0.0, 1.0, 10)

    def row(centre, width):
        return slice_profile_matrix(thin, SliceAxis(centre, 1.0, 1), SliceProfile(width))[0]

    assert np.allclose(row(4.0, 3.0), [0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0])
    # half a cell at either end: its centre lies a quarter of a cell further in
    halves = np.array([0, 0, 0, 0.375, 1.125, 1.125, 0.375, 0, 0, 0]) / 3
    assert np.allclose(row(4.5, 3.0), halves)
    # 2.95 to 5.45: 0.55 of a cell, 0.225 above its centre, and 0.95, 0.025 below
    low, high = 0.55 * 0.225, 0.95 * 0.025
    ends = np.array([0, 0, 0, 0.55 - low, 1 + low + high, 0.95 - high, 0, 0, 0, 0]) / 2.5
    assert np.allclose(row(4.2, 2.5), ends)
    # thinner than a cell: that cell, and the next one for the distance from its centre
    assert np.allclose(row(4.2, 0.4), [0, 0, 0, 0, 0.8, 0.2, 0, 0, 0, 0])
    # -2 to 1, half outside: half a cell, a whole one, a whole one and half of the next, the first
    # two on the line through the others, x₋₂ = 3x₀ − 2x₁ and x₋₁ = 2x₀ − x₁
    outside = 0.375 * np.array([3, -2]) + 1.125 * np.array([2, -1]) + [1.125, 0.375]
    assert np.allclose(row(-0.5, 3.0), [*outside / 3, *[0] * 8])


def test_gaussian_rows_are_gaussian_sums():
    thin = SliceAxis(0.0, 0.7, 60)
    profile = SliceProfile(4.0, "gaussian")
    row = slice_profile_matrix(thin, SliceAxis(20.3, 5.0, 1), profile)[0]
    sigma = 4.0 / math.sqrt(8 * math.log(2))
    fine = np.linspace(thin.edges_mm[0], thin.edges_mm[-1], 600_001)
    middle = (fine[1:] + fine[:-1]) / 2 - 20.3
    density = np.where(np.abs(middle) <= profile.reach_mm, np.exp(-(middle**2) / (2 * sigma**2)), 0)
    assert np.exp(-profile.reach_mm**2 / (2 * sigma**2)) == pytest.approx(1e-3)
    # the share over each cell, and its first moment times the slope of the slices under the profile
    share = density.reshape(60, -1) / density.sum()
    moment = (share * (middle + 20.3 - thin.positions_mm.repeat(10_000)).reshape(60, -1)).sum(1)
    share = share.sum(1)
    under = np.flatnonzero(share)
    by_hand = share.copy()
    by_hand[under] += moment[under] / 0.7 @ np.gradient(np.eye(len(under)), axis=0)
    assert np.abs(row - by_hand).max() < 1e-6
    # without the slopes: as if every slice were flat within its cell
    assert np.abs(row - share).max() > 1e-3
    # sampled at the centres instead: not the same
    samples = np.exp(-((thin.positions_mm - 20.3) ** 2) / (2 * sigma**2))
    assert np.abs(row - samples / samples.sum()).max() > 5e-4
    # cells are means, so z² in them is 0.7²/12 above the square of their centres
    variance = row @ ((thin.positions_mm - 20.3) ** 2 + 0.7**2 / 12)
    assert variance == pytest.approx((density @ middle**2) / density.sum(), rel=2e-3)


def test_overlap_and_gaps():
    thin = SliceAxis(0.5, 1.0, 60)
    thick = SliceAxis(12.5, 5.0, 7)

    def coverage(width):
        "Thick slices over each thin one."
        matrix = slice_profile_matrix(thin, thick, SliceProfile(width))
        return (matrix[:, 10:45] > 1e-9).sum(0)

    assert (
        (coverage(5.0) == 1).all()
        and coverage(9.0).max() == 2
        and coverage(3.0).min() == 0
        and (coverage(3.0) == 0).sum() == 14
    )
    # contiguous: every thin slice counts alike
    assert np.allclose(slice_profile_matrix(thin, thick, SliceProfile(5.0))[:, 10:45].sum(0), 0.2)


def test_two_averages_in_a_row_are_one():
    fine = SliceAxis(0.5, 1.0, 60)
    middle = SliceAxis(1.5, 3.0, 20)
    thick = SliceAxis(4.5, 9.0, 6)
    twice = slice_profile_matrix(middle, thick, SliceProfile(9.0)) @ slice_profile_matrix(
        fine, middle, SliceProfile(3.0)
    )
    assert np.allclose(twice, slice_profile_matrix(fine, thick, SliceProfile(9.0)))


def test_only_positions_against_each_other_count():
    one = slice_profile_matrix(
        SliceAxis(0.0, 1.25, 50), SliceAxis(11.0, 4.0, 8), SliceProfile(5.0, "gaussian")
    )
    two = slice_profile_matrix(
        SliceAxis(-731.0, 1.25, 50), SliceAxis(-720.0, 4.0, 8), SliceProfile(5.0, "gaussian")
    )
    assert np.allclose(one, two, atol=1e-12)


def test_kinds_shapes_and_batches():
    matrix = slice_profile_matrix(
        SliceAxis(0.0, 1.0, 20), SliceAxis(4.0, 5.0, 3), SliceProfile(6.0)
    )
    thin = np.random.default_rng(0).normal(size=(2, 1, 20, 3, 4)).astype(np.float32)
    out = average_slices(thin, matrix)
    assert out.shape == (2, 1, 3, 3, 4) and out.dtype == np.float32
    assert torch.allclose(
        average_slices(torch.from_numpy(thin), matrix), torch.from_numpy(out), atol=1e-6
    )
    assert np.allclose(out[1, 0, 2, 1, 3], matrix[2] @ thin[1, 0, :, 1, 3], atol=1e-6)
    whole = average_slices((thin[0, 0] * 1000).astype(np.int16), matrix)
    assert whole.dtype == np.float32 and np.allclose(
        whole, average_slices((thin[0, 0] * 1000).astype(np.int16).astype(np.float32), matrix)
    )
    both = torch.stack([torch.from_numpy(matrix), torch.from_numpy(matrix[::-1].copy())])
    assert torch.allclose(
        average_slices(torch.from_numpy(thin[:, 0]), both)[1, 0],
        average_slices(torch.from_numpy(thin[1, 0]), matrix)[2],
    )
    x = torch.randn(20, 2, 2, requires_grad=True)
    average_slices(x, matrix).sum().backward()
    assert torch.allclose(x.grad[:, 0, 0], torch.from_numpy(matrix.sum(0)).float())


# ---------------------------------------------------------------- lengths, windows, errors
@pytest.mark.parametrize("d, r", [(50, 5), (50, 6), (1, 5), (7, 3)])
def test_both_length_conventions(d, r):
    thick = SliceAxis(-12.0, float(r), d)
    edge_to_edge = thin_axis(thick, 1.0, "slabs")
    centres = thin_axis(thick, 1.0, "centres")
    assert edge_to_edge.count == r * d and centres.count == r * (d - 1) + 1
    assert np.allclose(edge_to_edge.edges_mm[[0, -1]], thick.edges_mm[[0, -1]]) and np.allclose(
        centres.positions_mm[::r], thick.positions_mm
    )
    assert np.allclose(
        np.abs(edge_to_edge.positions_mm[:, None] - thick.positions_mm).min(0), 0 if r % 2 else 0.5
    )


@pytest.mark.parametrize("spacing", [0.625, 0.8, 1.25, 1.3, 2.0, 7.0])
def test_ratios_that_are_no_whole_numbers(spacing):
    thick = SliceAxis(30.0, 5.0, 13)
    edge_to_edge = thin_axis(thick, spacing)
    centres = thin_axis(thick, spacing, "centres")
    assert abs(edge_to_edge.length_mm - thick.length_mm) <= spacing / 2 and np.isclose(
        edge_to_edge.edges_mm[[0, -1]].mean(), thick.edges_mm[[0, -1]].mean()
    )
    assert (
        centres.first_mm == 30.0
        and 0 <= thick.positions_mm[-1] - centres.positions_mm[-1] < spacing
    )
    assert np.allclose(slice_profile_matrix(edge_to_edge, thick, SliceProfile(5.0)).sum(1), 1)


def test_windows_go_both_ways():
    hu = torch.tensor([-2000.0, -1024.0, 0.0, 1024.0, 3000.0])
    assert torch.allclose(to_unit(hu), torch.tensor([0, 0, 0.5, 1, 1])) and torch.allclose(
        from_unit(to_unit(hu)), hu.clamp(-1024, 1024)
    )
    for window in ("chest", "full"):
        assert torch.allclose(
            to_unit(hu, window) * 2 - 1, get_window(window).to_network(hu), atol=1e-6
        )


def test_axes_of_grids():
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[:3, 3] = (5, 6, -40)
    assert SliceAxis.along(Grid((9, 4, 4), affine)) == SliceAxis(-40.0, 2.5, 9)
    # from the head down: along its own direction
    assert SliceAxis.along(Grid((9, 4, 4), affine @ np.diag([1, 1, -1, 1]))) == SliceAxis(
        40.0, 2.5, 9
    )
    turn = np.eye(4)
    turn[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert SliceAxis.along(Grid((9, 4, 4), turn @ affine)).spacing_mm == 2.5


FIVE = SliceAxis(0.0, 5.0, 3)
ONE = SliceAxis(0.0, 1.0, 9)


@pytest.mark.parametrize(
    "argument, call",
    [
        ("first_mm, spacing_mm", lambda: SliceAxis(0.0, 0.0, 3)),
        ("first_mm, spacing_mm", lambda: SliceAxis(math.nan, 1.0, 3)),
        ("count", lambda: SliceAxis(0.0, 1.0, 0)),
        ("width_mm", lambda: SliceProfile(0.0)),
        ("shape", lambda: SliceProfile(5.0, "triangle")),
        ("thin_spacing_mm", lambda: thin_axis(FIVE, 0.0)),
        ("convention", lambda: thin_axis(FIVE, 1.0, "edges")),
        ("thick", lambda: slice_profile_matrix(ONE, SliceAxis(0.0, 5.0, 4), SliceProfile(2.0))),
        ("thin", lambda: average_slices(np.zeros((8, 2, 2)), np.zeros((2, 9)))),
        ("thin", lambda: average_slices(np.zeros(9), np.zeros((2, 9)))),
        ("spacing_mm", lambda: place_slices(ONE, 5.0, SliceProfile(12.0))),
        ("spacing_mm", lambda: ThickSliceRange(spacing_mm=(5.0, 4.0))),
        ("shapes", lambda: ThickSliceRange(shapes=())),
        ("shape", lambda: ThickSliceRange(shapes=("box",))),
        ("count", lambda: StackPairs(Stacks(), count=0)),
        ("size", lambda: StackPairs(Stacks(), size=(3,))),
        ("count", lambda: StackPairs(Stacks([stack()]), count=9)[0]),
        ("size", lambda: StackPairs(Stacks([stack()]), size=11)[0]),
        ("spacing_mm", lambda: StackPairs(Stacks([stack(spacing=6.0)]))[0]),
    ],
)
def test_bad_input_is_refused(argument, call):
    with refused(argument):
        call()


# ---------------------------------------------------------------- pairs
WIDE = ThickSliceRange((3.0, 6.5), (0.6, 1.6), (0.0, 1.0), ("rectangular", "gaussian"))


@pytest.mark.parametrize("epoch", range(8))
def test_thick_is_exactly_the_matrix_times_thin(epoch):
    source = Stacks([stack(spacing=1.25)])
    item = StackPairs(source, WIDE, size=(6, 5), count=3).at(epoch, 0)
    whole = source[0]
    assert (
        item["thin"].shape[1:] == (6, 5)
        and item["thick"].shape == (3, 6, 5)
        and item["matrix"].dtype == torch.float64
        and not item["measured"]
    )
    assert torch.equal(average_slices(item["thin"], item["matrix"]), item["thick"])
    # the crop misses nothing that the whole column would have added
    full = slice_profile_matrix(whole.thin_axis, item["thick_axis"], item["profile"])
    start = round((item["thin_axis"].first_mm - whole.thin_axis.first_mm) / 1.25)
    assert np.allclose(
        full[:, start : start + len(item["thin"])], item["matrix"], atol=1e-12
    ) and np.allclose(item["matrix"].sum(1), 1)
    places = [
        (r, c)
        for r in range(7)
        for c in range(6)
        if np.array_equal(
            whole.thin[start : start + len(item["thin"]), r : r + 6, c : c + 5], item["thin"]
        )
    ]
    assert len(places) == 1


def test_draws_are_of_seed_epoch_and_index():
    source = Stacks([stack(seed=0), stack(seed=1)])
    pairs = StackPairs(source, WIDE, size=4, count=2)

    def same(a, b):
        axes = ("thick_axis", "profile")
        return all(a[key] == b[key] for key in axes) and torch.equal(a["thin"], b["thin"])

    assert (
        same(pairs.at(3, 1), StackPairs(source, WIDE, size=4, count=2).at(3, 1))
        and same(pairs[0], pairs.at(0, 0))
        and same(pairs[-1], pairs[1])
    )
    drawn = [pairs.at(epoch, 0) for epoch in range(6)]
    assert len({(i["thick_axis"], i["profile"]) for i in drawn}) == 6 and {
        i["profile"].shape for i in drawn
    } == {"rectangular", "gaussian"}
    assert not same(pairs.at(0, 0), StackPairs(source, WIDE, size=4, count=2, seed=1).at(0, 0))
    with pytest.raises(IndexError):
        pairs[2]


def test_whole_stacks_and_both_ends_are_reached():
    source = Stacks([stack(depth=52)])
    item = StackPairs(source)[0]
    assert item["thick"].shape == (10, 12, 10) and item["thin"].shape == (50, 12, 10)
    assert np.allclose(item["thick"][3, 2, 4], source[0].thin[15:20, 2, 4].mean(), atol=1e-4)
    starts = {
        StackPairs(source, count=10, seed=seed)[0]["thin_axis"].first_mm for seed in range(40)
    }
    assert starts == {100.0, 101.0, 102.0}  # three places for 50 mm in 52


def test_batches_pad_what_is_shorter():
    pairs = StackPairs(Stacks([stack(60, seed=s) for s in range(3)]), WIDE, size=4, count=3)
    items = [pairs[i] for i in range(3)]
    batch = collate_stacks(items)
    assert len({len(i["thin"]) for i in items}) > 1 and batch["mask"].sum(1).tolist() == [
        len(i["thin"]) for i in items
    ]
    assert torch.allclose(average_slices(batch["thin"], batch["matrix"]), batch["thick"], atol=1e-3)
    assert batch["matrix"].transpose(1, 2)[~batch["mask"]].abs().max() == 0 and batch["id"] == [
        "case-0",
        "case-1",
        "case-2",
    ]


def test_measured_slices_are_used_and_not_simulated():
    thick_axis = SliceAxis(97.0, 5.0, 10)  # the first and the last stand out of the thin stack
    measured = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((10, 12, 10), np.float32)
    source = Stacks([stack(thick=measured, thick_axis=thick_axis, profile=SliceProfile(5.0))])
    item = StackPairs(source)[0]
    assert (
        item["measured"]
        and item["thick"][:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        and item["thick_axis"].first_mm == 102.0
        and len(item["thin"]) == 40
    )
    drawn = [StackPairs(source, count=2, size=3, seed=seed)[0] for seed in range(30)]
    assert {i["thick"][0, 0, 0].item() for i in drawn} == {1, 2, 3, 4, 5, 6, 7}
    for i in drawn:
        assert (
            i["thick_axis"].first_mm == 97 + 5 * i["thick"][0, 0, 0]
            and i["thin_axis"].edges_mm[0] == i["thick_axis"].edges_mm[0]
        )
    with refused("count"):
        StackPairs(source, count=9)[0]


# ---------------------------------------------------------------- real thin CT
@pytest.mark.parametrize("name, spacing", [("nsclcrg-R01-001", 1.0), ("lidc-0002", 1.25)])
def test_real_thin_ct(real_ct, name, spacing):
    path = real_ct / "thin" / f"{name}.nii.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the real thin CTs here")
    volume = read_ct(path)
    real = ThinStack(
        name, name, volume.hu, SliceAxis.along(volume.grid), tuple(volume.grid.spacing_mm[1::-1])
    )
    assert real.thin_axis.spacing_mm == pytest.approx(spacing, abs=1e-4)
    pairs = StackPairs(Stacks([real]))
    item = pairs[0]
    assert len(item["thick"]) == int(real.thin_axis.length_mm // 5) and len(item["thin"]) == len(
        item["thick"]
    ) * round(5 / spacing)
    inner = item["thick"][:, 100:150, 100:150]
    ratio = round(5 / spacing)
    by_hand = torch.stack(
        [
            item["thin"][k * ratio : (k + 1) * ratio, 100:150, 100:150].mean(0)
            for k in range(len(inner))
        ]
    )
    assert torch.allclose(inner, by_hand, atol=0.01)
    shifted = torch.stack(
        [
            item["thin"][k * ratio + 1 : (k + 1) * ratio + 1, 100:150, 100:150].mean(0)
            for k in range(len(inner) - 1)
        ]
    )
    # one thin slice beside costs whole HU: alignment is no detail
    assert (inner[:-1] - shifted).abs().mean() > 2
