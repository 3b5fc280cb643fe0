"""Robustness: perturbations, the residual beyond noise, smoothness and contradictions."""

import csv
import json

import pytest
import torch
from refusals import refused

from ct_nb.data.open import phantom_source
from ct_nb.data.xray_pairs import XrayPairs
from ct_nb.drr2ct.robustness import (
    PERTURBATIONS,
    REFERENCE,
    Perturbation,
    Robustness,
    nominal_geometry,
    perturbed_xrays,
    render_views,
    residuals,
    robustness,
)
from ct_nb.evaluation.baselines import SIRT
from ct_nb.physics.geometry import ConeBeam, GeometryError
from ct_nb.physics.volume import Grid


@pytest.fixture(scope="module")
def pairs():
    return XrayPairs(
        phantom_source(2, 32),
        16,
        geometry=ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16),
    )


class Recorder:
    "A predictor that returns a fixed volume and records its inputs."

    name = "model"

    def __init__(self, hu):
        self.hu = hu
        self.inputs = []

    def predict(self, xrays, geometry):
        self.inputs.append((xrays, geometry))
        return self.hu


def condition(name):
    return next(c for c in PERTURBATIONS if c.name == name)


def test_the_reference_has_the_xrays_of_the_pairs(pairs):
    xrays, geometry = perturbed_xrays(REFERENCE, *render_views(pairs, 0, [REFERENCE])[None], 0, 0)
    assert torch.allclose(xrays, pairs[0]["xrays"], atol=1e-5) and geometry is pairs.geometry


def test_a_condition_changes_only_its_part(pairs):
    views = render_views(pairs, 0)
    true, clean = views[None]
    for c in PERTURBATIONS:
        xrays, geometry = perturbed_xrays(c, *views[c.azimuth_deg], 0, 0)
        rendered_xrays = views[c.azimuth_deg][1]
        assert xrays.shape[0] == geometry.views == len(rendered_xrays)
        assert torch.equal(xrays, rendered_xrays) == (not c.photons and not c.occlusion_mm), c.name
        assert (geometry is views[c.azimuth_deg][0]) == (c.error != "geometry"), c.name
    assert len(views[(0.0, 45.0, 90.0, 135.0)][1]) == 4 and len(views[(0.0,)][1]) == 1


def test_nominal_geometries(pairs):
    true = pairs.geometry
    turned = nominal_geometry(true, condition("turned 5°"))
    tilted = nominal_geometry(true, condition("tilted 5°"))
    assert float(turned.azimuth_deg[1]) == pytest.approx(95, abs=1e-6) and float(
        turned.elevation_deg[1]
    ) == pytest.approx(0, abs=1e-6)
    assert abs(float(tilted.elevation_deg[1])) == pytest.approx(5, abs=1e-6) and float(
        tilted.azimuth_deg[1]
    ) == pytest.approx(90, abs=1e-6)
    across = nominal_geometry(true, condition("5 mm across"))
    down = nominal_geometry(true, condition("5 mm down"))
    for moved, axis in ((across, true.column_step_mm), (down, true.row_step_mm)):
        assert torch.equal(moved.source_mm, true.source_mm)
        assert torch.allclose(
            moved.detector_center_mm[1] - true.detector_center_mm[1], 5 * axis[1] / axis[1].norm()
        )
        assert torch.equal(moved.detector_center_mm[0], true.detector_center_mm[0])


def test_noise_and_blocks_are_alike_on_a_ladder(pairs):
    true, clean = render_views(pairs, 0, [REFERENCE])[None]
    noise = [
        (perturbed_xrays(condition(n), true, clean, 0, 0)[0] - clean)
        for n in ("1e5 photons", "1e4 photons")
    ]
    assert noise[1].std() / noise[0].std() == pytest.approx(10**0.5, rel=0.2)
    changed = [
        (perturbed_xrays(condition(n), true, clean, 0, 0)[0] != clean).float().mean()
        for n in ("block of 50 mm", "block of 100 mm", "block of 200 mm")
    ]
    assert 0 < changed[0] < changed[1] < changed[2]
    again = perturbed_xrays(condition("1e4 photons"), true, clean, 0, 0)[0] - clean
    assert torch.equal(again, noise[1]) and not torch.equal(
        perturbed_xrays(condition("1e4 photons"), true, clean, 0, 1)[0] - clean, again
    )


def test_model_and_residual_use_the_nominal_geometry(pairs):
    model = Recorder(pairs[0]["hu"])
    conditions = [REFERENCE, condition("tilted 5°")]
    board = robustness(model, pairs, conditions, progress=False)
    assert (
        len(model.inputs) == 4
        and len(board.rows) == 4
        and board.conditions == [c.name for c in conditions]
    )
    (xrays, geometry), row = model.inputs[2], board.rows[2]
    assert (
        float(residuals(model.hu, xrays, geometry)[0].max()) == row["residual"]
        and geometry.elevation_deg[1].abs() > 4.9
    )
    # the truth does not explain X-rays whose geometry is wrong
    assert row["residual"] > board.rows[0]["residual"]
    assert board.rows[0]["psnr"] > 60 or board.rows[0]["psnr"] == float("inf")


def test_noise_is_no_contradiction(pairs):
    # rendered from the target's own grid: only noise is left
    fine = XrayPairs(phantom_source(1, 16), 16, geometry=pairs.geometry)
    board = robustness(
        Recorder(fine[0]["hu"]),
        fine,
        [REFERENCE, condition("1e6 photons"), condition("1e5 photons"), condition("tilted 5°")],
        limit=5e-3,
        progress=False,
    )
    assert [r["contradiction"] for r in board.rows] == [False, False, False, True]
    assert board.rows[2]["residual"] > 2 * board.rows[2]["beyond_noise"]


def board_of(limit=None):
    figures = {
        "as in training": (0, "reference", 25.0, 0.01),
        "a": (1, "even", 24.0, 0.01),
        "b": (2, "even", 22.0, 0.03),
        "c": (1, "cliff", 20.0, 0.01),
        "d": (1, "up", 24.0, 0.02),
        "e": (2, "up", 24.5, 0.02),
        "many": (-1, "up", 26.0, 0.01),
    }
    return Robustness(
        [
            {
                "case": "p0",
                "patient": "p0",
                "condition": name,
                "group": group,
                "severity": s,
                "error": "geometry" if group == "even" else "none",
                "psnr": p,
                "ssim": 0.5,
                "residual": r,
                "beyond_noise": r,
                "contradiction": None if limit is None else r > limit,
            }
            for name, (s, group, p, r) in figures.items()
        ],
        limit,
    )


def test_smoothness_in_known_numbers():
    groups = {row["group"]: row for row in board_of().smoothness()}
    assert (
        groups["even"]["smooth"] and groups["even"]["fall"] == 2.0 and groups["even"]["rise"] == 0.0
    )
    assert not groups["cliff"]["smooth"] and groups["cliff"]["fall"] == 5.0
    assert (
        not groups["up"]["smooth"]
        and groups["up"]["rise"] == 0.5
        and groups["up"]["ladder"] == ["many", "as in training", "d", "e"]
    )


def test_sentences_without_and_with_a_limit():
    assert "no residual limit" in board_of().sentences()[-1]
    wrong, damaged, alarms = board_of(0.015).sentences()[-3:]
    assert (
        "a 0 %, b 100 %" in wrong
        and "none" in damaged
        and "d 100 %, e 100 %" in alarms
        and "as in training" not in alarms
    )
    assert (
        board_of().summary()[0]["contradiction"] is None
        and "+0.00" in board_of().table()
        and "-3.00" in board_of().table(markdown=True)
    )


@pytest.mark.parametrize("limit", [None, 0.015])
def test_files(tmp_path, limit):
    board_of(limit).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "robustness.csv",
        "robustness.json",
        "robustness.png",
    ]
    rows = list(csv.DictReader((tmp_path / "robustness.csv").read_text().splitlines()))
    assert (
        len(rows) == 7
        and rows[2]["contradiction"] == ("" if limit is None else "True")
        and float(rows[0]["psnr"]) == 25.0
    )
    assert json.loads((tmp_path / "robustness.json").read_text())["limit"] == limit


def test_one_view_and_four_reach_a_predictor(pairs):
    board = robustness(
        SIRT(5),
        pairs,
        [c for c in PERTURBATIONS if c.group in ("reference", "views")],
        progress=False,
    )
    means = [row["psnr"] for row in board.summary()]
    assert means[3] < means[0] < means[1]  # one, two, four views


def test_invalid_arguments_are_refused(pairs):
    with refused("conditions"):
        robustness(SIRT(1), pairs, [REFERENCE, REFERENCE], progress=False)
    with refused("predictor"):
        robustness(
            Recorder(torch.full((16, 16, 16), float("nan"))), pairs, [REFERENCE], progress=False
        )
    with pytest.raises(GeometryError):
        perturbed_xrays(
            Perturbation("off", "far", 1.0, down_mm=1e5),
            *render_views(pairs, 0, [REFERENCE])[None],
            0,
            0,
        )
