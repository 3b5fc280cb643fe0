"""Metrics of slice interpolation: what each one measures, bounded memory with the same numbers,
upper bounds apart from baselines, and what is refused."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.evaluation.case_metrics import METRICS
from ct_nb.evaluation.metrics import psnr, ssim
from ct_nb.evaluation.scoreboard import Scoreboard
from ct_nb.slices.consistency import along_z, slice_data_consistency, smooth_covariance
from ct_nb.slices.metrics import (
    PROFILE_SAMPLES,
    SCAN_KEYS,
    SLICE_MAIN,
    SLICE_METRICS,
    UPPER_BOUNDS,
    BackProjection,
    Interpolation,
    SliceScoreboard,
    comparison_table,
    evaluate_slices,
    reaveraging_error,
    sampled_profile_matrix,
    slice_baselines,
    slice_noise,
    slice_scores,
    targets_met,
    targets_table,
    through_plane_edges,
    through_plane_scores,
    vae_upper_bounds,
)
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    slice_profile_matrix,
    thin_axis,
)
from ct_nb.slices.vae import SliceVAE, SliceVAEConfig
from ct_nb.slices.vae_metrics import vae_scores as vae_figures
from ct_nb.physics.scanned import scanned_voxels
from ct_nb.slices.vae_metrics import volume_ssim

THICK, PROFILE = SliceAxis(2.5, 5.0, 6), SliceProfile(5.0)
THIN = thin_axis(THICK, 1.0)
MATRIX = torch.from_numpy(slice_profile_matrix(THIN, THICK, PROFILE))


def volume(seed=0, shape=(30, 24, 26)):
    "Smooth things with edges along z, and noise."
    generator = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    body = torch.where(
        (z - shape[0] / 2).abs() + 0.4 * (y - shape[1] / 2).abs() < 9, 40.0, -800.0
    ) + 60 * torch.sin(x / 4 + z / 6)
    return body + 15 * torch.randn(shape, generator=generator)


def case(seed=0, patient=None):
    thin = volume(seed)
    return {
        "id": f"case{seed}",
        "patient": patient or f"p{seed}",
        "thin": thin,
        "thick": average_slices(thin, MATRIX),
        "matrix": MATRIX,
        "thin_axis": THIN,
        "thick_axis": THICK,
        "profile": PROFILE,
        "pixel_mm": (1.0, 1.0),
    }


def scan(item):
    "What `interpolate` takes and re-averaging needs."
    return [item[key] for key in SCAN_KEYS]


def test_noise_is_measured_and_not_anatomy():
    generator = torch.Generator().manual_seed(0)
    for level in (5.0, 40.0):
        assert float(
            slice_noise(level * torch.randn(3, 200, 200, generator=generator)).mean()
        ) == pytest.approx(level, rel=0.03)
    ramp = torch.arange(50.0)[None, :, None] * 7 + torch.arange(40.0) * 3
    assert float(slice_noise(ramp)) == pytest.approx(0, abs=1e-6)  # a slope is none
    with refused("hu"):
        slice_noise(torch.zeros(2, 2, 5))


def test_the_noise_estimator_is_the_convolution_it_was_published_as():
    image = volume()[:1]
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]])[None, None]
    found = (
        torch.nn.functional.conv2d(image[:, None], kernel).abs().sum()
        * math.sqrt(math.pi / 2)
        / (6 * (image.shape[1] - 2) * (image.shape[2] - 2))
    )
    assert float(slice_noise(image)) == pytest.approx(float(found), rel=1e-5)


def test_steps_are_against_the_truths_own():
    truth = volume()
    same = through_plane_scores(truth, truth)
    assert same == {"step_error_hu": 0.0, "step_level_db": 0.0, "noise_unevenness": 0.0}
    assert through_plane_scores(truth + 30, truth)["step_error_hu"] < 1e-4  # a constant is no step
    flicker = truth + 50 * torch.tensor([1.0, -1]).repeat(15)[:, None, None]
    assert (
        through_plane_scores(flicker, truth)["step_error_hu"] == pytest.approx(100, abs=1)
        and through_plane_scores(flicker, truth)["step_level_db"] > 0.3
    )
    doubled = 2 * (truth - truth.mean())
    # clipping takes a little
    assert through_plane_scores(doubled, doubled / 2)["step_level_db"] == pytest.approx(
        20 * math.log10(2), abs=0.6
    )
    assert all(math.isnan(value) for value in through_plane_scores(truth[:1], truth[:1]).values())


def test_noise_that_comes_and_goes_is_uneven_and_constant_blur_is_not():
    truth = volume()
    less = truth.clone()
    less[::5] = volume(1)[::5]  # other noise of the same level
    quiet = torch.stack(
        [
            (
                image
                if n % 5 == 0
                else torch.nn.functional.avg_pool2d(image[None, None], 3, 1, 1)[0, 0]
            )
            for n, image in enumerate(truth)
        ]
    )
    all_quiet = torch.nn.functional.avg_pool2d(truth[:, None], 3, 1, 1)[:, 0]
    uneven = {
        name: through_plane_scores(x, truth)["noise_unevenness"]
        for name, x in {"other": less, "pumping": quiet, "blurred": all_quiet}.items()
    }
    assert uneven["pumping"] > 5 * max(uneven["other"], uneven["blurred"])


def test_edges_along_z_only():
    step = torch.where(torch.arange(20) < 10, -800.0, 0.0)[:, None, None].expand(20, 16, 18)
    soft = step.clone()
    soft[10] = -400.0
    response, error, _ = through_plane_edges(soft, step)
    assert response == pytest.approx(0.5) and error == pytest.approx(0.5)
    assert math.isnan(through_plane_edges(step[:1], step[:1]).response)
    with refused("share"):
        through_plane_edges(step, step, share=1.0)


def test_ssim_in_parts_is_the_scoreboards():
    a, b = volume(0, (41, 24, 20)), volume(3, (41, 24, 20))
    for slices in (1, 7, 31, 100):
        assert volume_ssim(a, b, slices=slices) == pytest.approx(ssim(a, b), rel=1e-12)
    assert math.isnan(volume_ssim(a[:10], b[:10]))


def test_slice_figures_are_means_over_slices():
    item = case()
    pred = item["thin"] + torch.linspace(5, 60, 30)[:, None, None]
    found = slice_scores(pred, item["thin"])
    each = [psnr(p[None], t[None]) for p, t in zip(pred, item["thin"])]
    assert found["slice_psnr"] == pytest.approx(sum(each) / 30, abs=1e-3) and found[
        "worst_slice_psnr"
    ] == pytest.approx(min(each), abs=1e-3)
    # dB of a mean is not a mean of dB: the wrong one flatters
    assert found["slice_psnr"] > found["psnr"]
    assert math.isnan(found["reaveraged_hu"])
    # the VAE's board and this one say the same
    assert {name: found[name] for name in vae_figures(pred, item["thin"])} == vae_figures(
        pred, item["thin"]
    )


def field_of_view(shape=(30, 24, 26), radius=10.5):
    "Voxels inside of a circle, whose outside a scanner pads."
    _, y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    return (torch.hypot(x, y) < radius).numpy()


def test_voxels_that_were_not_scanned_do_not_count():
    "Whatever a method makes of the padding, its scores are those of the scan; as elsewhere."
    thin = torch.where(torch.from_numpy(field_of_view()), volume(), -1024.0)
    item = case() | {"thin": thin, "thick": average_slices(thin, MATRIX)}
    inside = scanned_voxels(thin.numpy())
    assert (inside != field_of_view()).mean() < 0.05  # corners of the circle
    pred = thin + 20 * torch.randn(thin.shape, generator=torch.Generator().manual_seed(1))
    found = slice_scores(pred, thin, scan(item), counted=inside)
    for padding in (-1024.0, 300.0):
        other = torch.where(torch.from_numpy(inside), pred, padding)
        assert slice_scores(other, thin, scan(item), counted=inside) == found
    assert found["left_out"] == pytest.approx(1 - inside.mean()) and found["left_out"] > 0.4
    assert found["psnr"] == psnr(pred, thin, mask=inside)
    assert found["ssim"] == pytest.approx(ssim(pred, thin, counted=inside), rel=1e-9)
    assert all(math.isfinite(value) for value in found.values())
    # padding that is copied is no skill: with it, the error seems half as large
    copied = slice_scores(torch.where(torch.from_numpy(inside), pred, thin), thin, scan(item))
    assert copied["mae_hu"] < 0.6 * found["mae_hu"] and copied["psnr"] > found["psnr"] + 2
    everything = np.ones_like(inside)
    for name, value in slice_scores(pred, thin, scan(item), counted=everything).items():
        assert value == pytest.approx(slice_scores(pred, thin, scan(item))[name], rel=1e-6), name


def test_the_board_leaves_the_padding_out():
    thin = torch.where(torch.from_numpy(field_of_view()), volume(), -1024.0)
    inside = torch.from_numpy(scanned_voxels(thin.numpy()))
    item = case() | {"thin": thin, "thick": average_slices(thin, MATRIX)}
    board = evaluate_slices(slice_baselines(), [item], progress=False)
    assert board.mean("linear", "left_out") == pytest.approx(1 - float(inside.double().mean()))
    hu = slice_baselines()[1].interpolate(*scan(item))
    assert board.mean("linear", "mae_hu") == pytest.approx(
        slice_scores(hu, thin, counted=inside.numpy())["mae_hu"]
    )


def test_slices_of_padding_alone():
    "A slice that was not scanned at all has no PSNR of its own."
    thin = volume()
    thin[:5] = -1024
    counted = scanned_voxels(thin.numpy())
    assert not counted[:5].any() and counted[5:].all()
    found = slice_scores(thin + 20.48, thin, scan(case()), counted=counted)
    assert found["worst_slice_psnr"] == pytest.approx(40, abs=0.3)
    assert found["step_error_hu"] < 1e-3 and math.isfinite(found["reaveraged_worst_hu"])


def test_re_averaging_is_not_clipped():
    item = case()
    metal = item["thin"].clone()
    metal[7, 3, 4] += 3000
    found = slice_scores(metal, item["thin"], scan(item))
    assert (
        found["reaveraged_worst_hu"] == pytest.approx(600, abs=1)
        and slice_scores(item["thin"], item["thin"], scan(item))["reaveraged_worst_hu"] < 1e-2
    )


PROFILES = [SliceProfile(width) for width in (0.6, 2.5, 5.0, 10.0)] + [
    SliceProfile(width, "gaussian") for width in (2.0, 7.5)
]


@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("convention", ["slabs", "centres"])
def test_samples_of_the_profile_agree_with_its_closed_form(profile, convention):
    "To the width of a sample, at every spacing of the thin slices and beyond their ends."
    for spacing in (0.7, 1.0, 1.3, 2.4):
        fine = thin_axis(THICK, spacing, convention)
        # a gap at the end of a scan that stops before the last centre may see nothing of it
        covered = fine.edges_mm[-1] - THICK.positions_mm[-1] + profile.reach_mm > 0.1
        thick = THICK if covered else THICK.part(0, THICK.count - 1)
        exact = slice_profile_matrix(fine, thick, profile)
        found = sampled_profile_matrix(fine, thick, profile).numpy()
        width = 2 * profile.reach_mm / PROFILE_SAMPLES / min(spacing, profile.width_mm)
        assert abs(found - exact).max() < 4 * width


def test_an_error_in_the_enforced_matrix_is_seen():
    """Rows that are cut at the ends of the scan fit their own result, so only another model of the
    measurement shows that the end slices are wrong.
    """
    profile = SliceProfile(10.0)
    cut = profile.cumulative(THIN.edges_mm - THICK.positions_mm[:, None])
    cut = torch.from_numpy(cut).diff(dim=1)
    cut /= cut.sum(1, keepdim=True)
    truth = 10 * torch.from_numpy(THIN.positions_mm).float()[:, None, None].expand(-1, 8, 9)
    measured = 10 * torch.from_numpy(THICK.positions_mm).float()[:, None, None].expand(-1, 8, 9)
    covariance = smooth_covariance(THIN)
    wrong = slice_data_consistency(truth, measured, cut, covariance=covariance)
    assert float((along_z(cut, wrong) - measured).abs().max()) < 1e-3
    error = reaveraging_error(wrong, measured, THICK, THIN, profile)
    assert error.shape == measured.shape and float(error.abs().max()) > 10
    assert slice_scores(wrong, truth, (measured, THICK, THIN, profile))["reaveraged_worst_hu"] > 10
    exact = slice_profile_matrix(THIN, THICK, profile)
    right = slice_data_consistency(truth, measured, exact, covariance=covariance)
    assert float(reaveraging_error(right, measured, THICK, THIN, profile).abs().max()) < 0.05


def test_a_misplaced_or_wrong_profile_is_seen():
    item = case()
    right = (item["thick"], THICK, THIN, PROFILE)
    assert float(reaveraging_error(item["thin"], *right).abs().max()) < 1e-2
    for axis, profile in ((SliceAxis(3.5, 5.0, 6), PROFILE), (THICK, SliceProfile(7.0))):
        error = reaveraging_error(item["thin"], item["thick"], axis, THIN, profile)
        assert float(error.abs().max()) > 10


def test_every_column_is_defined():
    item = case()
    assert set(slice_scores(item["thin"], item["thin"], scan(item))) <= set(SLICE_METRICS)
    assert set(SLICE_MAIN) <= set(SLICE_METRICS)


def test_the_columns_of_other_boards_are_left_alone():
    "A volume scored by another system is not asked for columns that only slices have."
    own = {
        "slice_psnr",
        "worst_slice_psnr",
        "slice_ssim",
        "step_error_hu",
        "step_level_db",
        "noise_unevenness",
        "z_edge_response",
        "z_edge_softness",
        "z_edge_error",
        "reaveraged_hu",
        "reaveraged_worst_hu",
    }
    assert set(SLICE_METRICS) - set(METRICS) == own and all(
        SLICE_METRICS[name] is METRICS[name] for name in METRICS
    )
    rows = [
        {"case": "a", "patient": "a", "predictor": "model", "psnr": 30.0, "step_error_hu": 4.0},
        {"case": "a", "patient": "a", "predictor": "linear", "psnr": 20.0, "step_error_hu": 5.0},
    ]
    assert Scoreboard(rows).metrics == ["psnr"] and SliceScoreboard(
        rows, model="model"
    ).metrics == [
        "psnr",
        "step_error_hu",
    ]
    board = SliceScoreboard(rows, model="model")
    assert "step error, HU ↓" in board.table()
    (comparison,) = board.comparisons(["step_error_hu"])
    assert (comparison.model, comparison.baseline) == ("model", "linear")
    assert comparison.gain == 1.0 and comparison.patients == 1 and math.isnan(comparison.low)


def test_baselines_interpolate_as_their_names_say():
    item = case()
    scan = (item["thick"], THICK, THIN, PROFILE)
    nearest, linear, cubic, physics = (b.interpolate(*scan) for b in slice_baselines())
    assert torch.equal(nearest, item["thick"].repeat_interleave(5, 0))
    # 2 mm above the first centre
    assert float((linear[4] - (0.6 * item["thick"][0] + 0.4 * item["thick"][1])).abs().max()) < 1e-2
    assert (
        float((average_slices(physics, MATRIX) - item["thick"]).abs().max())
        < 1e-2
        < float((average_slices(cubic, MATRIX) - item["thick"]).abs().max())
    )
    with refused("name"):
        Interpolation("spline")


def test_the_upper_bound_of_the_residual_keeps_what_the_vae_loses():
    item = case()
    vae = SliceVAE(SliceVAEConfig.preset("smoke")).eval()
    vae.straight.fit([vae.window.to_network(volume(5))[None, None]])
    start = BackProjection().interpolate(item["thick"], THICK, THIN, PROFILE)
    found = vae_upper_bounds(vae, item["thin"], start)
    assert set(found) == set(UPPER_BOUNDS) and psnr(
        found["upper_bound_residual"], item["thin"]
    ) > max(psnr(start, item["thin"]), psnr(found["upper_bound_vae"], item["thin"]))
    assert torch.allclose(vae_upper_bounds(vae, start, start)["upper_bound_residual"], start)
    with torch.no_grad():
        plain = vae.window.to_hu(
            vae(vae.window.to_network(item["thin"])[None, None])[0][0, 0].clamp(-1, 1)
        )
    assert torch.allclose(found["upper_bound_vae"], plain, atol=0.1)


class Oracle:
    "Returns the truth plus an offset in HU."

    def __init__(self, items, name, offset=0.0):
        self.items = items
        self.name = name
        self.offset = offset

    def interpolate(self, thick, *axes):
        truth = next(i["thin"] for i in self.items if torch.equal(i["thick"], thick))
        return truth + self.offset


class Short(Oracle):
    "Forgets a slice."

    def interpolate(self, thick, *axes):
        return super().interpolate(thick, *axes)[1:]


@pytest.fixture(scope="module")
def items():
    return [case(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def board(items):
    return evaluate_slices(
        [
            Oracle(items, "regressor_consistent", 2.0),
            Oracle(items, "diffusion_sample", 400.0),
            *slice_baselines(),
        ],
        items,
        None,
        lambda item: dict.fromkeys(UPPER_BOUNDS, item["thin"] + 1),
        progress=False,
    )


def test_models_baselines_and_upper_bounds_are_kept_apart(board):
    assert board.baselines == ["nearest", "linear", "cubic", "back_projection"]
    assert board.models == ["regressor_consistent", "diffusion_sample"]
    comparisons = board.comparisons()
    # the upper bounds are better and no baseline
    assert {c.baseline for c in comparisons} <= set(board.baselines)
    text = board.table()
    assert text.index("back_projection") < text.index("upper_bound_vae")
    assert "3 cases, 3 patients" in text
    gains = {c.model: c for c in comparisons if c.metric == "psnr"}
    assert gains["regressor_consistent"].low > 0 > gains["diffusion_sample"].gain
    assert len(comparison_table(comparisons).splitlines()) == len(comparisons) == 8


def test_files_of_a_board(board, tmp_path):
    board.save(tmp_path)
    with (tmp_path / "scoreboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 8
    assert float(rows[0]["psnr"]) == pytest.approx(-20 * math.log10(2 / 2048), abs=0.05)
    content = json.loads((tmp_path / "metrics.json").read_text())
    gain = content["gain_over_baselines"]["regressor_consistent"]["psnr"]["cubic"]
    low, high = gain["interval_95"]
    assert gain["patients"] == 3 and low < gain["better_by"] < high
    assert (tmp_path / "scoreboard.png").stat().st_size > 1000
    # of a signed figure neither way is better
    assert "step_level_db" not in content["gain_over_baselines"]["regressor_consistent"]
    assert [t["met"] for t in content["targets"]] == [t.met for t in targets_met(board)]


def test_targets_are_numbers_and_either_met_or_not(items, board):
    results = {(r.model, r.metric): r for r in targets_met(board)}
    psnr_target = results["regressor_consistent", "psnr"]
    assert psnr_target.met and psnr_target.value > psnr_target.target == 1.0
    assert not results["diffusion_sample", "psnr"].met
    # an offset of 2 HU is a misfit of 2 HU
    misfit = results["regressor_consistent", "reaveraged_worst_hu"]
    assert misfit.value == pytest.approx(2, abs=0.01) and not misfit.met
    close = evaluate_slices(
        [Oracle(items, "regressor_consistent", 0.5), *slice_baselines()], items[:1], progress=False
    )
    results = targets_met(close)
    assert all(r.patients == 1 and r.met for r in results)
    assert {r.metric for r in results} == {"psnr", "reaveraged_worst_hu"}
    assert len(targets_table(results).splitlines()) == 2


def test_bad_predictions_are_refused(items):
    with refused("predictors"):
        evaluate_slices([BackProjection(), BackProjection()], items, progress=False)
    with refused("items"):
        evaluate_slices([BackProjection()], [], progress=False)
    with refused("short"):
        evaluate_slices([Short(items, "short")], items[:1], progress=False)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_slices([Oracle(items, "nan", math.nan)], items[:1], progress=False)
