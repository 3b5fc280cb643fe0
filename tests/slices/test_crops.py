"""Training crops: pairs stay pairs, the same crop in every call, and scans left out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.slices.crops import (
    CachedStacks,
    SliceCrops,
    change_along_z,
    drop_unusable,
    flip_in_plane,
    flip_z,
    resample_thin,
)
from ct_nb.slices.open import open_stacks
from ct_nb.slices.paired_stacks import StackCase, StackSource
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThickSliceRange,
    ThinStack,
    average_slices,
    slice_profile_matrix,
)
from ct_nb.slices.vae_train import ThinCrops


@pytest.fixture(scope="module")
def pairs():
    return StackPairs(
        CachedStacks(open_stacks("phantom:2", size=64, side_mm=192)),
        ThickSliceRange((9.0, 12.0), (0.8, 1.2), (0.0, 1.0), ("rectangular", "gaussian")),
        32,
        3,
    )


def test_averaging_to_a_larger_spacing(pairs):
    item = pairs[0]
    less = resample_thin(item, 2 * item["thin_axis"].spacing_mm)
    n = less["thin_axis"].count
    assert torch.allclose(
        less["thin"], (item["thin"][0 : 2 * n : 2] + item["thin"][1 : 2 * n : 2]) / 2, atol=1e-3
    ) and torch.equal(less["thick"], item["thick"])
    assert less["matrix"].shape == (3, n) and torch.allclose(
        less["matrix"].sum(1), torch.ones(3, dtype=torch.float64)
    )
    assert less["thin_axis"].edges_mm[0] == pytest.approx(item["thin_axis"].edges_mm[0])


def test_turning_over_keeps_thick_slices_the_means_of_thin_ones(pairs):
    item, over = pairs[1], flip_z(pairs[1])
    again = torch.from_numpy(
        slice_profile_matrix(over["thin_axis"], over["thick_axis"], over["profile"])
    )
    assert torch.allclose(average_slices(over["thin"], again), over["thick"], atol=1e-2)
    wrong = torch.from_numpy(
        slice_profile_matrix(item["thin_axis"], item["thick_axis"], item["profile"])
    )
    # axes that did not turn along
    if not torch.allclose(again, wrong):
        assert not torch.allclose(average_slices(over["thin"], wrong), over["thick"], atol=1e-2)
    twice = flip_z(over)
    assert torch.equal(twice["thin"], item["thin"]) and twice[
        "thick_axis"
    ].first_mm == pytest.approx(item["thick_axis"].first_mm)


def test_crops_are_drawn_from_seed_epoch_and_index(pairs):
    crops, again = SliceCrops(pairs), SliceCrops(pairs)
    seen = [crops.at(epoch, 1) for epoch in range(12)]
    assert all(
        torch.equal(one["thin"], again.at(epoch, 1)["thin"]) for epoch, one in enumerate(seen)
    )
    spacings = {round(one["thin_axis"].spacing_mm, 4) for one in seen}
    own = pairs[1]["thin_axis"].spacing_mm
    assert (
        round(own, 4) in spacings
        and len(spacings) > 3
        and all(own * 0.999 <= s <= own * 1.501 for s in spacings)
    )
    for one in seen:
        assert one["thin"].shape == (one["thin_axis"].count, 32, 32) and one["matrix"].shape == (
            3,
            one["thin_axis"].count,
        )
    assert {
        one["thin_axis"].spacing_mm for one in (SliceCrops(pairs, 1.0).at(e, 1) for e in range(4))
    } == {own}
    with pytest.raises(ValueError, match="coarsest"):
        SliceCrops(pairs, 0.5)


def test_scans_are_read_once_and_no_more_than_fit():
    class Source:
        ids = ["a", "b"]
        patients = ["a", "b"]
        reads = 0

        def __len__(self):
            return 2

        def __getitem__(self, index):
            self.reads += 1
            return ThinStack(
                "ab"[index],
                "ab"[index],
                np.full((4, 8, 8), 40000.4 * index, np.float32),
                SliceAxis(0, 1, 4),
                (1.0, 1.0),
            )

    source = Source()
    kept = CachedStacks(source)
    assert (
        kept[0].thin.dtype == np.int16
        and kept[1].thin.max() == 32767
        and [kept[n] for n in (0, 1, 0)]
        and source.reads == 2
    )
    kept = CachedStacks(source)
    kept.limit_bytes = 600
    kept[0], kept[1], kept[1]
    assert list(kept._stacks) == ["a"]


def resident() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(),
    reason="resident memory is read from /proc, which only Linux has",
)
def test_of_a_map_only_the_crop_is_read(tmp_path):
    "A prepared scan of 0.4 GB: what keeps it, and crops of thin slices and of pairs."
    about = dict(
        pixel_mm=(1.0, 1.0), thick_axis=SliceAxis(2.0, 5.0, 160), profile=SliceProfile(5.0)
    )
    shapes = {"thin": (800, 500, 500), "thick": (160, 500, 500)}
    # empty, so no room is taken on the disk
    maps = {
        name: np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.int16, shape)
        for name, shape in shapes.items()
    }
    stack = ThinStack(
        "a", "a", maps["thin"], SliceAxis(0.0, 1.0, 800), thick=maps["thick"], **about
    )
    kept = CachedStacks(StackSource([StackCase("a", "a", lambda: stack)]))
    before = resident()
    assert kept[0].thin is maps["thin"] and kept[0].thick is maps["thick"] and kept[0] is kept[0]
    for epoch in range(4):
        assert ThinCrops(kept, (8, 64, 64)).at(epoch, 0)["hu"].shape == (8, 64, 64)
    item = SliceCrops(StackPairs(kept, ThickSliceRange(), 64, 4)).at(0, 0)
    assert (
        item["measured"]
        and item["thin"].shape[1:] == (64, 64)
        and resident() - before < 100 * 2**20
    )
    maps["thin"][:, 250, 250] = 7  # written through: the crop comes from the file
    assert ThinCrops(kept, (8, 260, 260)).at(0, 0)["hu"].max() == 7


def test_what_cannot_be_used_is_left_out_and_named():
    def broken():
        raise ValueError("b.zip: is cut short")

    good = ThinStack("a", "a", np.zeros((4, 8, 8), np.int16), SliceAxis(0, 1, 4), (1.0, 1.0))
    short = ThinStack("c", "c", np.zeros((2, 8, 8), np.int16), SliceAxis(0, 1, 2), (1.0, 1.0))
    files = (Path("somewhere"),)
    source = CachedStacks(
        StackSource(
            [
                StackCase("a", "a", lambda: good, files),
                StackCase("b", "b", broken, files),
                StackCase("c", "c", lambda: short, files),
                StackCase("made", "made", broken),
            ]
        )
    )

    def fits(stack):
        if len(stack.thin) < 3:
            raise ValueError(f"{stack.id}: is too short")

    rest, reasons = drop_unusable(source, fits)
    assert (
        rest.ids == ["a", "made"]
        and reasons == ["b: b.zip: is cut short", "c: c: is too short"]
        and rest._stacks is source._stacks
    )
    with refused("data"):
        drop_unusable(source.subset([1, 2]), fits)

    def bug():
        raise KeyError("a mistake in the program is none of the data")

    with pytest.raises(KeyError):
        drop_unusable(StackSource([StackCase("a", "a", bug, files)]))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_turning_in_the_plane_keeps_pairs(pairs, rows, columns, swapped):
    item = pairs[0] | {"pixel_mm": (1.0, 2.0)}
    turned = flip_in_plane(item, rows, columns, swapped)
    assert torch.allclose(
        average_slices(turned["thin"], turned["matrix"]), turned["thick"], atol=1e-2
    )
    # where the voxel in row 0 and column 5 went
    there = [31 if rows else 0, 5 if not columns else 31 - 5]
    if swapped:
        there.reverse()
    assert turned["thin"][2, there[0], there[1]] == item["thin"][2, 0, 5] and turned[
        "pixel_mm"
    ] == ((2.0, 1.0) if swapped else (1.0, 2.0))


def test_crops_turn_every_way_and_are_taken_where_most_changes(pairs):
    def of(choices):
        return SliceCrops(pairs, 1.0, choices)

    change = {
        choices: [change_along_z(of(choices).at(epoch, 0)["thin"]) for epoch in range(24)]
        for choices in (1, 4)
    }
    assert np.mean(change[4]) > 1.15 * np.mean(change[1])
    for epoch in range(4):  # each is the liveliest of its own four draws
        most = max(change_along_z(pairs.at(4 * epoch + n, 0)["thin"]) for n in range(4))
        assert change[4][epoch] == pytest.approx(most, rel=1e-5)
    assert (
        change_along_z(torch.zeros(1, 4, 4)) == 0
        and change_along_z(torch.tensor([0.0, 3000.0]).view(2, 1, 1)) == 200
    )
    with refused("choices"):
        SliceCrops(pairs, 1.5, 0)
