"""X-ray guidance against dense matrices, its own noise level, and the inputs it refuses."""

import pytest
import torch
from refusals import refused

from ct_nb.cascade.guidance import MODES, XrayGuidance, ray_variance, weighted_step
from ct_nb.evaluation.inference import view_residuals
from ct_nb.physics.detector import bin_pixels
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import jitter_pose
from ct_nb.physics.projector import backproject, project
from ct_nb.physics.solvers import data_consistency
from ct_nb.physics.volume import WINDOWS, Grid, hu_to_mu
from ct_nb.physics.xray_noise import XrayNoise, add_xray_noise

TINY = ConeBeam.orbit(
    [0.0, 70.0], [0.0, 20.0], grid=Grid.cube(6), detector_shape=(7, 7), pixel_mm=80.0
)
PAIR = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16.0)
THREE = ConeBeam.orbit(
    [0.0, 60.0, 120.0], grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16.0
)
WATER = float(hu_to_mu(0.0))


def uniform(seed, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(geometry):
    "The projector as a matrix (rays, voxels), float64."
    voxels = geometry.grid.shape[0] ** 3
    return (
        project(
            torch.eye(voxels, dtype=torch.float64).view(voxels, *geometry.grid.shape),
            geometry.to(torch.float64),
        )
        .flatten(1)
        .T
    )


def attenuation(x0, window="chest"):
    return WATER * (1 + WINDOWS[window].to_hu(x0[:, 0]) / 1000)


def chests(geometry, batch=2, dtype=torch.float32):
    "Guess and truth in the network's range, (B, 1, D, H, W), and the truth's X-rays (B, V, R, C)."
    mm = geometry.grid.centers_mm(dtype)
    body = ((mm / torch.tensor([120.0, 90.0, 200.0])).norm(dim=-1) < 1).to(dtype)
    lung = ((mm - torch.tensor([50.0, 0.0, 10.0])).norm(dim=-1) < 45).to(dtype)
    truth = torch.stack([body * (0.5 + 0.05 * b) - lung * 0.4 - 0.5 for b in range(batch)])[:, None]
    guess = truth + 0.1 * normal(1, *truth.shape, dtype=dtype) + 0.1 * body
    return guess, truth, project(attenuation(truth), geometry)


@pytest.fixture(scope="module")
def matrix():
    return dense(TINY)


# the weighted step


def parts(dtype=torch.float64):
    residual = uniform(0, 1, 2, 7, 7, dtype=dtype)
    weight = 1 / (0.02 + 0.2 * uniform(1, 1, 2, 7, 7, dtype=dtype))
    return residual, weight, 1e-4 * (0.2 + uniform(2, 1, 6, 6, 6, dtype=dtype))


def test_the_step_is_the_most_probable_one(matrix):
    residual, weight, spread = parts()
    r = residual.flatten()
    d = weight.flatten().reciprocal()
    w = spread.flatten()
    expected = w**2 * (
        matrix.T @ torch.linalg.solve((matrix * w**2) @ matrix.T + torch.diag(d**2), r)
    )
    # the guess is trusted so much that the noise level is out of reach
    assert ((r - matrix @ expected) / d).square().sum() > len(r)
    got = weighted_step(residual, TINY, weight, spread, iterations=400, tolerance=1e-12).flatten()
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-12)
    one = torch.full_like(d, float(d.square().mean().sqrt()))
    alike = w**2 * (
        matrix.T @ torch.linalg.solve((matrix * w**2) @ matrix.T + torch.diag(one**2), r)
    )
    unspread = matrix.T @ torch.linalg.solve(matrix @ matrix.T + torch.diag((d / w.mean()) ** 2), r)
    for wrong in (alike, unspread):
        assert (wrong - expected).norm() > 0.1 * expected.norm()


def test_one_noise_and_one_spread_are_damping():
    residual = uniform(0, 2, 2, 7, 7, dtype=torch.float64)
    spread = 2e-5
    noise = 0.05
    got = weighted_step(
        residual,
        TINY,
        torch.full_like(residual, 1 / noise),
        torch.tensor(spread, dtype=torch.float64),
        iterations=300,
        tolerance=1e-12,
    )
    peer = data_consistency(
        torch.zeros(2, 6, 6, 6, dtype=torch.float64),
        residual,
        TINY,
        300,
        1e-12,
        damping=(noise / spread) ** 2,
    )
    assert torch.allclose(got, peer, rtol=1e-6, atol=1e-12)
    assert (
        data_consistency(torch.zeros_like(peer), residual, TINY, 300, 1e-12, damping=noise / spread)
        - peer
    ).norm() > 0.1 * peer.norm()


def test_the_step_ends_on_the_noise_for_each_patient_alone(matrix):
    truth = torch.stack(
        [
            0.01 * uniform(3, 6, 6, 6, dtype=torch.float64),
            0.001 * uniform(4, 6, 6, 6, dtype=torch.float64),
            torch.zeros(6, 6, 6, dtype=torch.float64),
        ]
    )
    residual = project(truth, TINY) + 0.03 * normal(5, 3, 2, 7, 7, dtype=torch.float64)
    weight = torch.full_like(residual, 1 / 0.03)
    step = weighted_step(
        residual, TINY, weight, torch.tensor(0.01, dtype=torch.float64), iterations=60
    )
    level = ((residual - project(step, TINY)) * weight).square().mean((1, 2, 3))
    assert torch.allclose(level[:2], torch.ones(2, dtype=torch.float64), atol=1e-9)
    # nothing to explain, nothing changed
    assert ((residual[2] * weight[2]).square().mean() <= 1) == (not step[2].any())
    alone = weighted_step(
        residual[1:2], TINY, weight[1:2], torch.tensor(0.01, dtype=torch.float64), iterations=60
    )
    assert torch.allclose(alone, step[1:2], rtol=1e-9, atol=1e-15)


def test_the_sum_falls_at_every_iteration():
    residual, weight, spread = parts()

    def total(k):
        step = weighted_step(residual, TINY, weight, spread, iterations=k, tolerance=0.0)
        return float(
            ((residual - project(step, TINY)) * weight).square().sum()
            + (step / spread).square().sum()
        )

    totals = [total(k) for k in range(5)]  # converged to rounding after that
    assert all(b < a for a, b in zip(totals, totals[1:]))


# noise


def test_variance_of_binned_photons_is_that_of_draws():
    image = 4 * uniform(0, 2, 32, 32)
    camera = XrayNoise(photons_per_pixel=3e4, readout_photons=10.0)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([add_xray_noise(image, camera, generator) for _ in range(400)])
    for most, pixels in ((32, 1), (16, 4), (8, 16)):
        measured = bin_pixels(draws, PAIR, most)[0].var(0)
        claimed = ray_variance(image[None], PAIR, camera, most)[0]
        assert claimed.shape == measured.shape == (2, most, most)
        assert abs(float((measured / claimed).mean()) - 1) < 0.02
        # forgetting that a mean is quieter
        assert pixels == 1 or abs(float((measured / (claimed * pixels)).mean()) - 1) > 0.5
    # forgetting the readout
    assert abs(float((draws.var(0) * (3e4 * torch.exp(-image))).mean()) - 1) > 0.03


def test_exposure_does_not_average_out():
    image = torch.full((1, 2, 32, 32), 3.0)
    camera = XrayNoise(exposure_sd=0.05, beam_quality_sd=0.02)
    for most in (32, 8):
        assert torch.allclose(
            ray_variance(image, PAIR, camera, most), torch.tensor(0.05**2 + 0.06**2)
        )
    assert torch.allclose(ray_variance(image, PAIR, 0.08, 8), torch.tensor(0.08**2 / 16))


def test_noise_in_every_shape():
    image = uniform(0, 3, 2, 32, 32)
    per_view = torch.tensor([0.1, 0.2])
    expected = ray_variance(
        image, PAIR, per_view.view(1, 2, 1, 1).expand(3, 2, 32, 32).contiguous(), 16
    )
    for noise in (
        per_view,
        [0.1, 0.2],
        per_view.expand(3, 2),
        per_view.view(2, 1, 1).expand(2, 32, 32),
    ):
        assert torch.equal(ray_variance(image, PAIR, noise, 16), expected)
    assert expected[0, 1, 0, 0] == 4 * expected[0, 0, 0, 0]
    for wrong in (
        torch.ones(3),
        torch.ones(2, 2),
        torch.ones(3, 2, 32),
        torch.ones(1, 3, 2, 32, 32),
    ):
        with refused("noise"):
            ray_variance(image, PAIR, wrong)
    for wrong in (-0.1, float("nan")):
        with refused("noise"):
            ray_variance(image, PAIR, wrong)


# guidance


@pytest.mark.parametrize("geometry", [PAIR, THREE], ids=["2 views", "3 views"])
def test_soft_guidance_leaves_the_noise_and_no_less(geometry):
    guess, truth, clean = chests(geometry)
    noisy = clean + 0.05 * normal(2, *clean.shape)
    hit = project(torch.ones(16, 16, 16), geometry) > 0

    def level(x):
        return ((project(attenuation(x), geometry) - noisy) / 0.05)[:, hit].square().mean(1).sqrt()

    guide = XrayGuidance(noisy, geometry, noise=0.05, mismatch=0.0)
    guided = guide(guess, torch.tensor([0.9, 0.1]))
    assert guided.shape == guess.shape and guided.dtype == torch.float32
    assert (level(guess) > 1.5).all() and torch.allclose(level(guided), torch.ones(2), atol=2e-3)
    assert ((guided - truth).flatten(1).norm(dim=1) < (guess - truth).flatten(1).norm(dim=1)).all()
    again = guided
    for _ in range(10):
        again = guide(again)
    assert (
        torch.allclose(level(again), torch.ones(2), atol=2e-3)
        and (again - guided).abs().max() < 1e-3
    )
    mu = attenuation(guess)
    damping = (0.05 / (0.3 * WATER)) ** 2
    for _ in range(10):
        mu = data_consistency(mu, noisy, geometry, 20, damping=damping)
    # what damping alone comes to
    assert (((project(mu, geometry) - noisy) / 0.05)[:, hit].square().mean(1).sqrt() < 0.9).all()


def test_exact_guidance_has_these_xrays_and_keeps_what_they_do_not_see(matrix):
    guess, _, clean = chests(TINY, dtype=torch.float64)
    guide = XrayGuidance(clean, TINY, mode="exact", iterations=500, tolerance=1e-13)
    guided = guide(guess)
    assert torch.allclose(
        project(attenuation(guided), TINY), clean, atol=1e-5
    ) and not torch.allclose(project(attenuation(guess), TINY), clean, atol=0.05)
    null = torch.eye(216, dtype=torch.float64) - torch.linalg.pinv(matrix, rtol=1e-9) @ matrix

    def unseen(x):
        return (x.flatten(1) @ null).norm()

    assert unseen(guided - guess) < 1e-6 * (guided - guess).norm()
    soft = XrayGuidance(clean, TINY, noise=0.02, mismatch=0.0)(guess)
    assert unseen(soft - guess) < 1e-6 * (soft - guess).norm()
    spread = XrayGuidance(
        clean,
        TINY,
        mode="exact",
        spread=50 + 500 * uniform(7, 6, 6, 6, dtype=torch.float64),
        iterations=500,
        tolerance=1e-13,
    )(guess)
    assert torch.allclose(project(attenuation(spread), TINY), clean, atol=1e-5)
    # a spread may change what no X-ray sees, and is known to
    assert unseen(spread - guess) > 1e-2 * (spread - guess).norm()


def test_exact_guidance_in_single_precision():
    for geometry in (PAIR, THREE):
        guess, _, clean = chests(geometry)
        guided = XrayGuidance(clean, geometry, mode="exact", iterations=200, tolerance=1e-6)(guess)
        assert (
            (project(attenuation(guided), geometry) - clean).norm()
            < 2e-3 * clean.norm()
            < 0.1 * (project(attenuation(guess), geometry) - clean).norm()
        )


def test_spread_is_in_hu_and_mismatch_in_line_integrals():
    guess, _, clean = chests(PAIR, dtype=torch.float64)
    step = (
        (
            XrayGuidance(
                clean, PAIR, noise=0.03, mismatch=0.04, spread=2.0, iterations=200, tolerance=1e-10
            )(guess)
            - guess
        )[:, 0]
        * 1.024
        * WATER
    )

    def peer(hu):
        return data_consistency(
            attenuation(guess), clean, PAIR, 200, 1e-10, damping=(0.05 / (hu / 1000 * WATER)) ** 2
        ) - attenuation(guess)

    assert torch.allclose(step, peer(2.0), rtol=1e-5, atol=1e-12) and not torch.allclose(
        step, peer(3.0), rtol=0.1
    )


def test_off_hands_the_guess_back():
    guess, _, clean = chests(PAIR)
    assert XrayGuidance(clean, PAIR, mode="off")(guess) is guess
    x0 = guess.clone().requires_grad_()
    assert XrayGuidance(clean, PAIR, mode="off")(x0) is x0


def test_window_and_energy_are_those_of_the_network():
    guess, truth, _ = chests(PAIR)
    for window, energy in (("chest", 80.0), ("full", 60.0)):

        def to_hu(x, window=window):
            return WINDOWS[window].to_hu(x[:, 0])

        clean = project(float(hu_to_mu(0.0, energy)) * (1 + to_hu(truth) / 1000), PAIR)
        guide = XrayGuidance(clean, PAIR, window=window, energy_kev=energy, mode="exact")
        assert guide.explains(truth).max() < 1e-5
        assert guide.explains(guide(guess)).max() < 0.05 * guide.explains(guess).min()
        other = XrayGuidance(clean, PAIR, window="lung", energy_kev=energy)
        assert other.explains(truth).min() > 0.1


def test_explains_is_the_residual_of_each_view():
    guess, _, clean = chests(PAIR)
    xrays = clean + 0.1 * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    # above vacuum, where both count alike
    hu = WINDOWS["chest"].to_hu(guess.clamp_min(-0.95))[:, 0]
    found = XrayGuidance(xrays, PAIR, mode="off").explains(guess.clamp_min(-0.95))
    for b in range(2):
        assert found[b].tolist() == pytest.approx(
            view_residuals(hu[b], xrays[b], PAIR)[0], rel=1e-4
        )
    assert found.shape == (2, 2)


def test_a_batch_is_its_patients_and_one_patient_serves_many_samples():
    guess, _, clean = chests(PAIR, batch=3)
    turned = ConeBeam.stack(
        [PAIR, jitter_pose(PAIR, torch.Generator().manual_seed(0), 5.0, 5.0), PAIR]
    )
    for mode in ("soft", "exact"):
        together = XrayGuidance(clean, turned, mode=mode, noise=0.05)(guess)
        for b in range(3):
            assert torch.allclose(
                XrayGuidance(clean[b : b + 1], turned[b], mode=mode, noise=0.05)(guess[b : b + 1]),
                together[b : b + 1],
                atol=1e-3,
            )
        assert not torch.allclose(
            XrayGuidance(clean[1:2], PAIR, mode=mode, noise=0.05)(guess[1:2]),
            together[1:2],
            atol=1e-2,
        )
        for geometry in (PAIR, ConeBeam.stack([PAIR])):
            samples = XrayGuidance(
                clean[:1], geometry, mode=mode, noise=0.05, spread=uniform(0, 1, 16, 16, 16) + 200
            )(guess)
            alone = [
                XrayGuidance(
                    clean[:1], PAIR, mode=mode, noise=0.05, spread=uniform(0, 16, 16, 16) + 200
                )(guess[b : b + 1])
                for b in range(3)
            ]
            assert torch.allclose(samples, torch.cat(alone), atol=1e-3)


def test_a_dead_pixel_says_nothing():
    guess, _, clean = chests(PAIR)
    noise = torch.full_like(clean, 0.05)
    noise[:, 1, 10:14, 8:20] = torch.inf
    wrong = torch.where(noise == torch.inf, clean + 9, clean)
    for detector in (32, 16):
        first, second = (
            XrayGuidance(x, PAIR, noise=noise, detector=detector)(guess) for x in (clean, wrong)
        )
        assert torch.equal(first, second)
        assert not torch.allclose(
            XrayGuidance(wrong, PAIR, noise=0.05, detector=detector)(guess), first, atol=1e-2
        )


def test_rays_beside_the_grid_do_not_count():
    wide = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(64, 64), pixel_mm=16.0)
    guess, _, clean = chests(wide)
    hit = project(torch.ones(16, 16, 16), wide) > 0
    assert 0.1 < hit.float().mean() < 0.5
    # silence beside the grid must not buy noise inside
    noisy = clean + 0.05 * normal(2, *clean.shape) * hit
    guided = XrayGuidance(noisy, wide, noise=0.05, mismatch=0.0)(guess)
    level = ((project(attenuation(guided), wide) - noisy) / 0.05)[:, hit].square().mean(1).sqrt()
    assert torch.allclose(level, torch.ones(2), atol=2e-3)


def test_quiet_rays_count_more_than_noisy_ones():
    guess, truth, clean = chests(PAIR)
    camera = XrayNoise(photons_per_pixel=1e5)
    noisy = torch.stack(
        [add_xray_noise(y, camera, torch.Generator().manual_seed(b)) for b, y in enumerate(clean)]
    )
    sigma = ray_variance(clean, PAIR, camera).sqrt()
    own, alike = (
        XrayGuidance(noisy, PAIR, noise=noise, mismatch=0.0, iterations=60)(guess)
        for noise in (camera, float(sigma.square().mean().sqrt()))
    )
    assert ((project(attenuation(own), PAIR) - clean) / sigma).norm() < 0.75 * (
        (project(attenuation(alike), PAIR) - clean) / sigma
    ).norm()
    assert (own - truth).norm() < (alike - truth).norm() < (guess - truth).norm()


def test_precision_determinism_and_inference_mode():
    guess, _, clean = chests(PAIR)
    guide = XrayGuidance(clean, PAIR, noise=0.05)
    assert torch.equal(guide(guess), guide(guess)) and guide(guess.double()).dtype == torch.float64
    half = guide(guess.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), guide(guess), atol=0.05)
    with torch.inference_mode():
        assert torch.equal(XrayGuidance(clean, PAIR, noise=0.05)(guess), guide(guess))
    assert not guide(guess.requires_grad_()).requires_grad


def test_more_pixels_than_needed_are_binned():
    guess, _, clean = chests(PAIR)
    guide = XrayGuidance(clean, PAIR, mode="exact", detector=16, iterations=60)
    assert guide.xrays.shape == (2, 2, 16, 16) and guide.geometry.detector_shape == (16, 16)
    assert guide.explains(guide(guess)).max() < 0.02


# what it refuses


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mode="hard"), "mode: must be one of off, soft, exact, got 'hard'"),
        (dict(geometry=None), "geometry: expected the ConeBeam"),
        (dict(geometry=THREE), "xrays: the geometry describes"),
        (dict(geometry=ConeBeam.stack([PAIR] * 3)), "geometry: its batch shape"),
        (dict(xrays=torch.zeros(2, 32, 32)), "xrays: the geometry describes"),
        (dict(xrays=torch.full((2, 2, 32, 32), float("nan"))), "xrays: there are NaN"),
        (dict(mismatch=-1.0), "mismatch: a standard deviation"),
        (dict(mismatch=float("nan")), "mismatch: a standard deviation"),
        (dict(noise=0.0, mismatch=0.0), "noise: soft guidance needs"),
        (dict(noise=torch.ones(5)), "noise: expected a number or the shape"),
        (dict(spread=0.0), "spread: expected a positive number"),
        (dict(spread=torch.ones(8, 8, 8)), "spread: expected a positive number"),
        (dict(window="brain"), "window: there is none named"),
        (dict(energy_kev=5.0), "energy_kev: must lie"),
    ],
)
def test_wrong_settings_in_one_sentence(change, message):
    with pytest.raises(ValueError) as caught:
        XrayGuidance(**{"xrays": torch.ones(2, 2, 32, 32), "geometry": PAIR, **change})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(2, 1, 8, 8, 8), (2, 16, 16, 16), (2, 2, 16, 16, 16), (3, 1, 16, 16, 16)]
)
def test_wrong_volumes_in_one_sentence(mode, shape):
    guide = XrayGuidance(torch.ones(2, 2, 32, 32), PAIR, mode=mode)
    for function in (guide, guide.explains):
        with refused("x0"):
            function(torch.zeros(shape))


def test_the_step_is_in_the_range_of_the_transpose():
    residual = normal(0, 1, 2, 7, 7, dtype=torch.float64)
    step = weighted_step(
        residual,
        TINY,
        torch.ones_like(residual),
        torch.tensor(1e-4, dtype=torch.float64),
        iterations=1,
    )
    first = backproject(residual, TINY)
    assert abs((step * first).sum() / step.norm() / first.norm() - 1) < 1e-9
