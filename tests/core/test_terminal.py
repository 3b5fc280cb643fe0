"""How the programs end: for a full memory, for Ctrl-C, and for a reader that has gone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import refusal
from trained_runs import run_class

from ct_nb.core import terminal
from ct_nb.core.errors import is_out_of_memory
from ct_nb.core.terminal import program
from ct_nb.data import prepare as prepare_folder
from ct_nb.physics.volume import Volume
from ct_nb.slices import prepare as prepare_slices
from ct_nb.training.run import run_main

PROGRAMS = {
    "command": "from ct_nb.app.cli import app; app(['evaluate', {ct!r}, {ct!r}])",
    "training": """
from ct_nb.slices.vae_train import VAERun
from ct_nb.training.run import run_main
run_main(VAERun, ["--preset", "micro", "--out", {out!r}])
""",
    "prepare": "from ct_nb.slices.prepare import main; main('phantom:1', {out!r}, workers=0)",
}


def without_a_reader(code: str) -> tuple[int, str]:
    "Exit code and standard error of a program whose standard output nobody reads."
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    words = process.stderr.read()
    return process.wait(), words


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_word_where_nobody_reads_on(name, tmp_path):
    hu = np.zeros((16, 16, 16), np.float32) - 1000
    hu[:, 4:12, 4:12] = 40
    ct = tmp_path / "ct.npz"
    Volume(hu, np.diag([4.0, 4, 4, 1])).save(ct)
    code, words = without_a_reader(PROGRAMS[name].format(ct=str(ct), out=str(tmp_path / "run")))
    assert "roken" not in words and "Traceback" not in words, words
    assert code == terminal.READER_HAS_LEFT == 141


def test_another_pipe_that_breaks_is_an_error():
    with pytest.raises(SystemExit) as ended, program("name"):
        raise BrokenPipeError(32, "Broken pipe")
    assert ended.value.code == "name: [Errno 32] Broken pipe"


def full_memory() -> RuntimeError:
    "What torch raises for more memory than there is."
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    return caught.value


@pytest.mark.parametrize("error", [MemoryError(), full_memory()], ids=["Python", "torch"])
def test_a_full_memory_is_a_sentence(error, monkeypatch, tmp_path):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shapes differ"))
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("by its class"))

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(run_class("vae"), "fit", fails)
    with pytest.raises(SystemExit) as ended:
        run_main(run_class("vae"), ["--preset", "micro", "--out", str(tmp_path)])
    assert ended.value.code.startswith("ct_nb.slices.vae_train: does not fit into memory; ")
    monkeypatch.setattr("ct_nb.app.commands.evaluate_files", fails)
    assert refusal("evaluate", "a.npz", "b.npz").startswith("does not fit into memory; ")


@pytest.mark.parametrize(
    "module, opens",
    [(prepare_folder, "open_source"), (prepare_slices, "open_stacks")],
    ids=["data", "slices"],
)
def test_the_other_programs_end_as_the_trainings_do(module, opens, monkeypatch, tmp_path):
    for error, words in ((KeyboardInterrupt(), ": stopped"), (MemoryError(), "into memory")):

        def fails(*arguments, error=error):
            raise error

        monkeypatch.setattr(module, opens, fails)
        with pytest.raises(SystemExit) as ended:
            module.main("phantom:1", str(tmp_path / "out"))
        assert ended.value.code.startswith(module.__name__) and words in ended.value.code


def test_a_fault_of_the_program_is_no_sentence():
    with pytest.raises(RuntimeError, match="shapes differ"), program("name"):
        raise RuntimeError("shapes differ")
