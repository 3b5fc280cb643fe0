"""Which voxels of a comparison count: what both sides cover and a scanner measured."""

import math

import numpy as np
import pytest
import torch
from places import REAL_CT
from refusals import refused

from ct_nb.app.commands import evaluate_files
from ct_nb.data.folders import read_folder
from ct_nb.data.xray_pairs import XrayPairs
from ct_nb.evaluation.case_metrics import evaluate_volumes
from ct_nb.evaluation.scoreboard import evaluate
from ct_nb.physics.volume import Grid, Volume

PERFECT = {
    "psnr": math.inf,
    "ssim": 1,
    "mae_hu": 0,
    "mae_hu_body": 0,
    "mae_hu_outside": 0,
    "bias_hu": 0,
    "dice_body": 1,
    "dice_lung": 1,
    "hd95_mm_body": 0,
    "hd95_mm_lung": 0,
}


def chest(grid: Grid) -> np.ndarray:
    "HU of a made-up chest on any grid: a body, two unequal lungs, a spine, with soft edges."
    x, y, z = np.moveaxis(grid.centers_mm(torch.float64).numpy(), -1, 0)

    def inside(cx, cy, cz, rx, ry, rz):
        radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2)
        return 0.5 * (1 - np.tanh((radius - 1) * min(rx, ry) / 6))

    hu = -1000 + 1040 * inside(0, 0, 0, 140, 95, 1e9) + 660 * inside(0, 65, 0, 16, 16, 1e9)
    lungs = inside(65, -5, 0, 45, 60, 90) + inside(-65, -5, 5, 50, 65, 100)
    return np.round(hu - 890 * lungs)


def grid_of(shape, columns, center=(0.0, 0.0, 0.0)) -> Grid:
    "A grid of (D, H, W) voxels with these index axes (3, 3) in mm, about `center`."
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = np.asarray(center) - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Grid(shape, affine)


def scan(grid: Grid) -> Volume:
    return Volume(chest(grid), grid.affine)


def turned(degrees: float) -> np.ndarray:
    c = np.cos(np.radians(degrees))
    s = np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def sheared(degrees: float) -> np.ndarray:
    "Slices upright, each further to the back than the last: a gantry tilt as DICOM stores it."
    columns = np.eye(3)
    columns[1, 2] = np.tan(np.radians(degrees))
    return columns


TRUTH = grid_of((40, 64, 80), np.diag([4.0, 4, 4]))


@pytest.mark.parametrize(
    "truth, prediction",
    [
        (TRUTH, grid_of((35, 50, 50), 4 * turned(30))),
        (grid_of((40, 64, 80), 4 * sheared(25)), grid_of((24, 40, 50), np.diag([4.0, 4, 4]))),
        (TRUTH, grid_of((24, 40, 50), 4 * sheared(25))),
        (TRUTH, grid_of((40, 64, 80), np.diag([4.0, 4, 4]), (60, -40, 30))),
    ],
    ids=["turned", "sheared truth", "sheared prediction", "larger on one side"],
)
def test_a_perfect_prediction_on_another_grid_has_the_error_of_resampling(truth, prediction):
    scores = evaluate_volumes(scan(prediction), scan(truth))
    metrics = scores["metrics"]
    assert metrics["psnr"] > 35 and metrics["mae_hu"] < 10 and abs(metrics["bias_hu"]) < 1
    assert metrics["ssim"] > 0.98 and metrics["dice_body"] > 0.99 and metrics["dice_lung"] > 0.97
    assert metrics["hd95_mm_body"] <= 4
    assert 0.1 < scores["metrics"]["left_out"] < 0.9


@pytest.mark.parametrize("padding", [-3024, -2048, -2000, -1024])
@pytest.mark.parametrize("as_padding", [True, False])
def test_padding_counts_for_nobody(tmp_path, padding, as_padding):
    "The truth's corners are padded; the prediction has the same padding, or air and a couch."
    hu = chest(TRUTH)
    x, y, _ = np.moveaxis(TRUTH.centers_mm().numpy(), -1, 0)
    outside = np.hypot(x, y) > 120
    Volume(np.where(outside, padding, hu), TRUTH.affine).save(tmp_path / "truth.nii.gz")
    elsewhere = np.where(outside, padding if as_padding else 40, hu)
    Volume(elsewhere, TRUTH.affine).save(tmp_path / "prediction.nii.gz")
    scores = evaluate_files(tmp_path / "prediction.nii.gz", tmp_path / "truth.nii.gz")
    assert {name: scores["metrics"][name] for name in PERFECT} == PERFECT
    assert scores["metrics"]["left_out"] == pytest.approx(outside.mean(), abs=0.01)


@pytest.mark.parametrize("padding", [-3024, -1024])
def test_padding_of_the_prediction_counts_for_nobody(padding):
    hu = chest(TRUTH)
    x, y, _ = np.moveaxis(TRUTH.centers_mm().numpy(), -1, 0)
    padded = Volume(np.where(np.hypot(x, y) > 120, padding, hu), TRUTH.affine)
    metrics = evaluate_volumes(padded, Volume(hu, TRUTH.affine))["metrics"]
    assert {name: metrics[name] for name in PERFECT} == PERFECT


def test_air_of_the_prediction_is_no_padding():
    "A prediction cannot leave the body out by calling it unscanned."
    missing = np.where(chest(TRUTH) > -1000, -1024, -1000.0)
    missing[:, 20:40, 30:50] = 0
    metrics = evaluate_volumes(Volume(missing, TRUTH.affine), scan(TRUTH))["metrics"]
    assert metrics["left_out"] == 0 and metrics["mae_hu_body"] > 500


class Ideal:
    "Knows the patient, also where nobody scanned."

    name = "model"

    def __init__(self, whole: Volume, affine):
        self.whole = whole.resample_onto(Grid((32, 32, 32), affine)).hu

    def predict(self, xrays, geometry):
        return torch.from_numpy(self.whole)


@pytest.mark.parametrize("fault", ["short", "field of view", "blank slices"])
def test_what_was_not_scanned_counts_for_nobody_on_the_scoreboard(tmp_path, fault):
    whole = scan(grid_of((100, 100, 100), np.diag([4.0, 4, 4])))
    x, y, z = np.moveaxis(whole.grid.centers_mm().numpy(), -1, 0)
    measured = {
        "short": np.abs(z) < 82,
        "field of view": np.hypot(x, y) < 120,
        "blank slices": np.abs(z) < 82,
    }[fault]
    hu = np.where(measured, whole.hu, -1024)
    keep = np.flatnonzero(measured.any(axis=(1, 2))) if fault == "short" else np.arange(100)
    affine = whole.affine.copy()
    affine[2, 3] += 4 * keep[0]
    Volume(hu[keep], affine).save(tmp_path / "a.nii.gz")
    pairs = XrayPairs(read_folder(tmp_path, 32), 32)
    board = evaluate([Ideal(whole, pairs[0]["affine"].numpy())], pairs, progress=False)
    assert board.rows[0]["psnr"] > 50 and board.rows[0]["mae_hu"] < 1
    assert board.rows[0]["dice_body"] > 0.999
    assert board.rows[0]["left_out"] > 0.2


@pytest.mark.parametrize("name", [path.name for path in sorted(REAL_CT.glob("*.nii.gz"))] or [""])
def test_a_real_scan_against_itself_is_perfect(real_ct, tmp_path, name):
    "At every fifth voxel or so, so that it takes no time."
    import nibabel

    image = nibabel.load(real_ct / name)
    step = [max(1, n // 40) for n in image.shape]
    hu = np.asarray(image.dataobj)[:: step[0], :: step[1], :: step[2]]
    affine = image.affine @ np.diag([*map(float, step), 1])
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "scan.nii.gz")
    metrics = evaluate_files(tmp_path / "scan.nii.gz", tmp_path / "scan.nii.gz")["metrics"]
    for metric, value in PERFECT.items():
        assert metrics[metric] == value or math.isnan(metrics[metric]), metric


def test_nothing_in_common_and_nan_are_refused():
    far = grid_of((20, 20, 20), np.diag([4.0, 4, 4]), (900, 0, 0))
    with refused("pred"):
        evaluate_volumes(scan(far), scan(TRUTH))
    hole = scan(TRUTH)
    hole.hu[5, 5, 5] = np.nan
    with refused("pred"):
        evaluate_volumes(hole, scan(TRUTH))
