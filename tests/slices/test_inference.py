"""Thinning of scans: portions without seams, noise that belongs to slices, the frame of the input, consistency across portions, and a sentence for what cannot be done."""

import json
import weakref
import zipfile

import nibabel
import numpy as np
import pytest
import torch
from commands import ct_nb, refusal
from ct_files import body, pair_members, write_series, zipped
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ct_nb.data.read import read_volume
from ct_nb.physics.volume import Volume
from ct_nb.slices.consistency import interpolate_slices
from ct_nb.slices.inference import (
    DiffusionInterpolator,
    RegressorInterpolator,
    check_scan,
    check_training_range,
    in_portions,
    portions,
)
from ct_nb.slices.models import (
    SliceDiffusion,
    SliceDiffusionConfig,
    SliceRegressor,
    SliceRegressorConfig,
)
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    slice_profile_matrix,
    thin_axis,
)
from ct_nb.slices.thin_ct_files import (
    header_width,
    interpolate_file,
    interpolate_volume,
    thin_slice_affine,
)
from ct_nb.slices.train import SliceModels
from ct_nb.training.checkpoints import WeightsError, save_weights

SEEN = {"thick_mm": [4.0, 6.0], "width": [0.8, 1.2], "thin_mm": [1.0, 1.9]}


def drawn(kind, config, seed=0):
    "Random weights everywhere, as if trained: a new network says nothing."
    torch.manual_seed(seed)
    model = kind(config).eval()
    torch.nn.init.normal_(model.network.last.weight, std=0.05)
    if kind is SliceDiffusion:
        for layer in (model.vae.squeeze, model.vae.leave):
            torch.nn.init.normal_(layer.weight, std=0.02)
        model.vae.straight.fit([model.vae.window.to_network(hu(8, 40))[None, None]])
    return model


def hu(slices, pixels, seed=0):
    "A body in air, whole HU."
    generator = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(
        torch.arange(slices) / slices - 0.5,
        *([torch.arange(pixels) / pixels - 0.5] * 2),
        indexing="ij",
    )
    body = torch.where((y / 0.42) ** 2 + (x / 0.36) ** 2 < 1, 40.0, -1000.0)
    body = torch.where(
        ((y - 0.02) / 0.2) ** 2 + ((x.abs() - 0.16) / 0.12) ** 2 + (z / 0.6) ** 2 < 1, -820.0, body
    )
    return (body + 12 * torch.randn(body.shape, generator=generator)).clamp_min(-1024).round()


@pytest.fixture(scope="module")
def regressor():
    return drawn(SliceRegressor, SliceRegressorConfig.preset("smoke"))


@pytest.fixture(scope="module")
def diffusion():
    return drawn(SliceDiffusion, SliceDiffusionConfig.preset("smoke"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, regressor, diffusion):
    folder = tmp_path_factory.mktemp("run")
    slices = SliceModels(regressor, diffusion)
    save_weights(
        folder,
        slices,
        {
            "system": "slices",
            "network": slices.networks(),
            "preset": "smoke",
            "seen": SEEN,
            "training": {"fingerprint": "f"},
        },
    )
    return folder


@pytest.fixture
def scan(tmp_path):
    "Twelve slices of 48×48 at 5 mm, oblique in the patient; and its file."
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [3.0, 2.5, 5.0]
    affine[:3, 3] = [10, -40, 77]
    volume = Volume(hu(12, 48).numpy(), affine)
    volume.save(tmp_path / "thick.nii.gz")
    return volume, tmp_path / "thick.nii.gz"


@pytest.mark.parametrize("count,core,halo", [(1, 4, 2), (7, 3, 2), (23, 5, 1), (24, 40, 3)])
@pytest.mark.parametrize("convention", ["slabs", "centres"])
def test_portions_hold_every_thin_slice(count, core, halo, convention):
    thick = SliceAxis(-3.0, 5.0, count)
    thin = thin_axis(thick, 1.3, convention)
    found = portions(thick, thin, core, halo)
    seen = np.zeros(thin.count, int)
    for p in found:
        seen[p.first : p.last] += 1
        assert (
            len(p.weights) == p.last - p.first
            and (p.weights > 0).all()
            and p.stop - p.start <= core + 2 * halo + 1
        )
    assert (seen > 0).all() and (found[0].start, found[-1].stop) == (0, count)
    with pytest.raises(ValueError, match="core and halo"):
        portions(thick, thin, 0)


def test_portions_of_one_constant_and_of_a_slope_have_no_seams():
    thick_axis = SliceAxis(0.0, 5.0, 20)
    thin = thin_axis(thick_axis, 1.0, "centres")
    slope = torch.arange(20.0)[:, None, None].expand(20, 3, 4) * 50
    whole = interpolate_slices(slope, thick_axis, thin)
    pieces = in_portions(
        lambda y, a, b, p: interpolate_slices(y, a, b), slope, thick_axis, thin, 4, 2
    )
    inner = in_portions(
        lambda y, a, b, p: whole[p.first : p.last].clone(), slope, thick_axis, thin, 4, 2
    )
    assert torch.allclose(inner, whole, atol=1e-3)  # what does not depend on the portion comes back
    assert (pieces - whole).abs().max() < 6  # ends held with a small weight
    hard = torch.cat(
        [
            interpolate_slices(
                slope[p.start : p.stop],
                thick_axis.part(p.start, p.stop),
                thin.part(p.first, p.last),
            )
            for p in portions(thick_axis, thin, 4, 2)
        ][:1]
    )
    # without fading the held end would show
    assert (hard[-3:] - whole[len(hard) - 3 : len(hard)]).abs().max() > 15


def given(slices=14, pixels=40, spacing=1.0):
    axis = SliceAxis(0.0, 5.0, slices)
    return hu(slices, pixels), axis, thin_axis(axis, spacing), SliceProfile(5.0)


def test_the_regressor_in_portions_is_the_regressor(regressor):
    case = given()
    whole = RegressorInterpolator(regressor, consistent=False).thin(*case)
    with torch.no_grad():
        assert torch.allclose(whole, regressor(case[0][None], *case[1:])[0], atol=1e-2)
    cut = RegressorInterpolator(regressor, consistent=False, memory_gib=0.006, halo=4)
    assert len(portions(case[1], case[2], cut.plan(40, 40, *case[1:3])[0], 4)) > 1
    moved = (whole - interpolate_slices(*case[:3])).abs().mean()
    assert (cut.thin(*case) - whole).abs().mean() < 0.1 * moved


@pytest.mark.parametrize("kind", ["regressor", "diffusion"])
def test_consistency_holds_across_portions(kind, regressor, diffusion):
    case = given()
    matrix = torch.from_numpy(slice_profile_matrix(case[2], case[1], case[3]))
    for consistent in (True, False):
        thinner = (
            RegressorInterpolator(regressor, consistent=consistent, memory_gib=0.002)
            if kind == "regressor"
            else DiffusionInterpolator(diffusion, steps=2, consistent=consistent, memory_gib=0.004)
        )
        missed = float((average_slices(thinner.thin(*case), matrix) - case[0]).abs().max())
        assert missed < 0.05 if consistent else missed > 1


def test_noise_belongs_to_slices(diffusion, monkeypatch):
    case, seen = given(), {}
    own = SliceDiffusion.sample

    def watched(self, thick, thick_axis, thin_axis, profile, steps, consistent, noise):
        for place, z in zip(np.round(thin_axis.positions_mm, 3), noise[0].unbind(1)):
            seen.setdefault(place, []).append(z)
        return own(
            self, thick, thick_axis, thin_axis, profile, steps, consistent=consistent, noise=noise
        )

    monkeypatch.setattr(SliceDiffusion, "sample", watched)
    DiffusionInterpolator(diffusion, steps=1, memory_gib=0.004).thin(*case)
    shared = [zs for zs in seen.values() if len(zs) > 1]
    assert (
        shared
        and all(torch.equal(zs[0], z) for zs in shared for z in zs[1:])
        and not torch.equal(seen[0.0][0], seen[1.0][0])
    )


def test_draws_repeat_and_differ_and_the_mean_is_their_mean(diffusion):
    case = given(5, 24)
    make = lambda **more: DiffusionInterpolator(diffusion, steps=2, **more).thin(*case)
    one = make()
    same = make()
    other = make(seed=1)
    assert torch.equal(one, same) and not torch.equal(one, other)
    thinner = DiffusionInterpolator(diffusion, steps=2, consistent=False, count=3)
    draws = torch.stack([thinner.draw(n, *case) for n in range(3)])
    assert (
        torch.allclose(thinner.thin(*case), draws.mean(0), atol=1e-3) and draws.std(0).mean() > 0.1
    )
    matrix = torch.from_numpy(slice_profile_matrix(case[2], case[1], case[3]))
    assert (average_slices(make(count=3), matrix) - case[0]).abs().max() < 0.05


def test_what_is_shared_is_drawn_once(diffusion, monkeypatch):
    known = {}
    case = given(5, 24)
    drawn = []
    own = DiffusionInterpolator.draw
    alone = DiffusionInterpolator(diffusion, steps=1, count=3).thin(*case)
    monkeypatch.setattr(
        DiffusionInterpolator,
        "draw",
        lambda self, number, *rest: drawn.append(number) or own(self, number, *rest),
    )
    one, free, mean = (
        DiffusionInterpolator(diffusion, steps=1, known=known, **more)
        for more in ({}, {"consistent": False}, {"count": 3})
    )
    found = [thinner.thin(*case) for thinner in (one, free, mean)]
    # what came out was not changed by what came later
    assert (
        drawn == [0, 1, 2]
        and torch.equal(found[2], alone)
        and torch.equal(free.thin(*case), found[1])
        and torch.equal(one.thin(*case), found[0])
    )
    assert sum(tensor.numel() for _, tensor in known.values()) == found[0].numel()


def test_shared_draws_are_of_one_scan(diffusion):
    known = {}
    case = given(5, 24)
    other = given(5, 24)
    other = (other[0] + 5, *other[1:])
    thinner = DiffusionInterpolator(diffusion, steps=1, known=known)
    first = thinner.thin(*case)
    assert (
        not torch.equal(thinner.thin(*other), first)
        and len(known) == 1
        and torch.equal(
            DiffusionInterpolator(diffusion, steps=1).thin(*other), thinner.thin(*other)
        )
    )


class Peak(TorchDispatchMode):
    "Bytes of tensors that are alive while it is on, and the most there were."

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.most = 0
        self._seen = set()

    def _gone(self, key, size):
        self.alive -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.untyped_storage()._cdata in self._seen
            ):
                continue
            storage = tensor.untyped_storage()
            self._seen.add(storage._cdata)
            self.alive += storage.nbytes()
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize("kind", ["regressor", "diffusion"])
def test_features_do_not_grow_with_the_scan_and_only_the_slices_do(
    kind, regressor, diffusion, monkeypatch
):
    # as it is to a scan of ordinary size
    monkeypatch.setattr("ct_nb.slices.consistency.CONSISTENCY_CHUNK", 2**14)
    make = lambda gib, **more: (
        RegressorInterpolator(regressor, memory_gib=gib, **more)
        if kind == "regressor"
        else DiffusionInterpolator(diffusion, steps=1, memory_gib=gib, **more)
    )
    gib = (0.042, 0.019)[kind == "diffusion"]
    bytes_of = lambda case, count: count * 4 * case[2].count * case[0][0].numel()
    few, many = given(12, 128, 2.5), given(36, 128, 2.5)

    def most(case, thinner):
        before = case[0].clone()
        with Peak() as peak:
            thinner.thin(*case)
        assert torch.equal(before, case[0])
        return peak.most

    assert make(gib).plan(128, 128, *many[1:3]) == (4, pytest.approx(gib, rel=0.2))
    short, long = most(few, make(gib)), most(many, make(gib))
    room = 2**21  # matrices along z, and the rows that consistency works on at a time, in float64
    # one volume of thin slices, and nothing else that grows
    assert long - short < bytes_of(many, 1) - bytes_of(few, 1) + room
    assert long - bytes_of(many, 1) < gib * 2**30 + room  # the plan keeps its word
    # as a whole it takes more, so the measure sees features
    assert most(many, make(9.0)) - bytes_of(many, 1) > 1.5 * (long - bytes_of(many, 1))
    # a sum beside the draw, not four draws
    if kind == "diffusion":
        assert most(many, make(gib, count=4)) - long < bytes_of(many, 1) + room


def test_a_memory_that_is_too_small_is_said(scan, run, tmp_path):
    go = lambda memory, model: interpolate_file(
        scan[1],
        tmp_path / "x.nii.gz",
        run,
        2.5,
        memory_gib=memory,
        model=model,
        samples=1,
        steps=1,
        progress=False,
    ).notes
    for model in ("regressor", "mean"):
        assert any(
            "the smallest portion of these slices takes about" in note
            and "more than the 0.0001 GiB" in note
            for note in go(1e-4, model)
        )
        assert not any("portion" in note for note in go(1.0, model))


def test_the_frame_is_the_inputs(scan, regressor):
    volume, _ = scan
    found = interpolate_volume(volume, RegressorInterpolator(regressor), 1.25)
    thin = found.volume
    assert (
        thin.hu.shape == (48, 48, 48)
        and np.allclose(thin.grid.spacing_mm, [3, 2.5, 1.25])
        and np.allclose(thin.grid.bounds_mm, volume.grid.bounds_mm)
    )
    positions = lambda grid: [float(grid.index_to_mm([0, 0, n])[2]) for n in range(grid.shape[0])]
    assert np.allclose(positions(thin.grid), found.thin_axis.positions_mm) and np.allclose(
        positions(volume.grid), found.thick_axis.positions_mm
    )
    back = average_slices(
        torch.from_numpy(thin.hu),
        slice_profile_matrix(found.thin_axis, found.thick_axis, found.profile),
    )
    assert (back - volume.tensor()).abs().max() < 1 and abs(
        found.reaveraged_hu - float((back - volume.tensor()).abs().max())
    ) < 1e-3
    assert np.array_equal(thin.hu, thin.hu.round())
    centres = interpolate_volume(
        volume, RegressorInterpolator(regressor), 1.0, convention="centres"
    ).volume
    assert len(centres.hu) == 56 and np.allclose(
        centres.grid.index_to_mm([0, 0, 0]), volume.grid.index_to_mm([0, 0, 0])
    )


def test_downward_slices_stay_downward(regressor):
    affine = np.diag([2.0, 2, -5, 1])
    affine[:3, 3] = [0, 0, 300]
    volume = Volume(hu(8, 24).numpy(), affine)
    found = interpolate_volume(volume, RegressorInterpolator(regressor), 1.0)
    assert found.volume.affine[2, 2] == -1 and np.allclose(
        found.volume.grid.bounds_mm, volume.grid.bounds_mm
    )


@pytest.mark.parametrize("model", ["regressor", "sample", "mean"])
def test_a_file_comes_out_and_overlays_the_input(scan, run, tmp_path, model):
    volume, path = scan
    out = tmp_path / "new" / "thin.nii.gz"
    found = interpolate_file(path, out, run, 1.0, model=model, samples=2, steps=2, progress=False)
    assert sorted(p.name for p in out.parent.iterdir()) == ["thin.nii.gz", "thin_thinning.json"]
    again = read_volume(out)  # random weights make no HU
    assert (
        np.array_equal(again.hu, found.volume.hu)
        and again.hu.shape == (60, 48, 48)
        and np.allclose(again.grid.bounds_mm, volume.grid.bounds_mm)
    )
    about = json.loads((out.parent / "thin_thinning.json").read_text())
    assert (
        about["model"] == model
        and about["reaveraged_worst_hu"] < 1
        and about["thick"] == vars(found.thick_axis)
        and about["weights"]["preset"] == "smoke"
    )


def test_a_dicom_series_goes_in_with_the_thickness_of_its_header(run, tmp_path):
    image = hu(10, 32).numpy().astype(np.int16)
    write_series(tmp_path / "series", image, z_mm=[5.0 * n for n in range(10)], SliceThickness=6.0)
    axis = SliceAxis(0.0, 5.0, 10)
    assert header_width(tmp_path / "series", axis) == (6.0, []) and header_width(
        tmp_path / "a.nii.gz", axis
    ) == (None, [])
    found = interpolate_file(
        tmp_path / "series", tmp_path / "thin.nii.gz", run, 1.0, progress=False
    )
    assert (
        found.profile == SliceProfile(6.0)
        and found.thick_axis.spacing_mm == 5
        and found.volume.hu.shape == (50, 32, 32)
    )
    overlapping = interpolate_file(
        tmp_path / "series",
        tmp_path / "thin.nii.gz",
        run,
        1.0,
        width_mm=5.0,
        shape="gaussian",
        progress=False,
    )
    assert overlapping.profile == SliceProfile(5.0, "gaussian") and not np.array_equal(
        overlapping.volume.hu, found.volume.hu
    )
    assert "one slice" in sentence(
        lambda: interpolate_file(
            write_series(tmp_path / "single", image[:1], z_mm=[0.0])[0].parent,
            tmp_path / "x.nii.gz",
            run,
            progress=False,
        )
    )


@pytest.fixture(scope="module")
def two_series(tmp_path_factory):
    return zipped(
        tmp_path_factory.mktemp("pe") / "0001.zip",
        pair_members(body((60, 32, 40)), SeriesDescription="chest"),
    )


def test_one_series_of_several_is_named(two_series, run, tmp_path):
    "A patient's zip of a PE archive holds a thick and a thin series."
    go = lambda **more: interpolate_file(
        **dict(path=two_series, out=tmp_path / "thin.nii.gz", weights=run, progress=False) | more
    )
    text = sentence(go)
    assert (
        "0001.zip: holds 2 CT series; choose one with series=UID (--series UID): " in text
        and "1.2.1 (12 slices, chest)" in text
        and "1.2.2 (60 slices, chest)" in text
    )
    found = go(series="1.2.1", convention="centres")
    assert (
        found.thick_axis == SliceAxis(2.0, 5.0, 12)
        and found.thin_axis == SliceAxis(2.0, 1.0, 56)
        and found.profile == SliceProfile(5.0)
    )
    about = json.loads((tmp_path / "thin_thinning.json").read_text())
    assert (about["series"], about["convention"]) == ("1.2.1", "centres")
    assert "1 mm apart already" in sentence(
        lambda: go(series="1.2.2")
    ) and "has no series 1.2.3" in sentence(lambda: go(series="1.2.3"))
    with zipfile.ZipFile(two_series) as archive:
        archive.extractall(tmp_path / "folder")
    assert np.array_equal(
        go(path=tmp_path / "folder", series="1.2.1", convention="centres").volume.hu,
        found.volume.hu,
    )


@pytest.mark.parametrize("claimed", [0.0, 400.0, 12.0])
def test_a_thickness_that_cannot_be_true_is_said_and_not_used(claimed, run, tmp_path):
    "Neither silently, nor as a refusal of a width that nobody gave."
    write_series(
        tmp_path / "series",
        hu(2, 24).numpy().astype(np.int16),
        z_mm=[0.0, 5.0],
        SliceThickness=claimed,
    )
    found = interpolate_file(
        tmp_path / "series", tmp_path / "thin.nii.gz", run, 1.0, progress=False
    )
    assert found.profile == SliceProfile(5.0) and any(
        f"SliceThickness of {claimed} mm cannot be that of slices 5 mm apart" in note
        for note in found.notes
    )


def sentence(call, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_what_cannot_be_done_is_said(scan, run, regressor, tmp_path):
    volume, path = scan
    out = tmp_path / "out" / "x.nii.gz"
    go = lambda p=path, spacing=1.0, **more: interpolate_file(
        p, out, run, spacing, progress=False, **more
    )
    save = (
        lambda name, array, affine: nibabel.save(
            nibabel.Nifti1Image(array, affine), tmp_path / name
        )
        or tmp_path / name
    )
    image = hu(6, 24).numpy().astype(np.int16).transpose(2, 1, 0)
    assert "at least two along each axis" in sentence(
        lambda: go(save("one.nii.gz", image[..., :1], np.diag([2, 2, 5, 1])))
    )
    assert "4 dimensions" in sentence(
        lambda: go(save("four.nii.gz", np.stack([image, image], -1), np.diag([2, 2, 5, 1])))
    )
    bare = nibabel.Nifti1Image(image, None)
    bare.header["pixdim"][1:4] = 0
    nibabel.save(bare, tmp_path / "bare.nii.gz")
    raw = bytearray(__import__("gzip").decompress((tmp_path / "bare.nii.gz").read_bytes()))
    raw[76 + 4 : 76 + 16] = np.zeros(3, np.float32).tobytes()
    (tmp_path / "bare.nii").write_bytes(raw)
    assert "voxel spacing" in sentence(lambda: go(tmp_path / "bare.nii"))
    assert "5 mm apart already, 5 mm were asked for" in sentence(lambda: go(spacing=5.0))
    assert "spacing_mm: must be above 0" in sentence(lambda: go(spacing=0.0))
    assert "learnt from 4 to 6 mm" in sentence(
        lambda: go(save("thick8.nii.gz", image, np.diag([2, 2, 8, 1])))
    )
    assert "another axis" in sentence(
        lambda: go(
            save("side.nii.gz", image.transpose(2, 0, 1), np.diag([5, 2, 2, 1])), spacing=1.0
        )
    )
    assert "no such file" in sentence(lambda: go(tmp_path / "none.nii.gz"))
    assert "choose a name that ends in" in sentence(
        lambda: interpolate_file(path, tmp_path / "x.jpg", run)
    )
    assert "model: must be one of" in sentence(lambda: go(model="best"))
    assert "no such file" in sentence(
        lambda: interpolate_file(path, out, tmp_path / "nowhere"), WeightsError
    )
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_settings_without_sense_are_refused_before_a_scan_is_read(scan, run, tmp_path, monkeypatch):
    "Minutes of work must not end with a sentence that could have been said at once."
    _, path = scan
    out, was = tmp_path / "out" / "x.nii.gz", path.read_bytes()
    go = lambda **more: interpolate_file(
        **dict(path=path, out=out, weights=run, progress=False) | more
    )
    read = []
    monkeypatch.setattr("ct_nb.slices.thin_ct_files.read_ct", lambda *given: read.append(given))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        assert "memory_gib: must be a number above 0" in sentence(lambda: go(memory_gib=value))
    for value in (-3.0, float("nan"), float("inf")):
        assert "noise_hu: must be 0 or more" in sentence(lambda: go(noise_hu=value))
    assert (
        "convention must be 'slabs' or 'centres'" in sentence(lambda: go(convention="edges"))
        and "shape must be" in sentence(lambda: go(shape="round"))
        and "width_mm must be above 0" in sentence(lambda: go(width_mm=-1.0))
    )
    assert "count: the mean is of 1 draw" in sentence(lambda: go(model="mean", samples=0))
    assert "is the scan itself" in sentence(lambda: go(out=path)) and path.read_bytes() == was
    (tmp_path / "folder.nii.gz").mkdir()
    assert "folder.nii.gz is a folder" in sentence(lambda: go(out=tmp_path / "folder.nii.gz"))
    assert f"cannot be written, {path} is a file" in sentence(
        lambda: go(out=path / "new" / "x.nii.gz")
    )
    monkeypatch.setattr("os.access", lambda *args: False)
    assert "is not yours to write to" in sentence(go)
    assert not read and not out.parent.exists()


def test_a_file_that_was_there_is_replaced_whole(scan, run, tmp_path):
    (tmp_path / "old.nii").write_bytes(b"old")
    interpolate_file(scan[1], tmp_path / "old.nii", run, 2.5, progress=False)
    assert read_volume(tmp_path / "old.nii").hu.shape == (24, 48, 48)


def test_a_profile_that_is_none_and_slices_that_nobody_counts(scan, run, tmp_path):
    go = lambda **more: interpolate_file(
        **dict(path=scan[1], out=tmp_path / "x.nii.gz", weights=run, spacing_mm=2.5, progress=False)
        | more
    )
    # 0 is not "as the header says"
    assert "width_mm must be above 0, got 0.0" in sentence(lambda: go(width_mm=0.0))
    assert (
        "a profile of 500 mm is wider than" in sentence(lambda: go(width_mm=500.0))
        and not (tmp_path / "x.nii.gz").exists()
    )
    assert "thick.nii.gz would become 600000 slices of 48 × 48 pixels" in sentence(
        lambda: go(spacing_mm=1e-4)
    )
    # few voxels, but a covariance of 12000²
    assert "12000 slices" in sentence(lambda: go(spacing_mm=0.005))
    wide = go(width_mm=35.0)
    assert wide.reaveraged_hu > 1 and any(
        "miss the thick ones by up to" in note for note in wide.notes
    )
    assert not any(
        "miss the thick ones" in note
        for note in go(width_mm=35.0, noise_hu=20.0).notes + go().notes
    )


def test_the_file_is_named_where_a_model_has_not_seen_such_slices(run, tmp_path):
    Volume(hu(6, 24).numpy(), np.diag([2.0, 2, 8, 1])).save(tmp_path / "eight.nii.gz")
    assert "eight.nii.gz: its slices are 8 mm apart" in sentence(
        lambda: interpolate_file(
            tmp_path / "eight.nii.gz", tmp_path / "x.nii.gz", run, 2.0, progress=False
        )
    )


def test_the_command_thins_a_named_series_and_shows_progress(
    two_series, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ("interpolate-slices", two_series, "--weights", run)
    chosen = ("--spacing-mm", 1.25, "--series", "1.2.1", "--cover", "centers", "--out", "thin.nii")
    result = ct_nb(*words, *chosen)
    assert (
        "12 slices 5 mm apart → 45 slices 1.25 mm apart" in result.stdout
        and result.stdout.splitlines()[-1] == "thin.nii"
        and "12/12" in result.stderr
        and "thinning" in result.stderr
        and "thick slice" in result.stderr
    )
    assert read_volume(tmp_path / "thin.nii").hu.shape == (45, 32, 40)
    assert "--series UID" in refusal(*words)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--memory-gib", "inf"), "--memory-gib: must be"),
        (("--fwhm-mm", 0), "width_mm must be above 0"),
        (("--out", "x.jpg"), "out: unknown kind of file 'x.jpg'"),
        (("--spacing-mm", 5), "mm apart already"),
    ],
)
def test_the_command_ends_with_one_sentence(scan, run, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert words in refusal("interpolate-slices", scan[1], "--weights", run, *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_thicker_slices_go_on_when_told_to_and_the_note_says_so(run, tmp_path, scan):
    volume = Volume(hu(6, 24).numpy(), np.diag([2.0, 2, 8, 1]))
    volume.save(tmp_path / "eight.nii.gz")
    found = interpolate_file(
        tmp_path / "eight.nii.gz", tmp_path / "thin.nii.gz", run, 2.0, anyway=True, progress=False
    )
    assert any("nobody tested" in note for note in found.notes) and found.reaveraged_hu < 1
    axis = SliceAxis(0, 5.0, 9)
    notes = lambda *args: check_training_range(SliceAxis(0, 5.0, 9), *args)
    assert not notes(SliceProfile(5.0), 1.0, SEEN) and not notes(SliceProfile(5.0), 0.5, None)
    assert (
        "finer detail is only interpolated" in notes(SliceProfile(5.0), 0.5, SEEN)[0]
        and "profile is 9 mm" in notes(SliceProfile(9.0), 1.0, SEEN)[0]
    )
    assert (
        "thinner than"
        in check_training_range(SliceAxis(0, 3.0, 9), SliceProfile(3.0), 1.0, SEEN)[0]
    )


def test_a_run_without_the_model_that_is_asked_for(regressor, scan, tmp_path):
    slices = SliceModels(regressor)
    save_weights(tmp_path / "run", slices, {"system": "slices", "network": slices.networks()})
    assert "holds no trained diffusion model" in sentence(
        lambda: interpolate_file(scan[1], tmp_path / "x.nii.gz", tmp_path / "run", model="sample")
    )
    save_weights(
        tmp_path / "run",
        regressor,
        {"system": "slices_stage", "network": regressor.config.to_dict()},
    )
    assert "slices_stage" in sentence(
        lambda: interpolate_file(scan[1], tmp_path / "x.nii.gz", tmp_path / "run"), WeightsError
    )


def test_nothing_half_written(scan, run, tmp_path, monkeypatch):
    out = tmp_path / "out" / "thin.nii.gz"

    def broken(path, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ct_nb.physics.volume._write_nifti", broken)
    with pytest.raises(OSError):
        interpolate_file(scan[1], out, run, progress=False)
    assert not list(out.parent.iterdir())
