"""CT files: the frame of the input, the slice thickness of the header, and what is refused."""

import json
import zipfile

import nibabel
import numpy as np
import pytest
import torch
from ct_files import body, pair_members, write_series, zipped
from refusals import refused
from slice_scans import body_hu

from ct_nb.core.errors import InputError
from ct_nb.data.read import read_volume
from ct_nb.physics.volume import Volume
from ct_nb.slices.inference import RegressorInterpolator
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    slice_profile_matrix,
)
from ct_nb.slices.thin_ct_files import (
    header_width,
    interpolate_file,
    interpolate_volume,
    thin_slice_affine,
)
from ct_nb.slices.train import SliceModels
from ct_nb.training.checkpoints import WeightsError, save_weights


@pytest.fixture
def interpolate(thick_ct, slices_run, tmp_path):
    "`interpolate_file` of the thick CT to out/thin.nii.gz; any argument can be replaced."
    arguments = dict(
        path=thick_ct[1],
        out=tmp_path / "out" / "thin.nii.gz",
        weights=slices_run,
        spacing_mm=2.5,
        progress=False,
    )

    def call(**more):
        return interpolate_file(**arguments | more)

    return call


def slice_positions(grid) -> np.ndarray:
    "z, LPS mm, of every slice."
    return np.array([grid.index_to_mm([0, 0, n])[2] for n in range(grid.shape[0])])


def test_the_frame_is_the_inputs(thick_ct, regressor):
    volume, _ = thick_ct
    result = interpolate_volume(volume, RegressorInterpolator(regressor), 1.25)
    thin = result.volume
    assert thin.hu.shape == (48, 48, 48)
    np.testing.assert_allclose(thin.grid.spacing_mm, [3, 2.5, 1.25])
    np.testing.assert_allclose(thin.grid.bounds_mm, volume.grid.bounds_mm)
    np.testing.assert_allclose(slice_positions(thin.grid), result.thin_axis.positions_mm)
    np.testing.assert_allclose(slice_positions(volume.grid), result.thick_axis.positions_mm)
    matrix = slice_profile_matrix(result.thin_axis, result.thick_axis, result.profile)
    averaged = average_slices(torch.from_numpy(thin.hu), matrix)
    misfit = float((averaged - volume.tensor()).abs().max())
    assert misfit < 1 and result.reaveraged_hu == pytest.approx(misfit, abs=1e-3)
    assert np.array_equal(thin.hu, thin.hu.round())


def test_thin_slices_from_first_to_last_centre(thick_ct, regressor):
    volume, _ = thick_ct
    thin = interpolate_volume(
        volume, RegressorInterpolator(regressor), 1.0, convention="centres"
    ).volume
    assert len(thin.hu) == 56
    first = [0, 0, 0]
    np.testing.assert_allclose(thin.grid.index_to_mm(first), volume.grid.index_to_mm(first))


def test_downward_slices_stay_downward(regressor):
    affine = np.diag([2.0, 2, -5, 1])
    affine[:3, 3] = [0, 0, 300]
    volume = Volume(body_hu(8, 24).numpy(), affine)
    thin = interpolate_volume(volume, RegressorInterpolator(regressor), 1.0).volume
    assert thin.affine[2, 2] == -1
    np.testing.assert_allclose(thin.grid.bounds_mm, volume.grid.bounds_mm)


def test_the_affine_of_a_sheared_frame():
    "Gantry tilt: each slice is shifted along y as well."
    affine = np.eye(4)
    affine[:3, 2] = [0, 1.0, 5.0]
    thin = thin_slice_affine(affine, SliceAxis(0.0, 5.0, 4), SliceAxis(-2.0, 1.0, 20))
    np.testing.assert_allclose(thin[:3, 2], [0, 0.2, 1.0])
    np.testing.assert_allclose(thin[:3, 3], [0, -0.4, -2.0])


@pytest.mark.parametrize("model", ["regressor", "sample", "mean"])
def test_a_file_overlays_the_input(thick_ct, interpolate, tmp_path, model):
    volume, _ = thick_ct
    result = interpolate(spacing_mm=1.0, model=model, samples=2, steps=2)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["thin.nii.gz", "thin_thinning.json"]
    stored = read_volume(out / "thin.nii.gz")
    assert np.array_equal(stored.hu, result.volume.hu) and stored.hu.shape == (60, 48, 48)
    np.testing.assert_allclose(stored.grid.bounds_mm, volume.grid.bounds_mm)
    about = json.loads((out / "thin_thinning.json").read_text())
    assert about["model"] == model and about["reaveraged_worst_hu"] < 1
    assert about["thick"] == vars(result.thick_axis)
    assert about["weights"]["preset"] == "smoke"


def test_a_dicom_series_brings_its_slice_thickness(interpolate, tmp_path):
    image = body_hu(10, 32).numpy().astype(np.int16)
    series = tmp_path / "series"
    write_series(series, image, z_mm=[5.0 * n for n in range(10)], SliceThickness=6.0)
    axis = SliceAxis(0.0, 5.0, 10)
    assert header_width(series, axis) == (6.0, [])
    assert header_width(tmp_path / "a.nii.gz", axis) == (None, [])
    result = interpolate(path=series, spacing_mm=1.0)
    assert result.profile == SliceProfile(6.0) and result.thick_axis.spacing_mm == 5
    assert result.volume.hu.shape == (50, 32, 32)
    other = interpolate(path=series, spacing_mm=1.0, width_mm=5.0, shape="gaussian")
    assert other.profile == SliceProfile(5.0, "gaussian")
    assert not np.array_equal(other.volume.hu, result.volume.hu)
    single = write_series(tmp_path / "single", image[:1], z_mm=[0.0])[0].parent
    with pytest.raises(ValueError, match="one slice"):
        interpolate(path=single)


@pytest.fixture(scope="module")
def two_series(tmp_path_factory):
    "A patient's zip of a PE archive: a thick and a thin series."
    return zipped(
        tmp_path_factory.mktemp("pe") / "0001.zip",
        pair_members(body((60, 32, 40)), SeriesDescription="chest"),
    )


def test_one_of_several_series_is_chosen(two_series, interpolate, tmp_path):
    with pytest.raises(ValueError) as caught:
        interpolate(path=two_series)
    message = str(caught.value)  # it must name the flag and both series
    for part in ("--series UID", "1.2.1 (12 slices, chest)", "1.2.2 (60 slices, chest)"):
        assert part in message
    result = interpolate(path=two_series, series="1.2.1", spacing_mm=1.0, convention="centres")
    assert result.thick_axis == SliceAxis(2.0, 5.0, 12)
    assert result.thin_axis == SliceAxis(2.0, 1.0, 56)
    assert result.profile == SliceProfile(5.0)
    about = json.loads((tmp_path / "out" / "thin_thinning.json").read_text())
    assert (about["series"], about["convention"]) == ("1.2.1", "centres")
    with pytest.raises(ValueError, match="1 mm apart already"):
        interpolate(path=two_series, series="1.2.2", spacing_mm=1.0)
    with pytest.raises(ValueError, match="has no series 1.2.3"):
        interpolate(path=two_series, series="1.2.3")
    with zipfile.ZipFile(two_series) as archive:
        archive.extractall(tmp_path / "folder")
    unpacked = interpolate(
        path=tmp_path / "folder", series="1.2.1", spacing_mm=1.0, convention="centres"
    )
    assert np.array_equal(unpacked.volume.hu, result.volume.hu)


@pytest.mark.parametrize("thickness", [0.0, 400.0, 12.0])
def test_an_impossible_slice_thickness_is_noted_and_not_used(thickness, interpolate, tmp_path):
    write_series(
        tmp_path / "series",
        body_hu(2, 24).numpy().astype(np.int16),
        z_mm=[0.0, 5.0],
        SliceThickness=thickness,
    )
    result = interpolate(path=tmp_path / "series", spacing_mm=1.0)
    assert result.profile == SliceProfile(5.0)
    assert any(f"SliceThickness of {thickness} mm" in note for note in result.notes)


def _save_nifti(path, array, affine):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_scans_that_are_refused(interpolate, tmp_path):
    image = body_hu(6, 24).numpy().astype(np.int16).transpose(2, 1, 0)
    spacings = np.diag([2, 2, 5, 1])
    files = {
        "at least two along each axis": (image[..., :1], spacings),
        "4 dimensions": (np.stack([image, image], -1), spacings),
        "trained on 4 to 6 mm": (image, np.diag([2, 2, 8, 1])),
        "another axis": (image.transpose(2, 0, 1), np.diag([5, 2, 2, 1])),
    }
    for number, (reason, (array, affine)) in enumerate(files.items()):
        path = _save_nifti(tmp_path / f"{number}.nii.gz", array, affine)
        with pytest.raises(ValueError, match=reason) as caught:
            interpolate(path=path, spacing_mm=1.0)
        assert path.name in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        interpolate(path=tmp_path / "none.nii.gz")
    assert not (tmp_path / "out").exists()


def test_a_nifti_without_spacing_is_refused(interpolate, tmp_path):
    image = body_hu(6, 24).numpy().astype(np.int16).transpose(2, 1, 0)
    header = nibabel.Nifti1Image(image, None)
    raw = bytearray(header.to_bytes())
    raw[76 + 4 : 76 + 16] = np.zeros(3, np.float32).tobytes()  # pixdim
    (tmp_path / "bare.nii").write_bytes(raw)
    with pytest.raises(ValueError, match="voxel spacing"):
        interpolate(path=tmp_path / "bare.nii")


def test_impossible_settings_are_refused_before_the_scan_is_read(
    interpolate, tmp_path, monkeypatch
):
    reads = []
    monkeypatch.setattr("ct_nb.slices.thin_ct_files.read_ct", lambda *given: reads.append(given))
    (tmp_path / "folder.nii.gz").mkdir()
    for argument, settings in (
        ("memory_gib", {"memory_gib": 0.0}),
        ("noise_hu", {"noise_hu": -3.0}),
        ("convention", {"convention": "edges"}),
        ("shape", {"shape": "round"}),
        ("width_mm", {"width_mm": -1.0}),
        ("width_mm", {"width_mm": 0.0}),  # 0 is not "as the header says"
        ("count", {"model": "mean", "samples": 0}),
        ("model", {"model": "best"}),
        ("out", {"out": tmp_path / "folder.nii.gz"}),
        ("out", {"out": tmp_path / "x.jpg"}),
    ):
        with refused(argument):
            interpolate(**settings)
    assert not reads and not (tmp_path / "out").exists()


def test_places_that_cannot_be_written_to(thick_ct, interpolate, monkeypatch):
    _, path = thick_ct
    content = path.read_bytes()
    for out in (path, path / "new" / "x.nii.gz"):
        with refused("out"):
            interpolate(out=out)
    assert path.read_bytes() == content
    monkeypatch.setattr("os.access", lambda *args: False)
    with refused("out"):
        interpolate()


def test_an_existing_file_is_replaced(interpolate, tmp_path):
    (tmp_path / "old.nii").write_bytes(b"old")
    interpolate(out=tmp_path / "old.nii")
    assert read_volume(tmp_path / "old.nii").hu.shape == (24, 48, 48)


def test_profiles_and_spacings_without_sense(interpolate, tmp_path):
    with refused("width_mm"):
        interpolate(width_mm=500.0)
    for spacing_mm, slices in ((1e-4, 600000), (0.005, 12000)):
        with refused("spacing_mm") as caught:
            interpolate(spacing_mm=spacing_mm)
        assert caught.value.slices == slices
    with refused("spacing_mm"):
        interpolate(spacing_mm=0.0)
    assert not (tmp_path / "out" / "thin.nii.gz").exists()


def test_a_misfit_in_spite_of_consistency_is_noted(interpolate):
    def differs(notes):
        return any("differ from the thick ones" in note for note in notes)

    wide = interpolate(width_mm=35.0)
    assert wide.reaveraged_hu > 1 and differs(wide.notes)
    assert not differs(interpolate(width_mm=35.0, noise_hu=20.0).notes)
    assert not differs(interpolate().notes)


@pytest.mark.parametrize("model", ["regressor", "mean"])
def test_a_memory_that_is_too_small_is_noted(model, interpolate):
    def notes(memory_gib):
        result = interpolate(memory_gib=memory_gib, model=model, samples=1, steps=1)
        return [note for note in result.notes if "smallest tile" in note]

    assert len(notes(1e-4)) == 1 and not notes(1.0)


def test_thicker_slices_need_anyway(interpolate, tmp_path):
    path = tmp_path / "eight.nii.gz"
    Volume(body_hu(6, 24).numpy(), np.diag([2.0, 2, 8, 1])).save(path)
    with pytest.raises(InputError, match="eight.nii.gz"):
        interpolate(path=path)
    result = interpolate(path=path, anyway=True)
    assert any("outside the tested range" in note for note in result.notes)
    assert result.reaveraged_hu < 1


def test_runs_without_the_model_asked_for(regressor, interpolate, tmp_path):
    run = tmp_path / "run"
    models = SliceModels(regressor)
    save_weights(run, models, {"system": "slices", "network": models.networks()})
    with refused("model"):
        interpolate(weights=run, model="sample")
    save_weights(run, regressor, {"system": "slices_stage", "network": regressor.config.to_dict()})
    with pytest.raises(WeightsError, match="slices_stage"):
        interpolate(weights=run)
    with pytest.raises(WeightsError, match="no such file"):
        interpolate(weights=tmp_path / "nowhere")


def test_nothing_half_written(interpolate, tmp_path, monkeypatch):
    def full_disk(path, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ct_nb.physics.volume._write_nifti", full_disk)
    with pytest.raises(OSError):
        interpolate()
    assert not list((tmp_path / "out").iterdir())
