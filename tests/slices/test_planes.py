"""Slices learned from the planes of a scan: pairs, network, interpolator, command, and refusals."""

import functools
import json

import numpy as np
import pytest
import torch
from commands import ct_nb, refusal

from ct_nb.core.errors import InputError
from ct_nb.data.cache import MemoryCache
from ct_nb.data.read import read_volume
from ct_nb.evaluation.metrics import psnr
from ct_nb.physics.volume import Volume
from ct_nb.slices import self_supervised, thin_ct_files
from ct_nb.slices.consistency import along_z
from ct_nb.slices.metrics import BackProjection, Interpolation
from ct_nb.slices.open import open_stacks
from ct_nb.slices.plane_network import PlaneNetwork, PlaneNetworkConfig, cell_modes, fold_for
from ct_nb.slices.planes import PlanePairs, cell_axis, volume_planes
from ct_nb.slices.self_supervised import (
    PlaneInterpolator,
    PlaneLearningConfig,
    apply_to_planes,
)
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThickSliceRange,
    slice_profile_matrix,
    thin_axis,
)
from ct_nb.slices.thin_ct_files import interpolate_file, thin_slice_affine
from ct_nb.slices.train_planes import PLANES_PRESETS, open_planes, train_planes
from ct_nb.training.checkpoints import WeightsError

SMALL = dict(
    network=PlaneNetworkConfig.preset("smoke"), learning=PlaneLearningConfig.preset("smoke")
)
SHORT = dict(network=SMALL["network"], learning=PlaneLearningConfig(3, 2, 1e-3, 5, 24))


@pytest.fixture(scope="module")
def item():
    "Thick slices of a phantom, 8.75 mm, and the thin ones under them, 1.75 mm."
    stacks = open_stacks("phantom:1", size=112, side_mm=196)
    return StackPairs(stacks, ThickSliceRange((8.75, 8.75)))[0]


@pytest.fixture(scope="module")
def scan(item):
    return [item[key] for key in ("thick", "thick_axis", "thin_axis", "profile")]


@pytest.fixture
def small(monkeypatch):
    "Learning in the size of tests, for the interpolators that files get."
    make = functools.partial(PlaneInterpolator, **SMALL)
    monkeypatch.setattr(thin_ct_files, "PlaneInterpolator", make)


@pytest.fixture
def thick_file(item, tmp_path):
    "The thick slices as a file."
    affine = thin_slice_affine(
        np.diag([*item["pixel_mm"], item["thin_axis"].spacing_mm, 1.0]),
        item["thin_axis"],
        item["thick_axis"],
    )
    Volume(item["thick"].round().numpy(), affine).save(tmp_path / "thick.nii.gz")
    return tmp_path / "thick.nii.gz"


# ---------------------------------------------------------------- pairs
@pytest.mark.parametrize("shape, width", [("rectangular", 1.0), ("gaussian", 0.8)])
def test_pairs_of_an_affine_image_are_exact(shape, width):
    "Means of a ramp are its values at the centres, thick or thin."
    ramp = torch.arange(160.0)[:, None].expand(160, 160) - 80
    planes = volume_planes(ramp.expand(3, -1, -1), 5.0, (1.0, 1.0))[:1]
    wanted = ThickSliceRange((5.0, 5.0), (width, width), shapes=(shape,))
    pair = PlanePairs(planes, wanted, 1.0, 8, 32, noise=False).batch(
        4, torch.Generator().manual_seed(0)
    )
    slope = pair.thick.diff(dim=1)
    assert torch.allclose(slope.abs(), torch.full_like(slope, 5.0), atol=1e-3)
    assert torch.allclose(pair.thin.diff(dim=1).abs(), torch.tensor(1.0), atol=1e-3)
    matrix = slice_profile_matrix(pair.thin_axis, pair.thick_axis, pair.profile)
    averaged = along_z(matrix, pair.thin[:, :, None])[:, :, 0]
    assert torch.allclose(averaged, pair.thick, atol=1e-2)


def test_a_cell_holds_a_whole_number_of_thin_slices():
    thick = SliceAxis(3.0, 5.0, 4)
    for thin_mm, parts in ((1.0, 5), (0.9, 6), (1.25, 4), (5.0, 1)):
        axis = cell_axis(thick, thin_mm)
        assert axis.count == 4 * parts and axis.length_mm == pytest.approx(20.0)
        assert axis.edges_mm[0] == pytest.approx(thick.edges_mm[0])


def test_thin_slices_give_true_rows_too():
    hu = torch.zeros(40, 30, 20)
    assert len(volume_planes(hu, 5.0, (0.7, 0.8), 1.5)) == 2
    shapes = [
        (tuple(p.hu.shape), p.row_mm, p.column_mm)
        for p in volume_planes(hu, 1.0, (0.7, 0.8), 1.5)
    ]
    assert shapes == [
        ((40, 30, 20), 0.7, 0.8),
        ((40, 20, 30), 0.8, 0.7),
        ((30, 40, 20), 1.0, 0.8),
        ((20, 40, 30), 1.0, 0.7),
    ]


# ---------------------------------------------------------------- network
@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("spacing_mm", [1.0, 0.8, 2.0])
def test_one_network_serves_every_ratio_and_width(fold, spacing_mm):
    torch.manual_seed(0)
    network = PlaneNetwork(PlaneNetworkConfig(8, 1, fold=fold))
    torch.nn.init.normal_(network.last.weight, std=0.05)
    thick = SliceAxis(0.0, 5.0, 6)
    fine = thin_axis(thick, spacing_mm)
    x = 300 * torch.randn(2, 6, 31)
    out = network(x, thick, fine, SliceProfile(5.0), 0.7)
    assert out.shape == (2, fine.count, 31) and float(out.detach().abs().max()) > 0
    # the same correction, sampled coarser: means over whole cells
    cells = network(x, thick, thick, SliceProfile(5.0), 0.7)
    if 5 % spacing_mm == 0:
        means = out.unflatten(1, (6, -1)).mean(2)
        assert torch.allclose(means, cells, atol=1e-3)


def test_folded_columns_stay_in_place():
    "A pixel's correction depends on what is near it, also where columns are folded."
    torch.manual_seed(0)
    network = PlaneNetwork(PlaneNetworkConfig(8, 1, fold=2))
    torch.nn.init.normal_(network.last.weight, std=0.05)
    axis = SliceAxis(0.0, 5.0, 5)
    given = (axis, thin_axis(axis, 1.0), SliceProfile(5.0), 0.7)
    x = torch.zeros(1, 5, 80)
    spot = x.clone()
    spot[0, 2, 40] = 500
    with torch.no_grad():
        change = (network(spot, *given) - network(x, *given)).abs().sum((0, 1))
    assert float(change[36:46].sum()) > 0
    assert float(change[:26].max()) < 1e-4 and float(change[56:].max()) < 1e-4


def test_modes_beyond_the_slices_are_zero():
    matrix = cell_modes(SliceAxis(0.0, 5.0, 2), SliceAxis(-10.0, 1.0, 3), 4)
    assert float(matrix.abs().max()) == 0
    assert fold_for(0.7) == 2 and fold_for(1.4) == 1 and fold_for(2.0) == 1


def test_both_families_of_planes_are_the_same_to_the_network(scan):
    "Rows and columns exchanged: the result is exchanged."
    torch.manual_seed(0)
    network = PlaneNetwork(PlaneNetworkConfig(8, 1)).eval()
    torch.nn.init.normal_(network.last.weight, std=0.05)
    thick, *axes = scan
    thick = thick[:, :40, :32]
    one = apply_to_planes(network, thick, *axes, (1.75, 1.75))
    other = apply_to_planes(network, thick.mT, *axes, (1.75, 1.75)).mT
    assert torch.allclose(one, other, atol=1e-2)


# ---------------------------------------------------------------- the interpolator
@pytest.mark.parametrize("shape", ["rectangular", "gaussian"])
def test_a_scan_teaches_more_than_interpolation(item, shape):
    wanted = ThickSliceRange((8.75, 8.75), shapes=(shape,))
    stacks = open_stacks("phantom:1", size=112, side_mm=196)
    item = StackPairs(stacks, wanted)[0]
    scan = [item[key] for key in ("thick", "thick_axis", "thin_axis", "profile")]
    hu = PlaneInterpolator(item["pixel_mm"], **SMALL).interpolate(*scan)
    quality = float(psnr(hu, item["thin"]))
    others = [
        float(psnr(p.interpolate(*scan), item["thin"]))
        for p in (Interpolation("cubic"), BackProjection())
    ]
    assert quality > max(others) + 0.05
    assert float((along_z(item["matrix"], hu) - item["thick"]).abs().max()) < 0.1


def test_seeds_decide_and_the_cache_serves_the_second_call(item, scan, monkeypatch):
    def make(**more):
        return PlaneInterpolator(item["pixel_mm"], **SHORT | more)

    cache = MemoryCache()
    state = torch.random.get_rng_state()
    first = make(cache=cache).interpolate(*scan)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(make().interpolate(*scan), first)
    assert not torch.equal(make(seed=1).interpolate(*scan), first)

    def no_learning(*given):
        raise AssertionError("learned again")

    monkeypatch.setattr(self_supervised, "learn_planes", no_learning)
    assert torch.equal(make(cache=cache).interpolate(*scan), first)
    for changed in (dict(seed=1), dict(learning=PlaneLearningConfig(4, 2, 1e-3, 5, 24))):
        with pytest.raises(AssertionError, match="learned again"):
            make(cache=cache, **changed).interpolate(*scan)
    with pytest.raises(AssertionError, match="learned again"):
        make(cache=cache).interpolate(scan[0] + 1, *scan[1:])


def test_refusals_of_the_interpolator(item, scan):
    thick, *axes = scan
    for pixel_mm, hu, reason in (
        ((7.0, 7.0), thick, "show nothing finer"),
        (item["pixel_mm"], thick[:, :16], "mm wide"),
    ):
        with pytest.raises(InputError, match=reason):
            PlaneInterpolator(pixel_mm, **SHORT).interpolate(hu, *axes)
    for argument, make in (
        ("memory_gib", lambda: PlaneInterpolator((1.0, 1.0), memory_gib=0.0)),
        ("noise_hu", lambda: PlaneInterpolator((1.0, 1.0), noise_hu=-1.0)),
        ("steps", lambda: PlaneLearningConfig(steps=0)),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert caught.value.argument == argument
    notes = PlaneInterpolator((2.0, 2.0)).notes(99, 99, axes[0], thin_axis(axes[0], 1.0))
    assert "2 mm" in notes[0]
    assert PlaneInterpolator((0.7, 0.7)).notes(99, 99, axes[0], thin_axis(axes[0], 1.0)) == []


# ---------------------------------------------------------------- weights, files and the command
@pytest.fixture(scope="module")
def planes_run(tmp_path_factory):
    "The folder of a run on planes of one phantom."
    folder = tmp_path_factory.mktemp("planes")
    stack = open_stacks("phantom:1", size=64, side_mm=160)[0]
    stack.volume.save(folder / "data" / "scan.nii.gz")
    settings = PLANES_PRESETS["smoke"]
    train_planes(open_planes(folder / "data", settings), folder / "run", settings, progress=False)
    return folder / "run"


def test_a_file_without_weights_and_with(
    thick_file, item, small, planes_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "thin.nii.gz"
    result = interpolate_file(thick_file, out, spacing_mm=1.75, progress=False)
    cubic = Interpolation("cubic").interpolate(
        torch.from_numpy(read_volume(thick_file).hu).float(),
        result.thick_axis,
        result.thin_axis,
        result.profile,
    )
    count = result.thin_axis.count
    truth = item["thin"][:count]
    assert len(truth) == count
    assert psnr(torch.from_numpy(result.volume.hu), truth) > psnr(cubic, truth)
    about = json.loads((tmp_path / "thin_thinning.json").read_text())
    assert about["model"] == "planes" and about["weights"] is None and not about["started"]
    assert len(list((tmp_path / "cache").rglob("*.entry"))) == 1
    interpolate_file(thick_file, out, planes_run, 1.75, progress=False)
    about = json.loads((tmp_path / "thin_thinning.json").read_text())
    assert about["started"] and about["weights"]["run"] == "run"
    assert len(list((tmp_path / "cache").rglob("*.entry"))) == 2


def test_the_command_needs_no_weights(thick_file, small, tmp_path, monkeypatch):
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ("interpolate-slices", thick_file, "--spacing", 1.75, "--out", "thin.nii")
    printed = ct_nb(*words)
    assert printed.stdout.splitlines()[-1] == "thin.nii"
    assert "learning from planes" in printed.stderr and "interpolation" in printed.stderr
    again = ct_nb(*words)
    assert "learning from planes" not in again.stderr
    assert again.stdout == printed.stdout


def test_refusals_of_the_command(thick_file, planes_run, tmp_path, monkeypatch):
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ("interpolate-slices", thick_file)
    assert "train_slices" in refusal(*words, "--method", "mean")
    assert "train_slices" in refusal(*words, "--method", "mean", "--weights", planes_run)
    assert "mm apart already" in refusal(*words, "--spacing", 8.75)
    assert "--fwhm-mm" in refusal(*words, "--fwhm-mm", 0.0)
    with pytest.raises(WeightsError, match="no such file"):
        interpolate_file(thick_file, tmp_path / "x.nii", tmp_path / "nowhere")
    assert not list(tmp_path.glob("*.nii"))


def test_weights_for_other_pixels_are_refused(item, planes_run, tmp_path):
    volume = Volume(item["thick"].numpy(), np.diag([0.6, 0.6, 8.75, 1.0]))
    volume.save(tmp_path / "fine.nii.gz")
    with pytest.raises(InputError, match="pixels to a column"):
        interpolate_file(tmp_path / "fine.nii.gz", tmp_path / "x.nii", planes_run, 1.75)
