"""What all systems share: flags, presets, a finished run opened again, and one sentence for what cannot be used."""

import json
import shutil
from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from fastcore.basics import patch_to
from refusals import refused
from safetensors.torch import load_file
from trained_runs import SYSTEMS, options, run_class

from ct_nb.core.errors import FileError
from ct_nb.training.checkpoints import WeightsError
from ct_nb.training.run import Run, command_parser, join_histories, run_main
from ct_nb.training.trainer import TrainingStopped

pytestmark = pytest.mark.usefixtures("trained_cache")

every_system = pytest.mark.parametrize("system", SYSTEMS)


@every_system
def test_every_preset_is_there_and_every_flag_has_its_help(system):
    kind = run_class(system)
    sizes = [name for name in kind.presets if name != "atlas"]  # drr2ct's other base
    assert sizes == ["micro", "smoke", "cpu", "gpu", "paper"]
    parser = command_parser(kind)
    flags = {action.dest: action for action in parser._actions}
    shared = {own.name for own in fields(Run) if own.init} - {"settings"}
    assert shared <= set(flags) and not {"settings", "built", "claimed", "features"} & set(flags)
    assert all(action.help for action in parser._actions)
    values = vars(parser.parse_args(["--preset", "smoke", "--seed", "4", "--resume"]))
    assert (values["preset"], values["seed"], values["resume"]) == ("smoke", 4, True)
    assert values["steps"] is None and values["out"] == next(
        own.default for own in fields(kind) if own.name == "out"
    )
    assert parser.prog == kind.__module__


def test_a_run_without_its_methods_cannot_be_made():
    class Half(Run):
        presets: ClassVar[dict] = {"cpu": None}

        def configure(self, settings):
            return settings

        def open(self):
            return self

    with pytest.raises(TypeError, match="abstract methods _build, _train, evaluate, restore"):
        Half()
    for name in ("_build", "_train", "evaluate", "restore"):

        def method(self):
            return None

        method.__name__ = name
        patch_to(Half)(method)
    assert Half().open().preset == "cpu"


@every_system
def test_a_finished_run_opens_again_with_its_weights(system, trained):
    folder = trained(system)
    run = run_class(system).load(folder)
    weights = load_file(folder / "model.safetensors")
    state = run.network.state_dict()
    assert weights.keys() == state.keys() and not run.network.training
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    config = json.loads((folder / "config.json").read_text())
    assert run.history and run.history[-1]["loss"] is not None
    assert {"network", "versions", "training", "validation"} <= set(config)
    assert json.loads(json.dumps(run.identity())).items() <= config.items()
    assert not set(config["training"]["patients"]) & set(config["validation"]["patients"])
    for label in ("trained on:", "evaluated on:"):
        assert label in run.describe()


def test_a_run_on_other_data_or_of_another_system_is_refused(trained, tmp_path):
    shutil.copytree(trained("vae"), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["training"]["fingerprint"] = "other"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with refused(file="run", kind=FileError):
        run_class("vae").load(tmp_path / "run")
    with pytest.raises(WeightsError, match="'slice_vae', but 'drr2ct'"):
        run_class("drr2ct").load(tmp_path / "run")


@every_system
def test_a_preset_that_is_not_there_is_refused(system, trained):
    with refused("preset"):
        run_class(system)("huge", **options(system))


def test_names_of_patients_cannot_speak_to_the_terminal():
    class Loud:
        def description(self):
            return [("trained on", "a\x1b[2J\nevaluated on: b")]

    assert Run.describe(Loud()) == r"trained on:   a\x1b[2J\nevaluated on: b"


@pytest.mark.parametrize("error", [OSError("x: is full"), TrainingStopped("loss nan")])
def test_the_command_ends_with_one_sentence(error, monkeypatch, tmp_path):
    kind = run_class("vae")

    def fails(run, progress=True):
        raise error

    monkeypatch.setattr(kind, "fit", fails)
    with pytest.raises(SystemExit) as ended:
        run_main(kind, ["--preset", "micro", "--out", str(tmp_path)])
    assert ended.value.code == f"ct_nb.slices.vae_train: {error}"
    monkeypatch.setattr(kind, "fit", lambda run, progress=True: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is no sentence
        run_main(kind, ["--preset", "micro", "--out", str(tmp_path)])


@every_system
def test_a_folder_that_cannot_be_is_said_before_anything_is_made(
    system, trained, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    kind = run_class(system)

    def never(run, progress):
        raise AssertionError("it builds a network first")

    monkeypatch.setattr(kind, "_build", never)
    words = [f"--{name}={value}" for name, value in options(system).items()]
    with pytest.raises(SystemExit) as ended:
        run_main(kind, ["--preset", "micro", "--out", str(tmp_path / "file" / "run"), *words])
    assert str(ended.value.code).startswith(f"{kind.__module__}: {tmp_path / 'file' / 'run'}")


def test_a_stage_that_is_not_there_is_refused(tmp_path):
    run = run_class("cascade")("micro", out=tmp_path, stage=32)
    with refused("stage"):
        run.train_stages({"16": list, "32": list}, load=print, trained=["32"])
    assert join_histories({}) == []
