"""A killed run ends with the same weights: the trainer in the middle of a checkpoint is in test_trainer.py, here every system is stopped after each step or two and resumed."""

import pytest
from places import FULL
import torch
from safetensors.torch import load_file
from trained_runs import SYSTEMS, options, run_class

from ct_nb.training.trainer import Trainer, read_history

pytestmark = pytest.mark.usefixtures("trained_cache")

STEPS_IN_A_LIFE = {"drr2ct": 2}  # optimiser steps before the next kill; 1 for the others


class Killed(Exception):
    pass


@pytest.fixture
def mortal(monkeypatch):
    "`mortal(steps)` lets the trainers of this process take so many steps from now on."
    step = Trainer._optimizer_step
    left = [None] * 10_000  # before the first call: the reference may have to be trained

    def count(trainer, *arguments):
        if not left:
            raise Killed
        left.pop()
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_optimizer_step", count)

    def allow(steps):
        left[:] = [None] * steps

    return allow


def plain(rows):
    return [
        {name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows
    ]


# the same trainer as the others; they are stopped and resumed in `make test-all`
LONG = ("slices", "refinement")


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=FULL) if name in LONG else name for name in SYSTEMS]
)
def test_a_killed_run_ends_with_the_same_weights(system, trained, tmp_path, mortal):
    reference = trained(system)
    history = None
    kills = 0
    while history is None:
        mortal(STEPS_IN_A_LIFE.get(system, 1))
        run = run_class(system)("micro", out=tmp_path, resume=kills > 0, **options(system)).open()
        try:
            history = run.fit(progress=False)
        except Killed:
            kills += 1
            assert kills < 10, "it does not get on"
    assert kills > 0
    weights, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path, reference)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert plain(history) == plain(read_history(tmp_path)) == plain(read_history(reference))
