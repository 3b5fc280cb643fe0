"""Scores of thin slices: what each one notices and what it does not, bounded memory with the same numbers, ceilings apart from floors, and bad input in a sentence."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import ct_nb.slices.metrics as scores
from ct_nb.evaluation.case_metrics import METRICS
from ct_nb.evaluation.metrics import CHEST, psnr, ssim
from ct_nb.evaluation.scoreboard import Scoreboard, summarize_metric
from ct_nb.slices.metrics import (
    SLICE_MAIN,
    SLICE_METRICS,
    UPPER_BOUNDS,
    BackProjection,
    Interpolation,
    SliceScoreboard,
    evaluate_slices,
    slice_baselines,
    slice_noise,
    slice_scores,
    step_scores,
    targets_met,
    vae_upper_bounds,
    z_edges,
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


def test_noise_is_measured_and_not_anatomy():
    generator = torch.Generator().manual_seed(0)
    for level in (5.0, 40.0):
        assert float(
            slice_noise(level * torch.randn(3, 200, 200, generator=generator)).mean()
        ) == pytest.approx(level, rel=0.03)
    ramp = torch.arange(50.0)[None, :, None] * 7 + torch.arange(40.0) * 3
    assert float(slice_noise(ramp)) == pytest.approx(0, abs=1e-6)  # a slope is none
    with pytest.raises(ValueError, match="3 × 3"):
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
    same = step_scores(truth, truth)
    assert same == {"step_error_hu": 0.0, "step_level_db": 0.0, "noise_unevenness": 0.0}
    assert step_scores(truth + 30, truth)["step_error_hu"] < 1e-4  # a constant is no step
    flicker = truth + 50 * torch.tensor([1.0, -1]).repeat(15)[:, None, None]
    assert (
        step_scores(flicker, truth)["step_error_hu"] == pytest.approx(100, abs=1)
        and step_scores(flicker, truth)["step_level_db"] > 0.3
    )
    doubled = 2 * (truth - truth.mean())
    # clipping takes a little
    assert step_scores(doubled, doubled / 2)["step_level_db"] == pytest.approx(
        20 * math.log10(2), abs=0.6
    )
    assert all(math.isnan(value) for value in step_scores(truth[:1], truth[:1]).values())


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
        name: step_scores(x, truth)["noise_unevenness"]
        for name, x in {"other": less, "pumping": quiet, "blurred": all_quiet}.items()
    }
    assert uneven["pumping"] > 5 * max(uneven["other"], uneven["blurred"])


def test_edges_along_z_only():
    step = torch.where(torch.arange(20) < 10, -800.0, 0.0)[:, None, None].expand(20, 16, 18)
    soft = (
        torch.where(torch.arange(20) < 10, -800.0, 0.0)
        .index_fill(0, torch.tensor([10]), -400.0)[:, None, None]
        .expand(20, 16, 18)
    )
    assert z_edges(step, step)[:2] == (1.0, 0.0)
    assert z_edges(soft, step).response == pytest.approx(0.5) and z_edges(
        soft, step
    ).error == pytest.approx(0.5)
    assert z_edges(torch.zeros_like(step), step).error == 1.0
    sideways = step.movedim(0, 1)
    assert math.isnan(z_edges(sideways, sideways).response) and math.isnan(
        z_edges(step[:1], step[:1]).response
    )
    with pytest.raises(ValueError, match="share"):
        z_edges(step, step, share=1.0)


def test_ssim_in_portions_is_the_scoreboards():
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


def test_re_averaging_is_not_clipped():
    item = case()
    metal = item["thin"].clone()
    metal[7, 3, 4] += 3000
    found = slice_scores(metal, item["thin"], item["thick"], item["matrix"])
    assert (
        found["reaveraged_worst_hu"] == pytest.approx(600, abs=1)
        and slice_scores(item["thin"], item["thin"], item["thick"], item["matrix"])[
            "reaveraged_worst_hu"
        ]
        < 1e-2
    )


def test_every_column_is_defined():
    item = case()
    assert set(slice_scores(item["thin"], item["thin"], item["thick"], item["matrix"])) <= set(
        SLICE_METRICS
    ) and set(SLICE_MAIN) <= set(SLICE_METRICS)


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
    assert "step error, HU ↓" in SliceScoreboard(
        rows, model="model"
    ).table() and "gain 1.0 [-, -]" in summarize_metric(
        SliceScoreboard(rows, model="model"), "step_error_hu"
    )


def test_floors_are_read_as_their_names_say():
    item = case()
    given = (item["thick"], THICK, THIN, PROFILE)
    nearest, linear, cubic, physics = (floor.thin(*given) for floor in slice_baselines())
    assert torch.equal(nearest, item["thick"].repeat_interleave(5, 0))
    # 2 mm above the first centre
    assert float((linear[4] - (0.6 * item["thick"][0] + 0.4 * item["thick"][1])).abs().max()) < 1e-2
    assert (
        float((average_slices(physics, MATRIX) - item["thick"]).abs().max())
        < 1e-2
        < float((average_slices(cubic, MATRIX) - item["thick"]).abs().max())
    )
    with pytest.raises(ValueError, match="spline"):
        Interpolation("spline")


def test_the_residual_ceiling_keeps_what_the_vae_loses():
    item = case()
    vae = SliceVAE(SliceVAEConfig.preset("smoke")).eval()
    vae.straight.fit([vae.window.to_network(volume(5))[None, None]])
    start = BackProjection().thin(item["thick"], THICK, THIN, PROFILE)
    found = vae_upper_bounds(vae, item["thin"], start)
    assert set(found) == set(UPPER_BOUNDS) and psnr(found["ceiling_residual"], item["thin"]) > max(
        psnr(start, item["thin"]), psnr(found["ceiling_vae"], item["thin"])
    )
    assert torch.allclose(vae_upper_bounds(vae, start, start)["ceiling_residual"], start)
    with torch.no_grad():
        plain = vae.window.to_hu(
            vae(vae.window.to_network(item["thin"])[None, None])[0][0, 0].clamp(-1, 1)
        )
    assert torch.allclose(found["ceiling_vae"], plain, atol=0.1)


class Oracle:
    "Knows the answers; off by some HU."

    def __init__(self, items, name, off=0.0):
        self.items = items
        self.name = name
        self.off = off

    def thin(self, thick, *axes):
        return next(i["thin"] for i in self.items if torch.equal(i["thick"], thick)) + self.off


def test_the_board_keeps_models_floors_and_ceilings_apart(tmp_path):
    items = [case(seed) for seed in range(3)]
    board = evaluate_slices(
        [
            Oracle(items, "regressor_consistent", 2.0),
            Oracle(items, "diffusion_sample", 400.0),
            *slice_baselines(),
        ],
        items,
        tmp_path,
        lambda item: {"ceiling_vae": item["thin"] + 1, "ceiling_residual": item["thin"] + 1},
        progress=False,
    )
    assert board.baselines == ["nearest", "linear", "cubic", "back_projection"] and board.models == [
        "regressor_consistent",
        "diffusion_sample",
    ]
    assert board.best_baseline("psnr") in board.baselines  # the ceilings are better and are no floor
    text = board.table()
    assert (
        text.index("back_projection") < text.index("ceiling_vae") and "3 cases, 3 patients" in text
    )
    assert board.of("regressor_consistent").compare("psnr").exceeds_all
    assert not board.of("diffusion_sample").compare("psnr").exceeds_all
    rows = list(csv.DictReader((tmp_path / "scoreboard.csv").open()))
    assert len(rows) == 3 * 8 and float(rows[0]["psnr"]) == pytest.approx(
        -20 * math.log10(2 / 2048), abs=0.05
    )
    content = json.loads((tmp_path / "metrics.json").read_text())
    gain = content["gain_over_floors"]["regressor_consistent"]["psnr"]["cubic"]
    assert (
        gain["patients"] == 3
        and gain["interval_95"][0] < gain["better_by"] < gain["interval_95"][1]
        and (tmp_path / "scoreboard.png").stat().st_size > 1000
    )
    # of a signed figure neither way is better
    assert "step_level_db" not in content["gain_over_floors"]["regressor_consistent"]
    assert content["reach"] == board.reach()


def test_what_was_reached_is_said_either_way():
    items = [case(seed) for seed in range(2)]
    said = targets_met(
        evaluate_slices(
            [
                Oracle(items, "regressor_consistent", 0.5),
                Oracle(items, "diffusion_sample", 400.0),
                *slice_baselines(),
            ],
            items,
            progress=False,
        )
    )
    answers = {s.split(": ")[1].split(";")[0]: s.split(":")[0] for s in said}
    assert (
        answers["regressor_consistent is better than cubic in PSNR by 1 dB or more"] == "reached"
        and answers["diffusion_sample is better than cubic in PSNR at all"] == "not reached"
    )
    assert any(
        s.startswith("not reached") and "diffusion_sample, averaged again" in s for s in said
    ) and any(s.startswith("reached") and "regressor_consistent, averaged again" in s for s in said)
    one = evaluate_slices(
        [Oracle(items, "regressor_consistent", 0.5), *slice_baselines()], items[:1], progress=False
    )
    assert all("(1 patient)" in s and "[" not in s for s in targets_met(one) if "better" in s)


def test_bad_answers_are_refused():
    items = [case()]
    with pytest.raises(ValueError, match="name of its own"):
        evaluate_slices([BackProjection(), BackProjection()], items, progress=False)
    with pytest.raises(ValueError, match="no cases"):
        evaluate_slices([BackProjection()], [], progress=False)
    short = Oracle(items, "short")
    short.thin = lambda thick, *axes: items[0]["thin"][1:]
    with pytest.raises(ValueError, match="short on case0"):
        evaluate_slices([short], items, progress=False)
    with pytest.raises(ValueError, match="NaN"):
        evaluate_slices([Oracle(items, "nan", math.nan)], items, progress=False)
