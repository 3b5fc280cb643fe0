"""Runs of `programs/train_line.py` in processes of their own, and what `accelerate launch` sets for processes that share a network."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from places import PROGRAMS

PROGRAM = PROGRAMS / "train_line.py"
TWO_PROCESSES = (
    sys.executable,
    *"-m torch.distributed.run --standalone --nproc_per_node 2".split(),
)
# what `accelerate launch` makes of launch/fsdp.yaml, on the CPU
FSDP2 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
}
# the same of launch/deepspeed.yaml
ZERO3 = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "DS_ACCELERATOR": "cpu",
}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="wants DeepSpeed: pip install 'ct_nb[deepspeed]'"
)


def run_program(program, *words, launcher=(sys.executable,), expect=0, **environment):
    done = subprocess.run(
        [*launcher, str(program), *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def train(out, *words, **options):
    return run_program(PROGRAM, str(out), *words, **options)
