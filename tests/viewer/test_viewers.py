"""Explorers without a browser: presses, hovers and sliders, numbers at places, static figures."""

import base64
import io
import time
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figure_marks import marks_faults
from places import FULL, ROOT
from refusals import refused

from ct_nb.app.reconstruction_explorer import ReconstructionExplorer, XrayComparison
from ct_nb.physics.epipolar import epipolar_lines
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid, Volume
from ct_nb.viewer import canvas as explore
from ct_nb.viewer.canvas import (
    ImageCanvas,
    apply_colormap,
    display_widget,
    draw_canvas,
    is_interactive,
    line_mark,
    overlay,
    to_uint8,
)
from ct_nb.viewer.ct_viewer import VolumeViewer
from ct_nb.viewer.geometry_figure import corners_mm, surface_mesh
from ct_nb.viewer.scene3d import Camera, SurfacePoints, fit_camera, render_scene
from ct_nb.viewer.figures import to_patient_axes
from ct_nb.viewer.slice_canvas import SliceCanvas, value_at
from ct_nb.viewer.xray_viewer import DETECTOR, XrayExplorer, clipped_line, ray_inside

PLANES = ("axial", "coronal", "sagittal")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def uneven():
    """A volume of different counts and spacings along every axis, each voxel with a number of its
    own.
    """
    affine = np.diag([2.0, 3.0, 5.0, 1.0])
    affine[:3, 3] = -40, 10, 100
    return Volume(
        np.random.default_rng(0).permutation(6 * 7 * 8).reshape(6, 7, 8).astype(float) * 5 - 900,
        affine,
    )


@pytest.fixture(scope="module")
def chest():
    from ct_nb.phantom.chest import phantom

    return phantom(3, 32)


@pytest.fixture(scope="module")
def studio(chest):
    return XrayExplorer(chest.volume, size=32)


def digest(picture):
    return picture.frame["digest"]


# The picture


def test_a_picture_sends_its_pixels_as_they_are():
    picture, heard = ImageCanvas(), []
    picture.observe(lambda change: heard.append(change["new"]["digest"]), "frame")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture.draw(image), picture.draw(image.copy()), picture.draw(image[..., 0])
    assert (
        len(heard) == 2 and heard[0] != heard[1]
    ), "the same pixels are not sent twice, others are"
    assert picture.frame["pixels"] == image[..., 0].tobytes() and np.array_equal(
        picture.pixels, image[..., 0]
    )


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)],
    ids=["float", "four channels", "a row"],
)
def test_a_picture_refuses_what_is_none(wrong):
    with refused("pixels"):
        ImageCanvas().draw(wrong)


def test_grey_and_colours():
    assert to_uint8(np.array([-2000.0, -200, 0, 200, 5000]), "soft_tissue").tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]
    assert to_uint8(np.array([0.0, 1, 2]), (0.0, 2.0)).tolist() == [0, 128, 255]
    low, middle, high = apply_colormap(np.array([-9.0, 0.0, 9.0]), -1.0, 1.0).astype(int)
    assert (
        low[2] > low[0] and high[0] > high[2] and middle.sum() < 60
    ), "blue below, red above, dark where there is no error"
    pixels = np.full((2, 2), 100, np.uint8)
    labels = np.array([[0, 1], [2, 0]])
    half = overlay(pixels, labels, 0.5)
    assert (half[labels == 0] == 100).all() and len({tuple(c) for c in half[labels > 0]}) == 2


def test_the_script_is_a_module_that_needs_no_network():
    assert (
        "export default" in explore.CANVAS_JS
        and "import " not in explore.CANVAS_JS
        and "http" not in explore.CANVAS_JS + explore.CANVAS_CSS
    )


def test_marks_reach_the_page_that_stands_still():
    picture = ImageCanvas(
        pixel_mm=[1.0, 2.0], scale_bar_mm=10.0, letters=["R", "L", "A", "P"], title="title"
    )
    picture.draw(np.zeros((10, 20), np.uint8))
    picture.marks = [
        line_mark([(0, 0), (20, 10)], "#ff0000"),
        explore.dot_mark((3, 4), "#00ff00"),
        explore.text_mark((5, 5), "here", "#0000ff"),
    ]
    axis = plt.subplots()[1]
    draw_canvas(axis, picture)
    assert {"R", "L", "A", "P", "10 mm", "here"} <= {
        t.get_text() for t in axis.texts
    } and axis.get_title() == "title"
    assert any(
        np.allclose(l.get_xydata(), [(0, 0), (20, 20)]) for l in axis.lines
    ), "in mm, where pixels are twice as high as wide"


# Slices


@pytest.mark.parametrize("kind", PLANES)
def test_a_pixel_shows_the_voxel_that_its_place_names(uneven, kind):
    picture = SliceCanvas(uneven.grid, uneven.hu, kind, index=3)
    rows = picture.frame["rows"]
    columns = picture.frame["columns"]
    for row in range(rows):
        for column in range(columns):
            here = picture.to_mm(column + 0.5, row + 0.5)
            assert picture.pixels[row, column] == to_uint8(value_at(uneven.grid, uneven.hu, here))
            assert np.allclose(picture.to_pixel(here), (column + 0.5, row + 0.5)) and here[
                picture.normal
            ] == pytest.approx(picture.at_mm)
    spacing = dict(zip("xyz", uneven.grid.spacing_mm))
    assert (
        picture.pixel_mm
        == {
            "axial": [spacing["x"], spacing["y"]],
            "coronal": [spacing["x"], spacing["z"]],
            "sagittal": [spacing["y"], spacing["z"]],
        }[kind]
    )


def test_a_forgotten_flip_would_be_seen(uneven, monkeypatch):
    monkeypatch.setattr(
        SliceCanvas,
        "redraw",
        lambda self: self.draw(to_uint8(self.arrays[0].take(self.index, axis=2 - self.normal))),
    )
    with pytest.raises(AssertionError):
        test_a_pixel_shows_the_voxel_that_its_place_names(uneven, "coronal")


def test_letters_say_where_the_ends_are(uneven):
    """The left edge of an axial slice is the patient's right, its upper edge the front; of a
    coronal slice the upper edge is the head.
    """
    axial, coronal, sagittal = (SliceCanvas(uneven.grid, uneven.hu, kind) for kind in PLANES)
    assert (
        axial.letters == ["R", "L", "A", "P"]
        and axial.to_mm(0, 3)[0] < axial.to_mm(8, 3)[0]
        and axial.to_mm(3, 0)[1] < axial.to_mm(3, 7)[1]
    )
    assert (
        coronal.letters == ["R", "L", "H", "F"] and coronal.to_mm(3, 0)[2] > coronal.to_mm(3, 6)[2]
    )
    assert (
        sagittal.letters == ["A", "P", "H", "F"]
        and sagittal.to_mm(0, 3)[1] < sagittal.to_mm(7, 3)[1]
    )


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_upright_moves_no_number(axes, signs):
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign) in enumerate(zip(axes, signs)):
        affine[axis, column] = sign * (column + 1.5)
    affine[:3, 3] = 5, -3, 9
    volume = Volume(np.random.default_rng(1).normal(size=(4, 5, 6)), affine)
    labels = np.arange(120).reshape(4, 5, 6)
    straight, turned = to_patient_axes(volume, labels)
    assert np.allclose(straight.affine[:3, :3], np.diag(straight.grid.spacing_mm))
    for index in np.ndindex(4, 5, 6):
        point = volume.grid.index_to_mm(index[::-1])
        assert (
            value_at(straight.grid, straight.hu, point, None) == volume.hu[index]
            and value_at(straight.grid, turned, point, None) == labels[index]
        )


def test_upright_resamples_an_oblique_scan():
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = Volume(np.zeros((4, 20, 20)), turn @ np.diag([2.0, 2, 5, 1]))
    straight, labels = to_patient_axes(volume, np.ones((4, 20, 20), np.uint8))
    assert (
        straight.grid.shape == labels.shape
        and set(np.unique(labels)) == {0, 1}
        and straight.hu[labels == 0].mean() < -800
        and straight.hu[labels == 1].mean() > -100
    )


def test_slices_refuse_what_does_not_fit(uneven):
    with refused("plane"):
        SliceCanvas(uneven.grid, uneven.hu, "oblique")
    with refused("arrays"):
        SliceCanvas(uneven.grid, uneven.hu[1:])
    with refused("grid"):
        SliceCanvas(Grid((6, 7, 8), np.diag([-1.0, 1, 1, 1])), uneven.hu)
    with refused("labels"):
        to_patient_axes(uneven, np.zeros((2, 2, 2)))


# The CT viewer


def test_a_press_moves_the_other_planes(chest):
    viewer = VolumeViewer(chest.volume, chest.regions)
    before = {kind: digest(picture) for kind, picture in viewer.pictures.items()}
    viewer.pictures["coronal"].click = [4.5, 9.5, 1]
    assert (
        viewer.sliders["sagittal"].value == 4
        and viewer.sliders["axial"].value == 31 - 9
        and viewer.sliders["coronal"].value == 16
    )
    assert {
        kind for kind, picture in viewer.pictures.items() if digest(picture) != before[kind]
    } == {"axial", "sagittal"}
    assert np.allclose(viewer.at_mm, chest.volume.grid.index_to_mm([4, 16, 22]))


@pytest.mark.parametrize("kind", PLANES)
def test_the_number_under_the_pointer_is_the_volumes(chest, kind):
    names = {number: f"region {number}" for number in range(1, 21)}
    viewer = VolumeViewer(chest.volume, chest.regions, names)
    rng = np.random.default_rng(0)
    picture = viewer.pictures[kind]
    for u, v in rng.uniform(0, 32, (30, 2)):
        picture.hover = [u, v]
        index = tuple(
            np.floor(chest.volume.grid.mm_to_index(picture.to_mm(u, v)) + 0.5).astype(int)[::-1]
        )
        assert f"<b>{chest.volume.hu[index]:.0f} HU</b>" in viewer.readout.value
        assert (f"region {chest.regions[index]}" in viewer.readout.value) == (
            chest.regions[index] > 0
        )
    picture.hover = []
    assert "x {:.1f}, y {:.1f}, z {:.1f} mm".format(*viewer.at_mm) in viewer.readout.value


def test_window_mask_and_wheel_repaint(chest):
    viewer = VolumeViewer(chest.volume, chest.regions)
    seen = [digest(viewer.pictures["axial"])]
    viewer.window.value = dict(viewer.window.options)["lung"]
    seen.append(digest(viewer.pictures["axial"]))
    viewer.opacity.value = 0.0
    seen.append(digest(viewer.pictures["axial"]))
    viewer.pictures["axial"].wheel += 2
    seen.append(digest(viewer.pictures["axial"]))
    assert len(set(seen)) == 4 and viewer.sliders["axial"].value == 18
    viewer.pictures["axial"].wheel -= 100
    assert viewer.sliders["axial"].value == 0


def test_a_viewer_stands_still_too(chest):
    figure = VolumeViewer(chest.volume, chest.regions, {1: "left upper lobe"}).static()
    assert len(figure.axes) == 4 and "left upper lobe" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]
    with refused("window"):
        VolumeViewer(chest.volume, window="brain")


# The X-ray studio


def test_the_line_goes_through_the_image_of_the_point(studio):
    for point in np.random.default_rng(0).uniform(-80, 80, (20, 3)):
        seen = studio.geometry.project_points(torch.tensor(point))[0].numpy()
        for view in (0, 1):
            studio.pick(view, *seen[view])
            assert abs(studio.epipolar_line() @ [*seen[1 - view], 1]) < 1e-6
            wrong = epipolar_lines(
                studio.geometry, 1 - view, view, torch.tensor(seen[view])
            ).numpy()
            assert (
                abs(wrong @ [*seen[1 - view], 1]) > 1e-3
            ), "the line of the other direction would be another"


def test_the_drawn_line_is_that_line(studio):
    studio.pick(0, 40.0, 90.0)
    (dashed,), (solid,) = (
        [mark for mark in studio.pictures[1].marks if "line" in mark and bool(mark["dash"]) == dash]
        for dash in (True, False)
    )
    for u, v in (*dashed["line"], *solid["line"]):
        assert abs(studio.epipolar_line() @ [u, v, 1]) < 1e-2
    assert studio.pictures[0].marks[0]["dot"] == [40.0, 90.0]
    before = studio.pictures[1].marks
    studio.depth.value = 0.9
    assert (
        studio.pictures[1].marks[:2] == before[:2] and studio.pictures[1].marks[2] != before[2]
    ), "depth moves the point along the line"
    shadow = studio.geometry.project_points(torch.tensor(studio.point_mm))[0].numpy()
    assert np.allclose(shadow[0], [40, 90], atol=1e-6) and np.allclose(
        shadow[1], studio.pictures[1].marks[2]["dot"], atol=1e-2
    )


def test_a_tube_that_moves_changes_its_own_view(studio):
    before = [digest(p) for p in (*studio.pictures, studio.scene)]
    start = time.process_time()
    studio.controls[0]["source, mm"].value = 800.0
    assert time.process_time() - start < 5
    assert [a != digest(p) for a, p in zip(before, (*studio.pictures, studio.scene))] == [
        True,
        False,
        True,
    ]
    geometry = studio.geometry
    assert float(
        (geometry.source_mm[0] - torch.tensor(studio.volume.grid.center_mm.copy())).norm()
    ) == pytest.approx(800) and float(geometry.source_to_detector_mm[0]) == pytest.approx(1300)
    studio.controls[0]["source, mm"].value = 1000.0
    assert digest(studio.pictures[0]) == before[0]


def test_a_picture_of_a_view_is_the_projection(studio, chest):
    from ct_nb.physics.projector import project
    from ct_nb.physics.volume import hu_to_mu

    expected = project(
        hu_to_mu(chest.volume.to_grid(32).tensor()), studio.geometry.to(torch.float32)
    ).numpy()
    for view in range(2):
        assert (
            np.abs(studio.pictures[view].pixels - expected[view] / expected.max() * 255).max() < 1
        )


def test_tubes_at_one_place_have_no_line(chest):
    studio = XrayExplorer(chest.volume, azimuth_deg=(30.0, 30.0), size=16)
    studio.pick(0, 60, 60)
    assert (
        not studio.epipolar_line().any()
        and "no line" in studio.readout.value
        and not [m for m in studio.pictures[1].marks if m.get("dash")]
    )
    studio.pick(1, -5, 300)
    assert studio.picked == (1, 0.0, float(DETECTOR))


def test_a_drag_turns_the_scene_and_a_press_does_not(studio):
    azimuth = studio.camera.azimuth_deg
    before = digest(studio.scene)
    studio.scene.click = [100.0, 100.0, 1]
    assert studio.camera.azimuth_deg == azimuth and digest(studio.scene) == before
    studio.scene.click = [140.0, 100.0, 1]
    assert studio.pictures[0].letters == ["R", "L", "H", "F"] and studio.pictures[1].letters == [
        "P",
        "A",
        "H",
        "F",
    ]
    assert studio.camera.azimuth_deg == azimuth - 20 and digest(studio.scene) != before
    turned = digest(studio.scene)
    studio.scene.click = [300.0, 100.0, 2]
    assert digest(studio.scene) == turned, "another press is no drag"
    studio.scene.click = [140.0, 100.0, 2]
    assert len(studio.static().axes) == 3


def test_clipped_lines_end_at_the_border():
    rng = np.random.default_rng(0)
    for angle, offset in zip(rng.uniform(0, np.pi, 200), rng.uniform(-30, 30, 200)):
        a, b = np.cos(angle), np.sin(angle)
        ends = clipped_line((a, b, offset), 20, 10)
        u, v = np.meshgrid(np.linspace(0, 20, 401), np.linspace(0, 10, 201))
        distance = np.abs(a * u + b * v + offset).min()
        if ends is None:
            assert distance > 0 or np.isclose(distance, 0, atol=0.05)
        else:
            assert np.allclose(ends @ [a, b] + offset, 0, atol=1e-6)
            for u, v in ends:
                assert min(abs(u), abs(u - 20), abs(v), abs(v - 10)) < 1e-5
    assert ray_inside(
        np.array([0.0, 0, -50]), np.array([0.0, 0, 50]), np.array([[-1.0] * 3, [1.0] * 3])
    ) == pytest.approx(np.array([[0, 0, -1.0], [0, 0, 1]]))


def test_the_scene_is_drawn_where_it_is():
    grid = Grid.cube(16)
    geometry = ConeBeam.biplanar(grid=grid, detector_shape=(8, 8), pixel_mm=60)
    camera = fit_camera(Camera(20.0, 40.0), geometry)
    for points in (geometry.source_mm.numpy(), corners_mm(geometry)):
        pixels, _ = camera.project(points)
        assert (pixels >= 0).all() and (pixels <= camera.shape[::-1]).all()
    nothing = (np.zeros((0, 3)), np.zeros((0, 3)))
    xrays = np.zeros((2, 8, 8))
    xrays[0, 2, 6] = 1.0
    picture = render_scene(camera, SurfacePoints(nothing, nothing, 5.0), geometry, xrays, 1.0)
    point = (
        geometry.detector_center_mm + 2.5 * geometry.column_step_mm - 1.5 * geometry.row_step_mm
    )[0].numpy()
    white = np.argwhere((picture == 255).all(-1)).mean(0)[::-1] + 0.5
    # the one bright pixel is drawn where the geometry has it
    assert np.linalg.norm(white - camera.project(point)[0]) < 1.5


@pytest.mark.parametrize("radius", [5.0, 9.5])
@pytest.mark.parametrize("step", [1, 2])
def test_the_surface_of_a_ball_has_its_area(radius, step):
    from skimage.measure import mesh_surface_area

    ball = radius - np.linalg.norm(
        np.indices((24, 25, 26)) - np.array([12, 12, 13.0])[:, None, None, None], axis=0
    )
    vertices, triangles = surface_mesh(ball, 0.0, step)
    area = 4 * np.pi * radius**2
    # chords of length `step` miss a share of the area that goes with its square
    tolerance = 0.4 * (step / radius) ** 2
    assert mesh_surface_area(vertices, triangles) == pytest.approx(area, rel=tolerance)
    assert len(vertices) - len(triangles) / 2 == 2, "closed, by Euler's formula"
    distance = np.linalg.norm(vertices - [12, 12, 13], axis=1)
    assert np.abs(distance - radius).max() < 0.1 * step


def test_a_surface_closes_at_the_border_and_may_be_empty():
    solid, triangles = surface_mesh(np.ones((4, 5, 6)), 0.0)
    assert len(solid) - len(triangles) / 2 == 2
    assert surface_mesh(np.zeros((4, 5, 6)), 1.0)[1].shape == (0, 3)


# Reconstructions


@pytest.fixture(scope="module")
def answered():
    rng, grid = np.random.default_rng(0), Grid.cube(12)
    truth = Volume(rng.uniform(-1000, 500, grid.shape), grid.affine)

    def other(scale):
        return Volume(truth.hu + rng.normal(0, scale, grid.shape), grid.affine)

    geometry = ConeBeam.biplanar(grid=grid, detector_shape=(16, 16), pixel_mm=32)
    from ct_nb.physics.projector import project
    from ct_nb.physics.volume import hu_to_mu

    return SimpleNamespace(
        truth=truth,
        volumes={"coarse": other(200), "refined": other(100)},
        samples=[other(80) for _ in range(6)],
        geometry=geometry,
        xrays=project(hu_to_mu(truth.tensor()), geometry.to(torch.float32)).numpy(),
    )


def explorer(a, **changes):
    return ReconstructionExplorer(
        **{
            "volumes": a.volumes,
            "truth": a.truth,
            "samples": a.samples,
            "xrays": a.xrays,
            "geometry": a.geometry,
            **changes,
        }
    )


def test_columns_hold_what_they_are_named_after(answered):
    found = explorer(answered)
    k = found.slider.value
    stack = np.stack([v.hu for v in answered.samples])
    assert np.array_equal(
        found.pictures["refined"].pixels, to_uint8(answered.volumes["refined"].hu[k])
    )
    assert np.array_equal(
        found.errors["refined"].pixels,
        apply_colormap(answered.volumes["refined"].hu[k] - answered.truth.hu[k], -600, 600),
    )
    assert np.allclose(found.volumes["mean of samples"], stack.mean(0), atol=1e-2) and np.allclose(
        found.spread, stack.std(0, ddof=1), rtol=1e-3
    )
    assert not np.allclose(found.spread, stack.std(0), rtol=1e-3)
    found.plane.value = "sagittal"
    assert np.array_equal(
        found.pictures["coarse"].pixels,
        to_uint8(answered.volumes["coarse"].hu[::-1, :, found.slider.value]),
    )


def test_one_slider_moves_all(answered):
    found = explorer(answered)
    before = [digest(p) for p in found._all]
    found.pictures["coarse"].wheel = 1
    assert found.slider.value == 7 and all(a != digest(p) for a, p in zip(before, found._all))
    found.pictures["CT"].click = [3.5, 4.5, 1]
    assert (
        all(len(p.marks) == 4 for p in found._all)
        and f"coarse <b>{answered.volumes['coarse'].hu[7, 4, 3]:.0f}</b>" in found.readout.value
    )
    found.plane.value = "coronal"
    assert found.slider.value == 4, "another plane goes through the point that was pressed"


def test_another_sample_changes_its_column_and_its_xrays(answered):
    found = explorer(answered)
    found.xrays.shown.value = "one sample"
    before = digest(found.pictures["one sample"])
    residuals = list(found.xrays.residuals)
    other = digest(found.pictures["coarse"])
    found.sample.value = 3
    assert (
        np.array_equal(
            found.pictures["one sample"].pixels,
            to_uint8(answered.samples[3].hu[found.slider.value]),
        )
        and digest(found.pictures["one sample"]) != before
    )
    assert found.xrays.residuals != residuals and digest(found.pictures["coarse"]) == other


def test_xrays_of_the_truth_are_the_measured_ones(answered):
    found = XrayComparison(
        {"truth": answered.truth.hu, "wrong": answered.truth.hu + 100},
        answered.truth.grid,
        answered.xrays,
        answered.geometry,
    )
    assert (
        max(found.residuals) < 1e-5 and found.pictures[0][2].pixels.max() < 30
    ), "no difference is dark"
    found.shown.value = "wrong"
    assert min(found.residuals) > 0.05 and "wrong" in found.pictures[0][1].title


@pytest.mark.parametrize("left_out", ["truth", "samples", "xrays", "volumes"])
def test_an_explorer_shows_what_there_is(answered, left_out):
    changes = {
        "truth": {"truth": None},
        "samples": {"samples": ()},
        "xrays": {"xrays": None, "geometry": None},
        "volumes": {"volumes": {}},
    }[left_out]
    found = explorer(answered, **changes)
    found.slider.value, found.plane.value = 2, "coronal"
    assert ("CT" in found.pictures) == (left_out != "truth") and bool(found.errors) == (
        left_out != "truth"
    )
    assert ("standard deviation" in found.pictures) == (left_out != "samples") and (
        found.xrays is None
    ) == (left_out == "xrays")
    assert found.static().axes


def test_an_explorer_refuses_what_does_not_fit(answered):
    elsewhere = Volume(answered.truth.hu, Grid.cube(12, center_mm=(1, 0, 0)).affine)
    with refused():
        explorer(answered, volumes={"coarse": elsewhere})
    with refused():
        explorer(answered, geometry=None)
    with refused():
        ReconstructionExplorer({}, answered.truth)
    with refused():
        ReconstructionExplorer({"CT": answered.truth})


# Pages that stand still


def test_figures_of_explorers_carry_the_marks_of_all_figures(chest, studio, answered):
    assert marks_faults(VolumeViewer(chest.volume, chest.regions).static()) == []
    assert marks_faults(studio.static(), besides=["patient, tubes, rays and detectors"]) == []
    for plane in PLANES:
        found = explorer(answered)
        found.plane.value = plane
        assert marks_faults(found.static()) == []


def test_nobody_sits_at_a_test(monkeypatch):
    import IPython

    assert not is_interactive()
    for kernel, somebody in (
        (SimpleNamespace(_allow_stdin=True), True),
        (SimpleNamespace(_allow_stdin=False), False),
    ):
        monkeypatch.setattr(
            IPython, "get_ipython", lambda kernel=kernel: SimpleNamespace(kernel=kernel)
        )
        assert is_interactive() == somebody
        still = SimpleNamespace(static=lambda: "figure")
        assert (
            display_widget(still) == (still if somebody else "figure")
            and display_widget(still, False) == "figure"
            and display_widget(still, True) is still
        )


def blank(png: str) -> bool:
    "Whether a picture (base64) is of one colour but for some marks."
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")).astype(int)
    return (np.abs(image - np.median(image)) > 20).mean() < 0.05


@FULL
def test_papermill_gets_figures_of_all_explorers(tmp_path, monkeypatch):
    """A run without anybody: each explorer leaves one picture with something in it, and no widget.

    All run in one kernel, which reads the libraries once.
    """
    import nbformat
    import papermill

    from ct_nb.phantom.chest import phantom

    # a kernel draws into its notebook only with its own backend
    monkeypatch.delenv("MPLBACKEND", raising=False)
    phantom(5, 32).volume.save(tmp_path / "ct.nii.gz")
    ct = repr(str(tmp_path / "ct.nii.gz"))
    nothing = repr(str(tmp_path))
    small = {
        "explore_ct": f"data = {ct}",
        "explore_xrays": f"data = {ct}; size = 32",
        "explore_registration": f"data = {ct}; size = 32",
        "explore_reconstruction": f"data = {ct}; runs = {nothing}",
        "explore_steps": f"size = 32; weights = {nothing}",
        "explore_slices": f"size = 48; weights = {nothing}",
    }
    folder = ROOT / "nbs"
    assert set(small) == {path.stem for path in folder.glob("explore_*.ipynb")}
    cells, ends = [], {}
    for name, settings in small.items():
        code = [
            cell
            for cell in nbformat.read(folder / f"{name}.ipynb", 4).cells
            if cell.cell_type == "code"
        ]
        assert code[0].metadata["tags"] == ["parameters"]
        cells += [code[0].source, settings, *(cell.source for cell in code[1:])]
        ends[name] = len(cells)
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]),
        tmp_path / "all.ipynb",
    )
    done = papermill.execute_notebook(
        str(tmp_path / "all.ipynb"),
        None,
        kernel_name="python3",
        progress_bar=False,
        cwd=str(tmp_path),
    )
    begin = 0
    for name, end in ends.items():
        shown = [
            output.get("data", {}) for cell in done.cells[begin:end] for output in cell.outputs
        ]
        images = [data["image/png"] for data in shown if "image/png" in data]
        assert len(images) == 1 and not blank(images[0]), f"{name}: {len(images)} pictures"
        assert not any("widget" in kind for data in shown for kind in data), name
        begin = end
    white = io.BytesIO()
    Image.fromarray(np.full((50, 50), 255, np.uint8)).save(white, "png")
    assert blank(base64.b64encode(white.getvalue()))


def test_names_from_files_are_text_on_the_page(uneven):
    "A script in an HTML widget runs with the rights of the notebook."
    script = "<img src=x onerror=alert(document.cookie)>"
    mask = np.ones(uneven.hu.shape, np.uint8)
    viewer = VolumeViewer(uneven, mask, {1: script})
    assert "&lt;img src=x" in viewer.readout.value and "<img" not in viewer.readout.value
    explorer = ReconstructionExplorer({script: uneven, "b": uneven})
    explorer._read_out(uneven.grid.center_mm)
    assert "&lt;img src=x" in explorer.readout.value and "<img" not in explorer.readout.value


def test_html_is_made_in_one_place():
    "Widgets of HTML come from `ct_nb.viewer.widgets`, which escapes what `markup` did not make."
    for path in (ROOT / "ct_nb").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        own = path.name == "widgets.py"
        assert own or "from ipywidgets" not in text, f"{path.name} takes a widget past the escaping"
        assert own or path.name == "_modidx.py" or "html.escape" not in text, path.name
