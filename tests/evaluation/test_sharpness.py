"""Sharpness against the truth: edges, spectra, the null space, and the baselines of refinement."""

import math

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.evaluation.baselines import AtlasDataConsistency
from ct_nb.evaluation.sharpness import (
    SHARPNESS_METRICS,
    _parts,
    edges,
    null_space_added,
    sharpness_scores,
    spectra,
    spectrum_error_db,
)
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.solvers import range_component
from ct_nb.physics.volume import Grid, hu_to_mu, mu_to_hu
from ct_nb.refine.baselines import (
    DataConsistencyBaseline,
    IdentityBaseline,
    UnsharpMask,
    gaussian_high_pass,
)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def soften(hu):
    return F.avg_pool3d(F.pad(hu[None, None], (1,) * 6, mode="replicate"), 3, 1)[0, 0]


@pytest.fixture(scope="module")
def chest():
    truth = phantom(5, 16).volume.tensor().clamp(-990, 900)
    geometry = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16.0).to(
        torch.float32
    )
    return truth, soften(truth), project(hu_to_mu(truth), geometry), geometry


# edges


def test_edges_of_a_ramp_in_closed_form():
    """A step of height h blurred over w voxels has a slope h/w; a share of it is the response, and
    halos are above 1.
    """

    def ramp(width):
        profile = 400 * (torch.arange(16.0) - 8).div(width).clamp(-0.5, 0.5)
        return profile[:, None, None].expand(16, 16, 16)

    assert edges(ramp(4), ramp(4))[:2] == (1, 0)
    assert edges(0.6 * ramp(4), ramp(4), share=0.2).response == pytest.approx(0.6) and edges(
        0.6 * ramp(4), ramp(4), share=0.2
    ).error == pytest.approx(0.4)
    assert edges(1.5 * ramp(4), ramp(4), share=0.2).response == pytest.approx(1.5)
    assert edges(-ramp(4), ramp(4), share=0.2).response == pytest.approx(-1)


def test_only_edges_of_the_truth_count(chest):
    truth, soft, *_ = chest
    noisy = edges(soft + 300 * random(0, 16, 16, 16), truth)
    # the usual measure, which noise pleases

    def mean_gradient(v):
        return sum(v.diff(dim=a).abs().mean() for a in range(3))

    assert (
        mean_gradient(soft + 300 * random(0, 16, 16, 16))
        > mean_gradient(truth)
        > mean_gradient(soft)
    )
    plain = edges(soft, truth)
    assert (
        abs(noisy.response - plain.response) < 0.15
        and noisy.elsewhere > 1.5 * plain.elsewhere
        and plain.response < 0.8
    )
    assert (
        edges(truth.roll(3, -1), truth).response < 0.5
        and edges(truth.roll(3, -1), truth).error > 0.8
    )
    assert edges(soft + 2.5 * (truth - soft), truth).response > 1.2
    assert all(math.isnan(v) for v in edges(truth, torch.zeros_like(truth)))


# spectrum


def test_a_wave_is_in_its_shell():
    n, spacing = 32, 2.5
    wave = 100 * torch.cos(2 * math.pi * 6 * torch.arange(n) / n)[None, :, None].expand(n, n, n)
    s = spectra(wave, wave, spacing)
    assert s.frequency_per_mm[int(s.pred.argmax())] == pytest.approx(
        6 / (n * spacing)
    ) and s.frequency_per_mm[-1] == pytest.approx(1 / (2 * spacing))


def test_white_noise_has_its_power_in_every_shell():
    noise = 50 * random(1, 24, 24, 24)
    s = spectra(noise, noise, 2.0)
    # variance times the volume of a voxel
    assert (s.pred[3:] / (50**2 * 2.0**3) - 1).abs().max() < 0.3
    assert abs(s.pred[3:].mean() / (50**2 * 2.0**3) - 1) < 0.05
    half = spectra(0.5 * noise, noise, 2.0)
    assert torch.allclose(
        half.pred / half.truth, torch.full((12,), 0.25, dtype=torch.float64)
    ) and spectrum_error_db(half) == pytest.approx(10 * math.log10(4))
    assert torch.allclose(half.correlation, torch.ones(12, dtype=torch.float64))
    other = spectra(50 * random(2, 24, 24, 24), noise, 2.0)
    # the right power is not the right volume
    assert other.correlation[3:].abs().max() < 0.2 and spectrum_error_db(other) < 1.5
    assert torch.allclose(
        spectra(-noise, noise, 2.0).correlation, -torch.ones(12, dtype=torch.float64)
    )


def test_blur_lowers_power_and_keeps_correlation(chest):
    truth, soft, *_ = chest
    s = spectra(soft, truth, 20.0)
    assert s.pred[-1] < 0.4 * s.truth[-1] and s.correlation[:3].min() > 0.95


# null space


def test_null_space_parts_in_closed_form():
    m, whole = random(3, 8, 8, 8), (8, 8, 8)
    across = random(4, 8, 8, 8)
    across -= m * (across * m).sum() / m.square().sum()
    across *= m.norm() / across.norm()

    def matches(n, *expected):
        return _parts(n, m, whole) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    assert matches(m, 1, 1, 0) and matches(0 * m, 0, 0, 0) and matches(0.5 * m, 0.5, 0.75, 0)
    assert matches(3 * m, 3, -3, 2) and matches(2 * m, 2, 0, 1)  # overshoot is invented
    assert matches(0.3 * across, 0.3, -0.09, 0.3) and matches(
        0.6 * m + 0.3 * across, math.hypot(0.6, 0.3), 1 - 0.4**2 - 0.3**2, 0.3
    )
    assert matches(-0.5 * m, 0.5, 1 - 1.5**2, 0.5)  # and so is the opposite of what was missing
    assert math.isnan(_parts(m, 0 * m, whole).right)
    padded = _parts(random(5, 10, 10, 10), random(6, 10, 10, 10), (4, 4, 4))
    # blocks that stick out count
    assert padded.added == pytest.approx(
        (random(5, 10, 10, 10).norm() / random(6, 10, 10, 10).norm()).item(), rel=1e-5
    )


def test_one_block_does_not_excuse_another():
    m = random(3, 16, 8, 8)
    n = m.clone()
    n[8:] = 3 * m[8:]  # right on one side, too much on the other
    share = (m[8:].norm() / m.norm()).item()
    assert _parts(n, m, (8, 8, 8)).invented == pytest.approx(2 * share, rel=1e-4) and _parts(
        n, m, (8, 8, 8)
    ).right == pytest.approx(1 - 4 * share**2, rel=1e-4)
    n[8:] = -m[8:]
    # as one piece, c is neither 0 nor 1
    assert (
        _parts(n, m, (8, 8, 8)).invented == pytest.approx(share, rel=1e-4)
        and _parts(n, m, (16, 8, 8)).invented > share
    )


def repeated(volume, factor):
    for axis in range(3):
        volume = volume.repeat_interleave(factor, axis)
    return volume


def test_the_block_is_in_millimetres():
    "The same tissue on voxels of 20 and of 10 mm: the same blocks, so the same answer."
    found = {}
    for size in (16, 32):
        geometry = ConeBeam.biplanar(
            grid=Grid.cube(size), detector_shape=(32, 32), pixel_mm=16.0
        ).to(torch.float32)
        base = torch.zeros(size, size, size)
        added = repeated(100 * random(1, 16, 16, 16), size // 16)
        missing = repeated(100 * random(2, 16, 16, 16), size // 16)
        for block in (20.0, 40.0):
            found[size, block] = null_space_added(
                base + added, base, base + missing, geometry, block_mm=block, iterations=10
            ).invented
    assert (
        found[16, 40.0] == pytest.approx(found[32, 40.0], abs=0.03)
        and abs(found[32, 20.0] - found[32, 40.0]) > 0.1
    )


def test_doing_nothing_the_truth_and_noise(chest):
    truth, soft, _, geometry = chest

    def change(hu):
        return null_space_added(hu, soft, truth, geometry, iterations=10)

    assert change(soft) == (0, 0, 0)
    assert change(truth).right == pytest.approx(1, abs=1e-5) and change(truth).invented < 1e-3
    noise = change(soft + 60 * random(7, 16, 16, 16))
    assert noise.invented > 0.9 * noise.added and noise.right < -0.5 * noise.added**2
    assert change(soft + 0.5 * (truth - soft)).right == pytest.approx(0.75, abs=0.03)
    assert change(truth + 60 * random(7, 16, 16, 16)).invented > 3 * change(truth).invented


def test_what_the_x_rays_determine_is_not_counted(chest):
    truth, soft, _, geometry = chest
    seen = range_component(
        hu_to_mu(60 * random(8, 16, 16, 16)) - hu_to_mu(0.0), geometry, iterations=60
    )
    base = soft + 1200.0  # far from the clamp at zero attenuation
    changed = mu_to_hu(hu_to_mu(base) + seen)
    added = null_space_added(changed, base, truth + 1200.0, geometry, iterations=60)
    # without the split it would count
    unsplit = _parts(
        hu_to_mu(changed) - hu_to_mu(base), hu_to_mu(truth) - hu_to_mu(soft), (2, 2, 2)
    )
    assert added.added < 0.3 * unsplit.added and unsplit.added > 0.1


# baselines


def test_high_pass_is_blind_to_constants_and_keeps_fine_waves():
    assert gaussian_high_pass(torch.full((6, 7, 8), 30.0), 1.0).abs().max() < 1e-4
    wave = torch.cos(2 * math.pi * 6 * torch.arange(24.0) / 24)[:, None, None].expand(24, 24, 24)
    left = gaussian_high_pass(wave, 1.0)[8:16] / wave[8:16].abs().amax()
    assert (left - wave[8:16] * (1 - math.exp(-0.5 * (2 * math.pi / 4) ** 2))).abs().max() < 0.02


def test_unsharp_mask_is_the_best_of_its_kind(chest):
    truth, soft, xrays, geometry = chest
    mask = UnsharpMask.fit([(soft, truth)])

    def error(m):
        return (m.refine(soft, xrays, geometry) - truth).square().mean().item()

    amount = mask.settings["amount"]
    sigma = mask.settings["sigma_voxels"]
    for worse in (
        UnsharpMask(amount * 1.1, sigma),
        UnsharpMask(amount * 0.9, sigma),
        UnsharpMask(amount, sigma * 1.5),
    ):
        assert error(worse) > error(mask)
    assert error(mask) < error(UnsharpMask(0.0)) and amount > 0
    noisy = truth + 200 * random(9, 16, 16, 16)
    assert UnsharpMask.fit([(noisy, truth)]).settings["amount"] < 0  # smoothing is better
    with refused("pairs"):
        UnsharpMask.fit([])


def test_consistency_alone_agrees_with_the_x_rays_and_is_the_baseline_of_reconstruction(chest):
    truth, soft, xrays, geometry = chest
    refined = DataConsistencyBaseline().refine(soft, xrays, geometry)

    def error(hu):
        return ((project(hu_to_mu(hu), geometry) - xrays).norm() / xrays.norm()).item()

    assert error(refined) < 0.2 * error(soft) and torch.equal(
        refined, AtlasDataConsistency(soft).predict(xrays, geometry)
    )
    assert torch.equal(IdentityBaseline().refine(soft, xrays, geometry), soft)


def test_scores_of_a_case(chest):
    truth, soft, xrays, geometry = chest
    perfect, unchanged, baseline = (
        sharpness_scores(hu, soft, truth, geometry)
        for hu in (truth, soft, UnsharpMask(8.0).refine(soft, xrays, geometry))
    )
    assert (
        perfect["edge_response"] == 1
        and perfect["edge_error"] == perfect["spectrum_error_db"] == 0
        and perfect["fine_correlation"] == pytest.approx(1)
        and perfect["null_right"] == pytest.approx(1, abs=1e-5)
    )
    assert (
        unchanged["null_added"] == 0
        and unchanged["edge_response"] < 0.8
        and baseline["edge_response"] > unchanged["edge_response"]
        and baseline["null_invented"] > 0.1
    )
    assert (
        all(isinstance(v, float) for v in perfect.values())
        and perfect.keys() == unchanged.keys() == SHARPNESS_METRICS.keys()
    )
    assert (
        perfect["edge_mismatch"] == perfect["edges_elsewhere_db"] == 0
        and baseline["edge_mismatch"] == pytest.approx(abs(1 - baseline["edge_response"]))
        and unchanged["edges_elsewhere_db"] < 0 < baseline["edges_elsewhere_db"]
    )
    at_hand = spectra(soft, truth, 20.0)
    assert (
        sharpness_scores(soft, soft, truth, geometry, spectrum=at_hand) == unchanged
        and sharpness_scores(soft, soft, truth, geometry, spectrum=spectra(truth, truth, 20.0))[
            "spectrum_error_db"
        ]
        == 0
    )


def test_inputs_that_do_not_fit_are_refused(chest):
    truth, soft, xrays, geometry = chest
    for argument, attempt in (
        ("pred", lambda: edges(truth[:8], truth)),
        ("share", lambda: edges(truth, truth, share=0.0)),
        ("spacing_mm", lambda: spectra(truth, truth, -1.0)),
        ("bins", lambda: spectra(truth, truth, 5.0, bins=9)),
        ("block_mm", lambda: null_space_added(truth, soft, truth, geometry, block_mm=0)),
        ("sigma_voxels", lambda: UnsharpMask(1.0, 0.0)),
        ("pred", lambda: sharpness_scores(soft * torch.nan, soft, truth, geometry)),
        ("truth", lambda: sharpness_scores(truth[:8], soft[:8], truth[:8], geometry)),
    ):
        with refused(argument):
            attempt()
