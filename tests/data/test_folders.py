"Finding cases: finder, reader and cache keys look at the same files."

import warnings

import numpy as np
import pytest
from ct_files import body, change, disc_index, other_object, write_series
from refusals import refused

from ct_nb.core.errors import printable
from ct_nb.data.cache import DiskCache
from ct_nb.data.folders import name_cases, read_folder
from ct_nb.data.read import read_ct
from ct_nb.data.scan_files import find_cases


def write_scan(folder, hu=None, first_mm=0.0, **tags):
    "A series as large as a body: 320 × 256 × 240 mm."
    hu = body() if hu is None else hu
    return write_series(folder, hu, first_mm + 20.0 * np.arange(len(hu)), **SPACING | tags)


SPACING = {"PixelSpacing": [8.0, 8.0]}


def cases(root) -> dict[str, str]:
    "Name -> patient of the cases of a folder, which all must be read; a warning is no failure."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = read_folder(root, 16)
    return dict(zip(source.ids, source.patients))


# ---------------------------------------------------------------- what a DICOM case is
def test_a_disc(tmp_path):
    files = write_scan(tmp_path / "DICOM" / "PAT0" / "SE0", PatientID="nobody")
    disc_index(tmp_path, files)
    assert find_cases(tmp_path) == [tmp_path / "DICOM" / "PAT0" / "SE0"]
    assert cases(tmp_path) == {"DICOM_PAT0_SE0": "DICOM_PAT0_SE0"}
    assert (read_ct(tmp_path).hu == body()).all()


def test_folders_without_a_ct_are_no_cases(tmp_path):
    "The dose report and the structures of a scan, each in a folder of its own."
    write_scan(tmp_path / "CT", PatientID="anna")
    other_object(tmp_path / "SR" / "1.dcm", "1.2.840.10008.5.1.4.1.1.88.67", "SR")
    other_object(tmp_path / "RT" / "1.dcm", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT")
    write_series(tmp_path / "MR", body(), SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR")
    with pytest.warns(UserWarning, match="MR: holds no CT"):
        source = read_folder(tmp_path, 16)
    assert source.ids == ["CT"] and sorted(name for name, _ in source.skipped) == ["MR", "RT", "SR"]


def test_a_scout_above_its_scan(tmp_path):
    write_scan(tmp_path / "study" / "scan", PatientID="anna")
    other = write_series(tmp_path / "study", body()[:1], ImageType=["ORIGINAL", "LOCALIZER"])
    change(other[0], SeriesInstanceUID="1.2.9")
    assert cases(tmp_path) == {"study_scan": "study_scan"}


def test_a_series_over_several_folders(tmp_path):
    "Some discs hold at most so many files in a folder."
    hu, z = body(), 100 + 3.0 * np.arange(12)
    for k in range(3):
        part = slice(4 * k, 4 * k + 4)
        write_series(tmp_path / "SE0" / f"PART{k}", hu[part], z[part], PatientID="anna")
    write_series(tmp_path / "SE1", hu, series="1.2.4", PatientID="anna")
    assert find_cases(tmp_path) == [tmp_path / "SE0", tmp_path / "SE1"]
    named = name_cases(tmp_path, find_cases(tmp_path))
    assert [(case.id, case.patient) for case in named] == [("SE0", "SE0"), ("SE1", "SE0")]


def test_patients_of_one_uid_stay_apart(tmp_path):
    "Anonymised with one UID for everybody, a folder for each."
    write_series(tmp_path / "a", body(), PatientID="x")
    write_series(tmp_path / "b", body(seed=1), PatientID="x")
    assert find_cases(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_a_part_in_a_folder_below_is_read_once(tmp_path):
    hu, z = body(), 100 + 3.0 * np.arange(12)
    write_series(tmp_path / "scan", hu[:8], z[:8])
    write_series(tmp_path / "scan" / "rest", hu[8:], z[8:])
    assert find_cases(tmp_path) == [tmp_path / "scan"]
    assert (read_ct(tmp_path / "scan").hu == hu).all()


def test_files_without_preamble_and_ending(tmp_path):
    import pydicom

    for file in write_series(tmp_path / "old", body(), names=[f"IM{k}" for k in range(12)]):
        dataset = pydicom.dcmread(file)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(file, implicit_vr=True, little_endian=True)
    assert find_cases(tmp_path) == [tmp_path / "old"]
    assert (read_ct(tmp_path / "old").hu == body()).all()


def test_links(tmp_path):
    files = write_series(tmp_path / "real" / "series", body())
    root = tmp_path / "root"
    (root / "files").mkdir(parents=True)
    for file in files:
        (root / "files" / file.name).symlink_to(file)
    assert find_cases(root) == [root / "files"]
    (root / "series").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "circle").symlink_to(root, target_is_directory=True)
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    found = find_cases(tmp_path / "link")
    assert len(found) == 2 and all((read_ct(path).hu == body()).all() for path in found)


def test_stray_links_and_files_are_no_cases(tmp_path):
    write_scan(tmp_path / "scan")
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    (tmp_path / "counts").write_bytes(np.array([8, 4, 2, 1], "<i4").tobytes())
    assert find_cases(tmp_path) == [tmp_path / "scan"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.dcm").symlink_to(tmp_path / "gone")
    assert find_cases(tmp_path) == [tmp_path / "other", tmp_path / "scan"]


def test_a_folder_goes_by_its_own_name(tmp_path):
    write_scan(tmp_path / "zoe")
    (tmp_path / "current").symlink_to(tmp_path / "zoe", target_is_directory=True)
    assert find_cases(tmp_path) == [tmp_path / "zoe"]


# ---------------------------------------------------------------- names
def test_names_cannot_speak_to_the_terminal(tmp_path):
    "Line breaks and terminal codes in the names of files, of folders and of a table's cells."
    root = tmp_path / "a\x1b[2J"
    write_scan(root / "b\nc_insp", SeriesDescription="d\x1b[2J")
    write_scan(root / "b\nc_exp", body(seed=1))
    write_scan(root / "twin\x07", body(seed=1))
    (root / "bad\x1b[2J\n.nii").write_bytes(b"no CT")
    (root / "cut\x1b.zip").write_bytes(b"PK")
    with pytest.warns(UserWarning) as caught:
        source = read_folder(root, 16, on_error="skip")
    said = [str(warning.message) for warning in caught]
    for sentence in ("one patient each", "2 of 5 cases are left out", "has the same voxels as"):
        assert any(sentence in text for text in said), sentence
    (root / "patients.csv").write_text("case,patient\nnobody\x1b[2J,x\n")
    for opened in (lambda: read_folder(root, 16), lambda: source.split(["x\x1b[2J"])):
        with refused() as error:
            opened()
        said.append(str(error.value))
    assert all(line == printable(line) for text in said for line in text.split("\n"))
    assert sum(len(text.split("\n")) for text in said) == len(said) + 2  # a line for each left out


# ---------------------------------------------------------------- cache keys
def cubes(root, cache) -> list[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [sample.volume.hu for sample in read_folder(root, 16, cache=DiskCache(cache))]


@pytest.mark.parametrize(
    "name", ["ct.mhd", "scan[1].mhd", "ct.nrrd"], ids=["mhd", "brackets", "nrrd"]
)
def test_data_beside_a_header_are_part_of_the_key(tmp_path, name):
    "Two patients with equal headers, and the data of one replaced later."
    for k in range(2):
        folder = tmp_path / "data" / f"p{k}"
        hu = body(seed=k) + 60 * k
        folder.mkdir(parents=True)
        hu.astype("<i2").tofile(folder / "image.raw")
        if name.endswith(".nrrd"):
            text = (
                "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
                "sizes: 40 32 12\nspace directions: (8,0,0) (0,8,0) (0,0,20)\n"
                "kinds: domain domain domain\nendian: little\nencoding: raw\n"
                "space origin: (-160,-128,0)\ndata file: image.raw\n\n"
            )
        else:
            text = (
                "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
                "DimSize = 40 32 12\nElementSpacing = 8 8 20\nOffset = -160 -128 0\n"
                "ElementType = MET_SHORT\nElementDataFile = image.raw\n"
            )
        (folder / name).write_text(text)
    first, second = cubes(tmp_path / "data", tmp_path / "cache")
    center = (slice(6, 10),) * 3
    assert abs((second - first)[center].mean() - 60) < 5
    (body(seed=0) + 30).astype("<i2").tofile(tmp_path / "data" / "p0" / "image.raw")
    replaced, _ = cubes(tmp_path / "data", tmp_path / "cache")
    assert abs((replaced - first)[center].mean() - 30) < 5


def test_a_slice_changed_in_a_folder_below(tmp_path):
    files = write_scan(tmp_path / "data" / "scan", body()[:6])
    files += write_scan(tmp_path / "data" / "scan" / "rest", body()[6:], 120.0)
    (before,) = cubes(tmp_path / "data", tmp_path / "cache")
    for file in files[6:]:
        change(file, RescaleIntercept=-1000)
    (after,) = cubes(tmp_path / "data", tmp_path / "cache")
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("tag", [b"\x08\x00\x60\x00CS", b"\x08\x00\x16\x00UI"])
def test_a_damaged_header_is_a_case_that_cannot_be_read(tmp_path, tag):
    "The finder does not stop at it; the reader names the file."
    file, *_ = write_scan(tmp_path / "scan")
    file.write_bytes(file.read_bytes().replace(tag, tag[:4] + b"GS"))
    assert find_cases(tmp_path) == [tmp_path / "scan"]
    with refused(file=file):
        read_ct(tmp_path / "scan")
