"""Data consistency: closed forms, dense least squares, the stated noise, and what is refused."""

import numpy as np
import pytest
import torch

from ct_nb.slices import consistency as module
from ct_nb.slices.consistency import (
    along_z,
    back_projection,
    back_projection_matrix,
    interpolate_stack,
    interpolation_matrix,
    slice_data_consistency,
    smooth_covariance,
)
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    slice_profile_matrix,
    thin_axis,
)

THICK = SliceAxis(-13.0, 5.0, 8)


def random(seed, *shape, scale=300.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(spacing=1.0, profile=SliceProfile(5.0), thick=THICK):
    fine = thin_axis(thick, spacing)
    return (
        fine,
        torch.from_numpy(slice_profile_matrix(fine, thick, profile)),
        random(0, fine.count, 4, 3),
        random(1, thick.count, 4, 3),
    )


def far(matrix, x, thick):
    return float((along_z(matrix, x.double()) - thick).abs().max())


CASES = {
    "adjacent": (1.0, SliceProfile(5.0)),
    "overlap": (1.0, SliceProfile(7.5)),
    "gaps": (1.0, SliceProfile(2.0)),
    "gaussian": (0.8, SliceProfile(5.0, "gaussian")),
    "odd ratio": (1.25 / 1.1, SliceProfile(5.0)),
    "as thin": (5.0, SliceProfile(5.0)),
    "fewer thin than thick": (7.0, SliceProfile(5.0)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_nearest_consistent_volume_is_that_of_dense_least_squares(name, smooth):
    fine, matrix, guess, thick = case(*CASES[name])
    covariance = smooth_covariance(fine, 5.0) if smooth else None
    root = torch.linalg.cholesky(covariance) if smooth else torch.eye(fine.count).double()
    gap = (thick - along_z(matrix, guess.double())).flatten(1)
    dense = guess + (
        root @ torch.linalg.lstsq(matrix @ root, gap, driver="gelsd", rcond=1e-7).solution
    ).view_as(guess)
    found = slice_data_consistency(guess, thick, matrix, covariance=covariance)
    assert (found - dense).abs().max() < 2e-2
    # a projection
    assert torch.allclose(
        slice_data_consistency(found, thick, matrix, covariance=covariance), found, atol=1e-2
    )
    if name != "fewer thin than thick":
        assert far(matrix, found, thick) < 1e-2
    wrong = guess + along_z(matrix.mT, (thick - along_z(matrix, guess)))
    if name != "as thin":
        assert (wrong - dense).abs().max() > 1


@pytest.mark.parametrize("convention", ["slabs", "centres"])
@pytest.mark.parametrize("spacing", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    "profile",
    [SliceProfile(width) for width in (2.5, 5.0, 8.0, 10.0)]
    + [SliceProfile(width, "gaussian") for width in (5.0, 7.5)],
    ids=str,
)
def test_the_truth_stays_put_up_to_the_ends_of_the_scan(convention, spacing, profile):
    """A ramp of 10 HU/mm and its own thick slices; rows that are cut at the ends of the scan and
    divided by their sum move it by up to 42 HU.
    """
    thick = SliceAxis(100.0, 5.0, 12)
    fine = thin_axis(thick, spacing, convention)
    truth, measured = (
        10 * torch.from_numpy(axis.positions_mm - 100).float()[:, None, None]
        for axis in (fine, thick)
    )
    matrix = slice_profile_matrix(fine, thick, profile)
    covariance = smooth_covariance(fine, thick.spacing_mm)
    found = slice_data_consistency(truth, measured, matrix, covariance=covariance)
    assert (found - truth).abs().max() < 0.1
    cut = np.diff(profile.cumulative(fine.edges_mm - thick.positions_mm[:, None]), axis=1)
    cut /= cut.sum(1, keepdims=True)
    wrong = slice_data_consistency(truth, measured, cut, covariance=covariance)
    if profile.cumulative(fine.edges_mm[0] - thick.first_mm) > 0.05:
        assert (wrong - truth).abs().max() > 2


def test_extreme_values_still_come_back():
    fine, matrix, _, _ = case()
    guess = torch.where(random(2, fine.count, 16, 16) > 0, 30000.0, -1024.0)
    thick = torch.where(random(3, 8, 16, 16) > 0, 3071.0, -1024.0)
    assert (
        far(
            matrix,
            slice_data_consistency(guess, thick, matrix, covariance=smooth_covariance(fine)),
            thick,
        )
        < 1e-2
    )


@pytest.mark.parametrize("noise", [1.0, 20.0, 120.0])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_misfit_that_stays_is_the_stated_noise(noise, smooth):
    fine, matrix, _, _ = case(profile=SliceProfile(7.0))
    guess = random(0, 2, fine.count, 4, 3)
    thick = random(1, 2, 8, 4, 3)
    thick[1] *= 5  # every volume has its own damping
    covariance = smooth_covariance(fine) if smooth else None
    found = slice_data_consistency(guess, thick, matrix, noise, covariance)

    def rms(x):
        return (along_z(matrix, x.double()) - thick).square().mean((1, 2, 3)).sqrt()

    assert torch.allclose(rms(found), torch.full((2,), noise).double(), rtol=1e-3)
    covariance = torch.eye(fine.count).double() if covariance is None else covariance
    gram = matrix @ covariance @ matrix.mT
    # damping in the wrong unit
    naive = guess + along_z(
        covariance @ matrix.mT @ torch.linalg.inv(gram + noise**2 * torch.eye(8)),
        thick - along_z(matrix, guess),
    )
    assert (rms(naive) - noise).abs().min() > 0.1 * noise


def test_with_noise_it_is_the_smallest_change_of_that_misfit():
    fine, matrix, guess, thick = case(profile=SliceProfile(7.0))
    covariance = smooth_covariance(fine)
    found = slice_data_consistency(guess.double(), thick.double(), matrix, 40.0, covariance)
    change = found - guess
    pulled = along_z(covariance @ matrix.mT, thick.double() - along_z(matrix, found))
    # Lagrange: the change is along C Aᵀ(y − A x'), with one factor everywhere
    ratio = float((change * pulled).sum() / pulled.square().sum())
    assert ratio > 0 and torch.allclose(
        change, ratio * pulled, atol=1e-6 * float(change.abs().max())
    )


def test_a_guess_within_the_noise_stays_and_unreachable_noise_is_least_squares():
    fine, matrix, guess, thick = case()
    assert torch.equal(slice_data_consistency(guess, thick, matrix, 5000.0), guess)
    # contradict each other by 10 HU
    twice = torch.cat([matrix, matrix])
    measured = torch.cat([thick, thick + 10])
    for noise in (0.0, 1.0):
        assert far(matrix, slice_data_consistency(guess, measured, twice, noise), thick + 5) < 1e-2


def test_chunks_of_rows_change_nothing(monkeypatch):
    fine, matrix, _, _ = case()
    guess = random(0, 2, fine.count, 9, 5)
    thick = random(1, 2, 8, 9, 5)
    covariance = smooth_covariance(fine)

    def run():
        return [
            slice_data_consistency(guess, thick, matrix, noise, covariance) for noise in (0.0, 30.0)
        ] + [interpolate_stack(thick, THICK, fine, kind) for kind in module.INTERPOLATIONS]

    whole = run()
    largest = []
    real = module._times
    monkeypatch.setattr(module, "CONSISTENCY_CHUNK", 2 * fine.count * 5 * 2)
    monkeypatch.setattr(module, "_times", lambda m, x: (largest.append(x.shape[-2]), real(m, x))[1])
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(whole, run())) and max(largest) == 2


def test_in_place_is_the_same_without_a_second_volume():
    fine, matrix, guess, thick = case()
    for noise in (0.0, 30.0):
        moved = guess.clone()
        apart = slice_data_consistency(guess, thick, matrix, noise, smooth_covariance(fine))
        assert (
            slice_data_consistency(
                moved, thick, matrix, noise, smooth_covariance(fine), in_place=True
            )
            is moved
            and torch.equal(moved, apart)
            and not torch.equal(apart, guess)
        )


def test_reduced_precision_of_the_session_does_not_reach_it():
    fine, matrix, guess, thick = case()
    plain = slice_data_consistency(guess, thick, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(slice_data_consistency(guess, thick, matrix), plain)
    assert slice_data_consistency(guess.half(), thick.half(), matrix).dtype == torch.float16
    assert torch.equal(slice_data_consistency(guess, thick, matrix.numpy()), plain)


def test_gradients():
    fine, matrix, _, _ = case(2.5, thick=SliceAxis(0.0, 5.0, 3))
    guess, thick = (
        random(k, n, 2, 1, scale=1.0).double().requires_grad_()
        for k, n in ((0, fine.count), (1, 3))
    )
    assert torch.autograd.gradcheck(
        lambda a, b: slice_data_consistency(a, b, matrix, covariance=smooth_covariance(fine)),
        (guess, thick),
    )
    assert torch.autograd.gradcheck(
        lambda b: interpolate_stack(b, SliceAxis(0.0, 5.0, 3), fine, "cubic"), (thick,)
    )


def test_each_case_may_have_its_own_matrix():
    fine = SliceAxis(-15.0, 1.0, 41)
    both = [SliceAxis(-13.0 + shift, 5.0, 8) for shift in (0.0, 0.7)]
    matrices = torch.stack(
        [torch.from_numpy(slice_profile_matrix(fine, axis, SliceProfile(5.0))) for axis in both]
    )
    guess, thick = random(0, 2, 41, 3, 3), random(1, 2, 8, 3, 3)
    found = slice_data_consistency(guess, thick, matrices)
    for k in range(2):
        assert torch.allclose(
            found[k], slice_data_consistency(guess[k], thick[k], matrices[k]), atol=1e-3
        )


# interpolation


@pytest.mark.parametrize("spacing", [1.0, 1.25, 0.7, 5.0, 6.0])
@pytest.mark.parametrize("convention", ["slabs", "centres"])
def test_interpolation_is_what_it_says(spacing, convention):
    from scipy.interpolate import CubicSpline

    fine = thin_axis(THICK, spacing, convention)
    thick = random(0, 8, 2, 3).double()
    known = THICK.positions_mm
    wanted = np.clip(fine.positions_mm, -13, 22)

    def column(kind):
        return interpolate_stack(thick, THICK, fine, kind)[:, 1, 2].numpy()

    values = thick[:, 1, 2].numpy()
    assert np.allclose(column("linear"), np.interp(wanted, known, values))
    assert np.allclose(column("cubic"), CubicSpline(known, values, bc_type="clamped")(wanted))
    distance = np.abs(wanted[:, None] - known)
    clear = np.diff(np.sort(distance, 1)[:, :2])[:, 0] > 1e-6
    assert np.allclose(column("nearest")[clear], values[distance.argmin(1)][clear])
    for kind in module.INTERPOLATIONS:
        assert torch.allclose(
            interpolation_matrix(THICK, fine, kind).sum(1), torch.ones(fine.count).double()
        )
        assert torch.allclose(interpolate_stack(thick, THICK, THICK, kind), thick)


@pytest.mark.parametrize("kind", module.INTERPOLATIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_slices(kind, count):
    axis = SliceAxis(3.0, 5.0, count)
    fine, thick = thin_axis(axis, 1.0), random(0, count, 2, 2)
    found = interpolate_stack(thick, axis, fine, kind)
    assert (
        torch.allclose(found[2::5], thick, atol=1e-3)
        and torch.equal(found[0], found[1])
        and torch.equal(found[-1], found[-2])
    )
    assert (
        far(
            slice_profile_matrix(fine, axis, SliceProfile(5.0)),
            back_projection(thick, axis, fine, slice_profile_matrix(fine, axis, SliceProfile(5.0))),
            thick,
        )
        < 1e-2
    )


def test_back_projection_is_above_the_interpolations():
    fine = thin_axis(SliceAxis(0.0, 5.0, 20), 1.0)
    z = torch.from_numpy(fine.positions_mm)
    phase = torch.rand(30, 1, 1, generator=torch.Generator().manual_seed(0)).double() * 6.3
    # waves of 17 mm
    truth = 300 * torch.sin(2 * torch.pi * z.view(1, -1, 1, 1) / 17 + phase[..., None])
    matrix = slice_profile_matrix(fine, SliceAxis(0.0, 5.0, 20), SliceProfile(5.0))
    thick = average_slices(truth, matrix)

    def error(x):
        return float((x - truth)[:, 5:-5].square().mean().sqrt())

    linear = interpolate_stack(thick, SliceAxis(0.0, 5.0, 20), fine)
    smooth = back_projection(thick, SliceAxis(0.0, 5.0, 20), fine, matrix)
    steps = slice_data_consistency(linear, thick, matrix)
    assert (
        error(smooth) < 0.7 * error(steps)
        and error(steps) < 0.8 * error(linear)
        and far(matrix, smooth, thick) < 1e-9
    )


def test_back_projection_as_a_matrix():
    for thick in (THICK, SliceAxis(3.0, 5.0, 1)):
        for profile in (SliceProfile(5.0), SliceProfile(4.0)):
            fine = thin_axis(thick, 1.25)
            matrix = slice_profile_matrix(fine, thick, profile)
            weights = back_projection_matrix(thick, fine, profile)
            slices = random(0, thick.count, 3, 4).double()
            assert torch.allclose(
                along_z(weights, slices), back_projection(slices, thick, fine, matrix), atol=1e-8
            ) and torch.allclose(weights.sum(1), torch.ones(fine.count).double())
            assert torch.allclose(
                torch.from_numpy(matrix) @ weights, torch.eye(thick.count).double(), atol=1e-9
            )


def test_that_matrix_says_the_same_of_a_position_whatever_else_is_wanted():
    for profile in (SliceProfile(5.0), SliceProfile(8.0, "gaussian")):
        whole = back_projection_matrix(THICK, SliceAxis(-20.0, 0.9, 60), profile)
        assert torch.allclose(
            back_projection_matrix(THICK, SliceAxis(-20.0 + 0.9 * 13, 0.9, 5), profile),
            whole[13:18],
            atol=1e-6,
        )
        assert torch.allclose(
            back_projection_matrix(THICK, SliceAxis(90.0, 0.9, 2), profile).sum(1),
            torch.ones(2).double(),
        )


def test_what_is_refused():
    fine, matrix, guess, thick = case()
    for match, call in {
        "matrix": lambda: slice_data_consistency(guess, thick, matrix.mT),
        "thick": lambda: slice_data_consistency(guess, thick[..., :2], matrix),
        "noise_hu": lambda: slice_data_consistency(guess, thick, matrix, -1.0),
        "covariance": lambda: slice_data_consistency(guess, thick, matrix, covariance=torch.eye(3)),
        "kind": lambda: interpolate_stack(thick, THICK, fine, "spline"),
        "x: a matrix": lambda: interpolate_stack(thick[1:], THICK, fine),
        "length_mm": lambda: smooth_covariance(fine, 0.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
