"""A run that is killed at any moment in which it changes a file ends with the same weights.

The moments are the audit events of Python that change a file: opened for writing, renamed, deleted,
folder made. Twenty of them are drawn for each system and each writer of a cache, four for two
processes that share a network. A life is a forked process, which has its imports already.
"""

import os
import random
import resource
import select
import signal
import socket
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from places import FULL
from train_line_runs import FSDP2
from trained_runs import SYSTEMS, options, run_class

from ct_nb.data.cache import DiskCache, content_digest

pytestmark = [pytest.mark.usefixtures("trained_cache"), FULL]

MOMENTS = 20
SHARED_MOMENTS = 4  # each takes two runs of two processes
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")


def changes_a_file(event: str, arguments: tuple) -> bool:
    if event == "open":
        flags = arguments[2] if len(arguments) > 2 else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES


def begin(act, moment: int | None = None, death=None, environment: dict | None = None):
    """Runs `act` in a process of its own; `death()` is called there at its `moment`-th change of a
    file. Gives its number and the pipe by which it tells how many changes there were up to its end.
    """
    here, there = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        signal.alarm(300)
        try:
            os.environ.update(environment or {})
            torch.set_num_threads(1)
            count = 0

            def hook(event, arguments):
                nonlocal count
                if changes_a_file(event, arguments):
                    count += 1
                    if count == moment:
                        death()

            sys.addaudithook(hook)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            act()
            code = 0
        finally:
            os.write(there, str(count).encode())
            os._exit(code)
    os.close(there)
    return child, here


def end(child: int, pipe: int) -> tuple[int, int]:
    "Waits for a life; its exit status (negative: the signal) and the number of changes."
    with os.fdopen(pipe) as told:
        counted = told.read()
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), int(counted or 0)


def live(act, moment: int | None = None, death=None) -> tuple[int, int]:
    return end(*begin(act, moment, death))


def live_as_two(act, moments=(None, None), death=None) -> list[tuple[int, int]]:
    """Two processes that share the network by FSDP2, one of which may die at a moment of its own;
    when one has failed the other is killed, as by a launcher.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {**FSDP2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"LOCAL_WORLD_SIZE": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViewBlock,SwinBlock3d"}
    both = [
        begin(act, moment, death, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, moment in enumerate(moments)
    ]
    # an end is told at once, and without a word where it was a kill
    first = select.select([pipe for _, pipe in both], [], [])[0][0]
    place = [pipe for _, pipe in both].index(first)
    ends = {place: end(*both[place])}
    if ends[place][0]:
        os.kill(both[1 - place][0], signal.SIGKILL)
    ends[1 - place] = end(*both[1 - place])
    return [ends[0], ends[1]]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fill_the_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))


def weights_equal(folder, reference) -> bool:
    found, expected = (load_file(path / "model.safetensors") for path in (folder, reference))
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_goes_on_after_any_death(system, trained, tmp_path):
    # in a life of its own too: threads of this process would be missing in its children
    for name in ("drr2ct", system):
        assert live(lambda name=name: trained(name))[0] == 0
    reference = trained(system)
    more = options(system)

    def act(folder, resume):
        def train():
            run = run_class(system)("micro", out=folder, resume=resume, **more).open()
            run.fit(progress=False)

        return train

    code, changes = live(act(tmp_path / "whole", False))
    assert code == 0 and weights_equal(tmp_path / "whole", reference)
    draw = random.Random(f"{system} 0")
    moments = sorted(draw.sample(range(1, changes + 1), min(MOMENTS, changes)))
    deaths = [kill] * (len(moments) - 4) + [interrupt, interrupt, fill_the_disk, fill_the_disk]
    draw.shuffle(deaths)
    for moment, death in zip(moments, deaths):
        folder = tmp_path / f"{moment}"
        what = f"{system}, {death.__name__} at change {moment} of {changes}"
        first, _ = live(act(folder, False), moment, death)
        assert first != 0 or death is fill_the_disk, what
        # a second death, at an earlier moment of the second life
        live(act(folder, True), max(1, moment // 2), kill)
        code, _ = live(act(folder, True))
        assert code == 0, what
        assert weights_equal(folder, reference), what
        assert not list(folder.rglob("running.json")), what


def test_a_shared_run_goes_on_after_any_death(trained, tmp_path):
    "drr2ct's first stage, of which each process writes its part of every checkpoint."
    assert live(lambda: trained("drr2ct"))[0] == 0  # its phantoms and X-rays stay in the cache

    def act(folder, resume):
        def train():
            run = run_class("drr2ct")("micro", out=folder, resume=resume, stage="joint").open()
            run.fit(progress=False)
            PartialState().destroy_process_group()

        return train

    both = live_as_two(act(tmp_path / "whole", False))
    assert [code for code, _ in both] == [0, 0]
    draw = random.Random("shared 0")
    for number in range(SHARED_MOMENTS):
        folder = tmp_path / f"{number}"
        rank = number % 2
        death = fill_the_disk if number == SHARED_MOMENTS - 1 else kill
        moments = [None, None]
        moments[rank] = draw.randint(1, both[rank][1])
        what = f"{death.__name__} of process {rank} at change {moments[rank]} of {both[rank][1]}"
        first = live_as_two(act(folder, False), moments, death)
        assert any(code for code, _ in first) or death is fill_the_disk, what
        assert [code for code, _ in live_as_two(act(folder, True))] == [0, 0], what
        assert weights_equal(folder, tmp_path / "whole"), what
        assert not list(folder.rglob("running.json")), what
        assert not list(folder.rglob("training_shards/*")), what


@pytest.mark.parametrize("writer", ["entries", "phantoms"])
def test_a_cache_is_whole_after_any_death(writer, tmp_path):
    from ct_nb.data.open import phantom_source

    def act(folder):
        def write():
            cache = DiskCache(folder)
            if writer == "entries":
                for number in range(12):
                    name = content_digest("entry", number)
                    cache.get(name, lambda number=number: {"x": np.full(5000, number)})
            else:
                [sample.volume.hu.sum() for sample in phantom_source(3, 16, cache=cache)]

        return write

    def read(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*.entry")
        }

    code, changes = live(act(tmp_path / "whole"))
    assert code == 0
    expected = read(tmp_path / "whole")
    draw = random.Random(f"{writer} 0")
    for moment in draw.sample(range(1, changes + 1), min(MOMENTS, changes)):
        folder = tmp_path / f"{moment}"
        live(act(folder), moment, draw.choice([kill, kill, fill_the_disk]))
        for name, content in read(folder).items():
            assert content == expected[name], "a half-written entry has the name of a whole one"
        code, _ = live(act(folder))
        assert code == 0 and read(folder) == expected


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from ct_nb.training.run import run_main

    def stop(run, progress=True):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_class("vae"), "fit", stop)
    with pytest.raises(SystemExit) as ended:
        run_main(run_class("vae"), ["--preset", "micro", "--out", str(tmp_path)])
    assert "--resume" in str(ended.value.code)
