"Damaged inputs of every kind end as a plausible value or as one sentence with the file's name."

import json
import os
import subprocess
import sys
from pathlib import Path

from fuzz.harness import GOOD, Outcome, kinds_of_failures, table

HARNESS = Path(__file__).with_name("harness.py")
COUNT = 5000 if os.environ.get("CT_NB_TEST_ALL") else 120  # three of each kind
SECONDS = 1800


def test_damaged_inputs(tmp_path):
    "In a process of its own, which forks the readers: that of the tests has threads."
    done = subprocess.run(
        [sys.executable, HARNESS, "--count", str(COUNT), "--json", tmp_path / "outcomes.json"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [Outcome(**one) for one in json.loads((tmp_path / "outcomes.json").read_text())]
    assert len(found) == COUNT
    failed = [one for one in found if one.kind not in GOOD]
    assert not failed, f"\n{table(found)}\n{kinds_of_failures(found)}"
    # the readers read, and do not refuse everything
    assert sum(one.kind != "sentence" for one in found) > 0.3 * COUNT
