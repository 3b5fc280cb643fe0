"Solvers against a dense pseudo-inverse, their projections, and the inputs they refuse."

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.solvers import (
    data_consistency,
    fdk,
    minimum_norm,
    null_component,
    range_component,
    sirt,
)
from ct_nb.physics.volume import Grid

TINY = ConeBeam.orbit(
    [0.0, 70.0], [0.0, 20.0], grid=Grid.cube(6), detector_shape=(7, 7), pixel_mm=80.0
)
PAIR = ConeBeam.biplanar(grid=Grid.cube(24), detector_shape=(48, 48), pixel_mm=512 / 48)


def dense(geometry):
    "The projector as a matrix (rays, voxels), float64."
    voxels = int(np.prod(geometry.grid.shape))
    return (
        project(
            torch.eye(voxels, dtype=torch.float64).view(voxels, *geometry.grid.shape),
            geometry.to(torch.float64),
        )
        .flatten(1)
        .T
    )


def ball(size=24, dtype=torch.float32):
    mm = Grid.cube(size).centers_mm(dtype)
    return 0.02 * ((mm / torch.tensor([120.0, 80.0, 140.0])).norm(dim=-1) < 1).to(dtype) - 0.012 * (
        (mm - torch.tensor([50.0, 0.0, 10.0])).norm(dim=-1) < 45
    ).to(dtype)


@pytest.fixture(scope="module")
def matrix():
    return dense(TINY)


@pytest.mark.parametrize("consistent", [True, False])
def test_minimum_norm_is_the_pseudo_inverse(matrix, consistent):
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(2, 7, 7, generator=generator, dtype=torch.float64)
    if consistent:
        y = project(torch.rand(6, 6, 6, generator=generator, dtype=torch.float64), TINY)
    expected = (torch.linalg.pinv(matrix, rtol=1e-9) @ y.flatten()).view(6, 6, 6)
    assert torch.allclose(
        minimum_norm(y, TINY, iterations=500, tolerance=1e-13),
        expected,
        atol=1e-7 * expected.abs().max().item() + 1e-12,
        rtol=1e-5,
    )


def test_damping_is_tikhonov_and_spread_a_prior_deviation(matrix):
    y = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = 0.3 + torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    damping = 500.0
    covariance = w.flatten().square()
    expected = covariance * (
        matrix.T
        @ torch.linalg.solve(
            (matrix * covariance) @ matrix.T
            + damping * torch.eye(len(matrix), dtype=torch.float64),
            y.flatten(),
        )
    )
    result = minimum_norm(y, TINY, iterations=300, tolerance=1e-13, damping=damping, prior_std=w)
    assert torch.allclose(result.flatten(), expected, rtol=1e-7, atol=1e-12)


def test_minimum_norm_is_the_smallest_solution(matrix):
    truth = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    least = minimum_norm(project(truth, TINY), TINY, iterations=500, tolerance=1e-13)
    assert torch.allclose(project(least, TINY), project(truth, TINY), atol=1e-6)
    assert least.norm() < truth.norm()
    nothing = null_component(
        torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
        TINY,
        iterations=500,
        tolerance=1e-13,
    )
    assert (least + nothing).norm() > least.norm() and abs(
        (least * nothing).sum()
    ) < 1e-6 * least.norm() * nothing.norm()


def test_split_is_an_orthogonal_projection(matrix):
    mu = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    exact = dict(iterations=500, tolerance=1e-13)
    range_part = range_component(mu, TINY, **exact)
    null_part = null_component(mu, TINY, **exact)
    expected = (torch.linalg.pinv(matrix, rtol=1e-9) @ (matrix @ mu.flatten())).view(6, 6, 6)
    assert torch.allclose(range_part, expected, atol=1e-6) and torch.allclose(
        range_part + null_part, mu, atol=1e-14
    )
    assert torch.allclose(range_component(range_part, TINY, **exact), range_part, atol=1e-6)
    assert (
        abs((range_part * null_part).sum()) < 1e-8 * mu.square().sum()
        and project(null_part, TINY).abs().max() < 1e-6 * project(mu, TINY).max()
    )


def test_range_and_null_split_float32():
    mu = ball()
    range_part = range_component(mu, PAIR, iterations=150, tolerance=1e-6)
    null_part = null_component(mu, PAIR, iterations=150, tolerance=1e-6)
    assert torch.allclose(range_part + null_part, mu, atol=1e-6)
    assert project(null_part, PAIR).abs().max() < 2e-3 * project(mu, PAIR).abs().max()
    # as far as float32 and 150 iterations resolve the smallest singular values
    assert (
        range_component(range_part, PAIR, iterations=150, tolerance=1e-6) - range_part
    ).norm() < 5e-2 * range_part.norm()
    # 4 to 7 % measured: rounding lights up the smallest singular values
    assert (
        range_component(null_part, PAIR, iterations=150, tolerance=1e-6).norm()
        < 0.15 * null_part.norm()
    )
    assert abs((range_part * null_part).sum()) < 1e-2 * range_part.norm() * null_part.norm()


def test_batches_are_solved_each_on_its_own():
    mu = torch.stack([ball(), 100 * ball().flip(-1), torch.zeros_like(ball())])
    geometries = [
        PAIR,
        ConeBeam.orbit([10.0, 80.0], grid=PAIR.grid, detector_shape=(48, 48), pixel_mm=512 / 48),
        PAIR,
    ]
    stacked = ConeBeam.stack(geometries)
    image = project(mu, stacked)
    together = minimum_norm(image, stacked, iterations=20)
    for b, geometry in enumerate(geometries):
        alone = minimum_norm(image[b], geometry, iterations=20)
        assert torch.allclose(
            together[b], alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()) + 1e-12
        )
    assert not together[2].any() and torch.isfinite(together).all()


def test_noise_does_not_make_it_diverge():
    image = project(ball(), PAIR)
    noisy = image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    norms = [
        float(minimum_norm(noisy, PAIR, iterations=k, tolerance=0.0, damping=1.0).norm())
        for k in (30, 100, 300)
    ]
    assert max(norms) < 2 * float(ball().norm())


def test_rays_that_miss_do_no_harm():
    # most pixels see past the grid
    away = ConeBeam.orbit([0.0, 90.0], grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=60.0)
    mu = ball(16)
    image = project(mu, away) + 0.01  # what no ray through the grid can explain
    for solution in (minimum_norm(image, away), sirt(image, away)):
        assert torch.isfinite(solution).all()


def test_sirt():
    image = project(ball(), PAIR)
    residual = [
        float((project(sirt(image, PAIR, iterations=k), PAIR) - image).norm()) for k in (5, 20, 80)
    ]
    assert residual[0] > residual[1] > residual[2]
    assert (
        sirt(image, PAIR, iterations=10).min()
        >= 0
        > sirt(image, PAIR, iterations=10, nonnegative=False).min()
    )
    # a solution stays
    assert torch.allclose(sirt(image, PAIR, iterations=3, initial=ball()), ball(), atol=1e-5)


def test_data_consistency_reaches_the_xrays_and_stays_near():
    mu, prediction = ball(), ball().flip(-1)
    image = project(mu, PAIR)
    result = data_consistency(prediction, image, PAIR, iterations=120, tolerance=1e-6)
    assert (project(result, PAIR) - image).norm() < 1e-3 * image.norm()
    # the nearest, and the truth is one of the candidates
    assert (result - prediction).norm() <= (mu - prediction).norm()


@pytest.mark.parametrize("damping, weighted", [(0.0, False), (200.0, False), (200.0, True)])
def test_data_consistency_gradcheck(damping, weighted):
    geometry = ConeBeam.biplanar(grid=Grid.cube(3), detector_shape=(3, 3), pixel_mm=170.0)

    def random(seed, *shape):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # A⁺ of an arbitrary image is ill-conditioned
    mu = random(0, 3, 3, 3).requires_grad_()
    target = project(random(1, 3, 3, 3), geometry).requires_grad_(damping > 0)
    spread = (0.5 + random(2, 3, 3, 3)).requires_grad_() if weighted else None
    assert torch.autograd.gradcheck(
        lambda m, y, *w: data_consistency(
            m,
            y,
            geometry,
            iterations=60,
            tolerance=1e-14,
            damping=damping,
            prior_std=w[0] if w else None,
        ),
        (mu, target, *([spread] if weighted else [])),
        atol=1e-5,
    )


def test_the_derivative_is_the_null_space_projection():
    image = project(ball(), PAIR)
    gradient = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0))
    mu = ball().flip(0).requires_grad_()
    data_consistency(mu, image, PAIR, iterations=120, tolerance=1e-6).backward(gradient)
    expected = null_component(gradient, PAIR, iterations=120, tolerance=1e-6)
    assert (mu.grad - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("views, detector", [(90, 64), (61, 80)])
def test_fdk_sphere(views, detector):
    sphere = 0.02 * (Grid.cube(48).centers_mm().norm(dim=-1) < 100).float()
    orbit = ConeBeam.orbit(
        np.arange(views) * 360 / views + 7.0,
        grid=Grid.cube(48),
        detector_shape=(detector, detector),
        pixel_mm=576 / detector,
    )
    back = fdk(project(sphere, orbit), orbit)
    assert abs(float(back[20:28, 20:28, 20:28].mean()) / 0.02 - 1) < 0.03


@pytest.mark.parametrize(
    "geometry",
    [
        ConeBeam.biplanar(grid=Grid.cube(8)),
        ConeBeam.orbit(np.arange(10) * 20.0, grid=Grid.cube(8)),
        ConeBeam.orbit(np.arange(12) * 30.0, 10.0, grid=Grid.cube(8)),
        ConeBeam.orbit(np.arange(12) * 30.0, roll_deg=5.0, grid=Grid.cube(8)),
    ],
)
def test_fdk_refuses_what_is_not_a_circle(geometry):
    with refused("geometry"):
        fdk(torch.zeros(geometry.views, *geometry.detector_shape), geometry)


def test_wrong_shapes_are_a_sentence():
    image = torch.zeros(2, 48, 48)
    with refused("image"):
        minimum_norm(torch.zeros(3, 48, 48), PAIR)
    with refused("mu"):
        null_component(torch.zeros(8, 8, 8), PAIR)
    with refused("mu"):
        data_consistency(torch.zeros(8, 8, 8), image, PAIR)
    with refused("image"):
        sirt(torch.zeros(2, 32, 48), PAIR)
