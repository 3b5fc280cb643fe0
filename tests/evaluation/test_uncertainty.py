"""Coverage of intervals in simulation, calibration, null-space maps, figures, refused inputs."""

import math

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.stats import norm
from scipy.stats import t as student

import ct_nb.evaluation.uncertainty as uncertainty
from ct_nb.cascade.figures import reliability_figure, uncertainty_figure
from ct_nb.cascade.guidance import XrayGuidance
from ct_nb.evaluation.uncertainty import (
    LEVELS,
    Calibration,
    SampleSummary,
    calibrate,
    coverage,
    hallucination_map,
    prediction_factor,
    range_coverage,
    reliability,
    summarize_samples,
    uncertainty_rows,
)
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import WINDOWS, Grid, Volume, hu_to_mu

FULL = WINDOWS["full"]
TINY = ConeBeam.orbit(
    [0.0, 70.0], [0.0, 20.0], grid=Grid.cube(6), detector_shape=(7, 7), pixel_mm=80.0
)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(seed, count=6, side=8, std=1.0, patients=1):
    """Samples (S, B, D, H, W) and truth (B, D, H, W), HU: draws of one normal distribution a voxel,
    the samples' deviations times `std`.
    """
    draws = 100 * normal(seed, count + 1, patients, side, side, side)
    centre = 200 * normal(seed + 1, patients, side, side, side)
    return centre + std * draws[1:], centre + draws[0]


# intervals from few samples


@pytest.mark.parametrize("count", [2, 3, 5, 10, 20])
def test_intervals_hold_what_they_promise(count):
    n = 200_000
    draws = 40 + 7 * normal(count, count + 1, 1, 1, n)
    summary = summarize_samples(draws[1:])
    for row in coverage(summary, draws[0]):
        p = row["level"]
        error = 4 * math.sqrt(p * (1 - p) / n)
        assert abs(row["coverage"] - p) < error
        miss = (draws[0] - summary.mean).abs()
        wrong = {
            "no 1/S": student.ppf((1 + p) / 2, count - 1),
            "normal": norm.ppf((1 + p) / 2),
            "S degrees": student.ppf((1 + p) / 2, count) * math.sqrt(1 + 1 / count),
            "of the mean": student.ppf((1 + p) / 2, count - 1) / math.sqrt(count),
        }
        for name, factor in wrong.items():
            if name == "S degrees" and count > 5:
                continue  # hardly different
            assert (
                abs(float((miss <= factor * summary.standard_deviation).float().mean()) - p) > error
            ), (name, p)


def test_the_range_of_samples_assumes_no_distribution():
    n, count = 100_000, 5
    draws = normal(0, count + 1, 1, 1, n).exp().square()  # far from normal
    summary = summarize_samples(draws[1:])
    observed, promised = range_coverage(summary, draws[0], window=FULL)
    assert promised == pytest.approx(4 / 6) and abs(observed - promised) < 4 * math.sqrt(
        promised * (1 - promised) / n
    )
    # Student's interval does assume one
    assert (
        max(abs(row["coverage"] - row["level"]) for row in coverage(summary, draws[0], window=FULL))
        > 0.05
    )
    squeezed = draws[1:].mean(0) + 0.5 * (draws[1:] - draws[1:].mean(0))
    assert range_coverage(squeezed, draws[0], window=FULL)[0] < promised - 0.1


def test_prediction_factor_in_numbers():
    assert prediction_factor(0.95, 5) == pytest.approx(2.7764451 * math.sqrt(1.2), rel=1e-6)
    assert prediction_factor(0.8, 10**6) == pytest.approx(1.2815516, rel=1e-4)
    for level in (0.0, 1.0, -1, 95):
        with refused("level"):
            prediction_factor(level, 5)
    with refused("samples"):
        prediction_factor(0.5, 1)


# summaries


def test_summaries_of_tensors_and_streams():
    samples = 1e5 + normal(0, 7, 2, 3, 4, 5)
    before = samples.clone()
    summary = summarize_samples(samples)
    assert torch.equal(samples, before) and summary.samples == 7 and summary.scale == 1
    exact = samples.double()
    assert torch.allclose(summary.mean.double(), exact.mean(0), rtol=1e-6) and torch.allclose(
        summary.standard_deviation.double(), exact.std(0), rtol=0.05
    )
    naive = (samples.square().mean(0) - samples.mean(0).square()).clamp_min(0).sqrt()
    # what the difference of large numbers gives
    assert not torch.allclose(naive.double(), exact.std(0), rtol=0.05)
    assert torch.equal(summary.lowest, samples.amin(0)) and torch.equal(
        summary.highest, samples.amax(0)
    )
    for stream in (iter(samples), (s.numpy() for s in samples), list(samples)):
        assert torch.equal(summarize_samples(stream).standard_deviation, summary.standard_deviation)
    one, other = summary[1], summarize_samples(samples[:, 1])
    assert (
        torch.equal(one.mean, other.mean)
        and torch.equal(one.standard_deviation, other.standard_deviation)
        and one.samples == 7
    )
    low, high = one.interval(0.8)
    assert torch.allclose(
        high - low, 2 * prediction_factor(0.8, 7) * one.standard_deviation, rtol=1e-2
    ) and torch.equal(one.half_width(0.8), prediction_factor(0.8, 7) * one.standard_deviation)


def test_samples_are_held_one_at_a_time():
    import weakref

    alive, most = [], 0

    def draws():
        nonlocal most
        for seed in range(12):
            volume = normal(seed, 4, 4, 4)
            alive.append(weakref.ref(volume))
            most = max(most, sum(ref() is not None for ref in alive))
            yield volume
            del volume

    summarize_samples(draws())
    assert most <= 3


@pytest.mark.parametrize(
    "samples",
    [
        torch.zeros(1, 4, 4, 4),
        [],
        torch.zeros(4, 4, 4),
        [torch.zeros(4, 4, 4), torch.zeros(4, 4, 5)],
        [torch.zeros(4, 4, 4), torch.full((4, 4, 4), float("nan"))],
    ],
)
def test_samples_without_a_standard_deviation_are_refused(samples):
    with refused("samples"):
        summarize_samples(samples)


# coverage


def test_coverage_by_hand():
    mean = torch.zeros(1, 1, 4)
    sd = torch.tensor([[[10.0, 10.0, 20.0, 0.0]]])
    summary = SampleSummary(mean, sd, mean - sd, mean + sd, samples=3)
    truth = torch.tensor([[[5.0, 500.0, -5.0, 0.0]]])
    (row,) = coverage(summary, truth, levels=(0.5,))
    factor = student.ppf(0.75, 2) * math.sqrt(4 / 3)
    assert row == {"level": 0.5, "coverage": 0.75, "width_hu": pytest.approx(2 * factor * 10)}
    (row,) = coverage(summary, truth, mask=[[[True, True, False, False]]], levels=(0.5,))
    assert row["coverage"] == 0.5 and row["width_hu"] == pytest.approx(2 * factor * 10)
    assert math.isnan(coverage(summary, truth, mask=torch.zeros(1, 1, 4))[0]["coverage"])
    assert range_coverage(summary, truth) == (0.75, 0.5)


def test_truth_is_clipped_as_in_every_metric():
    summary = summarize_samples(1000 + 30 * normal(0, 5, 2, 2, 2))
    truth = torch.full((2, 2, 2), 2500.0)
    assert (
        coverage(summary, truth, levels=(0.95,))[0]["coverage"] > 0.5
        and coverage(summary, truth, levels=(0.95,), window=FULL)[0]["coverage"] == 0
    )


def test_rows_of_whole_and_body():
    samples, truth = model(3, side=16)
    body = torch.zeros(16, 16, 16, dtype=torch.bool)
    body[4:12] = True
    rows = uncertainty_rows(summarize_samples(samples)[0], truth[0], body, "a", "p")
    assert [(row["region"], row["level"]) for row in rows] == [
        (region, level) for region in ("whole", "body") for level in LEVELS
    ] and {row["case"] for row in rows} == {"a"}
    inner = coverage(samples[:, 0, 4:12], truth[0, 4:12])
    assert [row["coverage"] for row in rows[3:]] == pytest.approx(
        [row["coverage"] for row in inner], abs=1e-9
    )


def test_wrong_truth_and_mask():
    samples, truth = model(0)
    summary = summarize_samples(samples)[0]
    with refused("truth"):
        coverage(summary, truth)
    with refused("mask"):
        coverage(summary, truth[0], torch.ones(4, 4, 4))
    with refused("truth"):
        coverage(summary, truth[0] * math.nan)
    with refused("summary"):
        summary[0]


# reliability


def rows_of(std, patients=12, seed=0, correlated=0.0):
    rows = []
    for patient in range(patients):
        samples, truth = model(seed + 10 * patient, std=std)
        body = torch.ones(8, 8, 8, dtype=torch.bool)
        # one error for all of a patient
        shift = correlated * 100 * normal(seed + 10 * patient + 5, 1)
        rows += uncertainty_rows(
            summarize_samples(samples)[0],
            truth[0] + shift,
            body,
            f"case {patient}",
            f"patient {patient}",
            window=FULL,
        )
    return rows


def test_over_and_underconfident_models_are_distinguished():
    for factor, status in ((0.6, "overconfident"), (1.0, "consistent"), (1.7, "underconfident")):
        levels = reliability(rows_of(factor))
        assert [level.status for level in levels] == [status] * 3
        assert all(level.coverage.patients == 12 for level in levels)


def test_the_interval_is_over_patients_not_voxels():
    rows = rows_of(1.0, patients=8, correlated=1.0)
    level = reliability(rows)[1]
    values = np.array(
        [row["coverage"] for row in rows if row["region"] == "body" and row["level"] == 0.8]
    )
    half = student.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)
    assert (
        level.coverage.mean == pytest.approx(values.mean())
        and level.coverage.low == pytest.approx(values.mean() - half)
        and level.coverage.patients == 8
    )
    assert half > 2 * 1.96 * math.sqrt(0.8 * 0.2 / (8 * 512))  # what voxels would claim


def test_cases_of_a_patient_count_once_and_one_patient_gives_no_interval():
    rows = rows_of(1.0, patients=3)
    again = [{**row, "case": "again"} for row in rows if row["patient"] == "patient 0"] * 5
    assert reliability(rows + again)[0].coverage == reliability(rows)[0].coverage
    alone = reliability(rows_of(0.3, patients=1))[0]
    assert alone.status == "one patient" and math.isnan(alone.coverage.low)
    with refused("region"):
        reliability(rows, "heart")
    sure = reliability(rows_of(20.0, patients=3))[2]
    assert sure.coverage.high <= 1


# calibration


def cases_of(std, patients=range(12), **settings):
    for patient in patients:
        samples, truth = model(1000 + 10 * patient, std=std, **settings)
        yield summarize_samples(samples)[0], truth[0], None, f"patient {patient}"


def test_calibration_corrects_other_patients():
    for std in (0.5, 2.0):
        calibration = calibrate(cases_of(std, range(19)), level=0.8, window=FULL)
        before, after = [], []
        for summary, truth, _, name in cases_of(std, range(50, 60)):
            before += uncertainty_rows(summary, truth, torch.ones(8, 8, 8), name, name, window=FULL)
            after += uncertainty_rows(
                calibration.apply(summary), truth, torch.ones(8, 8, 8), name, name, window=FULL
            )
        assert calibration.scale * std > 1 and abs(
            reliability(after)[1].coverage.mean - 0.8 * 20 / 19
        ) < 0.01 < abs(reliability(before)[1].coverage.mean - 0.8)
        assert (calibration.patients, calibration.samples, calibration.level) == (19, 6, 0.8)


def test_the_coverage_holds_for_a_new_patient_unlike_the_others():
    level = 0.8
    patients = 10
    trials = 200
    covered, plain = [], []
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        cases = []
        for patient in range(patients + 1):
            samples = torch.randn(4, 3, 3, 3, generator=generator)
            summary = summarize_samples(samples)
            wrong_by = float(torch.exp(torch.randn(1, generator=generator)))
            error = (
                wrong_by
                * (1 + 0.1 * torch.randn(3, 3, 3, generator=generator))
                * summary.standard_deviation
            )
            cases.append((summary, summary.mean + error, None, str(patient)))
        new, truth, _, _ = cases.pop()
        covered.append(
            coverage(calibrate(cases, level).apply(new), truth, levels=(level,))[0]["coverage"]
        )
        scores = torch.cat(
            [((t - s.mean).abs() / s.half_width(level)).flatten() for s, t, _, _ in cases]
        )
        plain.append(
            float(
                ((truth - new.mean).abs() <= scores.quantile(level) * new.half_width(level))
                .float()
                .mean()
            )
        )
    error = np.std(covered) / math.sqrt(trials)
    assert (
        np.mean(covered) > level - 2 * error
        and np.mean(covered) < level + 1 / (patients + 1) + 2 * error
    )
    assert np.mean(plain) < level - 0.03  # the quantile without the patient who is yet to come


def test_patients_weigh_alike_however_many_cases_or_voxels_they_have():
    few = list(cases_of(1.0, range(6)))
    outlier = [(s, s.mean + 5 * (t - s.mean), m, "outlier") for s, t, m, _ in cases_of(1.0, [40])]
    once = calibrate(few + outlier, window=FULL)
    assert calibrate(few + outlier * 4, window=FULL).scale == once.scale and once.patients == 7
    large = [
        (s, s.mean + 5 * (t - s.mean), m, "outlier") for s, t, m, _ in cases_of(1.0, [40], side=12)
    ]
    assert calibrate(few + large, window=FULL).scale == pytest.approx(once.scale, rel=0.1)


def test_thinning_scores_only_widens(monkeypatch):
    whole = calibrate(cases_of(1.0), window=FULL).scale
    monkeypatch.setattr(uncertainty, "MAX_SCORES", 64)
    thinned = calibrate(cases_of(1.0), window=FULL).scale
    assert whole <= thinned < 1.05 * whole
    ((summary, truth, _, name),) = cases_of(1.0, [0])
    # 512, in blocks of 8; one patient of two weighs half, so 0.4 is their 80 % quantile
    scores = ((truth - summary.mean).abs() / summary.half_width(0.4)).flatten().sort().values
    assert calibrate([(summary, truth, None, name)], level=0.4, window=FULL).scale == pytest.approx(
        float(scores[8 * math.ceil(0.8 * 64) - 1]), rel=1e-6
    )


def test_masked_voxels_and_voxels_without_std():
    cases = list(cases_of(1.0))
    body = torch.zeros(8, 8, 8, dtype=torch.bool)
    body[2:6] = True

    def outside(summary, value):
        return uncertainty.replace(
            summary, standard_deviation=torch.where(body, summary.standard_deviation, value)
        )

    expected = calibrate([(s, t, body, n) for s, t, _, n in cases], window=FULL).scale
    assert (
        calibrate([(outside(s, 0.0), t, body, n) for s, t, _, n in cases], window=FULL).scale
        == expected
    )
    with refused("cases"):
        calibrate([(outside(s, 0.0), t, None, n) for s, t, _, n in cases], window=FULL)
    with refused("cases"):
        calibrate([(outside(s, 0.0), s.mean, None, n) for s, t, _, n in cases], window=FULL)


def test_calibration_refuses_cases_without_a_guarantee():
    cases = list(cases_of(1.0))
    with refused("cases"):
        calibrate(cases[:3])
    with refused("cases"):
        calibrate(cases, level=0.95)
    with refused("cases"):
        calibrate([(s, t, m, "same") for s, t, m, _ in cases])
    assert calibrate(cases[:4], level=0.8, window=FULL).patients == 4
    with refused("cases"):
        calibrate(cases[:6] + list(cases_of(1.0, range(20, 24), count=5)))
    with refused("cases"):
        calibrate([(s, t, torch.zeros(8, 8, 8), n) for s, t, _, n in cases])
    calibration = Calibration(1.5, 0.8, 12, 6)
    once = calibration.apply(cases[0][0])
    assert (
        torch.equal(once.standard_deviation, 1.5 * cases[0][0].standard_deviation)
        and torch.equal(once.mean, cases[0][0].mean)
        and once.scale == 1.5
    )
    with refused("summary"):
        calibration.apply(once)
    with refused("cases"):
        calibrate([(once, cases[0][1], None, "a")])
    with refused("summary"):
        calibration.apply(next(iter(cases_of(1.0, [0], count=5)))[0])


# the null space


@pytest.fixture(scope="module")
def projectors():
    matrix = (
        project(torch.eye(216, dtype=torch.float64).view(216, 6, 6, 6), TINY.to(torch.float64))
        .flatten(1)
        .T
    )
    seen = torch.linalg.pinv(matrix, rtol=1e-9) @ matrix
    return seen, torch.eye(216, dtype=torch.float64) - seen


def test_hallucination_map_against_dense_matrices(projectors):
    seen, unseen = projectors
    samples = -200 + 150 * normal(0, 5, 2, 6, 6, 6, dtype=torch.float64)
    calibration = hallucination_map(samples, TINY, iterations=500, tolerance=1e-13)
    parts = (samples.flatten(2) + 1000) @ unseen
    assert torch.allclose(
        calibration.standard_deviation.flatten(1), parts.std(0), rtol=1e-4, atol=1e-3
    )
    assert torch.allclose(
        calibration.share, parts.var(0).sum(1) / parts.square().sum(2).mean(0), rtol=1e-4
    )
    assert not torch.allclose(
        calibration.standard_deviation.flatten(1), (samples.flatten(2) @ seen).std(0), rtol=0.1
    ) and not torch.allclose(calibration.standard_deviation, samples.std(0), rtol=0.1)
    alone = hallucination_map(iter(samples[:, 1]), TINY, iterations=500, tolerance=1e-13)
    assert (
        alone.share.shape == ()
        and torch.allclose(alone.standard_deviation, calibration.standard_deviation[1], rtol=1e-6)
        and torch.allclose(alone.share, calibration.share[1])
    )


def test_the_share_is_0_for_one_opinion_and_1_for_none_in_common(projectors):
    _, unseen = projectors
    common = 300 * normal(0, 6, 6, 6, dtype=torch.float64)
    settings = dict(iterations=200, tolerance=1e-12)
    assert float(hallucination_map(common.expand(3, -1, -1, -1), TINY, **settings).share) == 0

    def seen(x):
        return x - (x.flatten(-3) @ unseen).view_as(x)

    # they differ in the range of the X-rays
    by_xrays = common + seen(100 * normal(1, 4, 6, 6, 6, dtype=torch.float64))
    assert hallucination_map(by_xrays, TINY, **settings).share < 1e-8
    nothing_shared = -1000 + 100 * normal(2, 12, 6, 6, 6, dtype=torch.float64)
    assert hallucination_map(nothing_shared, TINY, **settings).share == pytest.approx(1, abs=0.1)
    assert hallucination_map(torch.stack([common, -2000 - common]), TINY, **settings).share == 1


def test_exactly_guided_samples_disagree_in_the_null_space_alone():
    network = 0.3 * normal(0, 6, 1, 6, 6, 6, dtype=torch.float64) - 0.2
    to_hu = WINDOWS["chest"].to_hu
    xrays = project(float(hu_to_mu(0.0)) * (1 + to_hu(network[:1, 0]) / 1000), TINY)
    guided = to_hu(
        XrayGuidance(xrays, TINY, mode="exact", iterations=500, tolerance=1e-13)(network)[:, 0]
    )
    settings = dict(iterations=500, tolerance=1e-13)
    assert torch.allclose(
        hallucination_map(guided, TINY, **settings).standard_deviation,
        guided.std(0),
        rtol=1e-4,
        atol=1e-2,
    )
    free = to_hu(network[:, 0])
    assert (
        hallucination_map(free, TINY, **settings).standard_deviation.square().mean()
        < 0.9 * free.var(0).mean()
    )


def test_samples_on_another_grid():
    with refused("samples"):
        hallucination_map(torch.zeros(3, 8, 8, 8), TINY)
    with refused("samples"):
        hallucination_map(torch.zeros(1, 6, 6, 6), TINY)


# pictures


def test_pictures_draw_what_they_are_given(tmp_path):
    import matplotlib.pyplot as plt

    samples, truth = model(0, side=6)
    summary = summarize_samples(samples)[0]
    calibration = hallucination_map(samples[:, 0], TINY, iterations=5)
    figure = uncertainty_figure(
        Volume(truth[0].numpy(), TINY.grid.affine),
        summary,
        samples[0, 0],
        calibration,
        window="soft_tissue",
    )
    images = [axis.images[0] for axis in figure.axes[:12]]
    top = [np.asarray(image.get_array()) for image in images[:6]]
    assert (
        np.allclose(top[0], truth[0, 2])
        and np.allclose(top[1], summary.mean[2])
        and np.allclose(top[2], samples[0, 0, 2])
    )
    assert (
        np.allclose(top[3], (summary.mean - truth[0]).abs()[2], atol=1e-3)
        and np.allclose(top[4], summary.standard_deviation[2])
        and np.allclose(top[5], calibration.standard_deviation[2])
    )
    assert (
        images[0].get_clim() == (-200, 200)
        and images[3].get_clim() == images[4].get_clim() == images[11].get_clim()
    )
    assert "calibrated" not in figure._suptitle.get_text()
    mended = uncertainty_figure(
        Volume(truth[0].numpy(), TINY.grid.affine),
        Calibration(1.5, 0.8, 12, 6).apply(summary),
        samples[0, 0].numpy(),
        calibration,
    )
    assert "calibrated, × 1.50" in mended._suptitle.get_text()
    figure.savefig(tmp_path / "uncertainty.png")
    plots = reliability_figure(
        {
            "a_model": reliability(rows_of(0.6, patients=3)),
            "floor": reliability(rows_of(1.0, patients=3)),
        }
    )
    plots.savefig(tmp_path / "reliability.png")
    assert [text.get_text() for text in plots.axes[1].get_legend().get_texts()] == [
        "a model",
        "floor",
    ] and "3 patients" in plots._suptitle.get_text()
    one = reliability_figure(reliability(rows_of(1.0, patients=1)))
    one.savefig(tmp_path / "one.png")
    assert "1 patient;" in one._suptitle.get_text() and all(
        path.stat().st_size > 5000 for path in tmp_path.iterdir()
    )
    plt.close("all")
    for wrong in ([], {}, {"a": []}):
        with refused("levels"):
            reliability_figure(wrong)
    with pytest.raises(ValueError, match="one sample: expected the truth's shape"):
        uncertainty_figure(
            Volume(truth[0].numpy(), TINY.grid.affine), summary, samples[0], calibration
        )


# samples of a cascade


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ({"samples": 0}, "samples: must be a whole number from 1 up, got 0"),
        ({"samples": True}, "samples: must be a whole number"),
        ({"samples": 2.0}, "samples: must be a whole number"),
        ({"seed": 2**63}, "seed: must be a whole number from -2⁴⁰ to 2⁴⁰, got 9223372036854775808"),
        ({"seed": 0.5}, "seed: must be a whole number"),
        ({"seed": -(2**40)}, "seed: must be a whole number"),
    ],
)
def test_settings_of_samples_are_checked_first(setting, sentence):
    from ct_nb.cascade.sample import reconstruct_sampled

    with pytest.raises(ValueError, match=sentence):
        reconstruct_sampled(None, None, None, **setting)
