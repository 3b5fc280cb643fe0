"`launch/gpu_check.py`, whole, on the CPU: kernels by Triton's interpreter, times, training."

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from places import FULL, ROOT

PROGRAM = ROOT / "launch" / "gpu_check.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed here; pip install triton==3.7.1 (Linux)",
)


def check(*words, code=0):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr[-2000:]
    return done


@FULL
def test_everything_is_measured_once(tmp_path, trained, trained_cache):
    shutil.copytree(trained("drr2ct"), tmp_path / "training")  # as an earlier call left it
    said = check("--tiny", "--out", tmp_path).stdout
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(record["kernels"]) == 8 and "FAILED" not in said
    for row in record["kernels"]:
        assert row["passed"] and row["repeats"], row
        assert row["error"] < (1e-12 if row["precision"] == "float64" else 1e-5), row
    ours = [row for row in record["times"] if row["projector"] == "ct_nb"]
    assert [row["operation"] for row in ours][:2] == ["forward", "adjoint"] and len(ours) == 5
    assert all(row["milliseconds"] > row["memory_limit_ms"] > 0 for row in ours)
    assert record["training"]["finished"] and record["training"]["last"]["stage"] == "fine"
    assert "training: stage fine, step " in said and "| 8³ | forward |" in said

    # what is there is not measured again, and a kernel that differs ends with an error
    record["kernels"][2] |= {"error": 0.125, "passed": False}
    (tmp_path / "gpu_check.json").write_text(json.dumps(record))
    again = check("--tiny", "--out", tmp_path, "--minutes", 0.01, code=1).stdout
    assert "| gradient to volume | float64 | 1.2e-01 | yes | FAILED |" in again
    assert "training: stage fine" in again
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_without_a_card_there_is_one_sentence():
    lines = check(code=1).stderr.splitlines()
    assert len(lines) == 1 and "no CUDA card here; --tiny" in lines[0]
