"""A batch has the same gradients in one piece and in several, in one process and in two, in every
system: in pieces of one case too, whose contrastive loss by itself would be 0.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from places import FULL, PROGRAMS
from trained_runs import run_class, trained_folder

from ct_nb.cascade.train import CASCADE_PRESETS
from ct_nb.drr2ct.objective import get_stages
from ct_nb.drr2ct.train import DRR2CT_PRESETS
from ct_nb.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("trained_cache")

STEP = 1
CASES = 4


class Reached(Exception):
    pass


@pytest.fixture
def trainer_of(monkeypatch):
    "`trainer_of(call)` is the trainer that a call would have fitted."

    def found(call) -> Trainer:
        caught = []

        def fit(trainer, *arguments, **options):
            caught.append(trainer)
            raise Reached

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", fit)
            with pytest.raises(Reached):
                call()
        return caught[0]

    return found


def opened(system, tmp_path, **options):
    run = run_class(system)("micro", out=tmp_path, **options).open()
    run.build(progress=False)
    return run


def drr2ct(tmp_path, stage):
    run = opened("drr2ct", tmp_path)
    run.teacher = str(trained_folder("drr2ct"))
    stage = replace(get_stages(stage)[0], adversary_start=0.0)
    return lambda: run._train_stage(stage, False), run.training


def drr2ct_diffusion(tmp_path, stage):
    "With the decoder that draws noise and steps of its own."
    settings = DRR2CT_PRESETS["micro"]
    network = replace(settings.network, decoder="diffusion", size=32)
    run = opened("drr2ct", tmp_path, settings=replace(settings, network=network))
    return lambda: run._train_stage(get_stages(stage)[0], False), run.training


def cascade(tmp_path, number):
    run = opened("cascade", tmp_path)
    return lambda: run._train_stage(number, False), run.cohorts[run.sizes[number]].training


def cascade_patches(tmp_path, number):
    settings = CASCADE_PRESETS["micro"]
    stages = [replace(stage, patch=stage.size // 2) for stage in settings.stages]
    run = opened("cascade", tmp_path, settings=replace(settings, stages=tuple(stages)))
    return lambda: run._train_stage(number, False), run.cohorts[run.sizes[number]].training


def refinement(tmp_path, patch):
    run = opened("refinement", tmp_path, coarse=str(trained_folder("drr2ct")))
    run.model.refiner.config = replace(run.model.refiner.config, patch=patch)
    return lambda: run._train(False), None


def vae(tmp_path, _):
    run = opened("vae", tmp_path)
    run.settings = replace(run.settings, adversary_start=0.0)
    return lambda: run._train(False), None


def slices(tmp_path, name):
    run = opened("slices", tmp_path, vae=str(trained_folder("vae")))
    return lambda: run._train_model(name, False), None


def ct_encoder(tmp_path, _):
    run = opened("ct_encoder", tmp_path)
    return lambda: run._train(False), None


KINDS = [
    pytest.param(drr2ct_diffusion, "joint", marks=FULL),
    *((drr2ct, stage) for stage in ("joint", "latent", "masked", "fine")),
    *((cascade, number) for number in (0, 1)),
    (cascade_patches, 1),
    *((refinement, patch) for patch in (None, 8)),
    (vae, None),
    *((slices, name) for name in ("regressor", "diffusion")),
    (ct_encoder, None),
]


def gradients(trainer, batch, pieces):
    "Loss, figures and gradient of a batch in pieces."
    trainer.pieces = pieces
    trainer.model.train()
    loss, figures = trainer._accumulate(batch, STEP)
    assert trainer.pieces == pieces
    gradient = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in trainer.plain_model.parameters()
        ]
    )
    return loss, figures, gradient.clone()


def _name(value) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("kind, part", KINDS, ids=_name)
def test_gradients_do_not_depend_on_the_number_of_pieces(kind, part, tmp_path, trainer_of):
    call, data = kind(tmp_path, part)
    trainer = trainer_of(call)
    data = trainer.data if data is None else data
    at = data.at if hasattr(data, "at") else lambda _, index: data[index]
    batch = trainer.collate([at(n // len(data), n % len(data)) for n in range(CASES)])
    whole, figures, expected = gradients(trainer, batch, 1)
    assert expected.norm() > 0
    for pieces in (2, 4):
        loss, found, gradient = gradients(trainer, batch, pieces)
        error = float((gradient - expected).norm() / expected.norm())
        print(f"{kind.__name__} {part}: {pieces} pieces, loss {loss:.6f}, {error:.1e}")
        assert error < 1e-3
        assert loss == pytest.approx(whole, rel=1e-4)
        assert found.keys() == figures.keys()
        if "contrast" in figures:
            assert found["contrast"] == pytest.approx(figures["contrast"], rel=1e-4)
            assert found["contrast"] > 0.1


@FULL
def test_two_processes_have_the_gradients_of_one(tmp_path):
    "Drr2ct's joint stage: each process with its share of the batch in one piece, and in two."
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(PROGRAMS / "pieces_of_drr2ct.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from programs.pieces_of_drr2ct import gradients as gradients_of_one

    _, [(loss, expected)] = gradients_of_one(tmp_path / "run", 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for way, (first, second) in zip(("one piece", "two pieces"), zip(*ranks)):
        assert torch.equal(first[1], second[1])
        error = float((first[1] - expected).norm() / expected.norm())
        print(f"two processes, {way} each: loss {(first[0] + second[0]) / 2:.6f}, {error:.1e}")
        assert error < 1e-3
        assert (first[0] + second[0]) / 2 == pytest.approx(loss, rel=1e-4)
