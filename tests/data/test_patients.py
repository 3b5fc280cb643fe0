"""Who is who: several scans of one person never count as several persons."""

import io
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from ct_files import body, change, write_series
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.data.cache import DiskCache
from ct_nb.data.folders import find_cases, name_cases, read_folder
from ct_nb.data.open import open_source
from ct_nb.data.prepare import prepare
from ct_nb.slices.open import open_stacks
from ct_nb.slices.prepared import prepare_stacks
from ct_nb.slices.thin_folder import thin_folder
from ct_nb.training.run import case_record


def patients_of(root, names, ending=".nii.gz") -> dict[str, str]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / (name + ending)).write_bytes(b"")
    cases = name_cases(root, find_cases(root))
    return {case.name.removesuffix(ending): case.patient for case in cases}


def groups(patients: dict[str, str]) -> set[frozenset]:
    return {frozenset(n for n, p in patients.items() if p == q) for q in patients.values()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "persons",
    [
        [[f"{n:04d}a", f"{n:04d}b"] for n in range(998, 1002)],
        [["IM001a", "IM001b"], ["IM002a", "IM002b", "IM002c"]],
        [["P01_insp", "P01_exp"], ["P02_insp", "P02_exp"]],
        [[f"case{n:02d}/arterial", f"case{n:02d}/venous"] for n in range(1, 5)],
        [[f"pat{n}/4d/phase_{p:02d}" for p in range(0, 100, 10)] for n in (1, 2)],
        [[f"sub-{n:02d}_ses-1", f"sub-{n:02d}_ses-2"] for n in (1, 2, 11)],
        [[f"sub-{n}/ses-{s}/ct/sub-{n}_ses-{s}_ct" for s in (1, 2)] for n in ("A1", "A2")],
        [[f"{n}_T0", f"{n}_T1"] for n in ("smith", "jones")],
        [[f"pat{n}/{s:03d}" for s in (1, 2)] for n in (1, 2)],
        [["lidc-0002", "thin/lidc-0002"], ["lidc-0003"]],
        [["s0001/ct"], ["s0002/ct"], ["s0011/ct"]],
        [["train_1_a_1", "train_1_a_2", "train_1_b_1"], ["train_2_a_1"], ["train_11_a_1"]],
        [["P001_20190101", "P001_20200301"], ["P002_20190101"]],
        [["12_a", "12_b"], ["13_a", "13_b"]],
        [["P01", "P01_exp"], ["P02"]],
    ],
)
def test_scans_of_one_person_are_one_patient(tmp_path, persons):
    names = [name for person in persons for name in person]
    assert groups(patients_of(tmp_path, names)) == {frozenset(person) for person in persons}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "names",
    [
        ["case1", "case11", "case111"],
        [f"{n:03d}" for n in range(1, 13)],
        ["lctsc-s1-101", "lctsc-s1-102", "lidc-0001", "lidc-0002", "nsclcrg-R01-001"],
        [f"train/volume-{n}" for n in range(12)],
        [f"batch{b}/case{n}" for b in (1, 2) for n in range(3 * b, 3 * b + 3)],
        ["smith", "jones", "a", "b"],
        ["LUNG1-001", "LUNG1-002"],
        ["lung_001", "lung_003", "liver_0", "liver_1", "ct_001", "ct_002"],
        [f"case_{n:05d}_0000" for n in range(4)],
        [f"scan_{n:03d}" for n in range(12)],
    ],
)
def test_different_persons_stay_different(tmp_path, names):
    assert len(groups(patients_of(tmp_path, names))) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ["P01_1", "P01_2", "P02_1", "P02_2"],
        [f"LungCT_{n:04d}_{scan:04d}" for n in (1, 2) for scan in (0, 1)],
        ["P01_T0", "P01_T1"],
        [f"P{n}_scan{s:02d}" for n in (1, 2) for s in range(12)],
        ["arterial", "venous"],
    ],
)
def test_names_that_do_not_say_are_warned_of_once(tmp_path, names):
    with pytest.warns(UserWarning, match=f"{names[0]}.*{names[1]}.*patients.csv") as caught:
        patients_of(tmp_path, names)
    assert len(caught) == 1


def test_the_table_ends_the_doubt(tmp_path, recwarn):
    names = ["P01_1", "P01_2", "P02_1", "P02_2"]
    rows = "".join(f"{name},{name[:3]}\n" for name in names)
    (tmp_path / "patients.csv").write_text("case,patient\n" + rows)
    assert set(patients_of(tmp_path, names).values()) == {"P01", "P02"} and not recwarn.list


@pytest.mark.parametrize(
    "rows",
    ["a,p\nb\n", "a,p\nb,q\na,q\n", "a,p\nb,q\nc,r\n", "a,p\nb,\n", "a,p\nb,q,r\n", "a,p\n ,q\n"],
    ids=["short", "twice", "unknown", "no patient", "long", "no case"],
)
def test_faults_of_patients_csv_name_their_line(tmp_path, rows):
    (tmp_path / "patients.csv").write_text("case,patient\n" + rows)
    with refused(file="patients.csv", kind=FileError) as caught:
        patients_of(tmp_path, ["a", "b"])
    assert "line " in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_patients_csv_as_spreadsheets_save_it(tmp_path, encoding):
    text = "case;patient;remark\r\na;Müller;\r\nb;Müller;\r\n"
    (tmp_path / "patients.csv").write_bytes(text.encode(encoding))
    assert set(patients_of(tmp_path, ["a", "b"]).values()) == {"Müller"}
    (tmp_path / "patients.csv").write_bytes(text.encode("latin-1"))
    with refused(file="patients.csv", kind=FileError):
        patients_of(tmp_path, ["a", "b"])


# ---------------------------------------------------------------- PatientID
NUMBERS = {"a/first": "GEHEIM-4711", "a/later": "GEHEIM-4711", "b": "GEHEIM-4712", "c": "GEHEIM-1"}


def write_patients(root, numbers=NUMBERS, first_seed=0):
    "Scans of 320 × 256 × 240 mm with a PatientID each."
    for seed, (name, number) in enumerate(numbers.items(), first_seed):
        write_series(
            root / name,
            body(seed=seed),
            20.0 * np.arange(12),
            PixelSpacing=[8.0, 8.0],
            PatientID=number,
            PatientName="Geheim^Anna",
            SeriesDescription="GEHEIM",
        )
    return root


def everything_written(folder) -> bytes:
    "All files of a folder, and what is packed in them."
    found = b""
    for path in folder.rglob("*"):
        found += path.name.encode()
        content = path.read_bytes() if path.is_file() else b""
        begin = content.find(b"PK\x03\x04")
        found += content
        if begin >= 0:
            with zipfile.ZipFile(io.BytesIO(content[begin:])) as archive:
                found += b"".join(map(archive.read, archive.namelist()))
    return found + found.replace(b"\0", b"")  # numpy's text has four bytes a letter


def test_a_patient_id_joins_scans_and_is_written_nowhere(tmp_path, capsys):
    root = write_patients(tmp_path / "scans")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = read_folder(root, 16, cache=DiskCache(tmp_path / "out" / "cache"))
        prepare(source, tmp_path / "out" / "prepared")
        lines = prepare_stacks(thin_folder(root, 25.0), tmp_path / "out" / "stacks", workers=0)
    assert dict(zip(source.ids, source.patients)) == {
        "a_first": "a_first",
        "a_later": "a_first",
        "b": "b",
        "c": "c",
    }
    assert {line["status"] for line in lines} == {"prepared"}
    written = everything_written(tmp_path / "out")
    assert b"a_later" in written and b"geheim" not in written.lower()
    said = [str(warning.message) for warning in caught]
    shown = [*said, *capsys.readouterr(), repr(source.cases), repr(case_record(source)), str(lines)]
    assert "geheim" not in " ".join(shown).lower()


def test_the_split_is_the_same_on_another_machine(tmp_path):
    "And for a copy whose numbers were replaced."
    here = name_cases(write_patients(tmp_path / "here"), find_cases(tmp_path / "here"))
    there = tmp_path / "other" / "place"
    shutil.copytree(tmp_path / "here", there)
    for file in there.rglob("*.dcm"):
        number = {"a": "X1", "b": "X2", "c": "X3"}[file.relative_to(there).parts[0]]
        change(file, PatientID=number)
    copied = name_cases(there, find_cases(there))
    assert [(c.id, c.patient) for c in here] == [(c.id, c.patient) for c in copied]


@pytest.mark.filterwarnings("ignore")
def test_a_person_in_two_folders_is_not_two_patients(tmp_path):
    one = write_patients(tmp_path / "one", {"a": "4711", "b": "4712"})
    two = write_patients(tmp_path / "two", {"z/x": "4713", "z/y": "4711"}, 2)
    for joined in (f"{one}+{two}", f"{two}+{one}"):
        for opened in (lambda: open_source(joined, 16), lambda: open_stacks(joined, 25.0)):
            with refused("data") as caught:
                opened()
            assert "z_y" in str(caught.value) and "4711" not in str(caught.value)
    (two / "patients.csv").write_text("case,patient\nz_y,a\n")
    assert open_stacks(f"{one}+{two}", 25.0).patients == ["a", "b", "z_x", "a"]
