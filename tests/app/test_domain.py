"""X-rays unlike those that a run learnt from: from files, the atlas answers and says so."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from places import FULL, REAL_CT
from refusals import refused
from trained_runs import trained_folder

import ct_nb.app.reconstruct_files as room
from ct_nb.app.reconstruct_files import reconstruct_files
from ct_nb.atlas.reconstruct import reconstruct as reconstruct_by_atlas
from ct_nb.cascade.sample import reconstruct_sampled
from ct_nb.cascade.train import load_cascade
from ct_nb.core.files import read_json, write_json
from ct_nb.data.open import open_source, phantom_source
from ct_nb.data.radiograph_io import write_radiographs
from ct_nb.data.read import read_ct
from ct_nb.data.xray_pairs import XrayPairs
from ct_nb.drr2ct.predict import load_drr2ct, reconstruct
from ct_nb.evaluation.inference import DOMAIN_MARGIN, check_domain, learnt_from
from ct_nb.layers.pca_prior import LinearPrior
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, hu_to_mu
from ct_nb.training.checkpoints import WeightsError

GRID = Grid.cube(32, center_mm=(20.0, -35.0, 150.0))
VIEWS = ConeBeam.biplanar(grid=GRID, detector_shape=(64, 64), pixel_mm=8.0)
XRAYS = project(hu_to_mu(phantom(40, 32).volume.tensor()), VIEWS.to(torch.float32))
ATLAS = {"atlas": "phantom:2", "size": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xrays")
    write_radiographs(folder, XRAYS, VIEWS)
    return folder


def run_with(folder, system="drr2ct", **limits):
    "A copy of the smallest trained run, with other limits of its domain; None: without them."
    shutil.copytree(trained_folder(system), folder)
    config = read_json(folder / "config.json")
    if None in limits.values():
        del config["domain"]
    else:
        for name, limit in limits.items():
            config["domain"][name]["limit"] = limit
    write_json(folder / "config.json", config)
    return folder


def no_atlas(*_, **__):
    raise AssertionError("the atlas was asked")


@pytest.mark.parametrize(
    "system, beyond",
    [("drr2ct", "unconstrained"), ("drr2ct", "distance"), ("cascade", "unconstrained")],
)
def test_beyond_a_limit_the_atlas_answers_and_says_so(
    system, beyond, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(room, "reconstruct_sampled", partial(reconstruct_sampled, steps=2))
    limits = {"unconstrained": 9.0, "distance": 9.0} | {beyond: 1e-4}
    run = run_with(tmp_path / "run", system, **limits)
    found = reconstruct_files(files, VIEWS, run, tmp_path / "ct.nii.gz", **ATLAS)
    of_atlas = reconstruct_by_atlas(found.xrays, VIEWS, "phantom:2", 32)
    assert np.allclose(found.volume.hu, of_atlas.volume.hu, atol=1.0)
    assert np.allclose(read_ct(tmp_path / "ct.nii.gz").hu, found.volume.hu, atol=0.6)
    said = next(place for place, note in enumerate(found.notes) if "unlike theirs" in note)
    learnt = read_json(run / "config.json")["domain"]["learnt_from"]
    assert found.notes[said].startswith(f"the run learnt from {learnt}, and these X-rays are unlike")
    assert found.notes[said + 1].startswith("the CT is that of the atlas phantom:2")
    report = json.loads((tmp_path / "ct_report.json").read_text())
    domain = report["weights"]["domain"]
    assert domain["outside"] is True and domain["sentence"] in report["notes"]
    assert domain["learnt_from"] == learnt and domain["residual"] > 1e-3 < domain["distance"]
    assert not any("unlike" in note for note in report["xrays"]["read_as"])


def test_who_insists_has_the_run_s_answer(files, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "reconstruct_by_atlas", no_atlas)
    run = run_with(tmp_path / "run", distance=1e-4)
    found = reconstruct_files(files, VIEWS, run, tmp_path / "ct.nii.gz", insist=True)
    own = reconstruct(found.xrays, VIEWS, load_drr2ct(run))
    assert found.volume.hu.shape == (16, 16, 16)
    assert np.allclose(found.volume.hu, own.volume.hu, atol=1.0)
    told = " ".join(found.notes)
    assert "unlike theirs" in told and "the CT is the run's all the same" in told
    assert json.loads((tmp_path / "ct_report.json").read_text())["weights"]["domain"]["outside"]


@pytest.mark.parametrize("limit, outside", [(9.0, False), (None, None)])
def test_within_the_limits_and_without_any_the_run_answers(
    limit, outside, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(room, "reconstruct_by_atlas", no_atlas)
    run = run_with(tmp_path / "run", unconstrained=limit, distance=limit)
    found = reconstruct_files(files, VIEWS, run, tmp_path / "ct.nii.gz")
    assert found.volume.hu.shape == (16, 16, 16)
    told = " ".join(found.notes)
    assert ("and these X-rays are like theirs" in told) == (outside is False)
    assert ("it is not known whether these are" in told) == (outside is None)
    report = json.loads((tmp_path / "ct_report.json").read_text())
    assert report["weights"]["domain"]["outside"] is outside


def test_a_record_that_is_none_is_refused(files, tmp_path):
    run = run_with(tmp_path / "run", distance=-1.0)
    with refused("expected_residual"):
        reconstruct_files(files, VIEWS, run, None)
    config = read_json(run / "config.json")
    write_json(run / "config.json", config | {"domain": {"distance": "far"}})
    with refused(file="config.json", kind=WeightsError):
        reconstruct_files(files, VIEWS, run, None)


def test_a_refiner_does_not_sharpen_the_atlas(files, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("refined")

    monkeypatch.setattr(room, "load_refiner", lambda folder: folder)
    monkeypatch.setattr(room, "refine_reconstruction", refused)
    run = run_with(tmp_path / "run", distance=1e-4)
    reconstruct_files(files, VIEWS, run, tmp_path / "ct.nii.gz", refine=tmp_path / "sharp", **ATLAS)
    assert json.loads((tmp_path / "ct_report.json").read_text())["refined_by"] is None
    with pytest.raises(AssertionError, match="refined"):
        reconstruct_files(files, VIEWS, run, None, refine=tmp_path / "sharp", insist=True)


@pytest.mark.parametrize("system", ["drr2ct", "cascade"])
def test_a_run_records_what_it_learnt_from_and_which_x_rays_it_knows(system):
    config = read_json(trained_folder(system) / "config.json")
    count = len(config["training"]["cases"])
    assert config["domain"]["learnt_from"] == f"{count} phantoms"
    for name in ("unconstrained", "distance"):
        assert 0 < config["domain"][name]["median"] < config["domain"][name]["limit"] < 2


def test_what_the_weights_learnt_from_before_is_told(tmp_path):
    before = trained_folder("drr2ct")
    known = read_json(before / "config.json")["domain"]["learnt_from"]
    assert learnt_from("9 CTs") == "9 CTs" and learnt_from(known, before) == known
    assert learnt_from("9 CTs", before) == f"9 CTs, after {known}"
    older = run_with(tmp_path / "run", distance=None)
    assert "do not say what they learnt from" in learnt_from(known, older)


# ---------------------------------------------------------------- what is measured
def test_a_bigger_body_lies_outside_and_the_phantoms_inside():
    "A prior of 60 phantoms, and its own kind beside chests of another shape, by distance alone."
    volumes = torch.stack([phantom(seed, 16).volume.tensor().float() for seed in range(66)])
    prior = LinearPrior(16, 59)
    prior.fit(volumes[:60])
    beam = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16.0)
    beam = beam.to(torch.float32)

    def distances(hu):
        return [prior.distance(project(hu_to_mu(one), beam), beam) for one in hu]

    own = distances(volumes[60:])
    squeezed = torch.nn.functional.interpolate(
        volumes[60:, None], scale_factor=(1, 0.6, 1), mode="trilinear"
    )[:, 0]
    missing = 16 - squeezed.shape[2]
    squeezed = torch.nn.functional.pad(
        squeezed, (0, 0, missing // 2, missing - missing // 2), value=-1000.0
    )
    assert max(distances(volumes[:60])) < 0.01 < min(own)
    assert min(distances(squeezed)) > 1.5 * max(own)
    assert min(distances(volumes[60:].flip(1))) > 1.5 * max(own)
    # alone the modes explain the X-rays of one view better than those of two
    assert prior.distance(project(hu_to_mu(volumes[60]), beam)[:1], beam.select([0])) < own[0] * 1.5


def test_a_cascade_is_measured_before_it_is_made_consistent():
    cascade = load_cascade(trained_folder("cascade"))
    found = reconstruct_sampled(XRAYS, VIEWS, cascade, samples=1, steps=2)
    other = reconstruct_sampled(1.5 * XRAYS, VIEWS, cascade, samples=1, steps=2)
    assert max(found.residual_unconstrained) > 2 * max(found.residual)
    limits = {"learnt_from": "3 phantoms"} | {
        name: {"median": 0.0, "limit": 1.05 * value}
        for name, value in (
            ("unconstrained", max(found.residual_unconstrained)),
            ("distance", found.distance),
        )
    }
    assert check_domain(found, limits).outside is False
    assert check_domain(other, limits).outside is True


@FULL
@pytest.mark.skipif(not REAL_CT.is_dir(), reason="no real CTs here")
def test_every_real_thorax_lies_outside_what_phantoms_teach():
    "By distance alone, with the margin that runs have; new phantoms lie inside."

    def distances(source):
        pairs = XrayPairs(source, size=32, render_size=64)
        items = (pairs[index] for index in range(len(pairs)))
        return [prior.distance(item["xrays"], item["geometry"]) for item in items]

    volumes = [sample.volume.tensor().float() for sample in phantom_source(90, 32)]
    prior = LinearPrior(32, 89)
    prior.fit_modes(torch.stack(volumes))
    limit = DOMAIN_MARGIN * max(distances(phantom_source(8, 64, first_seed=90)))
    new = distances(phantom_source(30, 64, first_seed=5000))
    thoraxes = open_source(str(REAL_CT), 64, on_error="skip", thorax_only=True)
    real = distances(thoraxes.one_per_patient())
    assert len(real) > 10 and min(real) > limit, (sorted(real)[:3], limit)
    assert np.mean([value > limit for value in new]) <= 0.1, (sorted(new)[-3:], limit)
