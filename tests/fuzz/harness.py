"""Reads thousands of damaged inputs in processes that may die, and counts what became of them.

python tests/fuzz/harness.py --count 5000
python tests/fuzz/harness.py --seed 123 --format nrrd     # one of them, with its traceback
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from fuzz.doors import DOORS, Door, plain, read_quietly  # noqa: E402
from fuzz.mutators import BLIND, choose, mutate  # noqa: E402

SECONDS = 10  # of the processor, for one input
PATIENCE = 6  # times as long on the clock, where others use the processor too
MEBIBYTES = 1536  # of memory above what the process had before
SENTENCE = 1500  # characters of a message at most
GOOD = ("same", "plausible", "sentence")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")
BLIND_NAMES = {way.__name__ for way in BLIND}


@dataclass
class Outcome:
    "What became of one damaged input."

    format: str
    seed: int
    mutator: str
    file: str
    kind: str  # one of GOOD, or a failure
    detail: str = ""
    seconds: float = 0.0
    mebibytes: float = 0.0


# ---- one input --------------------------------------------------------------------------------


def make_mutant(door: Door, seed: int, base: Path, folder: Path) -> tuple[str, str, str]:
    "A copy of `base` with one file damaged: (file, pattern, mutator)."
    rng = np.random.default_rng([seed, zlib.crc32(door.name.encode())])
    shutil.copytree(base, folder, copy_function=os.link)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    pattern = choose(rng, door.damaged)
    file = choose(rng, [f for f in files if _fits(f, pattern)])
    changed, mutator = mutate(rng, (folder / file).read_bytes(), door.damaged[pattern])
    (folder / file).unlink()  # the other name of the whole one
    (folder / file).write_bytes(changed)
    return file, pattern, mutator


def _fits(file: str, pattern: str) -> bool:
    return fnmatch(file, pattern) or fnmatch(file.rsplit("/", 1)[-1], pattern)


def judge(door: Door, error: Exception, folder: Path, file: str) -> tuple[str, str]:
    "Whether what was raised is one sentence about the file."
    from ct_nb.core.errors import InputError

    message = str(error)
    if not isinstance(error, InputError):
        return f"escaped: {type(error).__name__}", message[:200]
    if "does not fit into memory" in message:
        return "memory", message[:200]
    names = {part for part in Path(file).parts} | {p.name for p in folder.iterdir()}
    names |= {Path(name).stem for name in names if len(Path(name).stem) > 2}
    if not any(name in message for name in (*names, folder.name)):
        return "sentence without the file", message[:200]
    if UNPRINTABLE.search(message):
        return "control characters in the sentence", ascii(message[:200])
    if len(message) > SENTENCE:
        return "sentence too long", message[:200]
    return "sentence", message[:300]


def try_mutant(door: Door, seed: int, base: Path, place: Path, whole) -> Outcome:
    folder = place / "input"
    shutil.rmtree(folder, ignore_errors=True)
    file, pattern, mutator = make_mutant(door, seed, base, folder)
    outcome = Outcome(door.name, seed, mutator, file, "")
    begin = time.process_time()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    try:
        value = read_quietly(door, folder)
    except Exception as error:
        outcome.kind, outcome.detail = judge(door, error, folder, file)
    else:
        outcome.kind, outcome.detail = weigh(door, value, whole, pattern, mutator)
    outcome.seconds = time.process_time() - begin
    outcome.mebibytes = _memory("VmHWM") - before
    if outcome.seconds > SECONDS:
        outcome.kind = "too slow"
    if outcome.mebibytes > MEBIBYTES:
        outcome.kind = "memory"
    return outcome


def weigh(door: Door, value, whole, pattern: str, mutator: str) -> tuple[str, str]:
    "Whether a value that was read is that of the whole input, or one that it could have been."
    try:
        problem = door.check(value)
    except Exception as error:  # of a kind that nobody thought of
        problem = f"{type(error).__name__}: {error}"
    if problem:
        return "implausible value", problem[:200]
    found = plain(value)
    if found == whole:
        return "same", ""
    seen = pattern in door.checksummed and mutator in BLIND_NAMES
    if seen and plain_numbers(found) != plain_numbers(whole):
        return "damage not seen", ""
    return "plausible", ""


def plain_numbers(value):
    "The arrays of a plain value: what a checksum protects."
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return [plain_numbers(part) for part in parts]
    return value if isinstance(value, tuple) else None


def _memory(field: str) -> float:
    "MiB of this process now (VmRSS) or at most since the counter was reset (VmHWM)."
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text)[1]) / 1024


# ---- the pool ---------------------------------------------------------------------------------


def _silence() -> None:
    "What C++ libraries write belongs to nobody."
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _work(pipe, bases: Path) -> None:
    _silence()
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    most = size + 3 * MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    by_name = {door.name: door for door in DOORS}
    whole = {}
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        while (task := pipe.recv()) is not None:
            name, seed = task
            door = by_name[name]
            base = bases / name
            if name not in whole:
                whole[name] = _whole(door, base)
            pipe.send(try_mutant(door, seed, base, Path(place), whole[name]))
    os._exit(0)


def _whole(door: Door, base: Path):
    "The value of the input before it is damaged; None where it is refused."
    with contextlib.suppress(ValueError):
        return plain(read_quietly(door, base))


def make_bases(doors, bases: Path) -> None:
    "Whole inputs of all doors, in a process of its own: libraries leave threads behind."

    def make():
        for door in doors:
            (bases / door.name).mkdir(parents=True)
            door.write(bases / door.name)

    process = multiprocessing.get_context("fork").Process(target=make)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"whole inputs could not be written (exit code {process.exitcode})")


@dataclass
class Worker:
    process: multiprocessing.Process
    pipe: multiprocessing.connection.Connection
    task: tuple | None = None
    begin: float = 0.0

    @classmethod
    def start(cls, bases: Path) -> "Worker":
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, bases), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, task) -> None:
        self.task, self.begin = task, time.monotonic()
        self.pipe.send(task)

    def take(self) -> Outcome | None:
        "What it sent; a death or a time that is over is an outcome; None: wait on."
        if self.pipe.poll():
            with contextlib.suppress(EOFError, ConnectionResetError):
                return self.pipe.recv()
        seconds = time.monotonic() - self.begin
        if self.process.is_alive() and seconds < SECONDS * PATIENCE:
            return None
        late = self.process.is_alive()
        self.process.kill()
        self.process.join()
        kind = "too slow" if late else f"crash: exit code {self.process.exitcode}"
        name, seed = self.task
        return Outcome(name, seed, "?", "?", kind, "", seconds)


def fuzz(tasks: list[tuple[str, int]], workers: int, bases: Path) -> list[Outcome]:
    "The outcome of each (format, seed), in no order."
    tasks = list(reversed(tasks))
    pool = [Worker.start(bases) for _ in range(workers)]
    outcomes = []
    busy = []
    while tasks or busy:
        for worker in pool:
            if worker.task is None and tasks:
                worker.give(tasks.pop())
        busy = [worker for worker in pool if worker.task is not None]
        wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], timeout=1)
        for worker in busy:
            outcome = worker.take()
            if outcome is None:
                continue
            outcomes.append(outcome)
            worker.task = None
            if not worker.process.is_alive():
                pool[pool.index(worker)] = Worker.start(bases)
        busy = [worker for worker in pool if worker.task is not None]
    for worker in pool:
        worker.pipe.send(None)
    for worker in pool:
        worker.process.join()
    return outcomes


def find_doors(name: str | None) -> list[Door]:
    found = [door for door in DOORS if name is None or name in (door.name, door.name.split()[0])]
    if not found:
        raise SystemExit(f"no format {name!r}; there are {', '.join(d.name for d in DOORS)}")
    return found


def run(count: int, name: str | None = None, first: int = 0, workers: int = 2) -> list[Outcome]:
    "`count` mutants, evenly over the formats (or those of one name), with seeds from `first` on."
    doors = find_doors(name)
    tasks = [(doors[k % len(doors)].name, first + k // len(doors)) for k in range(count)]
    # all of one format together: a worker reads each whole input once
    tasks.sort(key=lambda task: [d.name for d in doors].index(task[0]))
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        make_bases(doors[: len(tasks)], Path(folder))
        return fuzz(tasks, workers, Path(folder))


# ---- the report -------------------------------------------------------------------------------


def table(outcomes: list[Outcome]) -> str:
    "Counts by format and outcome."
    counts = defaultdict(Counter)
    for o in outcomes:
        counts[o.format][o.kind if o.kind in GOOD else "failed"] += 1
    lines = [f"{'format':<24}" + "".join(f"{kind:>11}" for kind in (*GOOD, "failed"))]
    for name in [door.name for door in DOORS if door.name in counts] + ["all"]:
        row = counts[name] if name != "all" else sum(counts.values(), Counter())
        lines.append(f"{name:<24}" + "".join(f"{row[kind]:>11}" for kind in (*GOOD, "failed")))
    return "\n".join(lines)


def failures(outcomes: list[Outcome]) -> list[Outcome]:
    found = [o for o in outcomes if o.kind not in GOOD]
    return sorted(found, key=lambda o: (o.format, o.kind, o.seed))


def kinds_of_failures(outcomes: list[Outcome]) -> str:
    "Markdown: format, kind, how often, an example of each with its seed."
    groups = defaultdict(list)
    for o in failures(outcomes):
        groups[o.format, o.kind].append(o)
    lines = ["| format | failure | times | seed | file, mutator: what it said |", "|-" * 5 + "|"]
    for (name, kind), group in groups.items():
        o = group[0]
        said = ascii(o.detail)[1:-1].replace("|", "/")
        seeds = ", ".join(str(o.seed) for o in group[:4])
        lines.append(
            f"| {name} | {kind} | {len(group)} | {seeds} | {o.file}, {o.mutator}: {said[:160]} |"
        )
    return "\n".join(lines)


def show_one(name: str, seed: int) -> None:
    "One mutant here, with the traceback of what it raises."
    for door in find_doors(name):
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            folder = Path(folder)
            make_bases([door], folder / "bases")
            base = folder / "bases" / door.name
            file, _, mutator = make_mutant(door, seed, base, folder / "input")
            print(f"{door.name}, seed {seed}: {file} by {mutator}", flush=True)
            try:
                value = read_quietly(door, folder / "input")
                print("read:", door.check(value) or "plausible", f"{value!r:.500}")
            except Exception:
                traceback.print_exc()
            print(asdict(try_mutant(door, seed, base, folder, _whole(door, base))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--format", help="one format, or the first word of several")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", help="a file for all outcomes")
    parser.add_argument("--report", help="a file for a table of the kinds of failures")
    options = parser.parse_args()
    if options.seed is not None:
        show_one(options.format, options.seed)
        return
    begin = time.monotonic()
    outcomes = run(options.count, options.format, options.first, options.workers)
    print(table(outcomes))
    print(f"{len(outcomes)} inputs in {time.monotonic() - begin:.0f} s")
    worst = max(outcomes, key=lambda o: o.mebibytes)
    print(f"most memory: {worst.mebibytes:.0f} MiB ({worst.format}, seed {worst.seed})")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(o) for o in outcomes]))
    if options.report:
        Path(options.report).write_text(
            f"```\n{table(outcomes)}\n```\n\n{kinds_of_failures(outcomes)}\n"
        )
    elif failures(outcomes):
        print(kinds_of_failures(outcomes))


if __name__ == "__main__":
    main()
