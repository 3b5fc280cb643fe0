"""Files and report of a reconstruction; from X-ray files, tests/drr2ct/test_predict.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
from refusals import refused

from ct_nb.app.reconstruct_files import (
    ENDINGS,
    SHOWN_VIEWS,
    reconstruction_figure,
    report,
    save_reconstruction,
)
from ct_nb.data.read import read_volume
from ct_nb.evaluation.inference import Reconstruction
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid, Volume


@pytest.fixture
def reconstruction():
    "Made-up numbers of two views, with two samples."
    grid = Grid.cube(8, center_mm=(10, -20, 300))
    generator = np.random.default_rng(0)

    def volume(mean, std):
        return Volume(generator.normal(mean, std, grid.shape).round(), grid.affine)

    xrays = generator.random((2, 12, 16))
    return Reconstruction(
        volume(0, 100),
        residual=[0.02, 0.2],
        reprojection=0.98 * xrays,
        xrays=xrays,
        geometry=ConeBeam.biplanar(grid=grid, detector_shape=(12, 16), pixel_mm=32.0),
        residual_consistent=[0.02, 0.2],
        residual_unconstrained=[0.3, 0.4],
        limit=0.1,
        contradictions=["view 1: beyond"],
        samples=[volume(0, 100), volume(0, 100)],
        spread=volume(50, 1),
        seed=4,
    )


def test_a_view_beyond_the_limit_contradicts(reconstruction):
    content = report(reconstruction, {"note": "mine"})
    rows = content["residual"]
    assert [row["contradicts"] for row in rows] == [False, True]
    assert [row["without_consistency"] for row in rows] == [0.3, 0.4]
    assert "reached_by_the_layer" not in rows[0] and content["note"] == "mine"
    found = content["contradiction"]
    assert found["found"] is True and found["limit"] == 0.1
    assert found["sentence"] == "view 1: beyond" and found["comparisons"] == {}
    assert content["samples"]["count"] == 2 and content["samples"]["seed"] == 4
    assert content["samples"]["mean_spread_hu"] == pytest.approx(50, abs=0.5)


def test_without_a_limit_nothing_is_judged(reconstruction):
    content = report(replace(reconstruction, limit=None, contradictions=None, samples=[]))
    assert [row["contradicts"] for row in content["residual"]] == [None, None]
    assert content["contradiction"]["found"] is None and content["samples"] is None
    content = report(replace(reconstruction, contradictions=[], limit=0.5))
    assert content["contradiction"]["found"] is False
    content = report(replace(reconstruction, contradictions=[], limit=None))
    assert "neither each other" in content["contradiction"]["sentence"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_file_is_named_after_the_ct(reconstruction, ending, tmp_path):
    paths = save_reconstruction(reconstruction, tmp_path / "new" / f"a.b{ending}")
    names = [f"a.b{part}{ending}" for part in ("", "_sample_1", "_sample_2", "_spread")]
    names += ["a.b_preview.png", "a.b_report.json"]
    assert [path.name for path in paths] == names and all(path.is_file() for path in paths)
    assert np.array_equal(read_volume(paths[0]).hu, reconstruction.volume.hu)
    assert json.loads(paths[-1].read_text())["files"] == names[:-1]


@pytest.mark.parametrize("name", ["ct.jpg", "ct", ".nii.gz", "ct.nii.gz.bak"])
def test_another_ending_is_refused_before_anything_is_written(reconstruction, name, tmp_path):
    with refused("out"):
        save_reconstruction(reconstruction, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_preview_says_what_contradicts_and_what_is_left_out(reconstruction):
    import matplotlib.pyplot as plt

    figure = reconstruction_figure(reconstruction, "lung")
    labels = [axis.get_xlabel() for axis in figure.findobj(plt.Axes)]
    assert "residual 0.020" in labels and "residual 0.200: contradicts" in labels
    plt.close(figure)
    views = SHOWN_VIEWS + 1
    geometry = ConeBeam.orbit(
        np.linspace(0, 90, views),
        grid=reconstruction.volume.grid,
        detector_shape=(12, 16),
        pixel_mm=32.0,
    )
    xrays = np.resize(reconstruction.xrays, (views, 12, 16))
    many = replace(
        reconstruction,
        xrays=xrays,
        reprojection=xrays,
        geometry=geometry,
        residual=[0.1] * views,
        limit=None,
        spread=None,
    )
    figure = reconstruction_figure(many)
    below = figure.subfigs[1]
    assert below.get_supxlabel() == "4 of 5 X-rays are shown"
    assert len(below.axes) == 3 * SHOWN_VIEWS + 2
    plt.close(figure)
