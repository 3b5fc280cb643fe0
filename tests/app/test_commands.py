"""The functions behind `ct-nb`: what they return and write."""

import json

import numpy as np
import pytest
from refusals import refused

from ct_nb.app.commands import (
    DRR_VOXEL_MM,
    embed_files,
    evaluate_files,
    register_files,
    simulate_drrs,
)
from ct_nb.data.linearize import read_radiographs
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry_io import load_geometry, save_geometry
from ct_nb.physics.pose_errors import rotate, translate
from ct_nb.physics.projector import project
from ct_nb.physics.registration import target_registration_error
from ct_nb.physics.volume import Grid, Volume, hu_to_mu

SMALL = {"detector_size": 16, "pixel_mm": 32.0}


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    Volume(phantom(3, 32).volume.hu, Grid.cube(32, center_mm=(12, -30, 250)).affine).save(path)
    return path


def test_drrs_are_line_integrals_of_the_cube_that_the_geometry_names(ct, tmp_path):
    paths, notes = simulate_drrs(ct, tmp_path, (0.0, 45.0, 90.0), energy_kev=80.0, **SMALL)
    assert [path.name for path in paths] == ["xray_0.png", "xray_1.png", "xray_2.png"]
    assert len(notes) == len(set(notes))
    geometry = load_geometry(tmp_path / "geometry.json")
    cube = Volume(phantom(3, 32).volume.hu, Grid.cube(32, center_mm=(12, -30, 250)).affine)
    cube = cube.to_grid(round(320 / DRR_VOXEL_MM))
    assert geometry.grid == cube.grid and geometry.views == 3
    expected = project(hu_to_mu(cube.tensor(), 80.0), geometry)
    xrays = read_radiographs(tmp_path / "xrays.npz", geometry)
    assert np.abs(xrays - expected).max() < 1e-3


def test_one_elevation_for_all_views_or_one_for_each(ct, tmp_path):
    simulate_drrs(ct, tmp_path, (0.0, 90.0), (10.0, -10.0), **SMALL)
    geometry = load_geometry(tmp_path / "geometry.json")
    rays = geometry.detector_center_mm - geometry.source_mm
    assert rays[0, 2] > 0 > rays[1, 2], "a positive elevation points to the head"
    with refused("elevation"):
        simulate_drrs(ct, tmp_path, (0.0, 90.0, 180.0), (10.0, -10.0), **SMALL)
    for cube_mm in (0.0, -320.0, float("nan"), float("inf")):
        with refused("cube_mm"):
            simulate_drrs(ct, tmp_path, cube_mm=cube_mm, **SMALL)


def test_evaluation_by_label_and_undefined_metrics_as_null(ct, tmp_path):
    truth = phantom(3, 32).volume.hu
    affine = Grid.cube(32, center_mm=(12, -30, 250)).affine
    labels = (truth > 200).astype(float)
    Volume(truth + 20 * labels, affine).save(tmp_path / "prediction.nii.gz")
    Volume(labels, affine).save(tmp_path / "labels.nii.gz")
    maps = (tmp_path / "labels.nii.gz", tmp_path / "labels.nii.gz")
    scores = evaluate_files(tmp_path / "prediction.nii.gz", ct, *maps, tmp_path / "scores.json")
    row = scores["labels"][1]
    assert row["voxels"] == labels.sum() and row["dice"] == 1 and row["hd95_mm"] == 0
    assert row["mae_hu"] == pytest.approx(20, abs=0.1) == row["bias_hu"]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["labels"]["1"]["mae_hu"] == row["mae_hu"]
    undefined = [name for name, value in scores["metrics"].items() if not np.isfinite(value)]
    assert undefined and all(content["metrics"][name] is None for name in undefined)
    assert content["metrics"]["mae_hu"] == scores["metrics"]["mae_hu"]


def test_labels_of_the_prediction_alone_are_refused(ct):
    with refused():
        evaluate_files(ct, ct, None, ct)


def test_the_name_of_an_index_is_checked_before_the_weights_are_read(tmp_path):
    with refused(file="index.csv"):
        embed_files([tmp_path], tmp_path / "no_run", tmp_path / "index.csv")


def test_a_moved_geometry_is_registered_back(ct, tmp_path):
    simulate_drrs(ct, tmp_path, detector_size=64, pixel_mm=8.0)
    geometry = load_geometry(tmp_path / "geometry.json")
    moved = translate(rotate(geometry, (0.0, 2.0, 3.0)), (9.0, -6.0, 5.0))
    save_geometry(moved, tmp_path / "moved.json")
    files = (ct, tmp_path / "xrays.npz", tmp_path / "moved.json", tmp_path / "posed.json")
    found, _ = register_files(*files, size=32, starts=32)
    corners = geometry.grid.index_to_mm([[64, 64, 64], [192, 192, 192]])
    posed = load_geometry(tmp_path / "posed.json")
    assert found.accepted, found.doubts
    assert target_registration_error(moved, geometry, corners).min() > 10
    assert target_registration_error(posed, geometry, corners).max() < 2
    assert posed.grid == geometry.grid and posed.detector_shape == geometry.detector_shape
