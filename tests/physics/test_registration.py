"""The pose of X-rays in the frame of a CT, beyond nbs/physics/10_registration.ipynb."""

import numpy as np
import pytest
import torch
from places import REAL_CT
from refusals import refused

from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.registration import (
    _BodyBox,
    move,
    one_after_another,
    patient_alone,
    register,
    target_registration_error,
)
from ct_nb.physics.similarity import SIMILARITIES, residuals
from ct_nb.physics.volume import Grid, Volume, hu_to_mu

SMALL = {"size": 48, "starts": 64}
MOVEMENT = torch.tensor([[3.0, -4.0, 2.0, 9.0, -7.0, 8.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def chest():
    return phantom(3, 48).volume


@pytest.fixture(scope="module")
def start(chest):
    return ConeBeam.biplanar(grid=chest.grid, detector_shape=(48, 48), pixel_mm=10.0)


@pytest.fixture(scope="module")
def body(chest):
    return patient_alone(chest)[1]


def xrays_of(volume, geometry, kev=60.0):
    return project(hu_to_mu(volume.tensor(), kev), geometry.on(volume.grid))


def error_mm(found, truth, body):
    return target_registration_error(found.geometry, truth, body).mean()


# ---------------------------------------------------------------- similarity
@pytest.mark.parametrize("similarity", ["ncc", "gradient"])
def test_the_sum_of_squares_is_two_minus_twice_the_correlation(similarity):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 7, 9)).astype(np.float32)
    r = residuals(torch.from_numpy(a)[None], torch.from_numpy(b), torch.ones(3, 7, 9), similarity)
    pairs = [(a, b)]
    if similarity == "gradient":
        pairs = [(np.diff(a, axis=axis), np.diff(b, axis=axis)) for axis in (1, 2)]
    expected = np.mean(
        [np.corrcoef(x[v].ravel(), y[v].ravel())[0, 1] for x, y in pairs for v in range(3)]
    )
    assert 1 - float(r.square().sum()) / 2 == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_pixels_without_weight_change_nothing(similarity):
    a, b = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(1, 8, 8)
    weight[:, :2, 3:] = 0
    expected = residuals(a[None], b, weight, similarity)
    blind = torch.where(weight > 0, b, 50.0)
    assert torch.allclose(residuals(a[None], blind, weight, similarity), expected, atol=1e-6)


# ---------------------------------------------------------------- poses
def test_a_shift_and_a_turn_move_the_points_by_their_length(start):
    shifted = move(start, torch.tensor([[0.0, 0, 0, 3, 0, 4]]).double(), np.zeros(3))
    points = 100 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    error = target_registration_error(shifted, start, points)
    assert torch.allclose(error, torch.full((2,), 5.0).double(), atol=1e-6)
    turned = move(start, torch.tensor([[0.0, 0, 90, 0, 0, 0]]).double(), np.zeros(3))
    error = target_registration_error(turned, start, [[10.0, 0, 7]])
    assert torch.allclose(error, torch.full((2,), 10 * 2**0.5).double(), atol=1e-5)


def test_many_movements_are_the_views_of_one_geometry(start):
    movements = torch.cat([0 * MOVEMENT, MOVEMENT])
    both = move(start, movements, np.zeros(3))
    assert both.views == 4
    for number in range(2):
        one = move(start, movements[number : number + 1], np.zeros(3))
        chosen = both.select([2 * number, 2 * number + 1])
        assert torch.allclose(chosen.source_mm, one.source_mm, atol=1e-9)
    assert torch.allclose(both.select([0, 1]).row_step_mm, start.row_step_mm, atol=1e-9)


def test_two_movements_are_one(start, body):
    second = torch.tensor([[-20.0, 11, 40, 3, 30, -5]]).double()
    center = body.mean(0)
    twice = move(move(start, MOVEMENT, center), second, center)
    once = move(start, one_after_another(MOVEMENT[0], second[0])[None], center)
    for name in ("source_mm", "detector_center_mm", "column_step_mm", "row_step_mm"):
        assert torch.allclose(getattr(once, name), getattr(twice, name), atol=1e-9), name


def test_a_ray_through_the_first_or_last_slice_does_not_count():
    grid = Grid.cube(32)
    view = ConeBeam.orbit(0.0, grid=grid, detector_shape=(64, 1), pixel_mm=12.0)
    points = grid.centers_mm(torch.float64).reshape(-1, 3)
    points = points[(points[:, :2].abs() < 100).all(1)].numpy()
    held = _BodyBox.around(points, grid).holds(view)[0, :, 0]
    ray = view.ray_directions()[0, :, 0]
    heights = [
        view.source_mm[0, 2] + ray[:, 2] / ray[:, 1] * (y - view.source_mm[0, 1])
        for y in (-95.0, 95.0)  # the outermost centres
    ]
    inside = torch.stack([height.abs() <= 155 for height in heights]).all(0)
    assert torch.equal(held > 0, inside) and 0 < held.sum() < 64
    within = points[np.abs(points[:, 2]) < 120]  # a body that ends before the slices do
    assert _BodyBox.around(within, grid).holds(view).all()


# ---------------------------------------------------------------- registration
def test_each_view_by_itself_and_the_source(chest, start, body):
    own = torch.cat([MOVEMENT, -0.5 * MOVEMENT])
    single = [start.select([v]) for v in (0, 1)]
    center = body.mean(0)
    moved = [move(view, m[None], center) for view, m in zip(single, own)]
    xrays = torch.cat([xrays_of(chest, view, 80.0) for view in moved])
    found = register(chest, xrays, start, separate=True, **SMALL)
    assert found.movements.shape == (2, 6) and found.accepted, found.doubts
    for v, view in enumerate(moved):
        assert target_registration_error(found.geometry.select([v]), view, body) < 2
    shift = torch.tensor([[0, 0, 0, 0, 0, 0, 6.0, -4, 20]], dtype=torch.float64)
    truth = move(start, MOVEMENT + 0, center)
    truth = move(truth, shift, center)
    found = register(chest, xrays_of(chest, truth), start, source=True, **SMALL)
    assert found.covariance.shape == (1, 9, 9)
    before = (truth.source_mm - move(start, MOVEMENT, center).source_mm).norm(dim=-1).mean()
    after = (truth.source_mm - found.geometry.source_mm).norm(dim=-1).mean()
    assert error_mm(found, truth, body) < 2 and after < before / 2


def test_a_ct_that_ends_before_the_xrays_do(chest, start, body):
    truth = move(start, MOVEMENT, body.mean(0))
    short = Volume(chest.hu[8:-8], np.array(Grid.cube(48).affine))
    short.affine = Grid(short.hu.shape, chest.affine).affine.copy()
    short.affine[:3, 3] = chest.grid.index_to_mm([0, 0, 8])
    found = register(short, xrays_of(chest, truth), start, **SMALL)
    assert error_mm(found, truth, body) < 1 and found.accepted, found.doubts


def test_exposure_and_masked_pixels_do_not_matter(chest, start, body):
    truth = move(start, MOVEMENT, body.mean(0))
    xrays = 1.2 * xrays_of(chest, truth) - 0.4
    mask = torch.ones_like(xrays, dtype=torch.bool)
    mask[:, :6], mask[:, :, -5:] = False, False
    xrays[~mask] = float("nan")
    found = register(chest, xrays, start, mask=mask, **SMALL)
    assert error_mm(found, truth, body) < 0.5 and found.accepted, found.doubts


def test_another_patient_is_doubtful(chest, start):
    found = register(chest, xrays_of(phantom(11, 48).volume, start), start, **SMALL)
    assert not found.accepted and "similarity" in found.doubts[0]


def test_the_covariance_is_that_of_repeated_noise(start):
    """About the movement without noise, which is not zero: `register` takes air for all but the
    body, and the body that it finds in coarse voxels is not quite the one of the X-rays.
    """
    patient, _ = patient_alone(phantom(0, 48).volume)
    coarse = patient.resample_onto(start.grid.resized(32))
    views = start.rebinned((32, 32))
    clean = xrays_of(coarse, views)

    def found(xrays):
        return register(coarse, xrays, views, "ncc", size=32, starts=1, rotation_deg=0, shift_mm=0)

    without_noise = found(clean).movements[0]
    squares = []
    for seed in range(16):
        noise = 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        noisy = found(clean + noise)
        movement = noisy.movements[0] - without_noise
        squares.append(float(movement @ torch.linalg.solve(noisy.covariance[0], movement)))
    assert 3 < np.mean(squares) < 12, "of six numbers, six"


@pytest.mark.skipif(
    not (REAL_CT / "cip-ct64.nii.gz").exists(), reason="no real CTs, see CT_NB_REAL_CT"
)
def test_a_patient_at_another_energy_with_noise():
    from ct_nb.data.read import read_ct
    from ct_nb.physics.xray_noise import XrayNoise, add_xray_noise

    volume = read_ct(REAL_CT / "cip-ct64.nii.gz")
    patient, body = patient_alone(volume)
    start = ConeBeam.biplanar(
        grid=volume.grid, isocenter_mm=body.mean(0), detector_shape=(64, 64), pixel_mm=8.0
    )
    truth = move(start, 2 * MOVEMENT, body.mean(0))
    generator = torch.Generator().manual_seed(0)
    xrays = add_xray_noise(xrays_of(patient, truth, 90.0), XrayNoise.radiograph(), generator)
    found = register(volume, xrays, start, size=64)
    assert target_registration_error(start, truth, body).mean() > 20
    assert error_mm(found, truth, body) < 0.5 and found.accepted, found.doubts


# ---------------------------------------------------------------- bad input
def test_what_does_not_fit_is_refused(chest, start):
    xrays = xrays_of(chest, start)
    with refused("xrays"):
        register(chest, xrays[:1], start)
    with refused("mask"):
        register(chest, xrays, start, mask=torch.ones(2, 5, 5, dtype=torch.bool))
    with refused("mask"):
        register(chest, xrays, start, mask=torch.zeros(xrays.shape, dtype=torch.bool))
    with refused("similarity"):
        register(chest, xrays, start, "mutual")
    with refused("xrays"):
        register(chest, xrays / 0, start)
    with refused("geometry"):
        register(chest, xrays, ConeBeam.stack([start, start]))
    with refused("size"):
        register(chest, xrays, start, size=8)
