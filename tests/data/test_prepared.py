"Prepared cases that are damaged, or of somebody else."

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.data.cases import CTSource
from ct_nb.data.folders import read_folder
from ct_nb.data.prepare import prepare
from ct_nb.physics.volume import Grid, Volume

RADIUS = np.linalg.norm(Grid.cube(32, 320.0).centers_mm().numpy(), axis=-1)


def ball(radius=100.0, seed=0, center=(0, 0, 0)) -> Volume:
    "A noisy ball of muscle in air, whole HU."
    noise = np.random.default_rng(seed).normal(0, 15, RADIUS.shape)
    return Volume(
        np.rint(np.where(radius > RADIUS, 40, -1000) + noise), Grid.cube(32, 320.0, center).affine
    )


def quiet(*args, **kwargs) -> CTSource:
    "`read_folder` without its warnings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_folder(*args, **kwargs)


ABOUT = {"notes": [], "label_names": {}, "report": None, "prepared": ["a", "p"]}


def prepared_case(path, about=None, **arrays) -> Path:
    "A prepared case with some of its arrays or entries changed; None leaves one out."
    source = CTSource.from_list(
        [ball()], 16, ids=["a"], labels=[np.ones(ball().hu.shape, np.uint8)]
    )
    (case,) = prepare(source, path / "whole").glob("*.npz")
    content = dict(np.load(case)) | arrays
    if about is not None:
        content["about"] = np.array(json.dumps(ABOUT | about))
    (path / "folder").mkdir()
    np.savez(path / "folder" / "a.npz", **{k: v for k, v in content.items() if v is not None})
    return path / "folder"


@pytest.mark.parametrize(
    "arrays",
    [
        {"hu": None},
        {"affine": None},
        {"hu": np.zeros((16, 16, 8), np.int16)},
        {"hu": np.zeros((16, 16, 16), np.float32)},
        {"hu": np.zeros((16, 16, 16), np.int16)},
        {"hu": np.array(3)},
        {"affine": np.eye(3)},
        {"affine": np.full((4, 4), np.nan)},
        {"labels": np.zeros((16, 16, 16))},
        {"labels": np.zeros((8, 8, 8), np.uint8)},
        {"about": {"notes": "a"}},
        {"about": {"label_names": {"one": "lung"}}},
        {"about": {"label_names": {"1": 2}}},
        {"about": {"report": "text"}},
        {"about": {"thorax": {"lung_litres": "4"}}},
        {"about": {"prepared": ["a"]}},
        {"about": {"prepared": ["../victim", "p"]}},
        {"about": {"prepared": ["/victim", "p"]}},
        {"about": {"prepared": [3, "p"]}},
    ],
)
def test_a_prepared_case_that_is_not_what_it_says(tmp_path, arrays):
    with refused(file="a.npz", kind=FileError):
        read_folder(prepared_case(tmp_path, **arrays), 16)[0]


def test_a_damaged_prepared_case_is_one_reason_of_a_folder(tmp_path):
    "One flipped bit in its record, say: it must not pass for a plain npz of another patient."
    folder = prepared_case(tmp_path)
    whole = (folder / "a.npz").read_bytes()
    for word in ("prepared".encode("utf-32-le"), b"about.npy"):
        damaged = bytearray(whole)
        damaged[whole.index(word) + 2] ^= 1
        (folder / "b.npz").write_bytes(damaged)
        source = quiet(folder, 16, on_error="skip")
        assert source.ids == ["a"] and [name for name, _ in source.skipped] == ["b.npz"]


def test_no_id_leads_out_of_the_prepared_folder(tmp_path):
    source = CTSource.from_list([ball()], 16, ids=["../victim"])
    with refused("name"):
        prepare(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
