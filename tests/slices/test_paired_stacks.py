"""Pairing two grids, and the split by patient."""

import numpy as np
import pytest
from ct_files import body

from ct_nb.physics.volume import Volume
from ct_nb.slices.paired_stacks import (
    SIDES,
    StackCase,
    StackSource,
    pair_stack,
    side_counts,
    split_patients,
    split_stacks,
    stack_sides,
)
from ct_nb.slices.slice_profile import (
    SliceAxis,
)

THIN = body((60, 32, 40))
THICK = THIN.reshape(12, 5, 32, 40).mean(1)


def volume(hu, spacing, first, pixel=2.0, origin=(-40.0, -30.0)):
    affine = np.diag([pixel, pixel, spacing, 1.0])
    affine[:3, 3] = (*origin, first)
    return Volume(hu, affine)


def test_thick_slices_from_the_other_end():
    thick = volume(THICK, 5.0, 2.0)
    thin = volume(THIN, 1.0, 0.0)
    turned = Volume(
        THICK[::-1],
        thick.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 11], [0, 0, 0, 1.0]]),
    )
    one = pair_stack("a", "a", thick, thin)
    two = pair_stack("a", "a", turned, thin)
    assert one.thick_axis == two.thick_axis and np.array_equal(one.thick, two.thick)


def test_another_field_of_view_is_brought_onto_the_thin_pixels():
    def ramp(shape, pixel, origin):
        x = origin[0] + pixel * np.arange(shape[2])
        y = origin[1] + pixel * np.arange(shape[1])
        return np.broadcast_to(x + 0.3 * y[:, None], shape).astype(np.float32)

    thin = volume(ramp((60, 30, 40), 2.0, (-40, -30)), 1.0, 0.0)
    thick = volume(ramp((12, 36, 32), 1.5, (-26, -24)), 5.0, 2.0, 1.5, (-26, -24))
    stack = pair_stack("a", "a", thick, thin)
    assert (
        stack.thin.shape[1:] == stack.thick.shape[1:]
        and np.allclose(stack.affine[:2, 3], (-26, -24))
        and stack.thin_axis == SliceAxis(0.0, 1.0, 60)
        and stack.thick_axis == SliceAxis(2.0, 5.0, 12)
    )
    # a shift of one pixel would be 2
    assert np.abs(stack.thick - stack.thin[:1])[
        :, 1:-1, 1:-1
    ].max() < 0.3 and "resampled" in " ".join(stack.notes)
    with pytest.raises(ValueError, match="share 11% of the thin ones' area"):
        pair_stack("a", "a", volume(ramp((12, 10, 13), 2.0, (-40, -30)), 5.0, 2.0), thin)


def test_sides_of_the_study_and_of_others():
    names = [f"{i:04d}" for i in range(323)]
    sides = split_patients(names)
    assert [list(sides.values()).count(s) for s in SIDES] == [
        243,
        48,
        32,
    ] and sides == split_patients(names[::-1] + names)
    assert sides != split_patients(names, seed=1) and sides != dict(
        zip(names, ["train"] * 243 + ["validation"] * 48 + ["test"] * 32)
    )
    for count in (3, 4, 7, 50, 324, 1000):
        counts = side_counts(count)
        assert (
            sum(counts) == count
            and min(counts) >= 1
            and (
                count < 12
                or all(abs(c - count * s / 323) < 1 for c, s in zip(counts, (243, 48, 32)))
            )
        )
    with pytest.raises(ValueError, match="2 patients do not fill 3 sides"):
        side_counts(2)


def test_a_growing_archive_moves_nobody():
    few = split_patients([f"{i}" for i in range(20)])
    more = split_patients([f"{i}" for i in range(200)], assigned=few)
    assert all(more[name] == side for name, side in few.items()) and [
        list(more.values()).count(s) for s in SIDES
    ] == list(side_counts(200))


def test_no_patient_on_two_sides():
    source = StackSource(StackCase(f"scan-{i}", f"patient-{i // 2}", dict) for i in range(24))
    parts = split_stacks(source)
    patients = [set(part.patients) for part in parts.values()]
    assert (
        sum(map(len, patients)) == 12
        and not (
            patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2]
        )
        and sum(len(p) for p in parts.values()) == 24
    )
    assert stack_sides(source.subset([0, 1])) == {"patient-0": "train"}
    with pytest.raises(ValueError, match="two scans are named 'a'"):
        StackSource([StackCase("a", "a", dict), StackCase("a", "b", dict)])
