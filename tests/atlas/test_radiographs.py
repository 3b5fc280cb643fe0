"""Radiographs as they are: unknown curves, blades and letters, and X-rays that contradict."""

import json

import numpy as np
import pytest
import torch
from atlas_inputs import CUBE, QUICK
from commands import ct_nb
from PIL import Image
from refusals import refused

from ct_nb.app.reconstruct_files import reconstruct_files
from ct_nb.atlas.contradiction import contradictions
from ct_nb.atlas.fit import XrayTarget
from ct_nb.atlas.intensities import fit_greys, grey_target
from ct_nb.atlas.reconstruct import reconstruct
from ct_nb.data.exposed_area import find_exposed_area
from ct_nb.data.read import read_ct
from ct_nb.evaluation.metrics import psnr
from ct_nb.phantom.chest import phantom
from ct_nb.physics.drr import render_drr
from ct_nb.physics.exports import LOOKS, add_scatter, collimated, exported
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.geometry_io import save_geometry
from ct_nb.physics.solvers import data_consistency
from ct_nb.physics.projector import project
from ct_nb.physics.volume import hu_to_mu

FINE = ConeBeam.biplanar(grid=CUBE, detector_shape=(128, 128), pixel_mm=3.0)


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def xrays(patient):
    return render_drr(patient, FINE)


@pytest.mark.parametrize("look", LOOKS)
def test_a_fitted_curve_reads_grey_values_better_than_one_gain(atlas, xrays, look):
    start = grey_target(exported(add_scatter(xrays, 3.0), look, seed(0)), FINE, atlas)
    _, read = fit_greys(atlas, start, QUICK)
    body = xrays > 0.5
    errors = [float((t.xrays - xrays)[body].square().mean().sqrt()) for t in (start, read)]
    assert errors[1] < 0.7 * errors[0]


def test_exposure_contrast_and_sign_of_a_view_do_not_matter(atlas, xrays):
    greys = exported(xrays, "gamma", seed(0))
    other = torch.stack([300 - 0.5 * greys[0], 7 + 3 * greys[1]])
    one, same = (
        reconstruct(images, FINE, atlas, settings=QUICK, grey=True) for images in (greys, other)
    )
    assert psnr(one.volume.tensor(), same.volume.tensor()) > 45
    assert one.contradictions is None


def test_pixels_that_do_not_count_do_not_matter(atlas, xrays):
    counted = torch.ones(xrays.shape)
    counted[:, :16] = 0
    counted[0, 40:52, 60:72] = 0
    volumes = []
    for fill in (0.0, 9.0):
        images = torch.where(counted > 0, xrays, fill)
        found = reconstruct(images, FINE, atlas, settings=QUICK, counted=counted)
        assert max(found.residual) < 0.05
        volumes.append(found.volume.hu)
    assert np.abs(volumes[0] - volumes[1]).max() < 1e-2


def test_data_consistency_keeps_to_the_pixels_that_count(patient, xrays):
    counted = torch.ones(xrays.shape)
    counted[0, :64] = 0
    start = torch.full_like(patient, 0.003)
    moved = data_consistency(start, xrays, FINE, iterations=60, counted=counted)
    left = (project(moved, FINE) - xrays) * counted
    before = (project(start, FINE) - xrays) * counted
    assert left.norm() < 0.1 * before.norm()
    garbage = torch.where(counted > 0, xrays, 100.0)
    same = data_consistency(start, garbage, FINE, iterations=60, counted=counted)
    assert torch.allclose(moved, same, atol=1e-6)
    assert hu_to_mu(0.0) > float(start.max())


def test_what_shows_no_patient_is_refused(atlas, xrays):
    greys = exported(xrays, "gamma", seed(0))
    noise = torch.rand(greys.shape, generator=seed(1))
    for images in (noise, torch.full_like(greys, 80.0)):
        with refused("xrays"):
            grey_target(images, FINE, atlas)
    saturated = torch.where(greys > greys.quantile(0.01), 255.0, 0.0)
    with refused("xrays"):
        grey_target(saturated, FINE, atlas)
    with refused("xrays"):
        grey_target(greys, FINE, atlas, counted=torch.zeros(greys.shape))
    with refused("counted"):
        reconstruct(greys, FINE, atlas, grey=True, counted=torch.ones(2, 3, 3))


@pytest.mark.parametrize("fill", [0.0, 255.0])
@pytest.mark.parametrize("number", range(3))
def test_blades_and_letters_are_found(xrays, fill, number):
    images, seen = collimated(exported(xrays, "gamma", seed(number)), 3.0, seed(number), fill)
    for image, shown in zip(images, seen.numpy()):
        area = find_exposed_area(image, 3.0)
        assert (area.seen & ~shown).sum() < 0.1 * (~shown).sum()
        assert (~area.seen & shown).sum() < 0.15 * shown.sum()


def test_swapped_views_and_a_strangers_lateral_are_said(atlas, xrays):
    stranger = render_drr(phantom(47, 32).volume.tensor().float(), FINE)
    right = contradictions(atlas, XrayTarget(xrays, FINE))
    assert right.sentences == []
    swapped = contradictions(atlas, XrayTarget(xrays[[1, 0]], FINE), settings=QUICK)
    assert "swapped" in swapped.sentences[0]
    mixed = contradictions(atlas, XrayTarget(torch.stack([xrays[0], stranger[1]]), FINE))
    assert mixed.statistics["together"] > 1.2 * right.statistics["together"]
    other_scale = contradictions(atlas, XrayTarget(0.75 * xrays, FINE))
    assert other_scale.statistics["soft tissue"] < right.statistics["soft tissue"] - 60


@pytest.mark.parametrize(
    "fault, grey", [("swapped", False), ("upside down", False), ("upside down", True)]
)
def test_one_fault_has_one_sentence(atlas, xrays, fault, grey):
    wrong = xrays[[1, 0]] if fault == "swapped" else torch.stack([xrays[0].flip(-1, -2), xrays[1]])
    images = exported(wrong, "gamma", seed(0)) if grey else wrong
    found = reconstruct(images, FINE, atlas, settings=QUICK, grey=grey)
    (sentence,) = found.contradictions
    assert fault in sentence
    assert found.notes.count(sentence) == 1


def test_two_pictures_become_a_ct_and_the_page_says_how(tmp_path, patient, xrays):
    blocked, _ = collimated(exported(add_scatter(xrays, 3.0), "gamma", seed(0)), 3.0, seed(0), 0.0)
    files = [tmp_path / "pa.png", tmp_path / "lateral.png"]
    for file, image in zip(files, blocked.numpy()):
        Image.fromarray(image.astype(np.uint8)).save(file)
    save_geometry(FINE, tmp_path / "geometry.json")
    done = ct_nb(
        "reconstruct",
        *files,
        "--geometry",
        tmp_path / "geometry.json",
        "--atlas",
        "phantom:2",
        "--size",
        "32",
        "--out",
        tmp_path / "ct.nii.gz",
    )
    assert "the file does not say of what" in done.stdout and "is not known" in done.stdout
    assert "a blade at the" in done.stdout and "burned-in mark" in done.stdout
    notes = json.loads((tmp_path / "ct_report.json").read_text())["notes"]
    assert any("fitted together with the reconstruction" in note for note in notes)
    empty = psnr(torch.full_like(patient, -1000.0), patient)
    assert psnr(read_ct(tmp_path / "ct.nii.gz").tensor(), patient) > empty + 5


def test_grey_values_go_with_no_other_option(tmp_path, xrays):
    file = tmp_path / "pa.png"
    Image.fromarray(exported(xrays, "gamma", seed(0))[0].numpy().astype(np.uint8)).save(file)
    with refused("kind"):
        reconstruct_files([file], FINE.select([0]), kind="grey", i0=255.0)
