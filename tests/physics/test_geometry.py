"ConeBeam: faults, gradients, limits and files, beyond nbs/physics/01*.ipynb."

import copy
import inspect
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.physics.epipolar import epipolar_lines, fundamental_matrix, nearest_on_epipolar_line
from ct_nb.physics.geometry import VECTORS, ConeBeam, GeometryError
from ct_nb.physics.geometry_io import (
    GeometryFileError,
    geometry_from_dicom,
    geometry_from_json,
    geometry_to_json,
    load_geometry,
    save_geometry,
)
from ct_nb.physics.pose_errors import jitter_pose, miscalibrate_view, rotate, translate
from ct_nb.physics.volume import Grid

GRID = Grid.cube(16, 320.0, (12.0, -30.0, 450.0))  # off the origin: a frame mix-up shows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def odd_views(count=5, seed=0, **kwargs) -> ConeBeam:
    """Views with nothing special about them: any angle, jittered, skewed and non-square pixels,
    some mirrored.
    """
    draw = torch.rand(4, count, generator=generator(seed), dtype=torch.float64)
    g = ConeBeam.orbit(
        360 * draw[0] - 180,
        120 * draw[1] - 60,
        360 * draw[2],
        grid=GRID,
        detector_shape=(48, 70),
        source_to_detector_mm=1100 + 500 * draw[3],
        **kwargs,
    )
    g = jitter_pose(g, generator(seed + 1), 2.0, 5.0, 3.0, 8.0)
    mirror = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)[:, None]
    return replace(g, column_step_mm=mirror * (1.3 * g.column_step_mm + 0.1 * g.row_step_mm))


def differences(a: ConeBeam, b: ConeBeam) -> float:
    return max((getattr(a, n) - getattr(b, n)).abs().max().item() for n in VECTORS)


# ---------------------------------------------------------------- faults
@pytest.mark.parametrize(
    "argument, value",
    [
        ("source_mm", torch.zeros(3)),
        ("source_mm", torch.zeros(2, 2)),
        ("source_mm", torch.zeros(0, 3)),
        ("row_step_mm", torch.zeros(3, 3)),
        ("source_mm", torch.full((2, 3), math.nan)),
        ("detector_center_mm", torch.full((2, 3), math.inf)),
        ("detector_shape", (0, 5)),
        ("detector_shape", (5,)),
        ("grid", (16, 16, 16)),
    ],
)
def test_impossible_geometries_are_refused_in_one_sentence(argument, value):
    with refused(argument, kind=GeometryError) as caught:
        replace(ConeBeam.biplanar(), **{argument: value})
    assert "\n" not in str(caught.value)


def test_pixel_steps_of_length_zero():
    with refused("source_mm", kind=GeometryError) as caught:
        replace(ConeBeam.biplanar(), row_step_mm=torch.zeros(2, 3))
    assert caught.value.view == 0


def test_source_in_the_plane_of_its_detector():
    g = ConeBeam.biplanar()
    in_plane = g.detector_center_mm[1] + 300 * g.row_step_mm[1]
    with refused("source_mm", kind=GeometryError) as caught:
        replace(g, source_mm=torch.stack([g.source_mm[0], in_plane]))
    assert caught.value.view == 1


@pytest.mark.parametrize("name", ["source_to_isocenter_mm", "source_to_detector_mm", "pixel_mm"])
def test_orbit_refuses_distances_that_are_not_positive(name):
    with refused(name, kind=GeometryError):
        ConeBeam.biplanar(**{name: -1.0})


def test_stack_names_what_differs():
    g = ConeBeam.biplanar()
    for other, word in (
        (ConeBeam.orbit([0.0]), "views"),
        (ConeBeam.biplanar(detector_shape=(8, 8)), "detector_shape"),
        (g.on(GRID), "grid"),
    ):
        with refused("geometries", kind=GeometryError) as caught:
            ConeBeam.stack([g, other])
        assert caught.value.property == word
    with refused("geometries", kind=GeometryError):
        ConeBeam.stack([])


def test_lists_arrays_and_integers_become_double_tensors():
    g = ConeBeam(
        [[0, -1000, 0]],
        np.array([[0, 500, 0]], dtype=np.float32),
        [[2, 0, 0]],
        [[0.0, 0.0, -2.0]],
        (4, 4),
        GRID,
    )
    assert g.dtype == torch.float64 and all(getattr(g, n).dtype == torch.float64 for n in VECTORS)
    assert (
        ConeBeam.biplanar(dtype=torch.float32).dtype == torch.float32
        and ConeBeam.biplanar().to(torch.float32).dtype == torch.float32
    )


# ---------------------------------------------------------------- constructors and angles
def test_angles_and_lengths_come_back():
    azimuth = torch.tensor([[-179.0, 35, 90], [0, 120, -60]]).double()
    elevation = torch.tensor([[80.0, -80, 0], [10, 0, -30]]).double()
    roll = torch.tensor([[0.0, 179, -90], [45, 0, 10]]).double()
    length = torch.tensor([1200.0, 1500, 1800]).double()
    g = ConeBeam.orbit(
        azimuth,
        elevation,
        roll,
        source_to_detector_mm=length,
        pixel_mm=torch.tensor([[1.0], [2.0]]),
    )
    assert g.batch_shape == (2,) and g.views == 3
    for got, expected in (
        (g.azimuth_deg, azimuth),
        (g.elevation_deg, elevation),
        (g.roll_deg, roll),
        (g.source_to_detector_mm, length.expand(2, 3)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        g.column_step_mm.norm(dim=-1), torch.tensor([[1.0] * 3, [2.0] * 3]).double()
    )


def test_isocentre_is_where_it_is_said_to_be():
    for isocenter in (None, (5.0, 6.0, 7.0)):
        g = ConeBeam.orbit([0.0, 77.0], 12.0, grid=GRID, isocenter_mm=isocenter)
        uv, depth = g.project_points(
            torch.tensor(np.array(GRID.center_mm if isocenter is None else isocenter))
        )
        torch.testing.assert_close(uv, torch.full((2, 2), 128.0).double())
        torch.testing.assert_close(depth, torch.full((2,), 1000.0).double())


def test_view_along_the_body_axis_is_defined_with_finite_gradients():
    elevation = torch.tensor([90.0, -90.0], dtype=torch.float64, requires_grad=True)
    g = ConeBeam.orbit([0.0, 0.0], elevation)
    g = g._map(lambda t: torch.where(t.abs() < 1e-9, 0.0, t))  # exactly along the axis
    assert g.azimuth_deg.tolist() == [0, 0] and g.elevation_deg.tolist() == [90, -90]
    total = (
        g.azimuth_deg.sum()
        + g.elevation_deg.sum()
        + g.roll_deg.sum()
        + g.matrices().sum()
        + g.plucker((3, 3)).sum()
    )
    assert torch.isfinite(torch.autograd.grad(total, elevation)[0]).all()


def test_batch_select_index_and_device_move():
    a, b = odd_views(seed=1), odd_views(seed=2)
    both = ConeBeam.stack([a, b])
    assert (
        both.batch_shape == (2,)
        and differences(both[1], b) == 0
        and differences(both.select([3, 0])[0], a.select([3, 0])) == 0
    )
    assert "batch (2,)" in repr(both) and "5 views" in repr(a)
    with refused("index", kind=GeometryError):
        a[0]


def test_pickle_copy_and_help():
    "The patched methods and properties survive; worker processes get a geometry by pickle."
    g = ConeBeam.stack([odd_views(seed=1), odd_views(seed=2)])
    for other in (pickle.loads(pickle.dumps(g)), copy.deepcopy(g)):
        assert differences(other, g) == 0 and other.grid == g.grid
        assert torch.equal(other.matrices(), g.matrices())
        assert torch.equal(other.azimuth_deg, g.azimuth_deg)
    for name in ("orbit", "from_matrices", "stack", "matrices", "project_points", "plucker"):
        method = getattr(ConeBeam, name)
        assert method.__doc__ and method.__qualname__ == f"ConeBeam.{name}"
    assert "C-arm views" in inspect.getdoc(ConeBeam.orbit)
    assert "source_to_isocenter_mm" in inspect.signature(ConeBeam.orbit).parameters
    assert ConeBeam.azimuth_deg.__doc__


# ---------------------------------------------------------------- matrices
def test_matrices_and_back():
    for g in (
        ConeBeam.biplanar(),
        odd_views(),
        ConeBeam.stack([odd_views(seed=3), odd_views(seed=4)]),
    ):
        P = g.matrices()
        for scale in (
            1.0,
            -1.0,
            1e-4,
            torch.linspace(-3, 5, g.views, dtype=torch.float64)[:, None, None],
        ):
            for known in (
                dict(source_to_detector_mm=g.source_to_detector_mm),
                dict(pixel_mm=g.column_step_mm.norm(dim=-1)),
            ):
                again = ConeBeam.from_matrices(
                    scale * P, detector_shape=g.detector_shape, grid=g.grid, **known
                )
                assert differences(again, g) < 1e-9
                torch.testing.assert_close(again.matrices(), P, atol=1e-9, rtol=1e-12)


def test_matrix_row_three_is_depth_in_mm_and_agrees_with_a_hand_computed_camera():
    g = odd_views()
    assert torch.allclose(g.matrices()[:, 2, :3].norm(dim=-1), torch.ones(5).double())
    # AP view by hand: u = 128 + x·(1500/depth)/2, depth = y + 1000
    P = ConeBeam.biplanar().matrices()[0]
    torch.testing.assert_close(
        P, torch.tensor([[750.0, 128, 0, 128000], [0, 128, -750, 128000], [0, 1, 0, 1000]]).double()
    )


def test_projection_agrees_with_ray_and_plane():
    g = odd_views()
    points = torch.tensor(np.array(GRID.center_mm)) + 100 * torch.randn(
        40, 3, generator=generator(5), dtype=torch.float64
    )
    uv, depth = g.project_points(points)
    for v in range(g.views):
        s, c, a, b = (getattr(g, n)[v] for n in VECTORS)
        n = torch.linalg.cross(a, b)
        n = n / n.norm() * torch.sign(n @ (c - s))
        for k in range(40):
            hit = s + (points[k] - s) * ((n @ (c - s)) / (n @ (points[k] - s)))
            image = c + (uv[v, k, 0] - 35) * a + (uv[v, k, 1] - 24) * b
            assert (hit - image).norm() < 1e-9 and abs(depth[v, k] - n @ (points[k] - s)) < 1e-9


@pytest.mark.parametrize(
    "kwargs, argument",
    [
        (dict(), "source_to_detector_mm"),
        (dict(pixel_mm=1.0, source_to_detector_mm=1.0), "source_to_detector_mm"),
        (dict(matrices=torch.zeros(2, 3, 3), pixel_mm=1.0), "matrices"),
        (dict(matrices=torch.zeros(2, 3, 4), pixel_mm=1.0), "matrices"),
        (dict(matrices=torch.full((2, 3, 4), math.nan), pixel_mm=1.0), "matrices"),
        # the middle of the grid lies in the plane of a source
        (dict(grid=Grid.cube(4, center_mm=(0, -1000, 0)), pixel_mm=1.0), "grid"),
    ],
)
def test_from_matrices_faults(kwargs, argument):
    with refused(argument, kind=GeometryError):
        ConeBeam.from_matrices(
            **{"matrices": ConeBeam.biplanar().matrices().round(decimals=9), **kwargs}
        )


def test_points_shared_or_per_scan():
    g = ConeBeam.stack([odd_views(seed=s) for s in range(3)])
    points = torch.randn(3, 7, 3, generator=generator(), dtype=torch.float64)
    uv, depth = g.project_points(points)
    assert uv.shape == (3, 5, 7, 2) and depth.shape == (3, 5, 7)
    for b in range(3):
        torch.testing.assert_close(uv[b], g[b].project_points(points[b])[0])
        torch.testing.assert_close(g.project_points(points[b])[0][b], uv[b])
    assert g.project_points(GRID.centers_mm()[None])[0].shape == (3, 5, 16, 16, 16, 2)
    for wrong in ((2, 7, 3), (7, 2)):
        with refused("points_mm", kind=GeometryError):
            g.project_points(torch.zeros(wrong))


def test_point_at_the_source_gives_finite_numbers():
    g = ConeBeam.biplanar()
    uv, depth = g.project_points(g.source_mm)
    assert torch.isfinite(uv).all() and depth[0, 0] == 0 and depth[1, 1] == 0


def test_single_precision_projects_to_a_hundredth_of_a_pixel():
    g = odd_views()
    uv = g.project_points(GRID.centers_mm(torch.float64))[0]
    assert (g.to(torch.float32).project_points(GRID.centers_mm())[0] - uv).abs().max() < 1e-2


# ---------------------------------------------------------------- gradients
def test_every_number_is_differentiable():
    def everything(angles, lengths, shift, turn):
        g = ConeBeam.orbit(
            angles[0],
            angles[1],
            angles[2],
            grid=GRID,
            detector_shape=(4, 6),
            source_to_isocenter_mm=lengths[0],
            source_to_detector_mm=lengths[1],
            pixel_mm=lengths[2],
        )
        g = translate(rotate(g, turn), shift)
        again = ConeBeam.from_matrices(
            g.matrices(),
            source_to_detector_mm=g.source_to_detector_mm,
            detector_shape=(4, 6),
            grid=GRID,
        )
        points = torch.tensor(np.array(GRID.center_mm)) + torch.tensor(
            [[30.0, -20, 50], [1, 2, 3]], dtype=torch.float64
        )
        uv, depth = again.project_points(points)
        lines = epipolar_lines(g, 0, 1, g.token_uv((2, 2)).reshape(-1, 2))
        return (
            uv,
            depth,
            g.azimuth_deg,
            g.elevation_deg,
            g.roll_deg,
            g.plucker((2, 3)),
            g.ray_directions((2, 2)),
            lines,
        )

    inputs = (
        [[10.0, 100.0], [5.0, -20.0], [3.0, 40.0]],
        [900.0, 1300.0, 1.5],
        [3.0, -2.0, 1.0],
        [1.0, 2.0, -3.0],
    )
    assert torch.autograd.gradcheck(
        everything,
        tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs),
        eps=1e-5,
        atol=1e-4,
        rtol=1e-4,
    )


def test_zero_rotation_has_a_gradient():
    turn = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotate(ConeBeam.biplanar(), turn).azimuth_deg.sum(), turn)
    torch.testing.assert_close(
        gradient, torch.tensor([0.0, 0, -2], dtype=torch.float64), atol=1e-9, rtol=0
    )


# ---------------------------------------------------------------- pose errors
def test_jitter_has_the_stated_standard_deviation_and_advances_the_generator_equally():
    g = ConeBeam.stack([ConeBeam.orbit([20.0, 110.0], grid=GRID)] * 3000)
    moved = jitter_pose(g, generator(), shift_mm=3.0)
    assert abs((moved.source_mm - g.source_mm).std() - 3) < 0.05 and torch.allclose(
        moved.source_mm - g.source_mm, moved.detector_center_mm - g.detector_center_mm
    )
    turned = jitter_pose(g, generator(), rotation_deg=1.0)
    assert (
        abs(turned.elevation_deg.std() - 1) < 0.03
        and abs((turned.azimuth_deg - g.azimuth_deg).std() - 1) < 0.03
    )
    plate = jitter_pose(g, generator(), detector_rotation_deg=2.0, detector_shift_mm=4.0)
    assert (
        torch.equal(plate.source_mm, g.source_mm)
        and abs((plate.detector_center_mm - g.detector_center_mm).std() - 4) < 0.06
    )
    torch.testing.assert_close(plate.column_step_mm.norm(dim=-1), g.column_step_mm.norm(dim=-1))
    one, two = generator(3), generator(3)
    jitter_pose(g[0], one, 1.0), jitter_pose(g[0], two, 0.0, 0.0, 1.0, 1.0)
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))


def test_rigid_motion_is_the_patient_moving_the_other_way():
    g = odd_views()
    points = torch.randn(9, 3, generator=generator(), dtype=torch.float64) * 80
    torch.testing.assert_close(
        translate(g, (3.0, -4.0, 5.0)).project_points(points)[0],
        g.project_points(points - torch.tensor([3.0, -4, 5]).double())[0],
    )
    back = rotate(
        rotate(g, (3.0, 4.0, -5.0), center_mm=(1.0, 2.0, 3.0)),
        (-3.0, -4.0, 5.0),
        center_mm=(1.0, 2.0, 3.0),
    )
    assert differences(back, g) < 1e-9


# ---------------------------------------------------------------- rays and the grid
def test_missing_rays_by_brute_force():
    oblique = Grid(
        (6, 8, 10), np.array([[18.0, 4, 0, -60], [-3, 20, 2, -80], [1, -2, 30, 400], [0, 0, 0, 1]])
    )
    g = ConeBeam.orbit(
        [0.0, 60.0, 200.0], [0.0, 30.0, -10.0], grid=oblique, detector_shape=(20, 24), pixel_mm=18.0
    )
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None, None, None]
    inverse = torch.tensor(np.linalg.inv(oblique.affine))
    high = torch.tensor([10.0, 8, 6]).double() - 0.5
    for v, fraction in enumerate(g.missing_rays()):
        points = g.source_mm[v] + t * (g.pixel_centers_mm()[v] - g.source_mm[v])
        index = points @ inverse[:3, :3].T + inverse[:3, 3]
        hit = ((index > -0.5) & (index < high)).all(-1).any(0)
        # a sampled ray can step over a corner
        assert 0.1 < fraction < 0.9 and abs(fraction - (~hit).double().mean()) <= 2 / 480


def test_views_that_miss_are_named():
    g = ConeBeam.biplanar(grid=GRID)
    lost = miscalibrate_view(g, 1, shift_mm=(0, 0, 900))
    assert lost.missing_rays().tolist() == [0.0, 1.0] and g.require_hits() is g
    with refused("grid", kind=GeometryError) as caught:
        lost.require_hits()
    assert caught.value.view == 1 and "\n" not in str(caught.value)
    with refused("grid", kind=GeometryError) as caught:
        ConeBeam.stack([g, lost]).require_hits()
    assert "view 1 of scan (1,)" in caught.value.reason


def test_detector_short_of_the_volume_and_volume_behind_the_source_are_missed():
    box = Grid.cube(8, 100.0)
    assert (
        ConeBeam.orbit(
            [0.0], grid=box, source_to_isocenter_mm=1000, source_to_detector_mm=900, pixel_mm=0.1
        )
        .missing_rays()
        .item()
        == 1.0
    )
    assert (
        ConeBeam.orbit([0.0], grid=box, isocenter_mm=(0, 1200, 0), pixel_mm=0.1)
        .missing_rays()
        .item()
        == 1.0
    )


def test_parallel_limit_and_source_inside():
    far = ConeBeam.biplanar(
        source_to_isocenter_mm=1e8, source_to_detector_mm=1e8 + 400, pixel_mm=1.0
    )
    points = 100 * torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    uv, _ = far.project_points(points)
    torch.testing.assert_close(
        uv[0], torch.stack([points[:, 0], -points[:, 2]], -1) + 128, atol=3e-3, rtol=0
    )
    torch.testing.assert_close(
        uv[1], torch.stack([-points[:, 1], -points[:, 2]], -1) + 128, atol=3e-3, rtol=0
    )
    inside = ConeBeam.biplanar(source_to_isocenter_mm=40.0, source_to_detector_mm=500.0)
    again = ConeBeam.from_matrices(inside.matrices(), source_to_detector_mm=500.0, grid=inside.grid)
    assert inside.missing_rays().max() == 0 and differences(again, inside) < 1e-9


def test_plucker_does_not_depend_on_the_point_of_the_line():
    g = odd_views()
    six = g.plucker((5, 7))
    assert six.shape == (5, 5, 7, 6)
    point = g.pixel_centers_mm((5, 7)) - torch.tensor(np.array(GRID.center_mm))
    torch.testing.assert_close(
        torch.linalg.cross(point, six[..., :3]), six[..., 3:], atol=1e-8, rtol=0
    )
    shifted = translate(g, (10.0, 20.0, 30.0)).on(
        Grid.cube(16, 320.0, np.array(GRID.center_mm) + [10, 20, 30])
    )
    # room and patient moved together: nothing changed
    torch.testing.assert_close(shifted.plucker((5, 7)), six, atol=1e-8, rtol=0)


# ---------------------------------------------------------------- epipolar
def test_lines_hold_projected_points_and_f_transposes():
    g = ConeBeam.stack([odd_views(seed=s) for s in (1, 2)])
    points = torch.tensor(np.array(GRID.center_mm)) + 100 * torch.randn(
        30, 3, generator=generator(9), dtype=torch.float64
    )
    uv, _ = g.project_points(points)
    for i, j in ((0, 1), (3, 2), (4, 0)):
        lines = epipolar_lines(g, i, j, uv[:, i])
        assert (lines[..., :2] * uv[:, j]).sum(-1).add(lines[..., 2]).abs().max() < 1e-8
        torch.testing.assert_close(lines[..., :2].norm(dim=-1), torch.ones(2, 30).double())
        F = fundamental_matrix(g, i, j)
        back = fundamental_matrix(g, j, i).transpose(-1, -2)
        sign = (F * back).sum((-1, -2)).sign()[:, None, None]
        torch.testing.assert_close(F, sign * back, atol=1e-12, rtol=1e-9)
        for b in range(2):
            torch.testing.assert_close(fundamental_matrix(g[b], i, j), F[b])


def test_fundamental_matrix_is_hartley_zisserman_9_1():
    g = odd_views()
    for i, j in ((0, 1), (2, 3), (4, 1)):
        P, Q = g.matrices()[i].numpy(), g.matrices()[j].numpy()
        null = np.linalg.svd(P)[2][-1]
        e = Q @ null
        F = np.array([[0, -e[2], e[1]], [e[2], 0, -e[0]], [-e[1], e[0], 0]]) @ Q @ np.linalg.pinv(P)
        F /= np.linalg.norm(F)
        ours = fundamental_matrix(g, i, j).numpy()
        assert min(abs(F - ours).max(), abs(F + ours).max()) < 1e-9


def test_nearest_tokens_by_brute_force():
    g = odd_views()
    shape, k = (6, 9), 11
    for i, j in ((0, 1), (2, 4)):
        tokens = g.pixel_centers_mm(shape)
        for n, got in enumerate(nearest_on_epipolar_line(g, i, j, shape, k)):
            # in space: the epipolar plane holds both sources and the token of view i; the line is
            # where it cuts detector j
            normal = torch.linalg.cross(
                g.source_mm[j] - g.source_mm[i], tokens[i].reshape(-1, 3)[n] - g.source_mm[i]
            )
            # within the detector's plane
            normal = normal - (
                normal @ (d := torch.linalg.cross(g.column_step_mm[j], g.row_step_mm[j]))
            ) * d / (d @ d)
            distance = (
                (tokens[j].reshape(-1, 3) - g.source_mm[j])
                @ torch.linalg.cross(
                    g.source_mm[j] - g.source_mm[i], tokens[i].reshape(-1, 3)[n] - g.source_mm[i]
                )
            ).abs() / normal.norm()
            # the skewed pixels of odd_views measure mm along their own axes; the order may differ
            # only among nearly equal distances
            assert distance[got].max() <= 1.25 * distance.sort().values[k - 1] + 1e-6


def test_nearest_tokens_are_exact_on_square_pixels():
    g = ConeBeam.orbit([0.0, 80.0], [3.0, -10.0], [20.0, 5.0], detector_shape=(40, 64))
    shape, k = (5, 8), 9
    uv = g.token_uv(shape).reshape(-1, 2)
    lines = epipolar_lines(g, 0, 1, uv)
    distance = (lines[:, :2] @ uv.T + lines[:, 2:]).abs()
    got = nearest_on_epipolar_line(g, 0, 1, shape, k)
    torch.testing.assert_close(
        distance.gather(1, got), distance.sort(-1).values[:, :k], atol=1e-4, rtol=0
    )
    assert torch.equal(nearest_on_epipolar_line(g.to(torch.float32), 0, 1, shape, k), got)


def test_nearest_tokens_of_a_batch_in_strips():
    g = ConeBeam.stack([odd_views(seed=s) for s in range(3)])
    got = nearest_on_epipolar_line(g, 1, 2, (40, 40), 8)  # 3 × 1600² distances: more than one strip
    assert got.shape == (3, 1600, 8) and got.dtype == torch.int64
    assert all(
        torch.equal(got[b], nearest_on_epipolar_line(g[b], 1, 2, (40, 40), 8)) for b in range(3)
    )


def test_degenerate_pairs_fall_back_to_position():
    g = ConeBeam.orbit([0.0, 0.0, 180.0])
    assert (fundamental_matrix(g, 0, 1) == 0).all() and (
        epipolar_lines(g, 0, 1, g.token_uv((3, 3)).reshape(-1, 2)) == 0
    ).all()
    assert torch.equal(nearest_on_epipolar_line(g, 0, 1, (8, 8), 1)[:, 0], torch.arange(64))
    # one source, a plate moved by 64 mm = one token of 8
    shifted = replace(
        g,
        detector_center_mm=g.detector_center_mm
        + torch.tensor([[0.0, 0, 0], [64.0, 0, 0], [0, 0, 0]]),
    )
    assert torch.equal(
        nearest_on_epipolar_line(shifted, 0, 1, (8, 8), 1)[1:8, 0], torch.arange(0, 7)
    )
    for pair in ((0, 2), (2, 0)):
        assert (
            torch.isfinite(fundamental_matrix(g, *pair)).all()
            and torch.isfinite(epipolar_lines(g, *pair, g.token_uv((3, 3)).reshape(-1, 2))).all()
        )
        assert (
            nearest_on_epipolar_line(g, *pair, (9, 9), 81)
            .sort(-1)
            .values.eq(torch.arange(81))
            .all()
        )
    source = g.source_mm.clone().requires_grad_()
    assert torch.isfinite(
        torch.autograd.grad(fundamental_matrix(replace(g, source_mm=source), 0, 1).sum(), source)[0]
    ).all()
    with refused("k", kind=GeometryError):
        nearest_on_epipolar_line(g, 0, 1, (4, 4), 17)


# ---------------------------------------------------------------- JSON
def test_json_round_trip_is_exact(tmp_path):
    g = odd_views()
    again = load_geometry(save_geometry(g, tmp_path / "geometry.json"))
    assert (
        differences(again, g) == 0
        and again.detector_shape == g.detector_shape
        and np.array_equal(again.grid.affine, g.grid.affine)
        and again.grid.shape == g.grid.shape
    )
    assert differences(load_geometry(tmp_path / "geometry.json", grid=Grid.cube(8)), g) == 0
    single = g.to(torch.float32)
    assert differences(geometry_from_json(geometry_to_json(single)), single.to(torch.float64)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["geometry.json"]


GOOD = json.loads(geometry_to_json(ConeBeam.biplanar(grid=GRID)))
BY_HAND = {
    "azimuth_deg": [0, 90],
    "source_to_isocenter_mm": 1000,
    "source_to_detector_mm": [1500, 1600],
    "pixel_mm": 1.5,
    "detector_shape": [64, 64],
    "grid": GOOD["grid"],
}


def without(content, *keys):
    content = json.loads(json.dumps(content))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return content


def with_(content, value, *keys):
    content = json.loads(json.dumps(content))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    "content, key",
    [
        (without(GOOD, "grid"), "grid"),
        (without(GOOD, "grid", "affine"), "affine"),
        (without(GOOD, "detector_shape"), "detector_shape"),
        (without(GOOD, "views"), "views"),
        (without(GOOD, "views", 1, "row_step_mm"), "row_step_mm"),
        (with_(GOOD, [1, 2], "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, "left", "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, [[1], [2, 3]], "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, [1, 2, None], "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, float("nan"), "grid", "affine", 0, 0), None),  # no JSON
        (with_(GOOD, [], "views"), "views"),
        (with_(GOOD, {}, "views"), "views"),
        (with_(GOOD, ["AP"], "views"), "views"),
        (with_(GOOD, [64.5, 64], "detector_shape"), "detector_shape"),
        (with_(GOOD, [0, 64], "detector_shape"), "detector_shape"),
        (with_(GOOD, [0, 0, 0], "views", 0, "row_step_mm"), "source_mm"),
        ([1, 2], "views"),
        ({**GOOD, "matrices": []}, "views"),
        (without(BY_HAND, "pixel_mm"), "pixel_mm"),
        (with_(BY_HAND, 0, "azimuth_deg"), "azimuth_deg"),
        (with_(BY_HAND, [1500], "source_to_detector_mm"), "source_to_detector_mm"),
        (with_(BY_HAND, -5, "pixel_mm"), "pixel_mm"),
        (with_(BY_HAND, True, "pixel_mm"), "pixel_mm"),
        (
            {"matrices": [[[1, 0], [0, 1]]], "detector_shape": [4, 4], "grid": GOOD["grid"]},
            "matrices",
        ),
        (
            {"matrices": [np.eye(3, 4).tolist()], "detector_shape": [4, 4], "grid": GOOD["grid"]},
            "source_to_detector_mm",
        ),
    ],
)
def test_json_faults_name_file_and_key(tmp_path, content, key):
    path = tmp_path / "geometry.json"
    path.write_text(json.dumps(content))
    with refused(file=path, kind=GeometryFileError) as caught:
        load_geometry(path)
    assert caught.value.key == key and "\n" not in str(caught.value)
    assert isinstance(caught.value, GeometryError)


@pytest.mark.parametrize(
    "content, key",
    [
        ("[" * 100_000, None),
        ('{"views": ' + "1" * 5000 + "}", None),
        (with_(GOOD, [1e30, 64, 64], "grid", "shape"), "shape"),
        (with_(GOOD, [20_000, 20_000, 20_000], "grid", "shape"), "shape"),
        (with_(GOOD, [64, 10**400, 64], "grid", "shape"), "shape"),
        (with_(GOOD, [0, 1e18, 0], "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, [30_000, 64], "detector_shape"), "detector_shape"),
        (with_(GOOD, [[[[1]]]], "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, {"x": 1}, "views", 0, "source_mm"), "source_mm"),
        (with_(GOOD, "grid", "grid"), "grid"),
        (with_(GOOD, "ct_nb cone-beam geometry, version 2", "format"), "format"),
        (with_(BY_HAND, 1600, "source_to_isocenter_mm"), "source_to_isocenter_mm"),
        (with_(BY_HAND, 1e9, "source_to_detector_mm"), "source_to_detector_mm"),
        (None, "views"),
    ],
)
def test_json_beyond_its_bounds(tmp_path, content, key):
    path = tmp_path / "geometry.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with refused(file=path, kind=GeometryFileError) as caught:
        load_geometry(path)
    assert caught.value.key == key and len(str(caught.value)) < 400


def test_a_singular_affine_names_the_file(tmp_path):
    path = tmp_path / "geometry.json"
    path.write_text(json.dumps(with_(GOOD, [[0] * 4] * 4, "grid", "affine")))
    with refused(file=path, kind=GeometryFileError):
        load_geometry(path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("nothing.json", None),
        ("text.json", b"AP and lateral"),
        ("bytes.json", b"\x89PNG\xff\xfe"),
        ("cut.json", geometry_to_json(ConeBeam.biplanar())[:300].encode()),
    ],
)
def test_files_that_are_not_json(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(file=name, kind=GeometryFileError):
        load_geometry(tmp_path / name)


def test_save_is_whole_or_nothing(tmp_path):
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(OSError, match="cannot be written"):
        save_geometry(ConeBeam.biplanar(), tmp_path / "taken" / "geometry.json")
    with refused("geometry", kind=GeometryError):
        save_geometry(ConeBeam.stack([ConeBeam.biplanar()] * 2), tmp_path / "geometry.json")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_json_by_hand():
    g = geometry_from_json(
        json.dumps({**BY_HAND, "elevation_deg": 5, "roll_deg": [1, 2], "isocenter_mm": [1, 2, 3]})
    )
    expected = ConeBeam.orbit(
        [0.0, 90.0],
        5.0,
        [1.0, 2.0],
        source_to_detector_mm=torch.tensor([1500.0, 1600.0]),
        pixel_mm=1.5,
        detector_shape=(64, 64),
        isocenter_mm=(1.0, 2.0, 3.0),
        grid=GRID,
    )
    assert differences(g, expected) == 0


# ---------------------------------------------------------------- DICOM
def radiograph(**tags):
    from pydicom.dataset import Dataset

    data = Dataset()
    for keyword, value in dict(
        PositionerPrimaryAngle=0,
        PositionerSecondaryAngle=0,
        DistanceSourceToDetector=1200,
        DistanceSourceToPatient=800,
        ImagerPixelSpacing=[0.4, 0.3],
        Rows=100,
        Columns=120,
    ).items():
        if keyword not in tags:
            setattr(data, keyword, value)
    for keyword, value in tags.items():
        if value is not None:
            setattr(data, keyword, value)
    return data


@pytest.mark.parametrize(
    "primary, secondary, detector_at",
    [
        (0, 0, (0, -400, 0)),
        (90, 0, (400, 0, 0)),
        (-90, 0, (-400, 0, 0)),
        (180, 0, (0, 400, 0)),
        (0, 90, (0, 0, 400)),
        (0, -90, (0, 0, -400)),
    ],
)
def test_dicom_detector_moves_as_the_standard_says(primary, secondary, detector_at):
    g = geometry_from_dicom(
        radiograph(PositionerPrimaryAngle=primary, PositionerSecondaryAngle=secondary)
    )
    torch.testing.assert_close(
        g.detector_center_mm[0], torch.tensor(detector_at).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        g.source_mm[0], -2 * torch.tensor(detector_at).double(), atol=1e-9, rtol=0
    )


def test_dicom_image_is_seen_from_the_detector():
    g = geometry_from_dicom(
        [radiograph(), radiograph(PositionerPrimaryAngle=30, PositionerSecondaryAngle=-20)],
        grid=GRID,
    )
    ray = g.central_ray
    up = torch.linalg.cross(g.row_step_mm, g.column_step_mm)
    # columns right, rows down, the ray comes towards the viewer
    assert ((up * ray).sum(-1) > 0).all()
    torch.testing.assert_close(
        g.column_step_mm[0], torch.tensor([0.3, 0, 0], dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        g.row_step_mm[0], torch.tensor([0, 0, -0.4], dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    "orientation, column, row",
    [
        (["L", "F"], (1, 0, 0), (0, 0, -1)),
        (["R", "F"], (-1, 0, 0), (0, 0, -1)),
        (["F", "R"], (0, 0, -1), (-1, 0, 0)),
        (["LH", "FL"], None, None),
    ],
)
def test_dicom_patient_orientation_is_obeyed(orientation, column, row):
    g = geometry_from_dicom(radiograph(PatientOrientation=orientation))
    if column is None:
        column, row = (1, 0, 0), (0, 0, -1)
    torch.testing.assert_close(
        g.column_step_mm[0] / 0.3, torch.tensor(column).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        g.row_step_mm[0] / 0.4, torch.tensor(row).double(), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(
    "tag, value",
    [
        ("DistanceSourceToDetector", None),
        ("DistanceSourceToPatient", None),
        ("ImagerPixelSpacing", None),
        ("PositionerPrimaryAngle", None),
        ("Rows", None),
        ("PositionerMotion", "DYNAMIC"),
        ("DetectorPrimaryAngle", 3.0),
        ("PatientOrientation", ["A", "F"]),  # contradicts the C-arm angles
        ("PatientOrientation", ["X", "F"]),  # not an orientation
        ("PatientOrientation", ["LR", "F"]),  # no direction
        ("DistanceSourceToDetector", 0),
        ("DistanceSourceToDetector", -1),
        ("DistanceSourceToPatient", 0),
        ("DistanceSourceToPatient", 1200),  # in the detector
        ("DistanceSourceToPatient", 2000),  # behind it
        ("DistanceSourceToPatient", 1100),  # the detector would stand in the grid
        ("DistanceSourceToPatient", 100),  # the source would
        ("ImagerPixelSpacing", [0, 0]),
        ("ImagerPixelSpacing", [0.4]),
        ("Rows", 30_000),
        ("NumberOfFrames", 30),
        ("PositionerPrimaryAngle", 400),
        ("PositionerSecondaryAngle", None),
    ],
)
def test_dicom_faults(tag, value):
    with refused(file="radiograph 0", kind=GeometryFileError) as caught:
        geometry_from_dicom(radiograph(**{tag: value}))
    assert caught.value.key == tag and "\n" not in str(caught.value)


CR, DX, XA = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("1", "1.1.1", "12.1"))


@pytest.mark.parametrize("tags", [dict(SOPClassUID=DX), dict(SOPClassUID=CR), dict(Modality="DX")])
def test_in_radiography_the_distance_ends_at_the_bucky(tags):
    notes = []
    chest = radiograph(
        DistanceSourceToDetector=1800, DistanceSourceToPatient=1746, ViewPosition="PA", **tags
    )
    g = geometry_from_dicom(chest, notes=notes)
    # a cube of 320 mm in front of the bucky
    assert float(g.source_mm[0].norm()) == pytest.approx(1746 - 160)
    assert float(g.source_to_detector_mm[0]) == pytest.approx(1800)
    assert len(notes) == 1 and "1586" in notes[0]
    given = geometry_from_dicom(chest, source_to_isocenter_mm=1500, notes=notes)
    assert float(given.source_mm[0].norm()) == pytest.approx(1500) and len(notes) == 1


def test_in_angiography_it_ends_at_the_isocentre():
    notes = []
    for tags in (dict(SOPClassUID=XA), dict(Modality="RF")):
        g = geometry_from_dicom(radiograph(**tags), notes=notes)
        assert float(g.source_mm[0].norm()) == pytest.approx(800) and notes == []
    geometry_from_dicom(radiograph(), notes=notes)
    assert len(notes) == 1 and "assumed" in notes[0]
    with pytest.warns(UserWarning, match="assumed"):
        geometry_from_dicom(radiograph())


def test_the_spacing_at_the_detector_is_used():
    notes = []
    tags = dict(SOPClassUID=XA, ImagerPixelSpacing=[0.143, 0.143])
    g = geometry_from_dicom(radiograph(PixelSpacing=[0.095, 0.095], **tags), notes=notes)
    assert float(g.column_step_mm.norm()) == pytest.approx(0.143) and "0.095" in notes[0]
    geometry_from_dicom(radiograph(PixelSpacing=[0.143, 0.143], **tags), notes=notes)
    assert len(notes) == 1


def test_a_magnification_that_the_distances_do_not_give():
    notes = []
    for factor in (1.5, 1.05):
        geometry_from_dicom(
            radiograph(SOPClassUID=XA, EstimatedRadiographicMagnificationFactor=factor), notes=notes
        )
    assert len(notes) == 1 and "1.05" in notes[0]


@pytest.mark.parametrize("side", [-1, 1])
def test_right_and_left_oblique_views_are_mirror_images(side):
    def axes(angle, orientation):
        data = radiograph(
            PositionerPrimaryAngle=side * angle, PatientOrientation=orientation, SOPClassUID=XA
        )
        g = geometry_from_dicom(data)
        return (g.column_step_mm[0] / 0.3 * torch.tensor([side, 1, 1])).round(decimals=3).tolist()

    # towards the letter of the tag, whichever side the detector is on
    assert axes(60, ["P", "F"]) == [0.5, 0.866, 0.0]
    assert axes(60, ["A", "F"]) == [-0.5, -0.866, 0.0]
    with refused(kind=GeometryFileError):  # 60° from what the tag says
        axes(30, ["P", "F"])


def test_a_view_position_against_the_angle():
    data = radiograph(ViewPosition="AP", Modality="DX", DistanceSourceToPatient=1000)
    with refused(file="radiograph 0", kind=GeometryFileError) as caught:
        geometry_from_dicom(data, notes=[])
    assert caught.value.key == "PositionerPrimaryAngle"


def test_dicom_from_files_and_view_positions(tmp_path):
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    paths = []
    for name, position in (("pa", "PA"), ("ll", "LL")):
        data = radiograph(
            PositionerPrimaryAngle=None, PositionerSecondaryAngle=None, ViewPosition=position
        )
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.12.1"
        data.SOPInstanceUID = f"1.2.3.{len(paths)}"
        paths.append(tmp_path / f"{name}.dcm")
        data.save_as(paths[-1], enforce_file_format=True)
    g = geometry_from_dicom(paths)
    assert (
        g.views == 2
        and torch.allclose(g.azimuth_deg.abs(), torch.tensor([180.0, 90.0]).double())
        and g.detector_shape == (100, 120)
    )
    (tmp_path / "no.dcm").write_text("no")
    with refused(file="no.dcm", kind=GeometryFileError):
        geometry_from_dicom(tmp_path / "no.dcm")
    with refused("datasets", kind=GeometryError):
        geometry_from_dicom([radiograph(), radiograph(Rows=50)])


# ---------------------------------------------------------------- figure
@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_figure_of_any_geometry(plt):
    from ct_nb.physics.volume import Volume
    from ct_nb.viewer.geometry_figure import geometry_figure

    oblique = Grid(
        (12, 14, 16),
        np.array([[18.0, 4, 0, -60], [-3, 20, 2, -80], [1, -2, 22, 400], [0, 0, 0, 1]]),
    )
    ball = np.where(
        np.linalg.norm(np.indices((12, 14, 16)) - np.array([6, 7, 8])[:, None, None, None], axis=0)
        < 5,
        50.0,
        -1000.0,
    )
    air = Volume(np.full((12, 14, 16), -1000.0), oblique.affine)
    body = Volume(ball, oblique.affine)
    one = ConeBeam.orbit([10.0], [30.0], grid=oblique, detector_shape=(20, 30), pixel_mm=20.0)
    around = ConeBeam.orbit(range(0, 360, 72), grid=oblique, detector_shape=(20, 30), pixel_mm=20.0)
    # the last looks along the body axis
    for g, volume in (
        (one, air),
        (one, body),
        (around, None),
        (ConeBeam.orbit([0.0], [90.0], grid=oblique), None),
    ):
        figure = geometry_figure(g, volume)
        figure.canvas.draw()
        assert len(figure.axes) == 3
        plt.close(figure)


def test_xray_hangs_on_its_detector_as_its_pixels_lie(plt):
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    from ct_nb.viewer.geometry_figure import geometry_figure

    g = ConeBeam.orbit([25.0], [10.0], [15.0], detector_shape=(4, 6), pixel_mm=50.0)
    image = torch.zeros(1, 4, 6)
    image[0, 1, 4] = 1.0
    figure = geometry_figure(g, xrays=image)
    figure.canvas.draw()
    textured = next(
        c
        for c in figure.axes[0].collections
        if isinstance(c, Poly3DCollection)
        and len(c._vec[0] if hasattr(c, "_vec") else c._faces) >= 24
    )
    faces = (
        textured._faces if hasattr(textured, "_faces") else textured._vec[:3].T.reshape(-1, 4, 3)
    )
    colors = textured._facecolor3d
    brightest = int(np.argmax(np.asarray(colors)[:, 0]))
    assert np.allclose(
        np.asarray(faces)[brightest].mean(0), g.pixel_centers_mm()[0, 1, 4].numpy(), atol=1.0
    )
