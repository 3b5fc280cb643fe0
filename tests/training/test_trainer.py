"""The trainer under a kill, a full disk, two processes; the weights files under abuse."""

import signal

import pytest
from places import FULL
import torch
from refusals import refused
from train_line_runs import TWO_PROCESSES, train

from ct_nb.core.files import atomic_write
from ct_nb.training.checkpoints import (
    STATE_FILE,
    WeightsError,
    load_state,
    load_weights,
    read_config,
    save_state,
    save_weights,
)
from ct_nb.training.trainer import TrainerConfig


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


@FULL
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
    done = train(tmp_path, launcher=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    assert done.stdout.count("weights") == 1, "each process should not train on its own"
    both = torch.load(tmp_path / "final.pt", weights_only=True)
    assert torch.allclose(both, undisturbed, atol=2e-6), (both - undisturbed).abs().max()


@FULL
def test_each_of_two_processes_goes_on_with_its_own_random_numbers(tmp_path):
    options = {"launcher": TWO_PROCESSES, "ACCELERATE_USE_CPU": "true"}
    train(tmp_path / "whole", "noise", **options)
    train(tmp_path / "parts", "noise", "stop", **options)
    states = load_state(tmp_path / "parts")["random"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    train(tmp_path / "parts", "noise", "resume", **options)
    whole, parts = (
        torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert torch.equal(whole, parts)


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


def test_resume_with_another_number_of_processes_is_refused(tmp_path):
    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    config = TrainerConfig(steps=2, batch_size=2, checkpoint_every=1, validate_every=0)
    trainer = Trainer(torch.nn.Linear(8, 1), step, Points(), config, tmp_path, collate)
    trainer.fit(progress=False)
    state = load_state(tmp_path)
    save_state(tmp_path, {**state, "random": 2 * state["random"]})
    with refused(file=tmp_path):
        trainer.fit(resume=True, progress=False)


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


def test_a_batch_says_which_entries_of_the_set_it_has(tmp_path):
    from programs.train_line import Points, collate, step

    from ct_nb.training.trainer import Trainer, TrainerConfig

    seen = []

    def listening(model, batch, number):
        seen.extend(map(tuple, batch["entry"]))
        return step(model, batch, number)

    data = Points()
    config = TrainerConfig(steps=3, batch_size=len(data), accumulation=2, validate_every=0)
    Trainer(torch.nn.Linear(8, 1), listening, data, config, tmp_path, collate).fit(progress=False)
    assert sorted(seen) == [(epoch, n) for epoch in range(3) for n in range(len(data))]


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


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("steps", -5),
        ("batch_size", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("gradient_clip", float("inf")),
        ("ema_decay", 1.0),
        ("log_every", 0),
        ("validate_every", -1),
        ("mixed_precision", "half"),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with refused(name):
        TrainerConfig(**{"steps": 10, name: value})
