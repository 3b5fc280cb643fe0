"""The trainer under a kill, a full disk, two processes; the weights files under abuse."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from places import PROGRAMS
from refusals import refused

from ct_nb.core.errors import InputError
from ct_nb.core.files import atomic_write
from ct_nb.training.checkpoints import (
    STATE_FILE,
    WeightsError,
    load_model,
    load_state,
    load_weights,
    read_config,
    save_weights,
)
from ct_nb.training.run import join_histories
from ct_nb.training.trainer import read_history, write_history

PROGRAM = PROGRAMS / "train_line.py"


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    train(out)
    return torch.load(out / "final.pt", weights_only=True)


def test_killed_in_mid_checkpoint_resumes_to_the_same_weights(tmp_path, undisturbed):
    train(tmp_path, "kill-in-save", expect=-signal.SIGKILL)
    # the first checkpoint stands whole; the second was being written
    assert load_state(tmp_path)["step"] == 10
    train(tmp_path, "resume")
    assert torch.equal(torch.load(tmp_path / "final.pt", weights_only=True), undisturbed)


def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(tmp_path, undisturbed):
    done = train(tmp_path, "small-disk", expect=1)
    assert (
        STATE_FILE in done.stderr.splitlines()[-1]
        and "could not be written" in done.stderr.splitlines()[-1]
    )
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.pt"))
    train(tmp_path, "resume")
    assert torch.equal(torch.load(tmp_path / "final.pt", weights_only=True), undisturbed)


def test_two_processes_give_the_single_process_result(tmp_path, undisturbed):
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    done = train(tmp_path, launcher=torchrun, ACCELERATE_USE_CPU="true")
    assert done.stdout.count("weights") == 1, "each process should not train on its own"
    both = torch.load(tmp_path / "final.pt", weights_only=True)
    assert torch.allclose(both, undisturbed, atol=2e-6), (both - undisturbed).abs().max()


def test_two_processes_that_share_the_optimizer_give_it_too(tmp_path, undisturbed):
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    )
    train(tmp_path, "zero", launcher=torchrun, ACCELERATE_USE_CPU="true")
    both = torch.load(tmp_path / "final.pt", weights_only=True)
    assert torch.allclose(both, undisturbed, atol=2e-6), (both - undisturbed).abs().max()
    moments = torch.load(tmp_path / "training_state.pt", weights_only=True)["optimizer"]["state"]
    assert len(moments) == 4 and all(
        torch.isfinite(m["exp_avg"]).all() for m in moments.values()
    ), "the checkpoint must hold the moments of all processes"


def test_resume_with_other_settings_is_refused(tmp_path):
    from dataclasses import replace

    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    config = TrainerConfig(steps=4, batch_size=2, checkpoint_every=2, validate_every=0)
    Trainer(torch.nn.Linear(8, 1), step, Points(), config, tmp_path, collate).fit(progress=False)
    with pytest.raises(ValueError, match="learning_rate=0.001, this run asks for 0.5"):
        Trainer(
            torch.nn.Linear(8, 1),
            step,
            Points(),
            replace(config, learning_rate=0.5),
            tmp_path,
            collate,
        ).fit(resume=True, progress=False)


def test_out_of_memory_cuts_the_batch_and_keeps_the_step(tmp_path):
    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    def hungry(model, batch, number):
        if len(batch["id"]) > 2:
            raise torch.cuda.OutOfMemoryError("simulated")
        return step(model, batch, number)

    finals = []
    for name, function in (("whole", step), ("hungry", hungry)):
        torch.manual_seed(1)
        model = torch.nn.Linear(8, 1)
        config = TrainerConfig(steps=5, batch_size=4, validate_every=0)
        Trainer(model, function, Points(), config, tmp_path / name, collate).fit(progress=False)
        finals.append(model.weight.detach())
    assert torch.allclose(*finals, atol=1e-6)


def test_a_step_is_told_its_number(tmp_path):
    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    told = []

    def listening(model, batch, number):
        told.append(number)
        return step(model, batch, number)

    Trainer(
        torch.nn.Linear(8, 1),
        listening,
        Points(),
        TrainerConfig(steps=4, batch_size=2, validate_every=0),
        tmp_path,
        collate,
    ).fit(progress=False)
    assert told == [0, 1, 2, 3]


def test_out_of_memory_on_one_case_lightens_the_network_and_says_so(tmp_path, capsys):
    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    model = torch.nn.Linear(8, 1)
    model.weights_wanted = 3

    def hungry(model, batch, number):
        if model.weights_wanted > 1:
            raise torch.cuda.OutOfMemoryError("simulated")
        return step(model, batch, number)

    def lighten(model):
        if model.weights_wanted == 1:
            return None
        model.weights_wanted -= 1
        return f"it wants {model.weights_wanted} now"

    trainer = Trainer(
        model,
        hungry,
        Points(),
        TrainerConfig(steps=3, batch_size=2, validate_every=0),
        tmp_path,
        collate,
        lighten=lighten,
    )
    trainer.fit(progress=False)
    said = capsys.readouterr().out
    assert (
        said.index("2 pieces") < said.index("it wants 2 now") < said.index("it wants 1 now")
        and model.weights_wanted == 1
    )

    def insatiable(model, batch, number):
        raise torch.cuda.OutOfMemoryError("simulated")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        Trainer(
            model,
            insatiable,
            Points(),
            TrainerConfig(steps=3, batch_size=2, validate_every=0),
            tmp_path / "b",
            collate,
            lighten=lighten,
        ).fit(progress=False)


def test_weights_of_another_model_missing_or_broken(tmp_path):
    save_weights(tmp_path, torch.nn.Linear(3, 2), {"system": "drr2ct", "network": {}})
    with pytest.raises(WeightsError, match="another model"):
        load_weights(tmp_path, torch.nn.Linear(3, 4))
    with pytest.raises(WeightsError, match="'drr2ct', but 'vae' was asked for"):
        read_config(tmp_path, "vae")
    with pytest.raises(WeightsError, match="no such file"):
        read_config(tmp_path / "nowhere")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights(tmp_path, torch.nn.Linear(3, 2))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        read_config(tmp_path)


def test_unwritable_folder_is_a_sentence(tmp_path):
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(OSError, match="cannot be written"):
        with atomic_write(tmp_path / "a_file" / "b.txt"):
            pass


def saved(folder, **changes):
    "Weights of a line with entries of their configuration changed; None leaves one out."
    torch.manual_seed(0)
    config = {"system": "drr2ct", "network": {"inputs": 3}, "seed": 0, "training": {"cases": ["a"]}}
    save_weights(folder, torch.nn.Linear(3, 2), config)
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"system": 3},
        {"system": None},
        {"network": [1]},
        {"network": None},
        {"seed": "0"},
        {"seed": True},
        {"training": [1]},
        {"training": {"cases": "a"}},
        {"training": {"fingerprint": 3}},
        {"residual": 0.1},
    ],
)
def test_an_entry_of_the_configuration_of_another_form(tmp_path, changes):
    with refused(file="config.json", kind=WeightsError):
        read_config(saved(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 10**5, '{"a": NaN}', "\xff", "a\0"])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with refused(file="config.json", kind=WeightsError):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[1, 2] = value
    save_weights(tmp_path, model, {"system": "drr2ct", "network": {}})
    with refused(file="model.safetensors", kind=WeightsError) as caught:
        load_weights(tmp_path, torch.nn.Linear(3, 2))
    assert "weight" in caught.value.reason


def test_weights_of_another_type(tmp_path):
    save_weights(tmp_path, torch.nn.Linear(3, 2).half(), {"system": "drr2ct", "network": {}})
    with refused(file="model.safetensors", kind=WeightsError):
        load_weights(tmp_path, torch.nn.Linear(3, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda network: torch.nn.Linear(10**6, 10**6),  # 4 TB
        lambda network: torch.nn.ModuleList(torch.nn.Identity() for _ in range(10**9)),
        lambda network: torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(10**9)),
        lambda network: torch.nn.Linear(network["outputs"], 2),
        lambda network: torch.nn.Linear("3", 2),
        lambda network: InputError("channels", "must be 3").argument.missing,
    ],
)
def test_settings_that_make_no_network_of_these_weights(tmp_path, build):
    with refused(file="config.json", kind=WeightsError):
        load_model(saved(tmp_path), "drr2ct", build)


def test_settings_that_do_not_fit_name_their_file(tmp_path):
    def build(network):
        raise InputError("channels", "must be at least 1, got 0")

    with refused(file="config.json", kind=WeightsError) as caught:
        load_model(saved(tmp_path), "drr2ct", build)
    assert "channels: must be at least 1" in caught.value.reason
    assert torch.nn.Linear(2000, 2000).weight.shape == (2000, 2000)  # the bound is gone


ROW = '{"step": 1, "loss": 0.5, "stage": "joint"}\n'


def test_a_history_comes_back(tmp_path):
    rows = [{"step": 1, "loss": 0.5, "stage": "a"}, {"step": 2, "psnr": float("inf")}]
    write_history(tmp_path, rows)
    assert "Infinity" not in (tmp_path / "history.jsonl").read_text()
    first, second = read_history(tmp_path)
    assert first == rows[0] and second["step"] == 2 and second["psnr"] != second["psnr"]
    assert read_history(tmp_path / "history.jsonl")[0] == first
    assert read_history(tmp_path / "nowhere") == []


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    (tmp_path / "history.jsonl").write_text(ROW + ROW[:20])
    assert [row["step"] for row in read_history(tmp_path)] == [1]


@pytest.mark.parametrize(
    "line",
    [
        ROW[:20],
        "3",
        "[1]",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": -1}',
        '{"step": true}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "loss": [1]}',
        '{"step": 1, "loss": true}',
        '{"step": 1, "stage": 3}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "step": 2}',
    ],
)
def test_a_line_of_the_history_that_is_no_row(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(f"{ROW}{line}\n{ROW}")
    with refused(file="history.jsonl") as caught:
        read_history(tmp_path)
    assert "line 2" in str(caught.value)


def test_an_empty_history_joins_with_others():
    joined = join_histories({"a": [], "b": [{"step": 3}], "c": [{"step": 2}]})
    assert [(row["step"], row["stage"]) for row in joined] == [(3, "b"), (5, "c")]
