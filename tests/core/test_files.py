"Atomic files beyond nbs/core/00_files.ipynb: faults of the disk, kinds of values, relative paths."

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ct_nb.core import files
from ct_nb.core.files import atomic_write, project_path, write_json


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


def test_others_may_read_the_file(tmp_path):
    with atomic_write(tmp_path / "x.txt") as temporary:
        temporary.write_text("1")
    assert (tmp_path / "x.txt").stat().st_mode & 0o777 == 0o644


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
