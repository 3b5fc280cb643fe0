"""Figures: what they refuse, what they label, and that a saved one is whole."""
import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid, Volume
from ct_nb.view.figures import along_lps, comparison_figure, plane, save_figure, slices_figure, training_figure, view_name, xrays_figure


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def cube(value=0.0, size=12): return Volume(np.full((size,) * 3, value), Grid.cube(size).affine)


def test_an_oblique_scan_is_drawn_in_the_patients_frame():
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grid = Grid((20, 40, 40), turn @ Grid((20, 40, 40), np.diag([2.0, 2, 4, 1])).affine)
    points = grid.centers_mm().numpy() - grid.center_mm
    ball_at_the_left = Volume(np.where(np.linalg.norm(points - [20, 0, 0], axis=-1) < 12, 100.0, -1000.0), grid.affine)
    straight = along_lps(ball_at_the_left)
    image, extent, _ = plane(straight, "axial")
    rows, columns = np.nonzero(image > -200)
    x = extent[0] + (columns.mean() + 0.5) * (extent[1] - extent[0]) / image.shape[1]
    assert x == pytest.approx(grid.center_mm[0] + 20, abs=1.5)
    assert np.allclose(straight.grid.spacing_mm, [2, 2, 4], rtol=0.05)


def test_planes_are_drawn_in_millimetres():
    flat = Volume(np.zeros((10, 50, 40)), np.diag([2.0, 2, 8, 1]))
    axes = slices_figure({"a": flat, "b": flat}, "soft_tissue").axes
    spans = [(abs(np.subtract(*a.get_xlim())), abs(np.subtract(*a.get_ylim()))) for a in axes[:3]]
    assert spans == [(80, 100), (80, 80), (100, 80)] and all(a.get_aspect() == 1 for a in axes[:6])
    assert [a.get_title().split(",")[0] for a in axes[:3]] == ["axial", "coronal", "sagittal"] and axes[3].get_ylabel() == "b"


def test_xrays_share_one_scale_and_name_their_views():
    geometry = ConeBeam.orbit([0, 90, 180, -90, 30], grid=Grid.cube(8), detector_shape=(10, 14), pixel_mm=3.0)
    assert [view_name(geometry, v).split(",")[0] for v in range(5)] == ["AP", "left lateral", "PA", "right lateral", "azimuth 30°"]
    images = [a.get_images()[0] for a in xrays_figure(np.random.default_rng(0).random((5, 10, 14)), geometry).axes[:5]]
    assert len({i.get_clim() for i in images}) == 1 and images[0].get_extent() == [-21, 21, 15, -15]
    with pytest.raises(ValueError, match=r"xrays: the geometry describes \(views, rows, columns\) = \(5, 10, 14\), got \(2, 10, 14\)"):
        xrays_figure(np.zeros((2, 10, 14)), geometry)


def test_comparison_says_what_it_compares():
    figure = comparison_figure(np.ones((2, 6, 6)), cube(), {"model": cube(204.8), "sirt": cube(20.48)})
    labels = [a.get_ylabel() for a in figure.findobj(plt.Axes)]
    assert "model   20.0 dB" in labels and "sirt   40.0 dB" in labels and "model − CT" in labels
    with pytest.raises(ValueError, match="'model' is on another grid"): comparison_figure(np.ones((2, 6, 6)), cube(), {"model": cube(size=13)})
    with pytest.raises(ValueError, match="window"): slices_figure(cube(), "no such window")


def test_training_figure_takes_history_rows_or_file(tmp_path):
    rows = [{"step": 10, "loss": 1.0, "l1": 0.5, "gradient_norm": 2.0}, {"step": 10, "psnr": 20.0}, {"step": 20, "loss": 0.1, "l1": 0.05, "gradient_norm": 1.0}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for history in (rows, SimpleNamespace(rows=rows), tmp_path / "history.jsonl"):
        titles = [a.get_title(loc="left") for a in training_figure(history).axes]
        assert titles == ["loss", "its parts", "validation psnr", "gradient norm"]
    with pytest.raises(ValueError, match="history: there is nothing in it yet"): training_figure([])


def test_saved_figures_are_whole_and_still_shown(tmp_path):
    figure = slices_figure(cube())
    assert save_figure(figure, tmp_path / "new" / "slices.png") is figure and plt.fignum_exists(figure.number)
    assert (tmp_path / "new" / "slices.png").read_bytes()[:4] == b"\x89PNG" and len(list((tmp_path / "new").iterdir())) == 1
