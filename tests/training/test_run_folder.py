"""A folder holds one run: what is resumed is the same, nobody else writes there, and a run that was
killed while it saved goes on.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from refusals import refused
from trained_runs import SYSTEMS, options, run_class

from ct_nb.training.run import Run, surroundings
from ct_nb.training.run_folder import (
    OWNER_FILE,
    RUN_FILE,
    RunFolderError,
    claim_folder,
    list_differences,
    lock_folder,
)
from ct_nb.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("trained_cache")

every_system = pytest.mark.parametrize("system", SYSTEMS)


class Killed(Exception):
    pass


@pytest.fixture
def forbid_training(monkeypatch):
    "After its call any optimiser step fails."

    def step(*arguments):
        raise AssertionError("it trains")

    return lambda: monkeypatch.setattr(Trainer, "_optimizer_step", step)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "finished")
    }


def copy_of(folder, path):
    shutil.copytree(folder, path)
    (path / "finished").unlink()
    return path


@every_system
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_with_another_seed_is_refused_and_changes_nothing(
    system, resume, trained, tmp_path, forbid_training
):
    out = copy_of(trained(system), tmp_path / "run")
    more = options(system)
    forbid_training()
    before = contents(out)
    run = run_class(system)("micro", out=out, seed=1, resume=resume, **more).open()
    with refused(file="run", kind=RunFolderError) as caught:
        run.fit(progress=False)
    assert "seed is 0 there and 1 here" in caught.value.reason
    assert contents(out) == before


@pytest.mark.parametrize("system", ["drr2ct", "slices", "ct_encoder"])
@pytest.mark.parametrize(
    "change, named", [({"data": "phantom:7"}, "training.cases"), ({"steps": 9}, "steps is")]
)
def test_other_data_and_settings_are_named(
    system, change, named, trained, tmp_path, forbid_training
):
    out = copy_of(trained(system), tmp_path / "run")
    more = options(system)
    forbid_training()
    before = contents(out)
    run = run_class(system)("micro", out=out, resume=True, **change, **more).open()
    with refused(file="run", kind=RunFolderError) as caught:
        run.fit(progress=False)
    assert named in caught.value.reason
    assert contents(out) == before


@every_system
def test_a_finished_run_is_not_trained_again(system, trained, tmp_path, forbid_training):
    reference = trained(system)
    out = copy_of(reference, tmp_path / "run")
    more = options(system)
    forbid_training()
    run = run_class(system)("micro", out=out, resume=True, **more).open()
    history = run.fit(progress=False)
    assert history and history[-1]["step"] == run_class(system).load(reference).history[-1]["step"]
    weights, expected = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (out, reference)
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("system", ["drr2ct", "vae", "slices"])
def test_a_run_killed_between_its_last_files_goes_on(system, trained, tmp_path, monkeypatch):
    save = safetensors.torch.save_file
    saves = iter([Killed, Killed])

    def die_twice(*arguments, **named):
        if next(saves, None):
            raise Killed
        return save(*arguments, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", die_twice)
    kind = run_class(system)
    for resume in (False, True):
        with pytest.raises(Killed):
            kind("micro", out=tmp_path, resume=resume).open().fit(progress=False)
    kind("micro", out=tmp_path, resume=True).open().fit(progress=False)
    weights, expected = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (tmp_path, trained(system))
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_run_begun_anew_leaves_nothing_of_the_one_before(trained, tmp_path, monkeypatch):
    out = copy_of(trained("vae"), tmp_path / "run")
    (out / "my notes.txt").write_text("keep")

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(Trainer, "_optimizer_step", die)
    with pytest.raises(Killed):
        run_class("vae")("micro", out=out).open().fit(progress=False)
    left = set(contents(out))
    assert "model.safetensors" not in left and "config.json" not in left
    assert {"my notes.txt", RUN_FILE} <= left and OWNER_FILE not in left


def test_a_folder_taken_by_another_run_is_not_written_to(tmp_path):
    kind = run_class("vae")
    first = kind("micro", out=tmp_path).open()
    first.fit(progress=False)
    kind("micro", out=tmp_path, seed=1, overwrite=True).open().fit(progress=False)
    with refused(file=tmp_path, kind=RunFolderError):
        first.evaluate(progress=False)
    assert not (tmp_path / "vae_scores.csv").exists()


def test_weights_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"old")
    run = run_class("vae")("micro", out=tmp_path, resume=True).open()
    with refused(file=tmp_path, kind=RunFolderError):
        run.fit(progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"


HOLD = """
import sys, time
from ct_nb.training.run_folder import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_waits_for_no_one_and_a_killed_one_is_told(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with refused(file=tmp_path, kind=RunFolderError) as caught, lock_folder(tmp_path):
            pass
        assert f"process {holder.pid} on" in caught.value.reason
    finally:
        holder.kill()
        holder.wait()
    with lock_folder(tmp_path) as note:
        assert f"process {holder.pid}" in note and "was killed" in note
    with lock_folder(tmp_path) as note:
        assert note == ""


def test_other_versions_are_told(tmp_path):
    identity = {"seed": 0, "versions": {"torch": "2.13.0"}}
    claim_folder(tmp_path, identity, ["weights"], go_on=True)
    (tmp_path / "weights").touch()
    newer = {"seed": 0, "versions": {"torch": "2.14.0"}}
    notes = claim_folder(tmp_path, newer, ["weights"], go_on=True)
    assert len(notes) == 1 and "torch" in notes[0] and "2.14.0" in notes[0]
    assert json.loads((tmp_path / RUN_FILE).read_text()) == identity


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"a": NaN}', "\u0000", '"x"'])
def test_a_damaged_identity_is_one_sentence_and_changes_nothing(tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    (tmp_path / "weights").touch()
    with refused(file=RUN_FILE, kind=RunFolderError):
        claim_folder(tmp_path, {"seed": 0}, ["weights"], go_on=True, overwrite=True)
    assert (tmp_path / RUN_FILE).read_text() == content and (tmp_path / "weights").exists()


def test_versions_of_another_form_are_a_difference(tmp_path):
    claim_folder(tmp_path, {"seed": 0, "versions": "old"}, ["weights"], go_on=True)
    (tmp_path / "weights").touch()
    notes = claim_folder(tmp_path, {"seed": 0, "versions": {"a": "1"}}, ["weights"], go_on=True)
    assert len(notes) == 1 and "old" in notes[0]


def test_what_is_removed_stays_inside(tmp_path):
    outside = tmp_path / "thesis"
    outside.mkdir()
    (outside / "text").touch()
    run = tmp_path / "run"
    run.mkdir()
    os.symlink(outside, run / "stages")
    claim_folder(run, {"seed": 0}, ["stages"], go_on=False, overwrite=True)
    assert os.listdir(outside) == ["text"] and not (run / "stages").exists()


@pytest.mark.parametrize(
    "there, here, said",
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b is 1 there and 2 here"]),
        ({"a": 1}, {}, ["a is 1 there and null here"]),
        (
            {"a": ["x", "y"]},
            {"a": ["y", "x"]},
            ["a are 2 there and 2 here (in another order)"],
        ),
    ],
)
def test_differences_are_named(there, here, said):
    assert list_differences(there, here) == said


def test_threads_are_told(tmp_path):
    "Sums are divided by threads, so their last digits depend on the number; it does not count."
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        claim_folder(tmp_path, {"seed": 0, **surroundings()}, ["weights"], go_on=True)
        (tmp_path / "weights").touch()
        assert claim_folder(tmp_path, {"seed": 0, **surroundings()}, ["weights"], go_on=True) == []
        torch.set_num_threads(1)
        notes = claim_folder(tmp_path, {"seed": 0, **surroundings()}, ["weights"], go_on=True)
    finally:
        torch.set_num_threads(before)
    assert len(notes) == 1 and "threads is 2 there and 1 here" in notes[0]
    assert json.loads((tmp_path / RUN_FILE).read_text())["threads"] == 2


@every_system
def test_a_run_records_its_threads_and_names_its_files(system, trained):
    "What a finished run leaves is what the next run of any system removes from the folder."
    folder = trained(system)
    for name in (RUN_FILE, "config.json"):
        assert json.loads((folder / name).read_text())["threads"] >= 1
    own = {".lock", "finished", RUN_FILE, "vae"}  # a run of its own is in `vae`
    left = {path.name for path in folder.iterdir()} - own
    assert left <= set(Run.files) and run_class(system).files == Run.files


def test_nothing_of_another_system_stays(trained, tmp_path):
    folder = copy_of(trained("vae"), tmp_path / "run")
    assert (folder / "vae_scores.csv").is_file() and (folder / "config.json").is_file()
    run = run_class("ct_encoder")("micro", out=folder)
    with refused(kind=RunFolderError):
        claim_folder(folder, {"system": "ct_encoder"}, run.files, go_on=False)
    claim_folder(folder, {"system": "ct_encoder"}, run.files, go_on=False, overwrite=True)
    assert {path.name for path in folder.iterdir()} <= {RUN_FILE, ".lock"}
