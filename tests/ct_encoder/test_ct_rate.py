"""CT-RATE's images: names, the metadata table, both versions, and headers against the table."""

import shutil

import nibabel
import numpy as np
import pytest
from ct_files import write_stored, write_table
from refusals import refused

from ct_nb.core.errors import FileError, InputError
from ct_nb.ct_encoder.ct_rate import (
    GEOMETRY_COLUMNS,
    MetadataRow,
    ct_rate_hu,
    ct_rate_name,
    ct_rate_path,
    ct_rate_root,
    published_version,
    read_ct_rate,
    read_metadata_table,
)
from ct_nb.ct_encoder.dataset import folder_cases, open_scans
from ct_nb.ct_encoder.encoder import CTEncoderConfig
from ct_nb.data.hounsfield import CTReadError
from ct_nb.data.read import read_ct
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Volume

CONFIG = CTEncoderConfig.preset("smoke")
NAME = "train_1_a_1.nii.gz"
COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", *GEOMETRY_COLUMNS)
SUPINE, PRONE = (1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0)
TILTED = (0.96, 0.28, 0, -0.28, 0.96, 0)


def affine_of(orientation=SUPINE, spacing=(7, 7, 9), position=(-100, -90, 5)):
    affine = np.eye(4)
    along = np.reshape(orientation, (2, 3))
    affine[:3, :3] = np.column_stack([*along, np.cross(*along)]) * spacing
    affine[:3, 3] = position
    return affine


def row_of(name, affine, slope="1", intercept="-1024", **cells):
    "A row of the metadata table that says this affine; `cells` replace what it says."
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    own = {
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
        "XYSpacing": str(spacing[:2].tolist()),
        "ZSpacing": str(spacing[2]),
        "ImageOrientationPatient": str((affine[:3, :2] / spacing[:2]).T.ravel().tolist()),
        "ImagePositionPatient": str(affine[:3, 3].tolist()),
    } | cells
    return (name, *(own[column] for column in COLUMNS[1:]))


def table_row(tmp_path, *rows, columns=COLUMNS):
    "The row of NAME in a metadata table."
    return read_metadata_table(write_table(tmp_path / "m.csv", columns, *rows))[NAME]


def archive(root, volumes, version, rows, header=None, columns=COLUMNS):
    "CT-RATE as published, of one version; a header of None is blank."
    dataset = root / "dataset"
    for number, volume in enumerate(volumes, 1):
        name = f"train_{number}_a_1.nii.gz"
        part = "train" if version == 1 else "train_fixed"
        path = dataset / part / f"train_{number}" / f"train_{number}_a" / name
        affine = np.diag([-1.0, -1, 1, 1]) if header is None else header
        write_stored(path, volume.hu + 1024 * (version == 1), affine)
    reports = [
        (f"train_{n}_a_1.nii.gz", "A nodule is seen.", "Nodule.") for n, _ in enumerate(volumes, 1)
    ]
    write_table(
        dataset / "radiology_text_reports" / "train_reports.csv",
        ("VolumeName", "Findings_EN", "Impressions_EN"),
        *reports,
    )
    if rows:
        write_table(dataset / "metadata" / "train_metadata.csv", columns, *rows)
    return str(root)


def test_names_and_paths(tmp_path):
    assert ct_rate_path("train_7_c_2") == "dataset/train_fixed/train_7/train_7_c/train_7_c_2.nii.gz"
    # the part of the name counts, not of the folder
    assert (
        ct_rate_path("x/y/valid_7_c_2.nii.gz", 1)
        == "dataset/valid/valid_7/valid_7_c/valid_7_c_2.nii.gz"
    )
    for name in ("scan.nii.gz", f"/{NAME}", f"../{NAME}", f"a/../{NAME}", f"C:\\{NAME}", ""):
        with refused("volume"):
            ct_rate_name(name)
    with refused("version"):
        ct_rate_path("train_7_c_2", 3)
    assert ct_rate_root(tmp_path) is None
    (tmp_path / "dataset" / "radiology_text_reports").mkdir(parents=True)
    assert ct_rate_root(tmp_path) == ct_rate_root(tmp_path / "dataset") == tmp_path
    assert ct_rate_root(tmp_path / "dataset" / "radiology_text_reports") is None


def test_hounsfield_units_are_checked():
    hu = phantom(2, 24).volume.hu
    assert np.allclose(ct_rate_hu((hu + 8192) / 2, 2, -8192, NAME), hu, atol=0.01)
    padded = hu.copy()
    padded[0] = -8192
    assert ct_rate_hu(padded, 1, 0, NAME).min() >= -1024
    for stored, intercept in ((hu, -1024), (hu + 1024, 0)):
        with refused(file=NAME, kind=CTReadError):
            ct_rate_hu(stored, 1, intercept, NAME)


@pytest.mark.parametrize(
    "spacing", ["[7.0, 7.0]", "7 7", "[7. 7.]", "(7,7)", "[np.float64(7.0), np.float64(7.0)]"]
)
def test_lists_as_programs_print_them(tmp_path, spacing):
    row = table_row(tmp_path, row_of(NAME, affine_of(TILTED), XYSpacing=spacing))
    assert np.allclose(row.affine, affine_of(TILTED)) and row[3:] == ("", "")
    assert (row.slope, row.intercept) == (1.0, -1024.0)


@pytest.mark.parametrize(
    "cells, column",
    [
        ({"XYSpacing": ""}, "XYSpacing"),
        ({"XYSpacing": "[0,7, 0,7]"}, "XYSpacing"),  # decimal commas
        ({"XYSpacing": "[nan, 7]"}, "XYSpacing"),
        ({"ZSpacing": "0"}, "spacing"),
        ({"ZSpacing": "-9"}, "spacing"),
        ({"ZSpacing": "1e9"}, "spacing"),
        ({"ImageOrientationPatient": "[1, 0, 0, 1, 0, 0]"}, "ImageOrientationPatient"),
        ({"ImageOrientationPatient": "[0, 0, 0, 0, 0, 0]"}, "ImageOrientationPatient"),
        ({"ImagePositionPatient": "[1, 2]"}, "ImagePositionPatient"),
    ],
)
def test_a_row_without_a_place_keeps_its_scale_and_the_reason(tmp_path, cells, column):
    row = table_row(tmp_path, row_of(NAME, affine_of(), **cells))
    assert row.affine is None and row.slope == 1
    assert "m.csv (line 2)" in row.no_affine and column in row.no_affine


@pytest.mark.parametrize("slope", ["", "nan", "inf", "0", "-1", "1,0", "one"])
def test_a_row_without_a_scale_keeps_its_place(tmp_path, slope):
    row = table_row(tmp_path, row_of(NAME, affine_of(), slope=slope))
    assert row.slope is None and row.affine is not None
    assert "m.csv (line 2)" in row.no_scale and "RescaleSlope" in row.no_scale


def test_rows_twice_and_tables_that_are_none(tmp_path):
    same = row_of(NAME, affine_of())
    assert table_row(tmp_path, same, same).slope == 1
    other = table_row(tmp_path, same, row_of(NAME, affine_of(), slope="2"))
    assert other.slope is None and "lines 2 and 3" in other.no_scale
    for rows, columns in (([("scan7", "1", "2")], COLUMNS[:3]), ([(NAME, "1")], COLUMNS[:2])):
        with refused(file="m.csv", kind=FileError):
            table_row(tmp_path, *rows, columns=columns)


@pytest.mark.parametrize("orientation", [SUPINE, PRONE, TILTED])
def test_the_encoder_gets_the_same_cube_of_both_versions(tmp_path, orientation):
    volumes = [phantom(seed, 32).volume for seed in (1, 2)]
    for volume in volumes:
        volume.hu = np.round(volume.hu)
    affine = affine_of(orientation)
    rows = [row_of(f"train_{n}_a_1.nii.gz", affine) for n in (1, 2)]
    with pytest.warns(UserWarning, match="notes on 2 of 2 scans") as said:
        first, _ = open_scans(archive(tmp_path / "1", volumes, 1, rows), CONFIG, progress=False)
    assert "spacing, axes and position are the table's" in str(said[0].message)
    second, facts = open_scans(
        archive(tmp_path / "2", volumes, 2, rows, affine), CONFIG, progress=False
    )
    assert all(fact["notes"] == [] for fact in facts)
    for number in range(2):
        assert (first[number]["hu"] - second[number]["hu"]).abs().max() <= 1
        assert first[number]["hu"].std() > 100


@pytest.mark.parametrize("name", ["cip-ct64", "ts-example"])
def test_a_real_scan_has_the_same_cube_in_both_versions(real_ct, tmp_path, name):
    volume = read_ct(real_ct / f"{name}.nii.gz")
    row = table_row(tmp_path, row_of(NAME, volume.affine))
    image = nibabel.Nifti1Image((volume.hu + 1024).transpose(2, 1, 0).astype(np.int16), np.eye(4))
    nibabel.save(image, tmp_path / NAME)
    found = read_ct_rate(tmp_path / NAME, row, 1)
    assert np.allclose(found.affine, volume.affine, atol=1e-3)
    assert np.abs(found.hu - volume.hu).max() <= 1


def test_a_row_that_is_damaged_leaves_out_one_volume(tmp_path):
    volumes = [phantom(seed, 24).volume for seed in (1, 2, 3)]
    rows = [row_of(f"train_{n}_a_1.nii.gz", affine_of()) for n in (1, 2)]
    rows.append(row_of("train_3_a_1.nii.gz", affine_of(), ZSpacing=""))
    rows.append(("train_4_a_1.nii.gz", "", "", "", "", "", ""))  # a volume that is not here
    with pytest.warns(UserWarning):
        scans, _ = open_scans(archive(tmp_path, volumes, 1, rows), CONFIG, progress=False)
    assert scans.ids == ["train_1_a_1", "train_2_a_1"]
    ((name, reason),) = scans.skipped
    assert name == "train_3_a_1" and "line 4" in reason and "ZSpacing" in reason


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("columns", [0, 3, 4])
def test_a_blank_header_without_a_table_is_refused(tmp_path, version, columns):
    volume = phantom(1, 24).volume
    write_stored(tmp_path / NAME, volume.hu + 1024 * (version == 1), np.diag([-1.0, -1, 1, 1]))
    row = None
    if columns:
        cells = row_of(NAME, affine_of())[:columns]
        row = table_row(tmp_path, cells, columns=COLUMNS[:columns])
    with refused(file=NAME, kind=CTReadError) as error:
        read_ct_rate(tmp_path / NAME, row, version)
    missing = "no row of it" if columns == 0 else COLUMNS[columns]
    assert missing in error.value.reason


def test_a_header_without_an_orientation_is_blank(tmp_path):
    "As nibabel writes an image without an affine; its spacing alone does not tell left from right."
    image = nibabel.Nifti1Image(phantom(1, 24).volume.hu.transpose(2, 1, 0), None)
    image.header.set_zooms((7, 7, 9))
    nibabel.save(image, tmp_path / NAME)
    found = read_ct_rate(tmp_path / NAME, table_row(tmp_path, row_of(NAME, affine_of(PRONE))), 2)
    assert np.allclose(found.affine, affine_of(PRONE)) and len(found.notes) == 1


def reversed_rows(affine, count):
    "The affine of the same voxels, stored with their rows in reverse order."
    step = np.diag([1.0, -1, 1, 1])
    step[1, 3] = count - 1
    return affine @ step


@pytest.mark.parametrize(
    "header, said",
    [
        (affine_of(), ""),
        (reversed_rows(affine_of(), 24), ""),  # dcm2niix does so
        (affine_of(spacing=(7.5, 7.5, 9)), "7.5 × 7.5 × 9 mm a voxel"),
        (affine_of(TILTED), "different directions"),
        (affine_of(PRONE), "mm apart"),
        (affine_of(position=(-100, -90, 45)), "40.0 mm apart"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_header_and_table_are_compared(tmp_path, header, said, version):
    volume = phantom(1, 24).volume
    write_stored(tmp_path / NAME, volume.hu + 1024 * (version == 1), header)
    found = read_ct_rate(tmp_path / NAME, table_row(tmp_path, row_of(NAME, affine_of())), version)
    assert np.allclose(found.affine, affine_of() if version == 1 else header)
    notes = [note for note in found.notes if "header" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)


def test_version_1_takes_its_values_from_the_table_and_not_from_its_header(tmp_path):
    scan = phantom(2, 24).volume
    for numbers, header in (((1, -1024), (1, 0)), ((2, -8192), (1, 0)), ((1, -1024), (1, -1024))):
        slope, intercept = numbers
        write_stored(tmp_path / NAME, (scan.hu - intercept) / slope, scan.affine, *header)
        row = MetadataRow(slope, intercept, None, "", "no columns")
        found = read_ct_rate(tmp_path / NAME, row, 1)
        assert np.abs(found.hu - scan.hu).max() <= slope and np.allclose(found.affine, scan.affine)
        assert any("slope and intercept of its metadata table" in note for note in found.notes)
    for row in (None, MetadataRow(1.0, -3000.0)):
        with refused(file=NAME, kind=CTReadError):
            read_ct_rate(tmp_path / NAME, row, 1)
    with refused("version"):
        read_ct_rate(tmp_path / NAME, row, 3)


def test_what_the_table_says_is_part_of_the_name_of_what_was_prepared(tmp_path):
    volumes = [phantom(seed, 24).volume for seed in (1, 2)]
    digests = set()
    for number, spacing in enumerate(((7, 7, 9), (7, 7, 8))):
        rows = [row_of(f"train_{n}_a_1.nii.gz", affine_of(spacing=spacing)) for n in (1, 2)]
        cases, _ = folder_cases(archive(tmp_path / str(number), volumes, 1, rows), CONFIG)
        digests.add(cases[0].digest)
    assert len(digests) == 2


def test_reports_that_fit_several_files_belong_to_none(tmp_path):
    for place in ("p1/ct", "p2/ct", "valid_1_a_1"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        phantom(1, 24).volume.save(tmp_path / f"{place}.nii.gz")
    (tmp_path / "r.json").write_text(
        '[{"volumename": "ct", "answer": "x"}, {"volumename": "valid_1_a_1", "answer": "y"}]'
    )
    cases, skipped = folder_cases(tmp_path, CONFIG)
    assert [case.id for case in cases] == ["valid_1_a_1"] and len(skipped) == 2
    assert all("2 files have the name of its report" in reason for _, reason in skipped)
    (tmp_path / "r.json").write_text(
        '[{"volumename": "ct", "answer": "x"}, {"volumename": "CT.nii.gz", "answer": "y"}]'
    )
    with refused("reports", kind=InputError):
        folder_cases(tmp_path, CONFIG)


def test_a_volume_keeps_what_its_reader_knew(tmp_path):
    "Notes of the reader stay; values of version 2 pass through `read_ct`."
    volume = phantom(1, 24).volume
    padded = Volume(np.where(np.arange(24) < 3, -8192, volume.hu), affine_of())
    write_stored(tmp_path / NAME, padded.hu, padded.affine)
    found = read_ct_rate(tmp_path / NAME, table_row(tmp_path, row_of(NAME, affine_of())), 2)
    assert found.hu.min() >= -1024 and found.notes == read_ct(tmp_path / NAME).notes


def test_a_metadata_table_beside_the_images_is_used_in_any_folder(tmp_path):
    volumes = [phantom(seed, 32).volume for seed in (1, 2)]
    rows = [row_of(f"train_{n}_a_1.nii.gz", affine_of(PRONE)) for n in (1, 2)]
    expected, _ = open_scans(
        archive(tmp_path / "2", volumes, 2, rows, affine_of(PRONE)), CONFIG, progress=False
    )
    archive(tmp_path / "flat", volumes, 2, rows)
    for file in list((tmp_path / "flat").glob("dataset/**/*.*")):
        file.rename(tmp_path / "flat" / file.name)
    shutil.rmtree(tmp_path / "flat" / "dataset")
    with pytest.warns(UserWarning, match="the table's"):
        found, _ = open_scans(str(tmp_path / "flat"), CONFIG, progress=False)
    for number in range(2):
        assert (found[number]["hu"] - expected[number]["hu"]).abs().max() <= 1


def test_an_image_knows_its_version_by_its_place(tmp_path):
    for version in (1, 2):
        path = tmp_path / ct_rate_path(NAME, version)
        assert published_version(path) == (tmp_path, version)
        assert published_version(path.parent / "other.nii.gz") is None
        assert published_version(tmp_path / "x" / NAME) is None
