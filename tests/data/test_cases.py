"""Sources: what a folder may hold, patients, what is left out and why, and damaged caches."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.data.cache import DiskCache, content_digest, default_cache_dir, files_digest
from ct_nb.data.cases import CTSource
from ct_nb.data.folders import name_cases, read_folder
from ct_nb.data.open import open_source, phantom_source
from ct_nb.data import prepare as prepare_module
from ct_nb.data.prepare import main, prepare
from ct_nb.data.scan_files import find_cases
from ct_nb.data.thorax_check import ThoraxRule, measure_thorax
from ct_nb.physics.volume import Grid, Volume

RADIUS = np.linalg.norm(Grid.cube(32, 320.0).centers_mm().numpy(), axis=-1)


def ball(radius=100.0, seed=0, center=(0, 0, 0)) -> Volume:
    "A noisy ball of muscle in air, whole HU."
    noise = np.random.default_rng(seed).normal(0, 15, RADIUS.shape)
    return Volume(
        np.rint(np.where(radius > RADIUS, 40, -1000) + noise), Grid.cube(32, 320.0, center).affine
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    "anna twice, ben, and a label map of anna's."
    root = tmp_path / "cts"
    ball(100, 1).save(root / "anna.nii.gz")
    ball(100, 2).save(root / "thin" / "anna.nrrd")
    ball(90, 3, (10, -20, 300)).save(root / "ben.npz")
    Volume((RADIUS < 50).astype(np.float32), Grid.cube(32, 320.0).affine).save(
        root / "labels" / "anna.nii.gz"
    )
    return root


def quiet(*args, **kwargs) -> CTSource:
    "`read_folder` without its warnings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_folder(*args, **kwargs)


# ---------------------------------------------------------------- what a folder holds
def test_any_mix_of_formats(folder):
    source = read_folder(folder, 16)
    assert source.ids == ["anna", "ben", "thin_anna"] and source.patients == ["anna", "ben", "anna"]
    assert [s.volume.hu.shape for s in source] == [(16, 16, 16)] * 3
    assert [s.labels is not None for s in source] == [True, False, False]
    assert source[0].label_names == {1: "1"}
    assert abs(source[0].labels.sum() * 20**3 / (4 / 3 * np.pi * 50**3) - 1) < 0.15
    assert np.allclose(source[1].volume.grid.center_mm, (10, -20, 300), atol=6)


def test_one_file_is_a_folder_of_one(folder):
    assert read_folder(folder / "ben.npz", 16).ids == ["ben"]


def test_same_name_in_two_formats_gets_two_ids(folder):
    ball(80, 9).save(folder / "anna.mha")
    source = read_folder(folder, 16)
    assert source.ids == ["anna.mha", "anna.nii.gz", "ben", "thin_anna"]
    assert set(source.patients) == {"anna", "ben"}


def test_label_names_are_read(folder):
    (folder / "labels" / "labels.json").write_text('{"1": "core"}')
    assert read_folder(folder, 16)[0].label_names == {1: "core"}
    (folder / "labels" / "anna.json").write_text('{"1": "heart"}')
    assert read_folder(folder, 16)[0].label_names == {1: "heart"}
    (folder / "labels" / "anna.json").write_text('["heart"]')
    with refused(file="anna.json", kind=FileError):
        read_folder(folder, 16)


def test_broken_labels_are_a_broken_case(folder):
    (folder / "labels" / "anna.nii.gz").write_text("nothing")
    with pytest.warns(UserWarning, match="anna.nii.gz.*labels"):
        source = read_folder(folder, 16, on_error="skip")
    assert source.ids == ["ben", "thin_anna"]


def test_links_in_a_circle_end(folder):
    (folder / "thin" / "up").symlink_to(folder, target_is_directory=True)
    assert len(read_folder(folder, 16)) == 3


# ---------------------------------------------------------------- bad folders
def test_empty_folder(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with refused(file=tmp_path, kind=FileError):
        read_folder(tmp_path, 16)


def test_bad_file_is_fatal_or_named(folder):
    (folder / "carl.nii.gz").write_text("this is text")
    with refused(file="carl.nii.gz", kind=FileError):
        read_folder(folder, 16)
    with pytest.warns(UserWarning, match="1 of 4 cases are left out\n  carl.nii.gz: is text"):
        source = read_folder(folder, 16, on_error="skip")
    assert source.skipped[0][0] == "carl.nii.gz" and len(source) == 3
    with refused("on_error"):
        read_folder(folder, 16, on_error="ignore")


def test_all_bad(tmp_path):
    for name in ("a.nii.gz", "b.nrrd"):
        (tmp_path / name).write_text("text")
    with (
        pytest.warns(UserWarning),
        refused(file=tmp_path, kind=FileError),
    ):
        read_folder(tmp_path, 16, on_error="skip")


def test_not_a_source(tmp_path):
    for name in ("fantom", "phantom:", "phantom:x", str(tmp_path / "nowhere")):
        with refused("data"):
            open_source(name)
    with refused("count"):
        open_source("phantom:0")


def test_no_body_in_it(tmp_path):
    Volume(
        np.where(RADIUS < 9, 40, -1000) + np.random.default_rng(0).normal(0, 9, RADIUS.shape),
        Grid.cube(32).affine,
    ).save(tmp_path / "air.nii.gz")
    with refused(file="air.nii.gz", kind=FileError):
        read_folder(tmp_path, 16)


# ---------------------------------------------------------------- patients
def test_patients_csv_wins(folder):
    (folder / "patients.csv").write_text("case,patient\nthin/anna.nrrd,zoe\nben,anna\n")
    source = read_folder(folder, 16)
    assert dict(zip(source.ids, source.patients)) == {
        "anna": "anna",
        "ben": "anna",
        "thin_anna": "zoe",
    }
    (folder / "patients.csv").write_text("a,b\n")
    with refused(file="patients.csv", kind=FileError):
        read_folder(folder, 16)


def test_a_copy_under_another_name_is_the_same_patient(folder):
    "And so are all cases of the other name."
    (folder / "old").mkdir()
    shutil.copy(folder / "anna.nii.gz", folder / "dora.nii.gz")
    ball(85, 7).save(folder / "old" / "dora.nii.gz")
    with pytest.warns(UserWarning, match="dora has the same voxels as anna"):
        source = read_folder(folder, 16)
    assert dict(zip(source.ids, source.patients)) == {
        "anna": "anna",
        "ben": "ben",
        "dora": "anna",
        "old_dora": "anna",
        "thin_anna": "anna",
    }


def write_dicom_header(path: Path, patient: str):
    import pydicom
    from pydicom.dataset import FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID = patient
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def test_dicom_folders_belong_to_the_patient_in_their_files(tmp_path):
    for name, patient in (
        ("p1/CT/1.dcm", "P1"),
        ("p2/CT/IM0", "P2"),
        ("p1/later/1.dcm", "P1"),
        ("erna/1.dcm", "E-7"),
        ("noname/1.dcm", ""),
    ):
        write_dicom_header(tmp_path / name, patient)
    (tmp_path / "erna.zip").write_bytes(b"")
    cases = name_cases(tmp_path, find_cases(tmp_path))
    assert {case.name: case.patient for case in cases} == {
        "p1/CT": "p1_CT",
        "p2/CT": "p2_CT",
        "p1/later": "p1_CT",
        "erna": "erna",
        "erna.zip": "erna",
        "noname": "noname",
    }
    assert sorted(case.id for case in cases) == [
        "erna",
        "erna.zip",
        "noname",
        "p1_CT",
        "p1_later",
        "p2_CT",
    ]


def test_split(folder):
    source = read_folder(folder, 16)
    for seed in range(8):
        training, validation = source.split(0.2, seed)
        assert training.patients and validation.patients
        assert not set(training.patients) & set(validation.patients)
        assert len(training) + len(validation) == 3
        assert [s.ids for s in source.split(0.2, seed)] == [training.ids, validation.ids]
    assert source.split(["anna"])[1].ids == ["anna", "thin_anna"]
    assert source.one_per_patient().ids == ["anna", "ben"]
    for wrong in (1.5, ["carl"], ["anna", "ben"], []):
        with refused("validation"):
            source.split(wrong)


# ---------------------------------------------------------------- thorax
def test_real_thoraxes_are_told_from_the_rest(real_ct, tmp_path):
    "The tiny, the cropped and the abdominal ones are left out by what is measured in them."
    thoraxes = {
        "lidc-0001",
        "lidc-0002",
        "nsclcrg-R01-001",
        "lungdx-A0001",
        "lungdx-A0002",
        "cip-ct64",
    }
    others = {
        "crlm-1006.nii.gz",
        "ctfm-s0335.nii.gz",
        "ts-example.nii.gz",
        "acrinflt-013.nii.gz",
        "pancreas-cb001.nii.gz",
    }
    flat = tmp_path / "ct"
    flat.mkdir()
    for name in {f"{id}.nii.gz" for id in thoraxes} | others:
        (flat / name).symlink_to(real_ct / name)
    with pytest.warns(UserWarning, match="cut off at the upper end"):
        source = read_folder(flat, 32, thorax_only=True)
    left_out = dict(source.skipped)
    assert set(source.ids) == thoraxes and set(left_out) == others
    assert "l of lung" in left_out["ctfm-s0335.nii.gz"]
    assert "upper end" in left_out["crlm-1006.nii.gz"]


def test_the_zip_and_its_twin_are_one_patient(real_ct, tmp_path):
    for path in (real_ct / "dicom" / "lungdx-A0002.zip", real_ct / "lungdx-A0002.nii.gz"):
        (tmp_path / path.name).symlink_to(path)
    source = quiet(tmp_path, 32)
    assert len(source) == 2 and set(source.patients) == {"lungdx-A0002"}
    # the cubes may lie a millimetre apart
    assert np.abs(source[0].volume.hu - source[1].volume.hu).mean() < 60


def test_real_labels_lie_on_their_scan(real_ct, tmp_path):
    (tmp_path / "labels").mkdir()
    for name in ("cip-ct64.nii.gz", "labels/cip-ct64.nii.gz"):
        (tmp_path / name).symlink_to(real_ct / name)
    sample = read_folder(tmp_path, 64)[0]
    assert (sample.volume.hu[sample.labels == 1] < -500).mean() > 0.9 and (
        sample.labels == 1
    ).sum() > 10_000


def test_thorax_rule_names_its_numbers():
    measure = measure_thorax(ball())
    assert measure.lung_litres == 0 and ThoraxRule().reasons(measure) == [
        "0.0 l of lung, at least 1.5 expected"
    ]
    assert ThoraxRule(least_lung_litres=0).reasons(measure) == []


# ---------------------------------------------------------------- adding, naming, fingerprints
def test_mixed_sources(folder):
    mixed = open_source(f"phantom:2+{folder}", 16)
    assert mixed.patients == ["phantom-00000", "phantom-00001", "anna", "ben", "anna"]
    assert mixed[0].report and not mixed[3].report
    ball(90, 5).save(folder / "phantom-00001.nii.gz")
    with refused("source") as caught:
        open_source(f"phantom:2+{folder}", 16)
    assert "phantom-00001" in caught.value.reason
    with refused("source"):
        phantom_source(1, 16) + read_folder(folder, 32)


def test_one_scan_in_two_folders_is_refused(tmp_path):
    scan = phantom_source(1, 32)[0].volume
    for name in ("a/first", "b/second"):
        scan.save(tmp_path / f"{name}.nii.gz")
    one, two = (read_folder(tmp_path / name, 16, thorax_only=False) for name in "ab")
    with refused("source"):
        one + two


def test_a_path_with_a_plus(folder):
    folder.rename(folder.with_name("a+b"))
    assert len(open_source(str(folder.with_name("a+b")), 16)) == 3


def test_fingerprint_follows_content(folder):
    first = read_folder(folder, 16).fingerprint()
    assert first == read_folder(folder, 16, cache=DiskCache(folder.parent / "cache")).fingerprint()
    ball(91, 3, (10, -20, 300)).save(folder / "ben.npz")
    assert read_folder(folder, 16).fingerprint() != first


def test_list_takes_cubes_as_they_are():
    volume = ball()
    source = CTSource.from_list([volume, ball(70)], 32)
    assert np.array_equal(source[0].volume.hu, volume.hu) and len(source[1:]) == 1
    for name in ("ids", "patients", "labels"):
        with refused(name):
            CTSource.from_list([volume, volume], 32, **{name: ["a"]})
    with refused("ids"):
        CTSource.from_list([volume, volume], 32, ids=["a", "a"])


# ---------------------------------------------------------------- prepared folders
def test_prepared_reads_with_numpy_alone(folder, tmp_path):
    source = read_folder(folder, 16)
    out = prepare(source, tmp_path / "prepared")
    blocked = (
        "import sys\nfor name in ('nibabel', 'SimpleITK', 'pydicom', 'monai', 'scipy', 'numba',"
        " 'matplotlib'): sys.modules[name] = None\n"
    )
    program = (
        blocked + f"from ct_nb.data.open import open_source\ns = open_source({str(out)!r}, 16,"
        " thorax_only=False)\nprint(s.ids, s.patients, int(s[0].labels.sum()),"
        " int(s[1].volume.hu.sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        done.stdout.strip() == f"{source.ids} {source.patients} {int(source[0].labels.sum())}"
        f" {int(source[1].volume.hu.sum())}"
    ), done.stderr
    # what was measured came along
    with (
        pytest.warns(UserWarning, match="l of lung"),
        refused(file=out, kind=FileError),
    ):
        read_folder(out, 16, thorax_only=True)


def test_prepare_from_the_shell(folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ct_nb.data.prepare",
            str(folder),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "16",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 cases of 2 patients" in done.stdout, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "anna.npz",
        "ben.npz",
        "thin_anna.npz",
    ]
    # a sentence, no traceback
    with pytest.raises(SystemExit, match="exists already; choose another folder"):
        main(str(folder), out=str(tmp_path / "out"), size=16)


def test_prepare_leaves_nothing_half_done(folder, tmp_path, monkeypatch):
    source = read_folder(folder, 16)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError) as caught:
        prepare(source, tmp_path / "prepared")
    name = tmp_path / "prepared" / f"{source.ids[0]}.npz"
    assert str(caught.value).startswith(f"{name}: could not be written (No space left on device)")
    assert [p.name for p in tmp_path.iterdir()] == ["cts"]


def test_two_that_prepare_one_folder_at_once(folder, tmp_path, monkeypatch):
    "The second says so, by the folder's name, and what the first wrote stays."
    source = read_folder(folder, 16)
    out = tmp_path / "prepared"
    arrays = prepare_module._prepared_arrays

    def first_is_faster(*arguments):
        out.mkdir(exist_ok=True)
        (out / "theirs.npz").touch()
        return arrays(*arguments)

    monkeypatch.setattr(prepare_module, "_prepared_arrays", first_is_faster)
    with pytest.raises(OSError) as caught:
        prepare(source, out)
    assert str(caught.value).startswith(f"{out}: could not be written (Directory not empty)")
    assert [p.name for p in out.iterdir()] == ["theirs.npz"]


# ---------------------------------------------------------------- the cache
def test_reopening_reads_nothing(folder, tmp_path, monkeypatch):
    cache = DiskCache(tmp_path / "cache")
    first = read_folder(folder, 16, cache=cache)
    monkeypatch.setattr(
        "ct_nb.data.folders.read_ct", lambda path: pytest.fail(f"{path} was read again")
    )
    again = read_folder(folder, 16, cache=DiskCache(tmp_path / "cache"))
    assert again.ids == first.ids
    assert np.array_equal(again[2].volume.hu, first[2].volume.hu)
    assert np.array_equal(again[0].labels, first[0].labels)


def test_a_changed_file_is_read_again(folder, tmp_path):
    def read():
        return read_folder(folder, 16, cache=DiskCache(tmp_path / "cache"))[1].volume.hu

    before = read()
    ball(60, 3, (10, -20, 300)).save(folder / "ben.npz")
    assert not np.array_equal(read(), before)


def test_changed_labels_are_read_again(folder, tmp_path):
    def read():
        return read_folder(folder, 16, cache=DiskCache(tmp_path / "cache"))[0].labels.sum()

    before = read()
    Volume((RADIUS < 80).astype(np.float32), Grid.cube(32, 320.0).affine).save(
        folder / "labels" / "anna.nii.gz"
    )
    assert read() > 2 * before


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:10],
        lambda b: b"",
        lambda b: b[:-30] + bytes([b[-30] ^ 1]) + b[-29:],
    ],
    ids=["cut", "stub", "empty", "flipped"],
)
def test_damaged_entries_are_rebuilt_with_a_warning(tmp_path, damage):
    cache, name = DiskCache(tmp_path), content_digest("x")

    def build():
        return {"a": np.arange(100)}

    cache.get(name, build)
    cache.path(name).write_bytes(damage(cache.path(name).read_bytes()))
    with pytest.warns(UserWarning, match="computed again"):
        assert np.array_equal(cache.get(name, build)["a"], np.arange(100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.get(name, lambda: pytest.fail("was not rebuilt"))


def test_an_entry_under_another_name_is_not_taken(tmp_path):
    cache = DiskCache(tmp_path)
    one = content_digest(1)
    two = content_digest(2)
    cache.get(one, lambda: {"a": np.zeros(3)})
    cache.path(two).parent.mkdir(exist_ok=True)
    shutil.copy(cache.path(one), cache.path(two))
    with pytest.warns(UserWarning, match="another name"):
        assert cache.get(two, lambda: {"a": np.ones(3)})["a"].sum() == 3


def test_a_cache_that_cannot_be_written_warns_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning) as caught:
        for i in range(3):
            assert cache.get(content_digest(i), lambda: {"a": np.zeros(2)})["a"].sum() == 0
    assert sum("cannot be written" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_cache_of_patients_is_its_owners_alone(tmp_path, mask):
    folder = tmp_path / "home" / "cache"
    before = os.umask(mask)
    try:
        DiskCache(folder).get(content_digest("x"), lambda: {"a": np.zeros(3)})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {0o700}
    assert [path.stat().st_mode & 0o777 for path in folder.glob("*/*")] == [0o600]


def test_opening_a_cache_closes_it_and_removes_what_the_dead_left(tmp_path):
    "An older version left it open to all; a killed process, half an entry."
    cache, name = DiskCache(tmp_path), content_digest("x")
    cache.get(name, lambda: {"a": np.zeros(3)})
    part = cache.path(name).parent
    part.chmod(0o755)
    left = part / f".tmp-ffffffff-1-01234567.{name}.entry"
    left.touch()
    os.utime(left, (0, 0))
    DiskCache(tmp_path)
    assert part.stat().st_mode & 0o777 == 0o700
    assert list(part.iterdir()) == [cache.path(name)]


def _race(folder, start, results):
    cache = DiskCache(folder)
    start.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(40):
            arrays = cache.get(content_digest(i), lambda i=i: {"a": np.full(20_000, i)})
            assert arrays["a"][-1] == i
    results.put(os.getpid())


def test_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, start, results)) for _ in range(3)]
    for p in processes:
        p.start()
    start.set()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("*/*"))) == 40  # and no temporary file is left


def test_file_digests_are_remembered_and_forgotten(tmp_path):
    cache, file = DiskCache(tmp_path / "cache"), tmp_path / "f"
    file.write_bytes(b"one")
    one = files_digest([file], cache)
    assert one == files_digest([file]) == files_digest([file], cache)
    file.write_bytes(b"two")
    assert files_digest([file], cache) == files_digest([file]) != one


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("CT_NB_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "ct_nb"


def test_without_a_home_the_cache_is_a_folder_of_ones_own(monkeypatch, tmp_path):
    "Whoever may write into the cache decides what is trained on."

    def homeless():
        raise RuntimeError

    monkeypatch.delenv("CT_NB_CACHE", raising=False)
    monkeypatch.setattr("ct_nb.data.cache.Path.home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"ct_nb_{os.getuid()}"
    assert default_cache_dir() == folder
    folder.mkdir()
    assert default_cache_dir() == folder
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    folder.rename(tmp_path / f"ct_nb_{other}")
    with refused("CT_NB_CACHE"):
        default_cache_dir()
