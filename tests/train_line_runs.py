"""Runs of `programs/train_line.py` in processes of their own."""

import os
import subprocess
import sys

from places import PROGRAMS

PROGRAM = PROGRAMS / "train_line.py"
TWO_PROCESSES = (
    sys.executable,
    *"-m torch.distributed.run --standalone --nproc_per_node 2".split(),
)


def train(out, *words, launcher=(sys.executable,), expect=0, **environment):
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(out), *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done
