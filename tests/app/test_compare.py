"""`reconstruct_all`: what a run folder must hold, and what the cache may return."""

import json

import numpy as np
import pytest
from refusals import refused

from ct_nb.app import compare
from ct_nb.app.compare import reconstruct_all, run_baselines, run_cascade, simulate_xray_pair
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry_io import geometry_to_json
from ct_nb.physics.volume import Grid, Volume
from ct_nb.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE

SMALL = {"size": 16, "render_size": 32, "detector_shape": (32, 32)}


@pytest.fixture
def comparison():
    return simulate_xray_pair(phantom(3, 32).volume, **SMALL)


def untrained(folder, name, network):
    "A run folder that looks trained: its files are there."
    (folder / name).mkdir(parents=True)
    config = {"system": name, "network": network}
    (folder / name / CONFIG_FILE).write_text(json.dumps(config))
    (folder / name / WEIGHTS_FILE).write_bytes(b"weights")
    return folder / name


def test_the_xrays_are_those_of_the_scan_in_its_own_frame(comparison):
    assert comparison.xrays.shape == (2, 32, 32) and comparison.xrays.max() > 1
    assert comparison.truth.grid.shape == (16, 16, 16) and comparison.volumes == {}
    affine = Grid.cube(32, center_mm=(30, -20, 400)).affine
    other = simulate_xray_pair(Volume(phantom(3, 32).volume.hu, affine), **SMALL)
    shift = other.truth.grid.center_mm - comparison.truth.grid.center_mm
    assert np.allclose(shift, (30, -20, 400), atol=1e-3)
    assert np.allclose(other.xrays, comparison.xrays, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError):
        simulate_xray_pair(Volume(np.full((8, 8, 8), -1000.0), Grid.cube(8).affine))


def test_the_cache_folder_follows_weights_xrays_and_geometry(comparison, tmp_path):
    run = untrained(tmp_path, "cascade", {})
    folder = compare.cache_folder(run, comparison)
    assert folder.parent == run / "explored" and folder == compare.cache_folder(run, comparison)
    assert compare.cache_folder(run, comparison, "coarse weights") != folder
    other = simulate_xray_pair(phantom(9, 32).volume, **SMALL)
    assert geometry_to_json(other.geometry) != geometry_to_json(comparison.geometry)
    assert compare.cache_folder(run, other) != folder
    (run / WEIGHTS_FILE).write_bytes(b"other weights")
    assert compare.cache_folder(run, comparison) != folder


def test_cached_samples_are_shown_on_the_grid_of_the_truth(comparison, tmp_path):
    run = untrained(tmp_path, "cascade", {})
    grid = Grid.cube(8, center_mm=comparison.truth.grid.center_mm)
    for number in range(2):
        hu = np.full(grid.shape, 100.0 * number)
        path = compare.cache_folder(run, comparison) / f"sample_{number:03d}.nii.gz"
        Volume(hu, grid.affine).save(path)
    run_cascade(comparison, tmp_path, samples=2)  # enough are cached: the weights stay unread
    assert [sample.grid for sample in comparison.samples] == [comparison.truth.grid] * 2
    assert [round(float(sample.hu[8, 8, 8])) for sample in comparison.samples] == [0, 100]
    assert comparison.missing == []


@pytest.mark.parametrize("samples", [-1, 1.5, True])
def test_a_number_of_samples_that_is_none(comparison, samples, tmp_path):
    with refused("samples"):
        run_cascade(comparison, tmp_path, samples)


def test_baselines_see_at_most_128_pixels(comparison, monkeypatch):
    shapes = []

    def predict(self, xrays, geometry):
        shapes.append((tuple(xrays.shape), geometry.detector_shape))
        return xrays.new_zeros(geometry.grid.shape)

    monkeypatch.setattr(compare.MinimumNorm, "predict", predict)
    monkeypatch.setattr(compare.SIRT, "predict", predict)
    wide = simulate_xray_pair(
        phantom(3, 32).volume, size=16, render_size=32, detector_shape=(160, 64)
    )
    run_baselines(wide)
    assert shapes == [((2, 128, 64), (128, 64))] * 2
    assert list(wide.volumes) == ["minimum norm", "SIRT"]


def test_a_run_that_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path):
    "Weights of another version, or a folder of another system, in the place of a trained run."
    for name in ("drr2ct", "cascade"):
        untrained(tmp_path, name, {"from_tomorrow": 1})
    comparison = reconstruct_all(phantom(3, 32).volume, tmp_path, samples=1)
    assert list(comparison.volumes) == ["minimum norm", "SIRT"] and not comparison.samples
    refusals = [sentence for sentence in comparison.missing if "cannot be used" in sentence]
    assert len(refusals) == 2 and "make demo" in refusals[0] and "train_cascade" in refusals[1]
    assert refusals[0].startswith(str(tmp_path / "drr2ct"))
