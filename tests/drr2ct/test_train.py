"""The four stages of drr2ct as configurations of one trainer: in order, by name, started from other weights, and when memory runs out. That a killed run resumes is in tests/training/test_resume.py."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import FULL
from refusals import refused
from train_line_runs import FSDP2, NEEDS_DEEPSPEED, ZERO3

from ct_nb.drr2ct.objective import STAGES, DRR2CTObjective, get_stages
from ct_nb.drr2ct.predict import load_drr2ct
from ct_nb.drr2ct.train import DRR2CT_PRESETS, DRR2CTRun
from ct_nb.training.trainer import read_history

pytestmark = pytest.mark.usefixtures("trained_cache")

STEPS = 8  # so that the first stage has more than one


def fitted(out, **changes) -> DRR2CTRun:
    run = DRR2CTRun("micro", out=out, steps=STEPS, **changes).open()
    run.fit(progress=False)
    return run


@pytest.fixture(scope="module")
def four(trained_cache, tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("four"))


def test_all_four_follow_one_another(four):
    assert list(dict.fromkeys(row["stage"] for row in four.history)) == [
        "joint",
        "latent",
        "masked",
        "fine",
    ]
    steps = [row["step"] for row in four.history]
    assert steps == sorted(steps) and steps[-1] == sum(
        max(1, round(stage.share * STEPS)) for stage in STAGES
    )
    of = {
        name: [row for row in four.history if row["stage"] == name]
        for name in ("joint", "latent", "masked", "fine")
    }
    assert (
        {"kl", "contrast", "cycle", "structure"} <= set(of["joint"][-1])
        and "masked" in of["masked"][-1]
        and "discriminator" in of["fine"][-1]
    )
    assert of["joint"][0]["kl"] == 0 < of["joint"][-1]["kl"], "the warm-up does not know the step"
    for name in of:
        assert (four.out / "stages" / name / "model.safetensors").is_file()
    config = json.loads((four.out / "config.json").read_text())
    assert [stage["name"] for stage in config["settings"]["stages"]] == list(of) and 0 < config[
        "residual"
    ]["median"] < config["residual"]["limit"]


def test_frozen_parts_stay_as_they_are(four):
    before, after = (
        load_drr2ct(four.out / "stages" / name).state_dict() for name in ("joint", "latent")
    )
    frozen = get_stages("latent")[0].frozen
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed & set(frozen), changed


def test_the_same_seed_gives_the_same_weights_whoever_looked(trained, tmp_path):
    "Built first and looked at, as the recipe does it, then trained."
    run = DRR2CTRun("micro", out=tmp_path).open()
    built, case = run.build(progress=False), run.validation[0]
    built.start(case["xrays"][None], case["geometry"])
    run.fit(progress=False)
    assert run.model is built and not run.built, "built twice, or what is trained passes for new"
    for name, value in load_drr2ct(trained("drr2ct")).state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name


def test_a_stage_by_name_goes_on_from_what_is_there(four, tmp_path):
    with refused("stage") as caught:
        DRR2CTRun("micro", out=tmp_path, stage="fine")
    assert "holds none" in caught.value.reason
    with refused("stage"):
        DRR2CTRun("micro", out=tmp_path, stage="final")
    run = fitted(tmp_path, stage="masked", start=str(four.out), teacher=str(four.out))
    assert {row["stage"] for row in run.history} == {"masked"} and "distillation" in run.history[0]
    before, after = (
        folder.state_dict() for folder in (load_drr2ct(four.out), load_drr2ct(tmp_path))
    )
    assert torch.equal(before["prior.mean_hu"], after["prior.mean_hu"]) and not torch.equal(
        before["views.patch.weight"], after["views.patch.weight"]
    )
    assert json.loads((tmp_path / "config.json").read_text())["start"] == str(four.out)


def test_weights_of_another_size_are_refused(trained, tmp_path):
    settings = replace(DRR2CT_PRESETS["smoke"], phantoms=2, validation_phantoms=1)
    run = DRR2CTRun("smoke", out=tmp_path, start=str(trained("drr2ct")), settings=settings)
    with refused("start"):
        run.open().build(progress=False)


def test_cases_that_were_trained_on_are_not_evaluated(trained):
    run = DRR2CTRun.load(trained("drr2ct"))
    with refused("pairs"):
        run.evaluate(run.training)


def test_out_of_memory_lowers_batch_then_lists_then_latent_channels(tmp_path, monkeypatch, capsys):
    forward = DRR2CTObjective.with_own_loss

    def hungry(self, batch, step):
        if self.model.config.latent_channels > 8:
            raise torch.cuda.OutOfMemoryError("simulated")
        return forward(self, batch, step)

    import ct_nb.drr2ct.train as train

    monkeypatch.setattr(train, "FEWEST_LATENT_CHANNELS", 8)
    monkeypatch.setattr(DRR2CTObjective, "with_own_loss", hungry)
    run = fitted(tmp_path, stage="joint")
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [
        "2 pieces" in said[0],
        "16 tokens" in said[1],
        "8 tokens" in said[2],
        "8 latent channels" in said[3],
    ] == [True] * 4, said
    assert (
        run.model.config.latent_channels == 8
        and load_drr2ct(tmp_path).config.epipolar_neighbours == 8
    )


@FULL
def test_accelerate_launches_two_processes(tmp_path):
    words = (
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "ct_nb.drr2ct.train",
        "--preset",
        "micro",
        "--stage",
        "joint",
        "--out",
        str(tmp_path),
    )
    done = subprocess.run(
        [str(Path(sys.executable).parent / "accelerate"), "launch", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("PSNR, dB") == 1
        and (tmp_path / "model.safetensors").is_file()
        and (tmp_path / "metrics.json").is_file()
    )


@FULL
@pytest.mark.parametrize(
    "sharing", [FSDP2, pytest.param(ZERO3, marks=NEEDS_DEEPSPEED)], ids=["FSDP2", "ZeRO-3"]
)
def test_two_processes_that_share_the_network_train_all_stages(sharing, trained, tmp_path):
    words = (
        *"-m torch.distributed.run --standalone --nproc_per_node 2 -m ct_nb.drr2ct.train".split(),
        *"--preset micro --out".split(),
        str(tmp_path),
    )
    environment = {
        **sharing,
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViewBlock,SwinBlock3d",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PSNR, dB") == 1
    network = load_drr2ct(tmp_path)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    assert not list(tmp_path.rglob("training_shards/*"))  # all stages are done
    alone = read_history(trained("drr2ct"))
    for one, two in zip(alone, read_history(tmp_path), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
