"""Preparation that resumes, reports and survives."""

import csv
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ct_files import body, zipped
from ct_files import series_members as series
from refusals import refused

from ct_nb.slices.open import open_stacks
from ct_nb.slices.paired_stacks import (
    SIDES,
    StackCase,
    StackSource,
    split_stacks,
)
from ct_nb.slices.pe_archive import pe_archive
from ct_nb.slices.prepare import main
from ct_nb.slices.prepared import prepare_stacks, prepared_stacks, read_stack
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    ThinStack,
)

THIN = body((60, 32, 40))
THICK = THIN.reshape(12, 5, 32, 40).mean(1)


def pair(thick=THICK, thin=THIN, **tags):
    return series(thick, 2.0, 5.0, "1.2.1", "1", **tags) + series(
        thin, 0.0, 1.0, "1.2.2", "2", **tags
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return zipped(tmp_path_factory.mktemp("pe") / "APE" / "0001.zip", pair())


@pytest.fixture
def archive(tmp_path, good) -> Path:
    root = tmp_path / "archive"
    for name in ("APE/0001", "APE/0002", "non APE/0001"):
        (root / f"{name}.zip").parent.mkdir(parents=True, exist_ok=True), (
            root / f"{name}.zip"
        ).write_bytes(good.read_bytes())
    (root / "APE" / "0003.zip").write_bytes(good.read_bytes()[:20_000])
    zipped(root / "non APE" / "0002.zip", [("../x", b"x")])
    return root


def statuses(lines):
    return {line["id"]: line["status"] for line in lines}


def test_preparing_reports_goes_on_and_resumes(archive, tmp_path, good, monkeypatch):
    out, source = tmp_path / "out", pe_archive(archive)
    lines = prepare_stacks(source, out, workers=0)
    assert statuses(lines) == {
        "APE_0001": "prepared",
        "APE_0002": "prepared",
        "APE_0003": "failed",
        "non_APE_0001": "prepared",
        "non_APE_0002": "failed",
    }
    with open(out / "report.csv", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert (
        "cut short" in rows["APE_0003"]["reason"]
        and "leads out of the archive" in rows["non_APE_0002"]["reason"]
    )
    assert (
        rows["APE_0001"]["thin_slices"],
        rows["APE_0001"]["thick_mm"],
        rows["APE_0001"]["patient"],
        rows["APE_0001"]["rows"],
    ) == ("60", "5.0", "APE_0001", "32") and float(rows["APE_0001"]["agreement_hu"]) < 1
    prepared = prepared_stacks(out)
    first = prepared[0]
    assert (
        prepared.ids == ["APE_0001", "APE_0002", "non_APE_0001"]
        and np.array_equal(first.thin, THIN)
        and isinstance(first.thin, np.memmap)
        and np.array_equal(first.thick, np.rint(THICK))
    )
    assert (
        first.thick_axis == SliceAxis(2.0, 5.0, 12)
        and first.profile == SliceProfile(5.0)
        and first.pixel_mm == (2.0, 2.0)
        and np.allclose(first.affine, source[0].affine)
    )
    assert not [p for p in out.iterdir() if p.name.startswith(".")]

    (archive / "APE" / "0003.zip").write_bytes(good.read_bytes())  # the download is completed
    os.truncate(out / "APE_0002" / "thin.npy", 1000)  # a crash tore a file
    monkeypatch.setattr("ct_nb.slices.pe_archive.read_ct", read_once := Counting())
    again = statuses(prepare_stacks(pe_archive(archive), out, workers=0))
    assert (
        again
        == {
            "APE_0001": "kept",
            "APE_0002": "prepared",
            "APE_0003": "prepared",
            "non_APE_0001": "kept",
            "non_APE_0002": "failed",
        }
        and read_once.count == 4
    )
    (archive / "APE" / "0001.zip").write_bytes(b"replaced by something broken")
    # nothing old under a line that says failed
    assert (
        statuses(prepare_stacks(pe_archive(archive), out, workers=0))["APE_0001"] == "failed"
        and "APE_0001" not in prepared_stacks(out).ids
    )


class Counting:
    "read_ct that counts."

    count = 0

    def __call__(self, *args):
        from ct_nb.data.read import read_ct

        self.count += 1
        return read_ct(*args)


def test_sides_are_kept_when_an_archive_grows(archive, tmp_path, good):
    out = tmp_path / "out"
    before = {
        line["patient"]: line["side"]
        for line in prepare_stacks(pe_archive(archive), out, workers=0)
    }
    for k in range(10, 22):
        (archive / "APE" / f"{k:04d}.zip").write_bytes(b"not yet here")
    after = {
        line["patient"]: line["side"]
        for line in prepare_stacks(pe_archive(archive), out, workers=0)
    }
    assert (
        set(before.values()) == set(SIDES)
        and all(after[p] == side for p, side in before.items())
        and len(after) == 17
    )
    assert {case.patient: case.side for case in prepared_stacks(out).cases} == {
        p: after[p] for p in ("APE_0001", "APE_0002", "non_APE_0001")
    }
    assert {side: len(part) for side, part in split_stacks(prepared_stacks(out)).items()} == {
        side: sum(after[p] == side for p in ("APE_0001", "APE_0002", "non_APE_0001"))
        for side in SIDES
    }


def test_where_nothing_may_be_written(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    source = StackSource([StackCase("a", "a", tiny)])
    with pytest.raises(ValueError, match="exists already and is no prepared folder"):
        prepare_stacks(source, tmp_path / "mine", workers=0)
    with refused("workers"):
        prepare_stacks(source, tmp_path / "x", workers=-1)
    with pytest.raises(ValueError, match="is no prepared folder"):
        prepared_stacks(tmp_path)
    with pytest.raises(ValueError, match="is no prepared scan or was cut short"):
        read_stack(tmp_path)
    assert statuses(
        prepare_stacks(
            StackSource([StackCase("a", "a", functools.partial(tiny, MemoryError("no room")))]),
            tmp_path / "y",
            workers=0,
        )
    ) == {"a": "failed"}
    with pytest.raises(ValueError, match="none of its scans could be prepared"):
        prepared_stacks(tmp_path / "y")


def tiny(error=None) -> ThinStack:
    if error:
        raise error
    return ThinStack("a", "a", np.zeros((4, 3, 3), np.float32), SliceAxis(0.0, 1.0, 4), (1.0, 1.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_and_one_that_dies(archive, tmp_path, workers):
    cases = pe_archive(archive).cases
    deadly = StackCase("deadly", "deadly", functools.partial(os._exit, 3))
    source = StackSource([cases[0], deadly, *cases[2:]])
    lines = prepare_stacks(source, tmp_path / "out", workers=workers)
    assert statuses(lines) == {
        "APE_0001": "prepared",
        "APE_0003": "failed",
        "deadly": "failed",
        "non_APE_0001": "prepared",
        "non_APE_0002": "failed",
    }
    reasons = {line["id"]: line.get("reason", "") for line in lines}
    assert "process died" in reasons["deadly"] and "cut short" in reasons["APE_0003"]
    assert np.array_equal(prepared_stacks(tmp_path / "out")[1].thin, THIN)


def open_ports(process) -> list[str]:
    "Addresses on which a process listens for TCP."
    held = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.exists()}
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [f[1] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in held]


def _ports_while_at_work(file: Path, parent: int) -> ThinStack:
    processes = (parent, os.getppid(), os.getpid())  # the second forks the third
    file.write_text(str([open_ports(process) for process in processes]))
    return tiny()


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="asks Linux for open ports")
def test_no_port_is_open_while_scans_are_prepared(tmp_path):
    "Whoever could connect to one could have code of theirs run as this user."
    with socket.create_server(("127.0.0.1", 0)):
        assert len(open_ports(os.getpid())) == 1
    load = functools.partial(_ports_while_at_work, tmp_path / "ports", os.getpid())
    source = StackSource([StackCase("a", "a", load)])
    assert statuses(prepare_stacks(source, tmp_path / "out", workers=2)) == {"a": "prepared"}
    assert (tmp_path / "ports").read_text() == "[[], [], []]"


def test_from_the_shell(archive, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ct_nb.slices.prepare",
            f"pe:{archive}",
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "0",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 prepared, 0 kept, 2 failed; see" in done.stdout, done.stderr
    assert (
        open_stacks(str(tmp_path / "out")).ids == ["APE_0001", "APE_0002", "non_APE_0001"]
        and json.loads((tmp_path / "out" / "stacks.json").read_text())["seed"] == 0
    )
    with pytest.raises(SystemExit, match="holds no zip"):
        main(f"pe:{tmp_path / 'out'}", out=str(tmp_path / "two"))


def prepared(folder, **changes) -> Path:
    "A prepared folder of one scan with entries of its about.json changed."
    source = StackSource([StackCase(n, n, functools.partial(named, n)) for n in "abc"])
    prepare_stacks(source, folder, workers=0)
    about = folder / "a" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    return folder


def named(name: str) -> ThinStack:
    return dataclasses.replace(tiny(), id=name, patient=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "/thesis"},
        {"id": "../thesis"},
        {"id": ".."},
        {"id": "a\nb"},
        {"id": 3},
        {"patient": None},
        {"pixel_mm": [1.0]},
        {"pixel_mm": [1.0, -1.0]},
        {"pixel_mm": [1e308, 1.0]},
        {"notes": "a note"},
        {"affine": [[1.0]]},
        {"affine": [[1.0, 2.0], [1.0]]},
        {"bytes": {}},
        {"bytes": {"thin": 3}},
        {"bytes": {"../thin": 3}},
        {"thin_axis": {"first_mm": 0.0, "spacing_mm": 0.0, "count": 4}},
        {"thin_axis": {"first_mm": 0.0, "spacing_mm": 1.0, "count": 5}},
        {"thin_axis": {"first_mm": 0.0, "spacing_mm": 1e9, "count": 4}},
        {"thin_axis": None},
        {"profile": {"width_mm": "5", "shape": "rectangular"}},
    ],
)
def test_a_record_of_a_scan_that_is_not_ours(tmp_path, changes):
    source_or_scan = prepared(tmp_path / "out", **changes)
    with refused():
        [case.load() for case in prepared_stacks(source_or_scan).cases]


def test_damage_to_an_array_is_seen(tmp_path):
    out = prepared(tmp_path / "out")
    for name, change in (
        ("order", lambda array: np.asfortranarray(array)),
        ("type", lambda array: array.astype(">i2")),
        ("kind", lambda array: array.astype(np.uint16)),
        ("shape", lambda array: array.reshape(3, 4, 3)),
    ):
        np.save(out / "a" / "thin.npy", change(np.zeros((4, 3, 3), np.int16)))
        with refused(file="thin.npy"):
            prepared_stacks(out)[0]
            pytest.fail(name)
    source = StackSource([StackCase(n, n, functools.partial(named, n)) for n in "abc"])
    again = statuses(prepare_stacks(source, out, workers=0))
    assert again == {"a": "prepared", "b": "kept", "c": "kept"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 2, "sides": {}}',
        '{"format": 1, "sides": {"a": "x"}}',
    ],
)
def test_a_split_that_is_not_ours(tmp_path, text):
    out = prepared(tmp_path / "out")
    (out / "stacks.json").write_text(text)
    with refused(file="stacks.json"):
        prepared_stacks(out)


def test_a_patient_without_a_side(tmp_path):
    with refused(file="stacks.json"):
        prepared_stacks(prepared(tmp_path / "out", patient="somebody"))


@pytest.mark.parametrize("name", ["../thesis", "absolute"])
def test_no_id_leads_to_a_folder_of_somebody_else(tmp_path, name):
    "A shared folder that says id: ../thesis must not delete it."
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    name = str(tmp_path / "thesis") if name == "absolute" else name
    source = StackSource([StackCase(n, n, functools.partial(named, n)) for n in (name, "b", "c")])
    lines = prepare_stacks(source, tmp_path / "out", workers=0)
    assert statuses(lines)[name] == "failed"
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path):
    out = prepared(tmp_path / "out")
    (out / "a" / "thesis.txt").touch()
    (out / "a" / "about.json").write_text("{}")
    source = StackSource([StackCase(n, n, functools.partial(named, n)) for n in "abc"])
    lines = {line["id"]: line for line in prepare_stacks(source, out, workers=0)}
    assert lines["a"]["status"] == "failed" and "thesis.txt" in lines["a"]["reason"]
    assert (out / "a" / "thesis.txt").is_file()
