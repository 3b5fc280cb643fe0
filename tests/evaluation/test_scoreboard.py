"""Baselines, scoreboard, its files, and refused predictions."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.evaluation.baselines import (
    AtlasDataConsistency,
    MeanAtlas,
    NearestNeighbour,
    fit_baselines,
)
from ct_nb.evaluation.case_metrics import evaluate_volumes
from ct_nb.evaluation.metrics import drr_error, held_out_drr_error, null_space_error
from ct_nb.evaluation.scoreboard import (
    PRIMARY_METRICS,
    Scoreboard,
    evaluate,
    held_out_views,
)
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.geometry_io import geometry_from_json
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, Volume, hu_to_mu

NAMES = [
    "air",
    "mean_atlas",
    "nearest_neighbour",
    "minimum_norm",
    "sirt",
    "linear_prior",
    "atlas_consistent",
]


def torso(seed, size):
    "An ellipsoid body with two lungs and a spine, of a size that the seed decides."
    rng = np.random.default_rng(seed)
    width = 130 + 20 * rng.random()
    depth = 85 + 20 * rng.random()
    lung = 38 + 10 * rng.random()
    x, y, z = Grid.cube(size).centers_mm().unbind(-1)
    hu = torch.full((size,) * 3, -1000.0)
    hu[(x / width) ** 2 + (y / depth) ** 2 < 1] = 40
    for side in (-65, 65):
        hu[((x - side) / lung) ** 2 + (y / 60) ** 2 + ((z - 10) / 110) ** 2 < 1] = -850
    hu[x**2 + (y - 65) ** 2 < 18**2] = 500
    return hu


def pair(seed, size=24, detector=32):
    geometry = ConeBeam.biplanar(
        grid=Grid.cube(size), detector_shape=(detector, detector), pixel_mm=512 / detector
    )
    fine = torso(seed, 2 * size)
    return {
        "id": f"case/{seed}",
        "patient": f"p{seed}",
        "geometry": geometry,
        "hu": F.avg_pool3d(fine[None], 2)[0],
        "affine": Grid.cube(size, center_mm=(10, 20, 30)).affine,
        "xrays": project(hu_to_mu(fine), geometry.on(Grid.cube(2 * size))),
    }


@pytest.fixture(scope="module")
def training():
    return [pair(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def held_out():
    return [pair(seed) for seed in range(100, 104)]


class Oracle:
    "The truth plus a given error."

    name = "model"

    def __init__(self, cases, error):
        self.truth = {c["xrays"].data_ptr(): c["hu"] for c in cases}
        self.error = error

    def predict(self, xrays, geometry):
        return self.truth[xrays.data_ptr()] + self.error


@pytest.fixture(scope="module")
def evaluated(training, held_out, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    noise = 10 * torch.randn(held_out[0]["hu"].shape, generator=torch.Generator().manual_seed(0))
    return (
        evaluate(
            [Oracle(held_out, noise), *fit_baselines(training)],
            held_out,
            out,
            save_cases=1,
            progress=False,
        ),
        out,
    )


def test_metrics_json_is_strict_and_complete(evaluated):
    board, out = evaluated
    text = (out / "metrics.json").read_text()
    content = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))
    assert (
        list(content["predictors"]) == ["model", *NAMES]
        and content["cases"] == 4
        and content["patients"] == 4
    )
    for name, row in content["predictors"].items():
        for metric in (
            "psnr",
            "ssim",
            "mae_hu",
            "drr_error",
            "drr_error_held_out",
            "null_space_error",
        ):
            assert isinstance(row[metric], float), (name, metric)
            assert row[metric] == pytest.approx(np.mean(board.values(name, metric)))
        assert row["lpips"] is None
    assert (
        set(content["definitions"]) == set(content["predictors"]["air"])
        and "2048" in content["definitions"]["psnr"]["definition"]
    )
    assert (
        content["notes"] == ["lpips: no weights given"]
        and content["settings"]["sirt"]["iterations"] > 0
        and content["held_out_azimuth_deg"] == [45.0, 135.0]
    )


def test_csv_has_a_row_per_case_and_predictor(evaluated):
    board, out = evaluated
    with open(out / "scoreboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["predictor"]) for r in rows[:2]] == [
        ("case/100", "model"),
        ("case/100", "air"),
    ] and len(rows) == 4 * 8
    assert (
        float(rows[0]["psnr"]) == board.rows[0]["psnr"]
        and rows[0]["lpips"] == ""
        and {"ssim", "mae_hu_body", "drr_error_held_out", *board.rows[0]} <= set(rows[0])
    )


def test_saved_case_overlays_the_patient(evaluated, held_out):
    nibabel = pytest.importorskip("nibabel")
    folder = evaluated[1] / "cases" / "case_100"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["truth.nii.gz", "model.nii.gz", "xrays.npz", "geometry.json"]
        + [f"{n}.nii.gz" for n in NAMES]
    )
    image = nibabel.load(folder / "truth.nii.gz")
    np.testing.assert_allclose(
        np.asarray(image.dataobj).transpose(2, 1, 0), held_out[0]["hu"], atol=0.51
    )
    np.testing.assert_allclose(
        image.affine, np.diag([-1, -1, 1, 1]) @ held_out[0]["affine"], atol=1e-4
    )
    np.testing.assert_array_equal(
        np.load(folder / "xrays.npz")["line_integrals"], held_out[0]["xrays"]
    )
    assert geometry_from_json((folder / "geometry.json").read_text()).views == 2
    assert (evaluated[1] / "scoreboard.png").read_bytes()[:4] == b"\x89PNG" and not [
        p for p in evaluated[1].rglob(".*")
    ]


def test_a_baseline_with_more_information_is_better(evaluated):
    board, _ = evaluated
    psnr = {name: board.mean(name, "psnr") for name in board.predictors}
    assert (
        psnr["air"] < psnr["minimum_norm"] < psnr["sirt"] < psnr["atlas_consistent"]
        and psnr["mean_atlas"] < psnr["atlas_consistent"]
    )
    assert board.mean("atlas_consistent", "drr_error") < 0.5 * board.mean("mean_atlas", "drr_error")
    assert board.mean("air", "null_space_error") == pytest.approx(1) and board.mean(
        "air", "drr_error"
    ) == pytest.approx(1)
    assert board.best_baseline("psnr") == max(NAMES, key=psnr.get) and board.best_baseline(
        "drr_error"
    ) == min(NAMES, key=lambda n: board.mean(n, "drr_error"))


def test_comparison_with_all_baselines(evaluated, held_out, training):
    board, _ = evaluated
    for metric in PRIMARY_METRICS:
        comparison = board.compare(metric)
        assert comparison.exceeds_all and comparison.gain.patients == 4
        assert comparison.baseline == board.best_baseline(metric)
        assert comparison.gain == board.gain(comparison.baseline, metric)
    assert len(board.summary()) == len(PRIMARY_METRICS)
    poor = evaluate([Oracle(held_out, -600.0), *fit_baselines(training)], held_out, progress=False)
    comparison = poor.compare("psnr")
    assert not comparison.exceeds_all and "atlas_consistent" in comparison.not_exceeded
    assert poor.gain("sirt", "psnr").high < 0


def test_one_patient_and_no_model_have_no_interval(evaluated, held_out, training):
    board, _ = evaluated
    rows = [row for row in board.rows if row["case"] == board.cases[0]]
    single = Scoreboard(rows).compare("psnr")
    assert single.not_exceeded == tuple(NAMES) and math.isnan(single.gain.low)
    baselines = Scoreboard([r for r in board.rows if r["predictor"] != "model"]).compare("psnr")
    assert math.isnan(baselines.model_mean) and math.isnan(baselines.gain.mean)
    assert baselines.baseline == board.best_baseline("psnr") and not baselines.exceeds_all
    alone = Scoreboard([r for r in board.rows if r["predictor"] == "model"]).compare("psnr")
    assert alone.baseline is None and not alone.exceeds_all


def test_exact_prediction_is_infinite_and_json_stays_strict(held_out, tmp_path):
    board = evaluate(
        [Oracle(held_out, 0.0), MeanAtlas(held_out[0]["hu"], 1)],
        held_out[1:3],
        tmp_path,
        progress=False,
    )
    assert board.mean("model", "psnr") == math.inf and "inf" in board.table()
    content = json.loads(
        (tmp_path / "metrics.json").read_text(), parse_constant=lambda token: pytest.fail(token)
    )
    assert (
        content["predictors"]["model"]["psnr"] is None
        and content["predictors"]["model"]["mae_hu"] == 0
    )
    assert ",inf," in (tmp_path / "scoreboard.csv").read_text()


def test_tables(evaluated):
    board, _ = evaluated
    text = board.table()
    markdown = board.table(markdown=True)
    assert (
        text.splitlines()[2].startswith("model")
        and "4 cases, 4 patients" in text
        and len({len(line) for line in text.splitlines()[:-1]}) == 1
    )
    assert markdown.splitlines()[0].count("|") == 8 and all(
        line.count("|") == 8 for line in markdown.splitlines()
    )
    assert len(board.figure(["psnr"]).axes) == 1


def test_drr_errors_by_hand(held_out):
    case = held_out[0]
    views = held_out_views(case["geometry"])
    assert drr_error(
        case["hu"], 2 * project(hu_to_mu(case["hu"]), case["geometry"]), case["geometry"]
    ) == pytest.approx(0.5, abs=1e-6)
    doubled = 2 * (case["hu"] + 1000) - 1000
    assert held_out_drr_error(
        torch.full_like(case["hu"], -1000.0), case["hu"], views
    ) == pytest.approx(1, abs=1e-6)
    # twice the attenuation, not clipped at any window
    assert held_out_drr_error(doubled, case["hu"], views) == pytest.approx(1, abs=1e-6)
    assert held_out_drr_error(case["hu"].clip(-1000, 0), case["hu"], views) == pytest.approx(
        (
            (
                project(hu_to_mu(case["hu"].clip(-1000, 0)), views)
                - project(hu_to_mu(case["hu"]), views)
            ).norm()
            / project(hu_to_mu(case["hu"]), views).norm()
        ).item(),
        rel=1e-5,
    )


def test_null_space_error_against_a_dense_pseudo_inverse():
    geometry = ConeBeam.biplanar(grid=Grid.cube(6), detector_shape=(5, 5), pixel_mm=100.0)
    truth, pred = (
        torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(s)) * 1000 - 500 for s in (0, 1)
    )
    matrix = torch.stack(
        [
            project(e.reshape(6, 6, 6), geometry).flatten()
            for e in torch.eye(216, dtype=torch.float64)
        ],
        1,
    )
    null = torch.eye(216, dtype=torch.float64) - torch.linalg.pinv(matrix, rtol=1e-10) @ matrix
    error, reference = (
        null @ v.double().flatten() for v in (hu_to_mu(pred) - hu_to_mu(truth), hu_to_mu(truth))
    )
    assert null_space_error(pred, truth, geometry, iterations=100) == pytest.approx(
        (error.norm() / reference.norm()).item(), rel=2e-3
    )
    both = null_space_error(torch.stack([pred, truth]), truth, geometry, iterations=100)
    assert (
        both[0] == pytest.approx((error.norm() / reference.norm()).item(), rel=2e-3)
        and both[1] == 0
    )


def test_atlas_consistent_is_the_weighted_projection_onto_the_xrays():
    geometry = ConeBeam.biplanar(grid=Grid.cube(6), detector_shape=(5, 5), pixel_mm=100.0)
    atlas, truth = (
        torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(s)) * 200 for s in (0, 1)
    )
    spread = 0.002 + 0.004 * torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(2))
    matrix = torch.stack(
        [
            project(e.reshape(6, 6, 6), geometry).flatten()
            for e in torch.eye(216, dtype=torch.float64)
        ],
        1,
    )
    y = matrix @ hu_to_mu(truth).double().flatten()
    mean = hu_to_mu(atlas).double().flatten()
    weight = spread.double().flatten() ** 2
    expected = mean + weight * (
        matrix.T @ torch.linalg.pinv(matrix * weight @ matrix.T, rtol=1e-12) @ (y - matrix @ mean)
    )
    result = AtlasDataConsistency(atlas, spread, rounds=1, iterations=200).predict(
        y.reshape(2, 5, 5).float(), geometry
    )
    off = (hu_to_mu(result).flatten().double() - expected.clamp_min(0)).norm() / (
        expected - mean
    ).norm()
    assert off < 0.02, off  # the solver stops at 1e-4 of the residual
    assert drr_error(result, y.reshape(2, 5, 5), geometry) < 2e-3


def test_nearest_neighbour_stores_as_many_volumes_as_fit(training):
    mean = torch.stack([c["hu"] for c in training]).mean(0)
    baselines = fit_baselines(training, library_mb=2.1 * 2 * 24**3 / 2**20)
    assert len(baselines[2].volumes) == 2 and torch.allclose(baselines[1].hu, mean, atol=1e-3)
    assert len(fit_baselines(training, limit=3)[2].volumes) == 3
    alone = fit_baselines(training[:1])
    assert torch.equal(
        alone[2].predict(training[4]["xrays"], training[4]["geometry"]), training[0]["hu"].round()
    )
    assert alone[-1].settings["spread"] == "none"
    ranking = NearestNeighbour(
        torch.stack([c["xrays"] for c in training]), torch.stack([c["hu"] for c in training])
    ).ranking(training[3]["xrays"])
    assert ranking[0] == 3 and sorted(ranking.tolist()) == list(range(6))


class Broken:
    def __init__(self, name, prediction):
        self.name, self.prediction = name, prediction

    def predict(self, xrays, geometry):
        return self.prediction


def test_refusals_name_the_predictor_or_argument(held_out, training):
    nan = torch.full((24,) * 3, math.nan)
    with refused("model on case/100") as caught:
        evaluate([Broken("model", nan)], held_out, progress=False)
    assert caught.value.predictor == "model"
    with refused("sirt on case/100"):
        evaluate([Broken("sirt", torch.zeros(2, 2))], held_out, progress=False)
    with refused("predictors"):
        evaluate([Broken("a", nan), Broken("a", nan)], held_out)
    with refused("pairs"):
        evaluate([Broken("a", nan)], [])
    with refused("train_pairs"):
        fit_baselines([])
    other = pair(0, size=16)
    for baseline in fit_baselines(training):
        if baseline.name in ("mean_atlas", "nearest_neighbour", "atlas_consistent"):
            with refused(baseline.name):
                baseline.predict(other["xrays"], other["geometry"])
    with refused("nearest_neighbour"):
        fit_baselines(training)[2].predict(other["xrays"][:1], other["geometry"].select([0]))
    with refused("line_integrals"):
        drr_error(held_out[0]["hu"], held_out[0]["xrays"][:1], held_out[0]["geometry"])


def test_a_folder_that_cannot_be_written_is_an_error(held_out, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        evaluate([Oracle(held_out, 1.0)], held_out[:1], tmp_path / "file" / "run", progress=False)


def test_two_files_on_their_own_grids():
    truth = Volume(torso(0, 40).numpy(), Grid.cube(40).affine)
    same = evaluate_volumes(truth, truth)
    assert same["metrics"]["mae_hu"] == 0 and same["notes"] == ["lpips: no weights given"]
    mirrored_storage = Volume(
        truth.hu[:, :, ::-1],
        truth.affine @ np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float),
    )
    # the affine counts, not the order of the array
    assert evaluate_volumes(mirrored_storage, truth)["metrics"]["mae_hu"] == pytest.approx(
        0, abs=1e-2
    )
    cube = truth.resample_onto(
        Grid(
            (20, 20, 20),
            np.diag([8.0, 8, 8, 1]) + np.array([[0, 0, 0, -76.0]] * 3 + [[0, 0, 0, 0]]),
        )
    )
    part = evaluate_volumes(cube, truth)
    assert (
        "was resampled onto the truth's voxels (40×40×40 at (8, 8, 8) mm)" in part["notes"][0]
        and "12.5% of the truth" in part["notes"][1]
    )
    assert part["metrics"]["mae_hu"] == pytest.approx(0, abs=1e-2)


def test_labels_of_one_side_give_hu_and_of_both_give_overlap():
    truth = Volume(torso(0, 40).numpy(), Grid.cube(40).affine)
    labels = np.zeros(truth.hu.shape, np.uint8)
    labels[truth.hu == -850], labels[truth.hu == 500] = 10, 20
    pred = Volume(truth.hu + np.where(labels == 20, -100, 0), truth.affine)
    one = evaluate_volumes(pred, truth, labels)["labels"]
    assert (
        one[20]["bias_hu"] == pytest.approx(-100)
        and one[10]["mae_hu"] == 0
        and "dice" not in one[10]
    )
    both = evaluate_volumes(pred, truth, labels, np.where(labels == 20, 0, labels))["labels"]
    assert (
        both[10]["dice"] == 1
        and both[10]["hd95_mm"] == 0
        and both[20]["dice"] == 0
        and both[20]["detected"] == 0
        and math.isnan(both[20]["hd95_mm"])
    )
    with refused("labels"):
        evaluate_volumes(pred, truth, labels[1:])
    with refused("pred_labels"):
        evaluate_volumes(pred, truth, None, labels)


def test_held_out_views_are_far_from_the_input_views():
    for azimuths in ([0, 90], [3, 88, 140], [0], [10, 55, 100, 145]):
        geometry = ConeBeam.orbit(
            azimuths,
            grid=Grid.cube(16),
            source_to_isocenter_mm=900.0,
            source_to_detector_mm=1300.0,
            detector_shape=(20, 30),
            pixel_mm=7.0,
        )
        views = held_out_views(geometry, 2)
        distance = [
            (abs(a - float(b) + 90) % 180 - 90) for a in azimuths for b in views.azimuth_deg
        ]
        assert min(map(abs, distance)) > 10 and views.detector_shape == (20, 30)
        assert torch.allclose(
            views.source_mm.norm(dim=-1), torch.tensor(900.0, dtype=torch.float64)
        ) and torch.allclose(views.source_to_detector_mm, torch.tensor(1300.0, dtype=torch.float64))
