"""Reconstruction without training: warps beside a peer, fits, atlases, files, and real patients."""

import json

import numpy as np
import pytest
import torch
from atlas_inputs import CUBE, QUICK
from commands import ct_nb
from places import REAL_CT
from refusals import refused

from ct_nb.atlas.bspline import displacement, least_jacobian
from ct_nb.atlas.combine import combine, onto_xrays, vote
from ct_nb.atlas.crossval import patient_folds
from ct_nb.atlas.fit import FitSettings, Level, VolumeTarget, XrayTarget, fit
from ct_nb.atlas.reconstruct import AtlasPredictor, atlas_baseline, reconstruct
from ct_nb.atlas.regions import region_map
from ct_nb.atlas.volumes import Atlas
from ct_nb.data.open import open_source, phantom_source
from ct_nb.data.radiograph_io import write_radiographs
from ct_nb.data.read import read_ct
from ct_nb.data.xray_pairs import XrayPairs
from ct_nb.evaluation.baselines import MinimumNorm
from ct_nb.evaluation.metrics import psnr
from ct_nb.phantom.chest import phantom
from ct_nb.physics.drr import render_drr
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid, Volume

BEAM = ConeBeam.biplanar(grid=CUBE, detector_shape=(32, 32), pixel_mm=16.0)


@pytest.fixture(scope="module")
def target(patient):
    return XrayTarget(render_drr(patient, BEAM), BEAM)


@pytest.fixture(scope="module")
def fitted(atlas, target):
    return fit(atlas, target, QUICK)


def test_a_displacement_is_that_of_itk():
    sitk = pytest.importorskip("SimpleITK")
    n, count, side = 7, 16, 320.0
    control = np.random.default_rng(0).normal(size=(3, n, n, n))
    transform = sitk.BSplineTransform(3, 3)
    transform.SetTransformDomainMeshSize([n - 3] * 3)
    transform.SetTransformDomainPhysicalDimensions([side] * 3)
    transform.SetTransformDomainOrigin([0.0] * 3)
    transform.SetParameters(control.ravel().tolist())  # x, y and z of all points, x fastest
    ours = torch.stack(
        [displacement(torch.tensor(c).float(), count, side, side / 4) for c in control]
    )
    step = side / count
    for z, y, x in ((0, 0, 0), (3, 8, 15), (15, 2, 7)):
        point = [(i + 0.5) * step for i in (x, y, z)]
        theirs = np.array(transform.TransformPoint(point)) - point
        assert np.allclose(ours[:, z, y, x].numpy(), theirs, atol=1e-4)


def test_the_proven_jacobian_lies_below_every_sample():
    generator = torch.Generator().manual_seed(3)
    control = 6 * torch.randn(3, 11, 11, 11, generator=generator)
    bound = least_jacobian(control, 40.0)
    u = torch.stack([displacement(c, 320, 320.0, 40.0) for c in control])
    slopes = [u[i].diff(dim=j)[:319, :319, :319] for i in range(3) for j in range(3)]
    sampled = torch.stack(slopes).view(3, 3, 319, 319, 319)
    # the components of the control are in the order of the axes (z, y, x)
    jacobian = sampled[:, :, ::3, ::3, ::3].permute(2, 3, 4, 0, 1) + torch.eye(3)
    least = float(torch.linalg.det(jacobian).min())
    assert bound <= least + 1e-3 and least < 0.8


def test_no_bend_is_folded_and_all_explain_the_xrays_better(atlas, target, fitted):
    before = target.residual((1 + atlas.hu / 1000).clamp_min(0)).square().flatten(1).mean(1).sqrt()
    assert (fitted.residual < 0.6 * before).all()
    assert min(fitted.least_jacobian) > 0
    bent = fitted.bend.apply(atlas.hu)
    again = target.residual((1 + bent / 1000).clamp_min(0)).square().flatten(1).mean(1).sqrt()
    assert torch.allclose(again, fitted.residual, rtol=1e-4)


def test_the_fit_does_not_depend_on_threads_or_company(atlas, target, fitted):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = fit(atlas, target, QUICK)
    finally:
        torch.set_num_threads(threads)
    # sums of products may round differently, and a fit follows rounding a little
    assert (two.bend.control_mm - fitted.bend.control_mm).abs().mean() < 0.1
    alone = fit(atlas.subset([1]), target, QUICK)
    assert (alone.bend.control_mm[0] - fitted.bend.control_mm[1]).abs().mean() < 0.1
    same = fit(atlas, target, QUICK)
    assert torch.equal(same.bend.control_mm, fitted.bend.control_mm)


def test_a_stretched_patient_is_found(atlas):
    """The atlas itself, made 8 % wider: a bend onto it is that stretch, and folds nothing."""
    wide = atlas.subset([0])
    axis = torch.linspace(-1, 1, 65)[1::2]
    grid = torch.stack(torch.meshgrid(axis, axis, axis / 1.08, indexing="ij")[::-1], -1)
    hu = torch.nn.functional.grid_sample(
        wide.hu[:, None], grid[None], padding_mode="border", align_corners=False
    )[0, 0]
    found = fit(wide, VolumeTarget(hu), FitSettings(levels=QUICK.levels, bending_mm2=3.0))
    bent = found.bend.apply(wide.hu)[0]
    assert psnr(bent, hu) > psnr(wide.hu[0], hu) + 6


def test_the_combination_is_on_the_xrays_and_between_its_atlases(atlas, target, fitted, patient):
    found = combine(atlas, fitted.bend, target)
    scores = [psnr(hu, patient) for hu in found.bent_hu]
    assert psnr(found.mean_hu, patient) > max(scores) - 0.3
    assert torch.allclose(found.weights.sum(0), torch.ones_like(patient), atol=1e-5)
    residual = target.residual((1 + found.hu / 1000).clamp_min(0)).norm() / target.xrays.norm()
    assert residual < 0.03
    same = onto_xrays(found.hu, target, found.spread_hu)
    assert (same - found.hu).abs().mean() < 3


def test_votes_are_shares():
    labels = torch.tensor([[[[1, 2]]], [[[1, 0]]], [[[3, 0]]]], dtype=torch.uint8)
    best, probability = vote(labels, torch.tensor([1.0, 2.0, 1.0]))
    assert best.tolist() == [[[1, 0]]]
    assert torch.allclose(probability, torch.tensor([[[0.75, 0.75]]]))


def test_an_atlas_of_a_folder_and_what_is_none(tmp_path):
    with refused("data"):
        Atlas.open("nothing-here")
    with refused("size"):
        Atlas.open("phantom:1", size=32, cache_dir=None).resized(5)
    with refused("folds"):
        patient_folds(["a", "b"], 3)
    groups = patient_folds([f"p{i}" for i in range(7)], 3)
    assert sorted(sum(groups, [])) == [f"p{i}" for i in range(7)]
    assert max(map(len, groups)) - min(map(len, groups)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bending_mm2", 0.0),
        ("bending_mm2", float("nan")),
        ("huber", -1.0),
        ("folding", -1.0),
        ("tissue", float("inf")),
        ("least_jacobian", 1.0),
        ("levels", (Level(32, 4, 5), Level(32, 12, 5))),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with refused(name):
        FitSettings(**{name: value})


def test_what_cannot_be_reconstructed_is_refused(atlas, target):
    for samples in (-1, True, 1.5):
        with refused("samples"):
            reconstruct(target.xrays, BEAM, atlas, samples=samples)
    with refused("size"):
        reconstruct(target.xrays, BEAM, size=48)
    with refused("xrays"):
        reconstruct(target.xrays * float("nan"), BEAM, atlas)
    with refused("geometry"):
        AtlasPredictor(atlas).predict(target.xrays, BEAM.on(Grid.cube(32, 300.0)))
    with refused("atlas"):
        bare = Atlas(atlas.hu, atlas.ids, atlas.patients)
        region_map(phantom(1, 32).volume, bare)
    air = phantom(1, 32).volume
    with refused("volume"):
        region_map(Volume(air.hu[:8].copy(), air.affine), atlas)


def test_images_that_are_no_line_integrals_are_said(atlas, target):
    good = reconstruct(target.xrays, BEAM, atlas, settings=QUICK)
    assert good.contradictions == [] and good.comparisons["unexplained"] < 0.1
    for wrong in (torch.exp(-target.xrays), 20 * target.xrays):
        found = reconstruct(wrong, BEAM, atlas, settings=QUICK)
        assert found.contradictions and found.contradictions[0] in found.notes


def test_the_baseline_of_a_run_takes_its_training_cases():
    pairs = XrayPairs(phantom_source(5, 16), size=16)
    baseline = atlas_baseline(pairs, count=3)
    assert baseline.atlas.ids == ["phantom-00000", "phantom-00002", "phantom-00004"]
    hu = baseline.predict(pairs[1]["xrays"], pairs[1]["geometry"])
    assert hu.shape == (16, 16, 16) and torch.isfinite(hu).all()


def test_from_files_to_files_without_weights(tmp_path, patient):
    write_radiographs(tmp_path / "xrays", render_drr(patient, BEAM), BEAM)
    done = ct_nb(
        "reconstruct",
        tmp_path / "xrays",
        "--geometry",
        tmp_path / "xrays" / "geometry.json",
        "--atlas",
        "phantom:2",
        "--size",
        "32",
        "--num-samples",
        "3",
        "--out",
        tmp_path / "ct.nii.gz",
    )
    assert "the atlas has 2 CTs, so there are 2 samples" in done.stdout
    content = json.loads((tmp_path / "ct_report.json").read_text())
    assert content["weights"] is None and content["samples"]["count"] == 2
    assert content["regions"]["names"] and 0 < content["regions"]["mean_probability"] <= 1
    for name in content["files"]:
        assert (tmp_path / name).is_file()
    hu = read_ct(tmp_path / "ct.nii.gz")
    assert psnr(hu.tensor(), patient) > psnr(torch.full_like(patient, -1000.0), patient) + 5
    refine = ct_nb(
        "reconstruct",
        tmp_path / "xrays",
        "--geometry",
        tmp_path / "xrays" / "geometry.json",
        "--refine",
        tmp_path,
        exit_code=1,
    )
    assert "--refine" in refine.stderr and "weights" in refine.stderr


@pytest.mark.skipif(not REAL_CT.is_dir(), reason="needs real CT beside the checkout")
def test_phantoms_alone_reconstruct_a_patient():
    source = open_source(f"{REAL_CT}/lidc-0002.nii.gz", 64)
    item = XrayPairs(source, size=64, render_size=64)[0]
    predictor = AtlasPredictor(Atlas.open("phantom:4", size=64))
    hu = predictor.predict(item["xrays"], item["geometry"])
    classical = MinimumNorm().predict(item["xrays"], item["geometry"])
    scanned = item["scanned"].numpy()
    scores = [psnr(volume, item["hu"], mask=scanned) for volume in (hu, classical)]
    assert scores[0] > scores[1] + 2
