"""Figures: what they refuse and label; all of the library's return their figure, with marks."""

import ast
import importlib
import inspect
import json
import runpy
import textwrap
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figure_marks import marks_faults
from places import ROOT
from refusals import refused

from ct_nb.core.plot_style import BASELINE, MODEL, SERIES, TRUTH, plot_style
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid, Volume
from ct_nb.viewer.ct_viewer import VolumeViewer
from ct_nb.viewer.figures import (
    along_lps,
    comparison_figure,
    orientation_marks,
    plane,
    save_figure,
    scale_bar,
    slices_figure,
    training_figure,
    view_name,
    xray_ends,
    xrays_figure,
)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def cube(value=0.0, size=12):
    return Volume(np.full((size,) * 3, value), Grid.cube(size).affine)


def test_an_oblique_scan_is_drawn_in_the_patients_frame():
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grid = Grid((20, 40, 40), turn @ Grid((20, 40, 40), np.diag([2.0, 2, 4, 1])).affine)
    points = grid.centers_mm().numpy() - grid.center_mm
    ball_at_the_left = Volume(
        np.where(np.linalg.norm(points - [20, 0, 0], axis=-1) < 12, 100.0, -1000.0), grid.affine
    )
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
    assert [a.get_title().split(",")[0] for a in axes[:3]] == [
        "axial",
        "coronal",
        "sagittal",
    ] and axes[3].get_ylabel() == "b"


def test_xrays_share_one_scale_and_name_their_views():
    geometry = ConeBeam.orbit(
        [0, 90, 180, -90, 30], grid=Grid.cube(8), detector_shape=(10, 14), pixel_mm=3.0
    )
    assert [view_name(geometry, v).split(",")[0] for v in range(5)] == [
        "AP",
        "left lateral",
        "PA",
        "right lateral",
        "azimuth 30°",
    ]
    images = [
        a.get_images()[0]
        for a in xrays_figure(np.random.default_rng(0).random((5, 10, 14)), geometry).axes[:5]
    ]
    assert len({i.get_clim() for i in images}) == 1 and images[0].get_extent() == [-21, 21, 15, -15]
    with refused("xrays"):
        xrays_figure(np.zeros((2, 10, 14)), geometry)


def test_comparison_says_what_it_compares():
    geometry = ConeBeam.biplanar(grid=Grid.cube(12), detector_shape=(6, 6), pixel_mm=80.0)
    figure = comparison_figure(
        np.ones((2, 6, 6)), geometry, cube(), {"model": cube(204.8), "sirt": cube(20.48)}
    )
    labels = [a.get_ylabel() for a in figure.findobj(plt.Axes)]
    assert "model   20.0 dB" in labels and "sirt   40.0 dB" in labels and "model − CT" in labels
    with refused("predictions"):
        comparison_figure(np.ones((2, 6, 6)), geometry, cube(), {"model": cube(size=13)})
    with refused("xrays"):
        comparison_figure(np.ones((3, 6, 6)), geometry, cube(), {"model": cube()})
    with pytest.raises(ValueError, match="window"):
        slices_figure(cube(), "no such window")


def test_training_figure_takes_history_rows_or_file(tmp_path):
    rows = [
        {"step": 10, "loss": 1.0, "l1": 0.5, "gradient_norm": 2.0},
        {"step": 10, "psnr": 20.0},
        {"step": 20, "loss": 0.1, "l1": 0.05, "gradient_norm": 1.0},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for history in (rows, SimpleNamespace(rows=rows), tmp_path / "history.jsonl"):
        titles = [a.get_title(loc="left") for a in training_figure(history).axes]
        assert titles == ["loss", "its parts", "validation psnr", "gradient norm"]
    with refused("history"):
        training_figure([])


def test_saved_figures_are_whole_and_still_shown(tmp_path):
    figure = slices_figure(cube())
    assert save_figure(figure, tmp_path / "new" / "slices.png") is figure and plt.fignum_exists(
        figure.number
    )
    assert (tmp_path / "new" / "slices.png").read_bytes()[:4] == b"\x89PNG" and len(
        list((tmp_path / "new").iterdir())
    ) == 1


# ---------------------------------------------------------------- all figures of the library
def public_figures() -> dict[str, callable]:
    "Module (without ct_nb) and name → every public function `…_figure` that the library exports."
    known = runpy.run_path(str(ROOT / "ct_nb" / "_modidx.py"))["d"]["syms"]
    names = [
        (module, name.removeprefix(module + "."))
        for module, symbols in known.items()
        for name in symbols
        if name.endswith("_figure")
    ]
    return {
        f"{module.removeprefix('ct_nb.')}.{name}": getattr(importlib.import_module(module), name)
        for module, name in names
        if "." not in name and name[0] != "_" and name != "save_figure"
    }


def signature_faults(function) -> list[str]:
    """What a figure function must say of itself: something to draw, a docstring, and a figure in
    every return.
    """
    found = []
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    nested = {
        id(node)
        for inner in ast.walk(tree)
        if isinstance(inner, (ast.FunctionDef, ast.Lambda)) and inner is not tree
        for node in ast.walk(inner)
    }
    returns = [
        node for node in ast.walk(tree) if isinstance(node, ast.Return) and id(node) not in nested
    ]
    if not inspect.signature(function).parameters:
        found.append("it has nothing to draw")
    if "figure" not in (function.__doc__ or "").lower():
        found.append("its docstring does not say that it returns a figure")
    if not returns or any(node.value is None for node in returns):
        found.append("it does not return its figure")
    return found


@pytest.mark.parametrize("name", sorted(public_figures()))
def test_every_figure_returns_itself(name):
    assert signature_faults(public_figures()[name]) == []


def test_a_figure_that_shows_and_forgets_is_found():
    def shown_figure():
        plt.figure()

        def helper():
            return 1

    assert signature_faults(shown_figure) == [
        "it has nothing to draw",
        "its docstring does not say that it returns a figure",
        "it does not return its figure",
    ]


def thorax() -> Volume:
    from ct_nb.phantom.chest import phantom

    return phantom(3, 16).volume


def found_reconstruction():
    volume = thorax()
    geometry = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(12, 12), pixel_mm=40.0)
    images = np.random.default_rng(0).random((2, 12, 12))
    return SimpleNamespace(
        volume=volume,
        spread=Volume(np.abs(volume.hu) / 50, volume.affine),
        samples=[volume] * 2,
        window="chest",
        xrays=images,
        reprojection=images * 0.98,
        geometry=geometry,
        residual=[0.01, 0.02],
        residual_consistent=[0.01, 0.2],
        limit=0.1,
        spread_means="standard deviation over 2 samples; not calibrated",
        how="for a test",
    )


def uncertain():
    from ct_nb.evaluation.uncertainty import hallucination_map, summarize_samples

    volume = thorax()
    samples = volume.tensor() + 60 * torch.randn(
        (3, 16, 16, 16), generator=torch.Generator().manual_seed(0)
    )
    return (
        volume,
        summarize_samples(samples),
        samples[0],
        hallucination_map(
            samples, ConeBeam.biplanar(grid=volume.grid, detector_shape=(12, 12), pixel_mm=40.0)
        ),
    )


def levels():
    from ct_nb.evaluation.segmentation_metrics import body_mask
    from ct_nb.evaluation.uncertainty import reliability, summarize_samples, uncertainty_rows

    volume = thorax()
    draws = torch.randn((5, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    body = torch.from_numpy(body_mask(volume.hu, volume.grid))
    return reliability(
        [
            row
            for patient in range(3)
            for row in uncertainty_rows(
                summarize_samples(100 * draws[1:] + patient),
                100 * draws[0],
                body,
                f"c{patient}",
                f"p{patient}",
            )
        ]
    )


def recalls():
    from ct_nb.ct_encoder.retrieval import retrieval

    scans = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    return {"impression": retrieval(scans, scans + 0.5)}


def spectrum():
    return {
        "frequency_per_mm": [0.01, 0.05],
        "truth": [9.0, 3.0],
        "power": {"coarse": [8.0, 1.0], "refined": [9.0, 2.0]},
        "correlation": {"coarse": [0.9, 0.1], "refined": [0.95, 0.4]},
    }


def call(name: str, *arguments, **settings):
    return public_figures()[name](*arguments, **settings)


def scores():
    from ct_nb.evaluation.scoreboard import MAIN_METRICS, Scoreboard

    return Scoreboard(
        [
            {
                "case": f"c{number}",
                "patient": f"p{number}",
                "predictor": name,
                **{metric: float(number + place) for metric in MAIN_METRICS},
            }
            for number in range(3)
            for place, name in enumerate(("model", "air"))
        ]
    )


def conditions():
    from ct_nb.drr2ct.robustness import Robustness

    return Robustness(
        [
            {
                "case": f"c{number}",
                "group": "noise",
                "condition": f"{severity} photons",
                "severity": severity,
                "told": "true",
                "psnr": 30.0 - severity,
                "beyond_noise": 0.01 * severity,
                "contradiction": severity > 1,
            }
            for number in range(2)
            for severity in (1.0, 2.0)
        ],
        0.015,
    )


def seen_by(geometry: ConeBeam):
    return np.random.default_rng(0).random((geometry.views, *geometry.detector_shape))


def slab_item():
    from ct_nb.slices.open import open_stacks
    from ct_nb.slices.slice_profile import StackPairs, ThickSliceRange

    return StackPairs(
        open_stacks("phantom:1", size=24, side_mm=192.0), ThickSliceRange((24.0, 24.0))
    )[0]


SCAN = ConeBeam.orbit([0, 90, 200], grid=Grid.cube(16), detector_shape=(12, 14), pixel_mm=40.0)
EXAMPLES = {  # name → how to draw it, and whether it shows anatomy
    "viewer.figures.slices_figure": (lambda: slices_figure({"a": thorax(), "b": thorax()}), True),
    "viewer.figures.xrays_figure": (lambda: xrays_figure(seen_by(SCAN), SCAN), True),
    "viewer.figures.comparison_figure": (
        lambda: comparison_figure(
            seen_by(SCAN), SCAN, thorax(), {"model": thorax(), "floor": thorax()}
        ),
        True,
    ),
    "viewer.figures.training_figure": (
        lambda: training_figure([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]),
        False,
    ),
    "viewer.geometry_figure.geometry_figure": (
        lambda: call("viewer.geometry_figure.geometry_figure", SCAN, thorax()),
        True,
    ),
    "app.reconstruct_files.reconstruction_figure": (
        lambda: call("app.reconstruct_files.reconstruction_figure", found_reconstruction()),
        True,
    ),
    "cascade.figures.uncertainty_figure": (
        lambda: call("cascade.figures.uncertainty_figure", *uncertain()),
        True,
    ),
    "cascade.figures.reliability_figure": (
        lambda: call("cascade.figures.reliability_figure", levels()),
        False,
    ),
    "refine.figures.refinement_figure": (
        lambda: call("refine.figures.refinement_figure", thorax(), thorax(), thorax()),
        True,
    ),
    "refine.figures.spectrum_figure": (
        lambda: call("refine.figures.spectrum_figure", spectrum()),
        False,
    ),
    "ct_encoder.figures.attention_figure": (
        lambda: call(
            "ct_encoder.figures.attention_figure",
            thorax(),
            {"a place": torch.rand(64), "another": torch.rand(64)},
            (4, 4, 4),
        ),
        True,
    ),
    "ct_encoder.figures.recall_figure": (
        lambda: call("ct_encoder.figures.recall_figure", recalls()),
        False,
    ),
    "ct_encoder.figures.labels_figure": (
        lambda: call("ct_encoder.figures.labels_figure", {"scan": {"mass": 0.8}}),
        False,
    ),
    "slices.figures.slices_cut_figure": (
        lambda: call(
            "slices.figures.slices_cut_figure", item := slab_item(), {"linear": item["thin"]}
        ),
        True,
    ),
    "slices.figures.latent_figure": (
        lambda: call("slices.figures.latent_figure", thorax(), {"vae": thorax().tensor() + 20}),
        True,
    ),
    "drr2ct.robustness.robustness_figure": (
        lambda: call("drr2ct.robustness.robustness_figure", conditions()),
        False,
    ),
    "evaluation.scoreboard.scoreboard_figure": (
        lambda: call("evaluation.scoreboard.scoreboard_figure", scores()),
        False,
    ),
}


def test_every_figure_has_an_example():
    assert set(public_figures()) == set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_figures_are_figures_and_carry_the_same_marks(name, tmp_path):
    before = plt.rcParams.copy()
    draw, shows_anatomy = EXAMPLES[name]
    figure = draw()
    assert isinstance(figure, matplotlib.figure.Figure) and plt.rcParams == before
    assert (
        save_figure(figure, tmp_path / "a.png") is figure
        and (tmp_path / "a.png").stat().st_size > 3000
    )
    axes = [axis for axis in figure.findobj(plt.Axes) if axis.images and axis.name != "3d"]
    if shows_anatomy:
        assert marks_faults(figure) == []
    images = [
        axis.images[0]
        for axis in axes
        if axis.images[0].get_cmap().name == "gray" and axis.images[0].get_clim()[0] < 0
    ]
    assert {image.get_clim() for image in images} <= {(-1024, 1024)}, "one window"
    assert {image.get_cmap().name for axis in axes for image in axis.images} <= {
        "gray",
        "magma",
        "berlin",
    }, "maps that need no red against green"


def test_what_is_not_marked_is_found():
    def one_row(letters=("R", "L", "A", "P"), bar=50.0):
        figure, axis = plt.subplots()
        axis.imshow(np.zeros((4, 4)), extent=(0, 100, 0, 100))
        orientation_marks(axis, letters)
        axis.set_title("slice")
        if bar:
            scale_bar(axis, bar)
        return figure, axis

    assert marks_faults(one_row()[0]) == [] and marks_faults(one_row(bar=0)[0]) == [
        "a row without a scale bar"
    ]
    assert (
        marks_faults(one_row(("R", "", "A", "P"))[0]) == ["'slice': letters ['A', 'P', 'R']"]
        and len(marks_faults(one_row(("R", "P", "A", "H"))[0])) == 1
    )
    figure, axis = one_row()
    axis.lines[0].set_xdata([10, 20])
    assert marks_faults(figure) == ["'slice': a bar that is not 50 mm long"] and marks_faults(
        figure, ["slice"]
    ) == ["no anatomy"]


def test_marks_say_which_end_is_which():
    figure, axis = plt.subplots()
    axis.imshow(np.zeros((4, 4)))
    orientation_marks(axis, ("LA", "", "H", "F"))
    assert [text.get_text() for text in axis.texts] == ["LA", "H", "F"]
    for ends in ("oblique", ("R", "L")):
        with refused("ends"):
            orientation_marks(axis, ends)
    geometry = ConeBeam.orbit([0, 90, 180, 45, 30], grid=Grid.cube(8))
    assert [xray_ends(geometry, view)[:2] for view in range(5)] == [
        ("R", "L"),
        ("P", "A"),
        ("L", "R"),
        ("RP", "LA") if xray_ends(geometry, 3)[0][0] == "R" else ("PR", "AL"),
        ("RP", "LA"),
    ]
    assert all(xray_ends(geometry, view)[2:] == ("H", "F") for view in range(5))


def test_a_scale_bar_is_as_long_as_it_says_on_every_axis():
    for limits in ((-160, 160), (160, -160), (0, 900)):
        figure, axis = plt.subplots()
        axis.set(xlim=limits, ylim=(0, 300))
        scale_bar(axis, 100)
        assert (
            np.ptp(axis.lines[0].get_xdata()) == 100
            and axis.get_xlim() == limits
            and axis.texts[0].get_text() == "100 mm"
        )
        low, high = sorted(limits)
        assert low < axis.lines[0].get_xdata().min() and axis.lines[0].get_xdata().max() < high


def test_the_colours_are_one_set():
    assert SERIES[:3] == (BASELINE, MODEL, TRUTH) and len(set(SERIES)) == 6


def test_dollars_in_a_name_are_dollars():
    "Names of losses, stages and labels come from files; as mathtext `$^{$` stops the figure."
    name = "a$^{$ b"
    rows = [{"step": k, "loss": 10.0**-k, name: 1.0, "stage": f"{name}{k}"} for k in (1, 2, 3)]
    figure = training_figure(rows)
    figure.canvas.draw()
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert not any("$" in text for text in ticks) and "1e−02" in ticks
    ball = np.zeros((8, 8, 8), np.uint8)
    ball[2:6, 2:6, 2:6] = 1
    volume = Volume(ball * 40.0 - 1000, np.diag([4.0, 4, 4, 1]))
    labelled = VolumeViewer(volume, mask=ball, names={1: name}).static()
    labelled.canvas.draw()
    assert [text.get_text() for text in labelled.legends[0].get_texts()] == [name]
    with plot_style():
        plt.figure().suptitle(name).figure.canvas.draw()
