"""Reconstruction with drr2ct: from tensors and files, samples, contradictions, reports."""

import json
import os

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.app.reconstruct_files import (
    reconstruct_files,
    reconstruction_figure,
    save_reconstruction,
)
from ct_nb.data.radiograph_io import RadiographError, write_radiographs
from ct_nb.data.read import read_ct
from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
from ct_nb.drr2ct.predict import ModelPredictor, reconstruct
from ct_nb.evaluation.inference import fit_detector, residual_limit, view_residuals
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.geometry_io import save_geometry
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, Volume, hu_to_mu
from ct_nb.physics.xray_noise import XrayNoise, add_xray_noise, move_detector
from ct_nb.training.checkpoints import WeightsError, save_weights

CENTER = np.array([20.0, -35.0, 150.0])
LIMIT = {"median": 0.03, "limit": 0.08}


@pytest.fixture(scope="module")
def network():
    "Untrained, but its prior has seen phantoms."
    torch.manual_seed(0)
    model = DRR2CT(DRR2CTConfig.preset("smoke")).eval()
    model.prior.fit(torch.stack([phantom(seed, 32).volume.tensor() for seed in range(20, 28)]))
    return model


@pytest.fixture(scope="module")
def run(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    save_weights(
        folder,
        network,
        {
            "system": "drr2ct",
            "network": network.config.to_dict(),
            "preset": "smoke",
            "training": {"fingerprint": "abc"},
            "residual": LIMIT,
        },
    )
    return folder


def take(views, seed=7):
    return project(
        hu_to_mu(phantom(seed, 64).volume.tensor(), 60.0),
        views.on(Grid.cube(64, center_mm=CENTER)).to(torch.float32),
    )


VIEWS = ConeBeam.biplanar(
    grid=Grid.cube(64, center_mm=CENTER), detector_shape=(128, 128), pixel_mm=4.0
)
XRAYS = take(VIEWS)


def save_counts(path, line_integrals, top=40000):
    from PIL import Image

    Image.fromarray((top * torch.exp(-line_integrals)).round().numpy().astype(np.uint16)).save(path)
    return path


# ---------------------------------------------------------------- the call
def test_the_answer_is_the_predictors_and_lies_in_the_patient(network):
    found = reconstruct(XRAYS, VIEWS, network)
    moved = translate(VIEWS, -torch.as_tensor(CENTER)).on(Grid.cube(32))
    assert np.array_equal(found.volume.hu, ModelPredictor(network).predict(XRAYS, moved).numpy())
    assert (
        np.allclose(found.volume.grid.center_mm, CENTER)
        and found.samples == []
        and found.spread is None
        and found.contradictions is None
    )
    assert view_residuals(found.volume.tensor(), XRAYS, VIEWS.on(found.volume.grid))[
        0
    ] == pytest.approx(found.residual, rel=1e-4)


def test_the_layer_meets_its_tolerance_and_both_residuals_are_told(network):
    from dataclasses import replace

    with_layer = reconstruct(XRAYS, VIEWS, network)
    without = reconstruct(XRAYS, VIEWS, network, consistency=False)
    assert with_layer.residual == with_layer.residual_consistent == without.residual_consistent
    assert without.residual == without.residual_unconstrained == with_layer.residual_unconstrained
    assert all(
        a < 0.6 * b
        for a, b in zip(with_layer.residual_consistent, with_layer.residual_unconstrained)
    )
    network.config, config = replace(network.config, consistency_iterations=60), network.config
    try:
        converged = reconstruct(XRAYS, VIEWS, network)
    finally:
        network.config = config
    assert all(
        reached < tolerance
        for reached, tolerance in zip(converged.residual_layer, converged.tolerance)
    )


def test_samples_follow_the_seed_and_leave_the_answer(network):
    state = torch.get_rng_state()
    found, again, other = (
        reconstruct(XRAYS, VIEWS, network, samples=2, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state), "the generator of the caller is left alone"
    assert np.array_equal(found.volume.hu, reconstruct(XRAYS, VIEWS, network).volume.hu)
    assert all(
        np.array_equal(a.hu, b.hu) for a, b in zip(found.samples, again.samples)
    ) and not np.array_equal(found.samples[0].hu, other.samples[0].hu)
    assert (
        np.allclose(
            found.spread.hu, np.std([s.hu for s in found.samples], axis=0, ddof=1), atol=1e-2
        )
        and found.spread.grid == found.volume.grid
    )
    assert reconstruct(XRAYS, VIEWS, network, samples=1).spread is None
    for wrong in (-1, 1.5, True):
        with refused("samples"):
            reconstruct(XRAYS, VIEWS, network, samples=wrong)


def test_contradictions_are_said_and_noise_is_none(network):
    generator = torch.Generator().manual_seed(0)
    noisy = add_xray_noise(XRAYS, XrayNoise(photons_per_pixel=1e5), generator)
    assert reconstruct(noisy, VIEWS, network, expected_residual=LIMIT).contradictions == []
    lowered = move_detector(VIEWS, 0.0, torch.tensor([0.0, 40.0], dtype=torch.float64))
    # as if a detector's step were told wrongly
    halved = XRAYS * torch.tensor([1.0, 0.5])[:, None, None]
    upside_down = torch.stack([XRAYS[0], XRAYS[1].flip(0)])
    for xrays, views in ((noisy, lowered), (halved, VIEWS), (upside_down, VIEWS)):
        found = reconstruct(xrays, views, network, expected_residual=LIMIT)
        assert found.contradictions and found.notes == found.contradictions
        assert all(
            note.startswith("view ")
            and "above the limit for noise (0.080): the X-ray contradicts the geometry, or it is no image of line integrals"
            in note
            for note in found.notes
        )


def test_limits(run, tmp_path):
    assert residual_limit(None) is None and residual_limit(LIMIT) == residual_limit(run) == 0.08
    for wrong in ({}, {"limit": 0.0}, {"limit": "a"}, {"limit": float("nan")}):
        with refused("expected_residual"):
            residual_limit(wrong)
    with pytest.raises(WeightsError):
        residual_limit(tmp_path)


def test_constant_xrays_are_refused(network):
    for image, words in (
        (XRAYS * 0, "view 0 is 0 everywhere"),
        (torch.stack([XRAYS[0], torch.full((128, 128), 2.5)]), "view 1 is 2.5 everywhere"),
    ):
        with pytest.raises(ValueError, match=words):
            reconstruct(image, VIEWS, network)


def test_any_detector_is_cut_to_what_the_network_takes(network):
    views = ConeBeam.biplanar(grid=VIEWS.grid, detector_shape=(150, 601), pixel_mm=1.0).rebinned(
        (150, 601)
    )
    found = reconstruct(take(views), views, network)
    assert (
        found.geometry.detector_shape == (64, 256)
        and found.xrays.shape == (2, 64, 256)
        and "150×601 pixels are averaged to 64×256" in found.notes[0]
    )
    cut, geometry = fit_detector(take(views), views)
    assert (cut - take(geometry)).abs().mean() < 0.02
    assert fit_detector(XRAYS, VIEWS)[0] is XRAYS


# ---------------------------------------------------------------- files
def test_files_and_report(run, tmp_path):
    files = [
        save_counts(tmp_path / f"{name}.png", image) for name, image in zip(("ap", "lat"), XRAYS)
    ]
    save_geometry(VIEWS, tmp_path / "biplanar.json")
    found = reconstruct_files(
        files, tmp_path / "biplanar.json", run, tmp_path / "out" / "ct.nii.gz", samples=2
    )
    assert sorted(os.listdir(tmp_path / "out")) == [
        "ct.nii.gz",
        "ct_preview.png",
        "ct_report.json",
        "ct_sample_1.nii.gz",
        "ct_sample_2.nii.gz",
        "ct_spread.nii.gz",
    ]
    back = read_ct(tmp_path / "out" / "ct.nii.gz")
    assert np.allclose(back.hu, found.volume.hu, atol=0.1) and back.grid == found.volume.grid
    content = json.loads((tmp_path / "out" / "ct_report.json").read_text())
    assert [
        view["with_consistency"] for view in content["residual"]
    ] == found.residual_consistent and content["residual"][1]["without_consistency"] > content[
        "residual"
    ][
        1
    ][
        "with_consistency"
    ]
    assert content["contradiction"]["found"] is False and content["contradiction"]["limit"] == 0.08
    assert (
        content["grid"]["shape_zyx"] == [32, 32, 32]
        and np.allclose(content["grid"]["affine_index_xyz_to_lps_mm"], found.volume.affine)
        and content["grid"]["spacing_mm_xyz"] == [10, 10, 10]
    )
    assert (
        content["window"] == {"name": "chest", "low_hu": -1024, "high_hu": 1024}
        and content["versions"]["torch"]
        and content["samples"]["count"] == 2
    )
    assert content["xrays"]["files"] == ["ap.png", "lat.png"] and any(
        "lat.png: pixels are taken for intensity, not inverted" in note
        for note in content["xrays"]["read_as"]
    )
    assert (
        content["weights"]["training_fingerprint"] == "abc"
        and content["weights"]["preset"] == "smoke"
        and str(tmp_path) not in json.dumps(content)
    )
    import nibabel

    image = nibabel.load(tmp_path / "out" / "ct.nii.gz")
    assert np.allclose(
        image.affine @ [15.5, 15.5, 15.5, 1], [-20, 35, 150, 1], atol=1e-3
    ), "RAS, where any viewer puts it"


def test_a_run_without_a_limit_does_not_judge(network, tmp_path):
    save_weights(
        tmp_path / "run", network, {"system": "drr2ct", "network": network.config.to_dict()}
    )
    write_radiographs(tmp_path / "xrays", XRAYS, VIEWS)
    reconstruct_files(tmp_path / "xrays", VIEWS, tmp_path / "run", tmp_path / "ct.nrrd")
    content = json.loads((tmp_path / "ct_report.json").read_text())
    assert (
        content["contradiction"]["found"] is None
        and "not judged" in content["contradiction"]["sentence"]
        and content["samples"] is None
    )


def test_what_cannot_be_done_is_a_sentence(run, tmp_path):
    write_radiographs(tmp_path / "xrays", XRAYS, VIEWS)
    (tmp_path / "file").write_text("")
    for out, kind, words in (
        ("ct.jpg", ValueError, "unknown kind of file"),
        (".nii.gz", ValueError, "unknown kind of file"),
        ("file/ct.nii.gz", OSError, "cannot be written"),
    ):
        with pytest.raises(kind, match=words) as caught:
            reconstruct_files(tmp_path / "xrays", VIEWS, run, tmp_path / out)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no such file"):
        reconstruct_files(tmp_path / "xrays", VIEWS, tmp_path, None)
    with pytest.raises(RadiographError, match="no such file"):
        reconstruct_files([tmp_path / "none.png"], VIEWS, run, None)
    assert sorted(os.listdir(tmp_path)) == ["file", "xrays"]


def test_the_preview_of_many_views_and_an_oblique_volume(network):
    import matplotlib.pyplot as plt

    views = ConeBeam.orbit(
        [0, 30, 60, 90, 120], grid=VIEWS.grid, detector_shape=(64, 96), pixel_mm=6.0
    )
    found = reconstruct(take(views), views, network, consistency=False)
    figure = reconstruction_figure(found, "lung")
    assert sum(len(part.axes) for part in figure.subfigs) == 3 + 1 + 12 + 2
    plt.close(figure)
    found.volume = Volume(
        found.volume.hu,
        found.volume.affine
        @ np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    plt.close(reconstruction_figure(found))


def test_saving_overwrites_whole(network, tmp_path):
    found = reconstruct(XRAYS, VIEWS, network)
    (tmp_path / "a.b.nii.gz").write_text("old")
    paths = save_reconstruction(found, tmp_path / "a.b.nii.gz", {"note": "mine"})
    assert [p.name for p in paths] == [
        "a.b.nii.gz",
        "a.b_preview.png",
        "a.b_report.json",
    ] and json.loads(paths[-1].read_text())["note"] == "mine"
    assert read_ct(paths[0]).grid == found.volume.grid


# ---------------------------------------------------------------- files
def test_samples_without_consistency_from_files(run, tmp_path):
    files = [
        save_counts(tmp_path / f"{name}.png", image) for name, image in zip(("ap", "lat"), XRAYS)
    ]
    save_geometry(VIEWS, tmp_path / "biplanar.json")
    found = reconstruct_files(
        files,
        tmp_path / "biplanar.json",
        run,
        tmp_path / "ct.nii.gz",
        samples=2,
        consistency=False,
    )
    assert any(
        "lat.png" in note and "pixels are taken for intensity" in note for note in found.notes
    )
    assert len(found.samples) == 2 and found.residual == found.residual_unconstrained
    content = json.loads((tmp_path / "ct_report.json").read_text())
    assert content["consistency"] is False
    assert (tmp_path / "ct_spread.nii.gz").is_file()
    assert (tmp_path / "ct_preview.png").stat().st_size > 10_000


# ---------------------------------------------------------------- samples of a cascade
@pytest.fixture(scope="module")
def cascade_run(tmp_path_factory):
    from ct_nb.cascade.network import Cascade, CascadeConfig, StageConfig
    from ct_nb.layers.denoiser import DenoiserConfig
    from ct_nb.layers.diffusion import DiffusionConfig

    folder = tmp_path_factory.mktemp("cascade")
    torch.manual_seed(0)
    stage = StageConfig(
        DenoiserConfig.preset("smoke", 16, condition_channels=2), DiffusionConfig(steps=20)
    )
    cascade = Cascade(
        CascadeConfig((stage,), "prior", {"size": 16, "modes": 4, "noise": 0.5, "energy_kev": 60.0})
    )
    cascade.start.prior.fit(torch.stack([phantom(seed, 16).volume.tensor() for seed in range(4)]))
    save_weights(
        folder,
        cascade,
        {"system": "cascade", "network": cascade.config.to_dict(), "preset": "smoke"},
    )
    return folder


def test_samples_of_a_cascade_from_files(cascade_run, tmp_path):
    write_radiographs(tmp_path / "xrays", XRAYS, VIEWS)
    found = reconstruct_files(
        tmp_path / "xrays",
        tmp_path / "xrays" / "geometry.json",
        cascade_run,
        tmp_path / "ct.nii.gz",
        samples=3,
        seed=5,
    )
    assert found.spread_means == "standard deviation over samples of the cascade; not calibrated"
    assert not found.residual_consistent
    content = json.loads((tmp_path / "ct_report.json").read_text())
    assert (
        content["how"] == "mean of 3 samples, X-ray guidance soft"
        and content["samples"]["count"] == 3
        and content["weights"]["system"] == "cascade"
        and "with_consistency" not in content["residual"][0]
    )
    mean = np.mean(
        [read_ct(tmp_path / f"ct_sample_{number}.nii.gz").hu for number in (1, 2, 3)], axis=0
    )
    assert np.allclose(read_ct(tmp_path / "ct.nii.gz").hu, mean, atol=0.1) and np.allclose(
        read_ct(tmp_path / "ct.nii.gz").grid.center_mm, CENTER
    )


def test_guidance_decides_how_well_a_cascade_explains_the_xrays(cascade_run, tmp_path):
    # of a CT on the cascade's grid, so that equality is possible
    own = project(
        hu_to_mu(phantom(3, 16).volume.tensor(), 60.0),
        VIEWS.on(Grid.cube(16, center_mm=CENTER)).to(torch.float32),
    )
    write_radiographs(tmp_path, own, VIEWS)
    soft, exact, off = (
        reconstruct_files(tmp_path, VIEWS, cascade_run, None, samples=2, **settings)
        for settings in ({}, {"guidance": "exact"}, {"consistency": False})
    )
    assert max(exact.residual) < 0.5 * max(off.residual) and max(soft.residual) < 0.8 * max(
        off.residual
    )
    assert (
        soft.consistent
        and not off.consistent
        and [found.how for found in (soft, exact, off)]
        == [f"mean of 2 samples, X-ray guidance {name}" for name in ("soft", "exact", "off")]
    )


def test_weights_of_a_third_system_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"system": "refine", "network": {}}))
    with pytest.raises(
        WeightsError,
        match="weights of the system 'refine', but 'drr2ct' or 'cascade' was asked for",
    ):
        reconstruct_files("xrays", VIEWS, tmp_path, None)


# ---------------------------------------------------------------- a refiner behind it
def test_an_untrained_refiner_leaves_the_answer_and_says_that_it_was_there(run, tmp_path):
    from ct_nb.refine.network import RefinerConfig
    from ct_nb.refine.pipeline import ConsistencySettings, RefinementModel

    torch.manual_seed(0)
    model = RefinementModel(RefinerConfig(size=32, channels=(6, 12), prior_features=4, hidden=16))
    settings = {"network": model.config.to_dict(), "consistency": ConsistencySettings().to_dict()}
    save_weights(tmp_path / "refiner", model, {"system": "refiner", **settings})
    write_radiographs(tmp_path / "xrays", XRAYS, VIEWS)
    plain, refined = (
        reconstruct_files(
            tmp_path / "xrays",
            VIEWS,
            run,
            tmp_path / f"{name}.nii.gz",
            consistency=False,
            refine=refine,
        )
        for name, refine in (("plain", None), ("refined", tmp_path / "refiner"))
    )
    assert (
        refined.how == "without the data-consistency layer, refined"
        and np.array_equal(refined.volume.hu, plain.volume.hu)
        and refined.volume.grid == plain.volume.grid
    )
    consistent = reconstruct_files(
        tmp_path / "xrays", VIEWS, run, None, refine=tmp_path / "refiner"
    )
    assert consistent.how == "refined" and max(consistent.residual) < max(refined.residual)
    content = json.loads((tmp_path / "refined_report.json").read_text())
    assert (
        content["refined_by"] == "refiner"
        and content["how"] == refined.how
        and content["residual"][0]["residual"] == refined.residual[0]
    )
    with pytest.raises(WeightsError):
        reconstruct_files(tmp_path / "xrays", VIEWS, run, None, refine=run)
