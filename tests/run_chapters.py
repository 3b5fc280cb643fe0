"""Run the chapters' own tests: `python tests/run_chapters.py [--all] [--flags slow] [NOTEBOOK ...]`.

Every notebook that exports a module runs in a process of its own, forked from one that has the
heavy imports already. A chapter that passed is not run again while its code, the modules that it
imports (directly or not), the lock and the interpreter stay the same: the same inputs have the same
result. `--all` runs every chapter. A chapter has 5 processor seconds; the table at the end shows
those that need more.
"""

import argparse
import ast
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CAP_S = 5.0  # processor seconds of a chapter
SLACK = 3.0  # a chapter fails beyond this multiple: processors differ, and are shared
PRELOAD = (
    "numpy scipy.ndimage scipy.stats torch matplotlib.pyplot numba nibabel SimpleITK pydicom"
    " fastcore.all monai.networks.nets diffusers.schedulers ct_nb.drr2ct.network ct_nb.slices.models"
    " ct_nb.ct_encoder.model ct_nb.viewer.figures"
).split()


KERNELS = """
import torch
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import backproject, project
from ct_nb.physics.volume import Grid
for dtype in (torch.float32, torch.float64):
    geometry = ConeBeam.biplanar(grid=Grid.cube(8, 320.0), detector_shape=(8, 8)).to(dtype)
    geometry.source_mm.requires_grad_()
    mu = torch.rand(8, 8, 8, dtype=dtype, requires_grad=True)
    image = project(mu, geometry, "numba")
    image.square().sum().backward()
    backproject(image.detach().requires_grad_(), geometry, "numba").square().sum().backward()
"""


def chapters() -> list[Path]:
    "Notebooks that export a module, in order."
    return sorted(p for p in NBS.glob("*/[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def code_of(path: Path) -> str:
    "The code of a notebook without magics, for its imports and its digest."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def imports(code: str, package: str) -> set[str]:
    "Names of modules of ct_nb that this code may import; `package` resolves relative ones."
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("ct_nb.")}


def dependencies(path: Path) -> list[Path]:
    "Files of the package that a chapter imports, directly or not."
    left, files = list(imports(code_of(path), "ct_nb")), {}
    while left:
        name = left.pop()
        file = ROOT / Path(*name.split(".")).with_suffix(".py")
        if name in files or not file.is_file():
            continue
        files[name] = file
        left += imports(file.read_text(encoding="utf-8"), name.rpartition(".")[0])
    return sorted(files.values())


def key(path: Path) -> str:
    "Digest of everything that decides whether a chapter passes."
    digest = hashlib.blake2b(sys.version.encode(), digest_size=16)
    digest.update(code_of(path).encode())
    for file in (*dependencies(path), ROOT / "requirements.lock", Path(__file__)):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def run(path: Path, flags: list[str]) -> tuple[bool, float]:
    "Whether a chapter passes, and its processor seconds, those of its own processes included."
    from nbdev.test import test_nb

    skipped = [flag for flag in ("slow", "gpu") if flag not in flags]
    passed, _ = test_nb(path, skip_flags=skipped, force_flags=flags, basepath=ROOT)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return bool(passed), sum(u.ru_utime + u.ru_stime for u in used)


def job(path: Path, flags: list[str], pipe) -> None:
    pipe.send(run(path, flags))


def run_all(paths: list[Path], flags: list[str], workers: int):
    """Runs chapters, so many at a time, each in a process of its own, forked from this one; gives
    (path, passed, processor seconds) as they end. A process that dies has not passed.
    """
    fork = multiprocessing.get_context("fork")
    left, running = list(paths), {}
    while left or running:
        while left and len(running) < workers:
            path = left.pop(0)
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=job, args=(path, flags, there))
            process.start()
            there.close()
            running[here] = path, process
        for pipe in multiprocessing.connection.wait(list(running)):
            path, process = running.pop(pipe)
            try:
                passed, seconds = pipe.recv()
            except EOFError:
                passed, seconds = False, 0.0
            process.join()
            yield path, passed, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="chapters to run; all of them unless given"
    )
    parser.add_argument("--all", action="store_true", help="also those that passed as they are")
    parser.add_argument("--flags", nargs="*", default=[], help="run cells marked slow or gpu too")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from ct_nb.data.cache import default_cache_dir

    passed = default_cache_dir() / "chapters"
    passed.mkdir(parents=True, exist_ok=True)
    todo = [p.resolve() for p in options.notebooks] or chapters()
    keys = {path: key(path) for path in todo}
    known = [] if options.all or options.flags else [p for p in todo if (passed / keys[p]).exists()]
    todo = [path for path in todo if path not in known]
    print(f"{len(todo)} chapters to run, {len(known)} passed as they are", flush=True)
    # no chapter pays for compiling what all of them use
    subprocess.run([sys.executable, "-c", KERNELS], cwd=ROOT, check=True)
    for name in PRELOAD:
        importlib.import_module(name)
    begin = time.monotonic()
    failed = []
    times = []
    for path, good, seconds in run_all(todo, options.flags, options.workers):
        times.append((seconds, path))
        if good and not options.flags:
            (passed / keys[path]).touch()
        elif not good:
            failed.append(path)
            print(f"failed: {path.relative_to(ROOT)}", flush=True)
    slow = sorted((item for item in times if item[0] > CAP_S), reverse=True)
    for seconds, path in slow:
        print(f"{seconds:6.1f} s of {CAP_S:g}: {path.relative_to(ROOT)}")
    total = sum(seconds for seconds, _ in times)
    print(
        f"{len(todo) - len(failed)} passed, {len(failed)} failed, {len(known)} as they were;"
        f" {total:.0f} processor seconds in {time.monotonic() - begin:.0f} s"
    )
    over = [] if options.flags else [p for seconds, p in slow if seconds > SLACK * CAP_S]
    if failed or over:
        names = ", ".join(str(path.relative_to(ROOT)) for path in failed or over)
        sys.exit(f"{'failed' if failed else 'far over their processor seconds'}: {names}")


if __name__ == "__main__":
    main()
