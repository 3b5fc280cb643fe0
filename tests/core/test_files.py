"Atomic files beyond nbs/core/00_files.ipynb: faults of the disk, kinds of values, relative paths."

import csv
import errno
import json
import multiprocessing
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ct_nb.core import files
from ct_nb.core.errors import FileError
from ct_nb.core.files import (
    atomic_folder,
    atomic_write,
    project_path,
    read_json,
    read_table,
    remove_leftovers,
    table_columns,
    read_text,
    write_json,
    writing,
)
from refusals import refused


def test_interrupted_block_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(path) in str(caught.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "taken" / "x.txt"):
        pass
    assert "taken" in str(caught.value) and "\n" not in str(caught.value)


def test_the_temporary_file_is_beside_the_target_with_its_ending(tmp_path):
    with atomic_write(tmp_path / "scan.nii.gz") as temporary:
        assert temporary.parent == tmp_path and temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"1")
        assert not (tmp_path / "scan.nii.gz").exists()
    assert (tmp_path / "scan.nii.gz").read_bytes() == b"1"


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def permissions(path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_and_folders_have_the_permissions_that_the_umask_leaves(tmp_path, mask):
    with umask(mask):
        write_json(tmp_path / "x.json", 1)
        with atomic_folder(tmp_path / "x") as temporary:
            (temporary / "y").touch()
    assert permissions(tmp_path / "x.json") == permissions(tmp_path / "x" / "y") == 0o666 & ~mask
    assert permissions(tmp_path / "x") == 0o777 & ~mask


@pytest.mark.parametrize("mask", [0, 0o777])
def test_a_private_file_is_its_owners_whatever_the_umask(tmp_path, mask):
    with umask(mask), atomic_write(tmp_path / "x", private=True) as temporary:
        temporary.write_text("1")
    assert permissions(tmp_path / "x") == 0o600


def _hang(write, path, begun):
    with write(path) as temporary:
        (temporary if temporary.is_file() else temporary / "half").write_text("half")
        begun.set()
        time.sleep(60)


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, write):
    "And not while it lives."
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    path = tmp_path / "x"
    process = context.Process(target=_hang, args=(write, path, begun))
    process.start()
    try:
        assert begun.wait(20)
        with write(path):
            pass
        assert len(os.listdir(tmp_path)) == 2
    finally:
        process.kill()
        process.join(20)
    assert len(os.listdir(tmp_path)) == 2
    with write(path):
        pass
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("age_s, left", [(3600, True), (2 * 86400, False)])
def test_what_another_machine_writes_counts_as_left_after_a_day(tmp_path, age_s, left):
    written = tmp_path / ".tmp-ffffffff-1-01234567.x"
    others = [".tmp-ffffffff-1-01234567.y", ".tmp-x", ".x", ".tmp-ffffffff-one-01234567.x"]
    for path in (written, *(tmp_path / name for name in others)):
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    with atomic_write(tmp_path / "x"):
        pass
    assert written.exists() == left
    assert all((tmp_path / name).exists() for name in others)  # none is of this output
    remove_leftovers(tmp_path)
    assert [(tmp_path / name).exists() for name in others] == [left, True, True, True]


def test_the_data_are_flushed_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(files.os, "replace", lambda *p: (calls.append("replace"), replace(*p)))
    with atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text("1")
    assert calls == ["fsync", "replace"]


def test_json_of_numbers_arrays_tensors_and_paths(tmp_path):
    values = {
        "number": np.float32(0.5),
        "count": np.int64(3),
        "array": np.arange(3),
        "tensor": torch.ones(2, 1),
        "path": Path("runs/a"),
        "text": "Bäume",
    }
    write_json(tmp_path / "x.json", values)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "number": 0.5,
        "count": 3,
        "array": [0, 1, 2],
        "tensor": [[1.0], [1.0]],
        "path": "runs/a",
        "text": "Bäume",
    }


@pytest.mark.parametrize("value, kind", [(float("inf"), ValueError), ({1, 2}, TypeError)])
def test_json_refuses_and_keeps_the_old_file(tmp_path, value, kind):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(kind):
        write_json(tmp_path / "x.json", {"value": value})
    assert (tmp_path / "x.json").read_text() == "1\n" and os.listdir(tmp_path) == ["x.json"]


def test_relative_paths_outside_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert project_path("runs") == tmp_path.resolve() / "deep" / "runs"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert project_path("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_a_marked_encoding(tmp_path, encoding):
    path = tmp_path / "x.txt"
    path.write_bytes("Ödem\r\n5 µm\u2028".encode(encoding))
    assert read_text(path) == "Ödem\r\n5 µm\u2028"


@pytest.mark.parametrize("content", ["Ödem".encode("latin-1"), b"a\0b", "ab".encode("utf-16-le")])
def test_text_in_another_encoding_is_refused_with_its_file(tmp_path, content):
    path = tmp_path / "x.txt"
    path.write_bytes(b"first\n" + content)
    with refused(file="x.txt", kind=FileError):
        read_text(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', "1" * 5000, '"\\ud800', "{]"]
)
def test_json_that_is_refused_with_its_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with refused(file="x.json", kind=FileError):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_read_as_written(tmp_path, delimiter):
    path = tmp_path / "t.csv"
    text = f'\ufeffid{delimiter}text\r\n\r\na{delimiter}"1{delimiter}2\n ""3"" \u2028"\r\n'
    path.write_bytes(text.encode())
    assert read_table(path, ("id",)) == [(3, {"id": "a", "text": f'1{delimiter}2\n "3" \u2028'})]


@pytest.mark.parametrize(
    "rows, line",
    [
        ("a,b\n1,2,3\n", 2),
        ("a,b\n1,2\n\n1\n", 4),
        ('a,b\n1,2\n3,"x\n4,5\n', 3),
        ('a,b\n1,x""y"\n', 0),
    ],
)
def test_a_row_that_breaks_the_rules_is_named(tmp_path, rows, line):
    path = tmp_path / "t.csv"
    path.write_text(rows)
    faults = []
    read_table(path, faults=faults)
    if not line:
        assert faults == []
        return
    assert f"t.csv: line {line} has" in faults[0]
    with refused(file="t.csv", kind=FileError):
        read_table(path)


@pytest.mark.parametrize("rows", ["", "\n\n", "a,a\n1,2\n", "b\n1\n"])
def test_a_table_without_its_columns(tmp_path, rows):
    (tmp_path / "t.csv").write_text(rows)
    with refused(file="t.csv", kind=FileError):
        read_table(tmp_path / "t.csv", ("a",))


def test_long_cells_a_line_for_excel_and_empty_lines_first(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,text\na," + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(read_table(path)[0][1]["text"]) == 200_000
    path.write_bytes(b"\r\nsep=;\r\nid;text\r\na;b,c\r\n")
    assert read_table(path) == [(4, {"id": "a", "text": "b,c"})]
    assert table_columns(path) == ["id", "text"]


@pytest.mark.parametrize(
    "content, what",
    [
        (b"PK\x03\x04\x14\0\x06\0", "Excel"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "Excel"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"PAR1\x15\x04", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"\n<!DOCTYPE html><html>", "web page"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_beginning(tmp_path, content, what):
    (tmp_path / "reports.csv").write_bytes(content)
    with refused(file="reports.csv", kind=FileError) as error:
        read_table(tmp_path / "reports.csv")
    assert what in error.value.reason


def test_the_limit_of_the_csv_module_is_left_as_it_was(tmp_path):
    "It is one for the whole process, and other readers of tables may rely on it."
    before = csv.field_size_limit()
    long = tmp_path / "long.csv"
    long.write_text(f"a,b\n1,{'x' * (before + 1)}\n")
    assert len(read_table(long)[0][1]["b"]) == before + 1
    assert table_columns(long) == ["a", "b"] and csv.field_size_limit() == before
    open_quote = tmp_path / "quote.csv"
    open_quote.write_text('a,b\n1,"2\n')
    with refused(file=open_quote):
        read_table(open_quote)
    assert csv.field_size_limit() == before


def test_a_full_disk_is_named_by_its_path(tmp_path):
    with pytest.raises(OSError) as caught, writing(tmp_path / "scan"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value).startswith(f"{tmp_path / 'scan'}: could not be written (No space")
    with pytest.raises(OSError) as caught, writing(tmp_path / "scan"):
        raise OSError("884736 requested and 51136 written")  # numpy on a full disk
    assert str(caught.value).startswith(f"{tmp_path / 'scan'}: could not be written (884736")
    with pytest.raises(OSError) as again, writing(tmp_path / "scan"):
        raise caught.value
    assert again.value is caught.value
