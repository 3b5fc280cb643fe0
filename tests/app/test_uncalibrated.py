"X-ray files without a geometry, to a CT with a page of what was assumed."

import json

import numpy as np
import pytest
import torch
from commands import ct_nb, refusal
from radiograph_files import save_dicom, save_png
from refusals import refused

from ct_nb.app.find_views import find_views
from ct_nb.atlas.uncalibrated import uncalibrated
from ct_nb.atlas.views import MUCH_WORSE, check_views, mirrored_ratio
from ct_nb.atlas.volumes import Atlas
from ct_nb.data.radiograph_io import write_radiographs
from ct_nb.data.read import read_volume
from ct_nb.phantom.chest import phantom
from ct_nb.physics.drr import render_drr
from ct_nb.physics.geometry_io import load_geometry
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.setups import SETUPS, setup_geometry

CHEST = SETUPS["chest"]
LOWER_MM = 15.0  # the lateral view, against the set-up


@pytest.fixture(scope="module")
def images():
    "Line integrals of a phantom that no atlas holds: PA of 128 × 112, lateral of 120 × 112 pixels."
    volume = phantom(20, 96).volume
    frontal = setup_geometry(CHEST, ["PA"], (128, 112), [[3.4, 3.4]], grid=volume.grid)
    lateral = setup_geometry(CHEST, ["LL"], (120, 112), [[3.4, 3.4]], grid=volume.grid)
    views = frontal, translate(lateral, (0.0, 0.0, -LOWER_MM))
    return [render_drr(volume.tensor(), view)[0] for view in views]


@pytest.fixture(scope="module")
def atlas():
    return Atlas.open("phantom:4", 32, cache_dir=None)


def intensities(image):
    "16-bit readings of the detector with their noise, bright in air."
    photons = np.random.default_rng(0).poisson(20_000 * torch.exp(-image).numpy())
    return (2.5 * photons).round().astype(np.uint16)


def test_two_pngs_become_a_ct(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_png(tmp_path / "a.png", intensities(images[1].flip(-1)))  # the lateral one, mirrored
    save_png(tmp_path / "b.png", intensities(images[0]))
    words = ("--pixel-mm", 3.4, "--atlas", "phantom:4", "--size", 32, "--out", "ct.nii.gz")
    text = ct_nb("reconstruct", "a.png", "b.png", *words).stdout
    assert "b.png: PA" in text and "a.png: left lateral" in text and "a.png: left" in text
    content = json.loads((tmp_path / "ct_report.json").read_text())
    geometry = content["geometry"]
    assert geometry["from"] == "the set-up chest"
    assert any("1800 mm from the detector" in line for line in geometry["assumed"])
    assert any("mirrored" in line and line.startswith("a.png") for line in geometry["found"])
    page = (tmp_path / "ct_geometry.md").read_text()
    assert all(f"- {line}" in page for line in (*geometry["assumed"], *geometry["found"]))
    views = load_geometry(tmp_path / "ct_geometry.json")
    rows = views.project_points(torch.zeros(1, 3))[0][1, 0, 1] - views.detector_shape[0] / 2
    higher_mm = -float(rows) * float(views.row_step_mm[1].norm())
    assert abs(higher_mm - LOWER_MM * 1800 / 1580) < 5
    volume = read_volume(tmp_path / "ct.nii.gz")
    body = volume.hu[16] > -300
    assert 0.1 < body.mean() < 0.8 and max(row["residual"] for row in content["residual"]) < 0.05
    assert "ct_geometry.md" in content["files"]


def test_eight_bit_logarithms_upside_down(images, tmp_path, atlas):
    "Negatives for the eye: bone is bright, 8 bits, the lateral one upside down."
    step = 8 / 255
    for name, image in (("pa", images[0]), ("lateral", images[1].flip(-1, -2))):
        save_png(tmp_path / f"{name}.png", np.round(image.numpy() / step).astype(np.uint8))
    notes = []
    found = find_views(
        [tmp_path / "pa.png", tmp_path / "lateral.png"],
        pixel_mm=3.4,
        atlas=("phantom:4", 32),
        notes=notes,
        kind="log_intensity",
        inverted=True,
        i0=0.0,
        scale=step,
    )
    assert any("lateral.png" in line and "upside down" in line for line in found.entry["found"])
    assert any("lateral.png: the middle" in line for line in found.entry["assumed"])
    expected = uncalibrated(images, CHEST, atlas, pixel_mm=3.4)
    assert (found.xrays - expected.xrays).abs().max() < step


def test_tags_say_pixels_distance_and_position(images, tmp_path):
    tags = dict(
        PhotometricInterpretation="MONOCHROME2",
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=1,
        ImagerPixelSpacing=[3.4, 3.4],
        DistanceSourceToDetector=1800.0,
    )
    files = [tmp_path / "1.dcm", tmp_path / "2.dcm"]
    for file, image, position in zip(files, images, ("PA", "LL")):
        save_dicom(file, intensities(image), ViewPosition=position, **tags)
    found = find_views(files, atlas=("phantom:4", 32), notes=[])
    assert any("1800 mm from the detector, by its tags" in line for line in found.entry["assumed"])
    assert all("by its tags" in line for line in found.entry["found"][:2])
    save_dicom(files[1], intensities(images[1]), ViewPosition="AP", **tags)
    with refused("geometry"):
        find_views(files, atlas=("phantom:4", 32), notes=[])


def test_a_pixel_size_is_asked_for_in_one_sentence(images, tmp_path):
    save_png(tmp_path / "a.png", intensities(images[0]))
    sentence = refusal("reconstruct", str(tmp_path / "a.png"))
    assert sentence.startswith("--pixel-mm: a.png does not say how large a pixel is")
    sentence = refusal("reconstruct", str(tmp_path / "a.png"), "--setup", "chest", "--pixel-mm", 0)
    assert sentence.startswith("--pixel-mm: must be above 0")


def test_three_images_need_a_geometry(images, atlas):
    with refused("geometry"):
        uncalibrated([*images, images[0]], CHEST, atlas, pixel_mm=3.4)


def test_a_folder_with_a_geometry_needs_no_other(images, tmp_path):
    views = setup_geometry(CHEST, ["PA"], (128, 112), [[3.4, 3.4]])
    write_radiographs(tmp_path, images[0][None], views)
    for given in (tmp_path, [tmp_path]):
        found = find_views(given, notes=[])
        assert found.page is None and torch.equal(found.geometry.source_mm, views.source_mm)


def test_a_geometry_that_does_not_fit_is_named(images, atlas):
    views = setup_geometry(CHEST, ["PA", "LL"], (96, 96), [[4.0, 4.0]] * 2)
    xrays = render_drr(phantom(20, 64).volume.tensor(), views)
    upside_down = torch.stack([xrays[0].flip(-1, -2), xrays[1]])
    for turned_only in (False, True):
        assert check_views(xrays, views, atlas, turned_only) == []
        (sentence,) = check_views(upside_down, views, atlas, turned_only)
        assert sentence.startswith("view 0 looks upside down")
    (sentence,) = check_views(xrays.flip(0), views, atlas)
    assert sentence.startswith("views 0 and 1 look as if they were exchanged")
    assert check_views(xrays.flip(0), views, atlas, turned_only=True) == []
    mirrored = torch.stack([xrays[0].flip(-1), xrays[1]])
    assert mirrored_ratio(atlas, mirrored, views) > MUCH_WORSE


def test_exchanged_views_are_named_where_the_geometry_is_moved(tmp_path):
    views = setup_geometry(CHEST, ["PA", "LL"], (96, 96), [[4.0, 4.0]] * 2)
    xrays = render_drr(phantom(20, 64).volume.tensor(), views)
    how = dict(geometry=views, setup="chest", atlas=("phantom:4", 32), notes=[])
    for name, images in (("right", xrays), ("exchanged", xrays.flip(0))):
        write_radiographs(tmp_path / name, images, views)
    right = find_views(tmp_path / "right", **how)
    assert right.entry["doubts"] == [] and right.entry["sure"]
    found = find_views(tmp_path / "exchanged", **how)
    (doubt,) = found.entry["doubts"]
    assert doubt.startswith("views 0 and 1 look as if they were exchanged")
    assert not found.entry["sure"] and doubt in found.page


@pytest.mark.parametrize("kind", [None, "grey"])
def test_eight_bits_without_a_geometry_are_no_greys(images, tmp_path, kind):
    "A curve is fitted only where the geometry is known, and a sentence says it."
    save_png(tmp_path / "pa.png", np.round(255 * torch.exp(-images[0]).numpy()).astype(np.uint8))
    how = dict(pixel_mm=3.4, atlas=("phantom:2", 32), notes=(notes := []), kind=kind)
    if kind == "grey":
        with refused("kind"):
            find_views(tmp_path / "pa.png", **how)
        return
    found = find_views(tmp_path / "pa.png", **how)
    assert not found.grey and any("only where the geometry is known" in note for note in notes)
