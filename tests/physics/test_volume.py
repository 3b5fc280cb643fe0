"Grid, resampling, body and saving beyond nbs/physics/00_volume.ipynb: peers, faults, real scans."

import errno
import resource
import time

import numpy as np
import pytest
import torch
from ct_files import affine_of, body
from refusals import refused
from scipy.spatial.transform import Rotation

from ct_nb.core.errors import FileError
from ct_nb.data.read import read_ct
from ct_nb.phantom.chest import phantom
from ct_nb.physics import volume as volume_module
from ct_nb.physics.volume import (
    AIR_HU,
    WINDOWS,
    Grid,
    Volume,
    find_body,
    get_window,
    hu_to_mu,
    mu_to_hu,
    mu_water_per_mm,
    resample,
)


def oblique(spacing=(1.7, 2.3, 3.1), angles=(20, -15, 40), origin=(10, -20, 300)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    return affine


# ---------------------------------------------------------------- grids and attenuation
@pytest.mark.parametrize(
    "shape, affine, argument",
    [
        ((4, 4), np.eye(4), "shape"),
        ((4, 0, 4), np.eye(4), "shape"),
        ((4, 4, 4), np.eye(3), "affine"),
        ((4, 4, 4), np.diag([1, 0, 1, 1.0]), "affine"),
        ((4, 4, 4), np.full((4, 4), np.nan), "affine"),
        ((4, 4, 4), affine_of().T, "affine"),
    ],
)
def test_grid_refuses(shape, affine, argument):
    with refused(argument):
        Grid(shape, affine)


def test_grid_is_not_changed_from_outside():
    affine = affine_of()
    grid = Grid((3, 4, 5), affine)
    affine[0, 3] = 999
    assert grid.affine[0, 3] == -40
    with pytest.raises(ValueError):
        grid.affine[0, 3] = 0


def test_resized_keeps_the_box():
    grid = Grid((30, 40, 50), oblique())
    for shape in (15, (10, 80, 33)):
        assert np.allclose(grid.resized(shape).bounds_mm, grid.bounds_mm)
        assert np.allclose(grid.resized(shape).center_mm, grid.center_mm)


def test_water_follows_the_table_between_its_nodes():
    energies = np.linspace(10, 500, 200)
    mu = [mu_water_per_mm(e) for e in energies]
    assert (np.diff(mu) < 0).all()
    # NIST's own intermediate values (XCOM, water with coherent scattering, cm²/g): 70 keV 0.1929,
    # 90 keV 0.1766, 120 keV 0.1614
    for energy, per_cm in ((70, 0.1929), (90, 0.1766), (120, 0.1614)):
        assert abs(mu_water_per_mm(energy) * 10 / per_cm - 1) < 0.01


@pytest.mark.parametrize("energy", [9.9, 501, 0, -60, np.nan])
def test_energy_out_of_range(energy):
    with refused("energy_kev"):
        hu_to_mu(0.0, energy)


def test_hu_and_mu_are_inverse_on_arrays_tensors_and_numbers():
    hu = np.array([-1000, -500, 0, 3000])
    assert np.allclose(mu_to_hu(hu_to_mu(hu, 80), 80), hu)
    assert hu_to_mu(hu.astype(np.float32)).dtype == np.float32
    assert float(hu_to_mu(0)) == mu_water_per_mm(60.0) and float(hu_to_mu(-1500.0)) == 0
    x = torch.tensor([-900.0, 200.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hu_to_mu, x) and torch.autograd.gradcheck(mu_to_hu, x)


def test_windows_name_themselves():
    for name, window in WINDOWS.items():
        assert name == window.name == get_window(window).name
    with refused("window") as caught:
        Volume(np.zeros((2, 2, 2)), np.eye(4)).window("cheast")
    assert "'cheast'" in caught.value.reason and "chest" in caught.value.reason
    assert Volume(np.full((2, 2, 2), -2000.0), np.eye(4)).window("lung").min() == -1


# ---------------------------------------------------------------- resampling
def sitk_linear(hu, source, target, outside=AIR_HU):
    import SimpleITK

    def image(values, grid):
        result = SimpleITK.GetImageFromArray(values)
        result.SetSpacing(grid.spacing_mm.tolist())
        result.SetDirection((grid.affine[:3, :3] / grid.spacing_mm).ravel().tolist())
        result.SetOrigin(grid.affine[:3, 3].tolist())
        return result

    reference = image(np.zeros(target.shape, np.float32), target)
    return SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(
            image(hu, source), reference, SimpleITK.Transform(), SimpleITK.sitkLinear, outside
        )
    )


@pytest.mark.parametrize("turn", [np.eye(4), oblique((1, 1, 1), origin=(0, 0, 0))])
def test_finer_grids_are_trilinear_as_in_simpleitk(turn):
    hu = np.random.default_rng(1).normal(0, 100, (14, 15, 16)).astype(np.float32)
    source = Grid(hu.shape, affine_of((2.0, 2.0, 2.0), (0, 0, 0)))
    target = Grid.cube(20, 14, source.center_mm)  # 0.7 mm voxels well inside
    target = Grid(
        target.shape,
        np.block(
            [
                [
                    turn[:3, :3] @ target.affine[:3, :3],
                    (turn[:3, :3] @ (target.affine[:3, 3] - source.center_mm) + source.center_mm)[
                        :, None
                    ],
                ],
                [np.zeros((1, 3)), np.ones((1, 1))],
            ]
        ),
    )
    assert np.abs(resample(hu, source, target) - sitk_linear(hu, source, target)).max() < 1e-2


def test_flips_and_axis_swaps_are_exact():
    hu = body()
    source = Grid(hu.shape, affine_of())
    swapped = np.zeros((4, 4))
    swapped[:, 0] = -source.affine[:, 2]
    swapped[:, 1] = source.affine[:, 0]
    swapped[:, 2] = -source.affine[:, 1]
    swapped[:, 3] = source.affine[:, 3]
    swapped[:3, 3] = source.index_to_mm((0, hu.shape[1] - 1, hu.shape[0] - 1))
    target = Grid((hu.shape[1], hu.shape[2], hu.shape[0]), swapped)
    assert (resample(hu, source, target) == hu[::-1, ::-1].transpose(1, 2, 0)).all()
    assert (Volume(resample(hu, source, target), swapped).resample_onto(source).hu == hu).all()


@pytest.mark.parametrize("shape", [(5, 7, 9), (12, 16, 20), (11, 31, 39), (1, 1, 1), (24, 64, 80)])
def test_mass_is_kept_at_any_coarsening_and_at_whole_refinements(shape):
    hu = body()
    source = Grid(hu.shape, affine_of())
    assert (
        abs(resample(hu, source, source.resized(shape)).mean(dtype=np.float64) - hu.mean()) < 2e-3
    )


def test_mass_is_kept_through_a_rotated_coarse_grid():
    points = Grid.cube(80, 160).centers_mm().numpy()
    ball = np.where((points**2).sum(-1) < 50**2, 40.0, AIR_HU).astype(np.float32)
    for angles in ((0, 0, 45), (20, -15, 40), (30, 30, 30)):
        cube = Grid.cube(32, 192)
        target = Grid(
            cube.shape,
            np.block(
                [
                    [
                        Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
                        @ cube.affine[:3],
                    ],
                    [np.array([[0, 0, 0, 1.0]])],
                ]
            ),
        )
        mass = (resample(ball, Grid.cube(80, 160), target) - AIR_HU).sum() * 6**3
        assert abs(mass / ((ball - AIR_HU).sum() * 2**3) - 1) < 2e-3


def test_outside_is_air_and_the_last_voxel_reaches_its_edge():
    source = Grid((2, 3, 4), np.eye(4))
    assert (
        resample(
            np.zeros(source.shape, np.float32),
            source,
            Grid(
                (4, 6, 8),
                np.diag([0.5, 0.5, 0.5, 1]) - 0.25 * np.pad(np.ones((3, 1)), ((0, 1), (3, 0))),
            ),
        )
        == 0
    ).all()
    away = np.eye(4)
    away[:3, 3] = 100
    for linear in (np.eye(3), oblique()[:3, :3]):
        away[:3, :3] = linear
        assert (
            resample(np.zeros(source.shape, np.float32), source, Grid((5, 5, 5), away)) == AIR_HU
        ).all()


def test_a_sheared_volume_stands_straight_on_a_straight_grid():
    sheared = np.eye(4)
    sheared[:3, :3] = [[2, 0, 0], [0, 2, 0.9], [0, 0, 3]]
    sheared[:3, 3] = (-50, -70, -45)
    grid = Grid((30, 50, 50), sheared)

    def anatomy(points):
        return 40 * np.sin(points[..., 0] / 15) + 0.8 * points[..., 1] - 0.5 * points[..., 2]

    straight = Grid.cube(16, 40)
    assert (
        np.abs(
            resample(anatomy(grid.centers_mm().numpy()).astype(np.float32), grid, straight)
            - anatomy(straight.centers_mm().numpy())
        ).max()
        < 1.5
    )


def test_thin_slices_onto_128_cubed_in_about_a_second():
    hu = np.random.default_rng(0).normal(-400, 500, (300, 256, 256)).astype(np.float32)
    source = Grid(hu.shape, affine_of((1.37, 1.37, 1.0)))
    start = time.process_time()
    resample(hu, source, Grid.cube(128, 320, source.center_mm))
    assert time.process_time() - start < 3  # seconds of processor, over all threads


# ---------------------------------------------------------------- the body and the cube
def patient_on_couch(offset_mm=(40.0, 60.0), couch=True) -> Volume:
    grid = Grid(
        (40, 120, 120),
        np.array([[4.0, 0, 0, -240], [0, 4, 0, -240], [0, 0, 6, -500], [0, 0, 0, 1]]),
    )
    x, y, _ = np.moveaxis(grid.centers_mm().numpy(), -1, 0)
    x, y = x - offset_mm[0], y - offset_mm[1]
    hu = np.full(grid.shape, -1000.0)
    if couch:
        hu[(np.abs(y - 118) < 3) & (np.abs(x) < 200)] = 50  # its top touches the back
        hu[(np.abs(y - 160) < 3) & (np.abs(x) < 200)] = 50  # its underside: a hollow box
        hu[(np.abs(np.abs(x) - 200) < 3) & (y > 118) & (y < 160)] = 50
    hu[(x / 160) ** 2 + (y / 115) ** 2 < 1] = 30
    hu[((np.abs(x) - 65) / 50) ** 2 + (y / 80) ** 2 < 1] = -850
    return Volume(hu, grid.affine)


@pytest.mark.parametrize("offset", [(0, 0), (40, 60), (-50, -30)])
def test_the_body_excludes_its_couch(offset):
    with_couch = patient_on_couch(offset)
    without = patient_on_couch(offset, couch=False)
    # its couch touches the back and is hollow
    for scan in (with_couch, without):
        assert np.abs(scan.body_center_mm - [*offset, -383]).max() <= 8


def fraction_outside(cube) -> float:
    "The fraction of the body outside the cube, from its note; 0 without one."
    notes = [note for note in cube.notes if "of the body lies outside the" in note]
    return float(notes[0].split("%")[0]) / 100 if notes else 0.0


def test_cube_has_its_position_its_least_value_and_its_note():
    scan = patient_on_couch((40, 60))
    scan.hu[scan.hu == -1000] = -1024
    for size in (32, 64):
        cube = scan.to_grid(size)
        assert cube.hu.shape == (size,) * 3 and cube.hu.min() == AIR_HU
        assert cube.grid == Grid.cube(size, 320, scan.body_center_mm)
        assert len(cube.notes) <= 1 and scan.notes == []
    narrow = scan.to_grid(32, side_mm=160)
    assert fraction_outside(narrow) > 0.3 and scan.to_grid(32, 500).notes == []
    assert (
        np.abs(
            scan.to_grid(64).hu.reshape(32, 2, 32, 2, 32, 2).mean((1, 3, 5)) - scan.to_grid(32).hu
        ).max()
        < 1e-2
    )


def test_no_body():
    with refused("volume"):
        Volume(np.full((20, 40, 40), -1000.0), affine_of()).to_grid(32)


def test_cube_lies_over_the_scan():
    scan = patient_on_couch((40, 60))
    back = scan.to_grid(128).resample_onto(scan.grid)
    assert back.grid == scan.grid
    inside = (np.abs(scan.grid.centers_mm().numpy() - scan.body_center_mm) < [155, 155, 110]).all(
        -1
    )
    assert np.abs(back.hu - scan.hu)[inside].mean() < 40  # edges only
    assert np.median(np.abs(back.hu - scan.hu)[inside]) < 0.01


def test_real_scans_are_centred(real_ct):
    """What holds for any CT: the cube is centred on the body, its note is the fraction of the body
    outside, and that is 0 where the body is narrower than the cube.
    """
    for path in sorted(real_ct.glob("*.nii.gz"))[::4]:
        scan = read_ct(path)
        cube = scan.to_grid(32)
        mask, coarse = find_body(scan)
        points = coarse.index_to_mm(np.argwhere(mask)[:, ::-1])
        low, high = points.min(0), points.max(0)
        # to the rounding of the centre to 1 mm
        assert np.abs(cube.grid.center_mm - (low + high) / 2).max() <= 0.51, path.name
        assert np.array_equal(cube.grid.extent_mm, [320, 320, 320]), path.name
        outside = (np.abs(points - cube.grid.center_mm) > 160).any(1).mean()
        assert abs(fraction_outside(cube) - outside) < 1e-3, (path.name, cube.notes)
        assert ((high - low).max() > 319) or fraction_outside(cube) == 0, path.name
        inside = np.abs(points - cube.grid.center_mm).max(1) < 155
        index = np.round(cube.grid.mm_to_index(points[inside])).astype(int)
        assert np.mean(cube.hu[tuple(index.T[::-1])] > AIR_HU) > 0.99, path.name


def test_lungs_behind_a_thin_wall_belong_to_the_body():
    made = phantom(36, 64)
    mask, coarse = find_body(made.volume)
    lungs = (made.regions > 0) & (made.regions < 6)
    seen = resample(mask.astype(np.float32), coarse, made.volume.grid) > 0.5
    assert seen[lungs].mean() > 0.97


def test_a_couch_of_foam_and_air_under_a_blanket_do_not():
    hu = np.full((24, 64, 64), -1000.0, np.float32)
    hu[:, 20:40, 16:48] = 0  # the trunk
    hu[:, 24:34, 20:30] = -800  # a lung behind 20 mm of wall
    hu[:, 24:32, 4:10] = hu[:, 24:32, 54:60] = 0  # arms
    hu[:, 16, 4:60] = hu[:, 16:24, 4] = hu[:, 16:24, 59] = 0  # a blanket from arm to arm
    hu[:, 40:48, 2:62] = -930  # foam
    hu[:, [40, 47], 2:62] = hu[:, 40:48, [2, 61]] = -100  # in a shell of carbon fibre
    mask, _ = find_body(Volume(hu, np.diag([5.0, 5.0, 5.0, 1.0])))
    trunk = np.zeros(hu.shape, bool)
    trunk[:, 20:40, 16:48] = True
    assert mask[trunk].mean() > 0.97 and mask[~trunk].mean() < 0.02


# ---------------------------------------------------------------- saving
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".npz"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"scan{suffix}"
    scan = Volume(body(), affine_of())
    scan.save(path)
    before = path.read_bytes()

    def full(temporary, hu, affine):
        temporary.write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("_write_nifti", "_write_nrrd", "_write_metaimage", "_write_npz"):
        monkeypatch.setattr(volume_module, name, full)
    with pytest.raises(
        OSError, match=rf"scan{suffix}: could not be written \(No space left on device\); choose"
    ):
        scan.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name", ["a_file/scan.nii.gz", "a_file/deeper/scan.mha", "a_file/scan.npz"]
)
def test_unwritable_folder_is_a_sentence(tmp_path, name):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(OSError, match="cannot be written.*choose a folder"):
        Volume(body(), affine_of()).save(tmp_path / name)


@pytest.mark.parametrize("name", ["scan.jpg", "scan", "scan.dcm", "scan.gz"])
def test_unknown_ending(tmp_path, name):
    with refused(file=name, kind=FileError):
        Volume(body(), affine_of()).save(tmp_path / name)


def test_whole_numbers_are_saved_as_int16_and_others_as_float32(tmp_path):
    import nibabel

    for hu, kind in ((body(), np.int16), (body() + 0.25, np.float32), (body() * 100, np.float32)):
        Volume(hu, affine_of()).save(tmp_path / "scan.nii")
        assert nibabel.load(tmp_path / "scan.nii").get_data_dtype() == kind


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_file_holds_a_voxel_that_is_no_number(tmp_path, value):
    hu = np.zeros((3, 4, 5), np.float32)
    hu[1, 2, 3] = value
    with refused(file="ct.nii.gz"):
        Volume(hu, np.eye(4)).save(tmp_path / "ct.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".npz"])
@pytest.mark.parametrize("missing", [1, 700, 20_000])
def test_a_full_disk_is_named_with_the_file_and_the_old_file_stays(tmp_path, suffix, missing):
    "Also where only the last bytes do not fit, which reach the disk when the file is closed."
    scan = Volume(np.random.default_rng(0).integers(-1000, 1000, (12, 32, 64)), np.eye(4))
    path = tmp_path / f"scan{suffix}"
    scan.save(path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) - missing, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{path}: could not be written") as caught:
            scan.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ".scan" not in str(caught.value)  # the temporary file's name
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
