"""Check a GPU in a few minutes: kernels against the reference, their times, steps of training.

python launch/gpu_check.py                    on a card; --minutes 8
python launch/gpu_check.py --tiny             the whole program on a CPU, in seconds

1. The Triton kernels: pictures, transpose and gradients against the reference in float64.
2. Their times at 64³ to 512³ beside the memory limit (the bytes that an operation must move, at the
   speed of a large copy on this card) and beside nanodrr, where it can be imported.
3. The rest of the minutes: network, batch and trainer of drr2ct's preset `gpu`, on a few phantoms.

Prints one table and writes OUT/gpu_check.json. What an earlier call left there is not measured
again on the same card with the same versions, and the training goes on from its last checkpoint.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TINY = "--tiny" in sys.argv
TRAINING = "--training" in sys.argv  # the process that trains, started by the one that measures
if TINY and not TRAINING:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when a kernel is defined

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ct_nb.core.errors import InputError, first_line  # noqa: E402
from ct_nb.core.files import read_json, write_json  # noqa: E402
from ct_nb.core.terminal import program  # noqa: E402
from ct_nb.training.checkpoints import versions  # noqa: E402

SIZES = (8,) if TINY else (64, 128, 256, 512)
DETECTOR = 8 if TINY else 256
DEVICE = "cpu" if TINY else "cuda"
TOLERANCES = {"float64": 2e-11, "float32": 2e-4}
QUANTITIES = ("picture", "transpose", "gradient to volume", "gradient to pose")
RESERVE_S = 5.0 if TINY else 20.0  # for the table and the file, from the minutes


def card() -> str:
    "The name of the device."
    return "CPU, by Triton's interpreter" if TINY else torch.cuda.get_device_name()


# ---------------------------------------------------------------- the kernels
def results(device: str, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    "Picture, transpose and gradients of one scene, two geometries of three views (tiny: one)."
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.physics.projector import backproject, project
    from ct_nb.physics.volume import Grid

    size, shape, batch, views = (4, (3, 4), 1, 1) if TINY else (48, (70, 90), 2, 3)
    beam = ConeBeam.orbit(
        [[20.0, 47.0, 90.0][:views]] * batch,
        [[15.0, -8.0, 0.0][:views]] * batch,
        [[12.0, 0.0, 90.0][:views]] * batch,
        grid=Grid.cube(size),
        detector_shape=shape,
        pixel_mm=540.0 / shape[1],
    )
    draw = torch.Generator().manual_seed(0)
    volume = torch.rand(batch, size, size, size, generator=draw).to(device, dtype).requires_grad_()
    image = torch.rand(batch, views, *shape, generator=draw).to(device, dtype)
    pose = [
        t.to(device, copy=True).requires_grad_() for t in (beam.source_mm, beam.detector_center_mm)
    ]
    steps = [t.to(device) for t in (beam.column_step_mm, beam.row_step_mm)]
    beam = ConeBeam(*pose, *steps, shape, beam.grid)
    picture = project(volume, beam, backend=backend)
    (picture * image).sum().backward()
    back = backproject(image, beam, backend=backend)
    gradient = torch.cat([t.grad.flatten() for t in pose])
    return [t.detach().cpu().double() for t in (picture, back, volume.grad, gradient)]


def check_kernels() -> list[dict]:
    "Relative differences from the reference in float64, by precision and quantity."
    expected = results("cpu", "torch", torch.float64)
    rows = []
    for name, tolerance in TOLERANCES.items():
        found, again = (results(DEVICE, "triton", getattr(torch, name)) for _ in range(2))
        for quantity, ours, same, truth in zip(QUANTITIES, found, again, expected):
            error = float((ours - truth).norm() / truth.norm())
            rows.append(
                {
                    "precision": name,
                    "quantity": quantity,
                    "error": error,
                    "repeats": bool(torch.equal(ours, same)),
                    "passed": error <= tolerance,
                }
            )
    return rows


# ---------------------------------------------------------------- their times
def seconds_of(function, most_s: float = 0.5) -> float:
    "Median of the calls that `most_s` seconds allow, 3 to 50, after one that compiles and warms."

    def once():
        start = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    count = int(np.clip(most_s / max(once(), 1e-6), 3, 50))
    return float(np.median([once() for _ in range(count)]))


def time_size(size: int, bandwidth: float) -> tuple[list[dict], str | None]:
    "Times of all operations at a size, and a sentence where nanodrr has none."
    from peers.harness import OPERATIONS, bench_geometry, bytes_to_move, write_scene
    from peers.worker import CtNb, Nanodrr, Scene

    rows, missing = [], None
    with tempfile.TemporaryDirectory() as folder:
        mu = np.random.default_rng(0).random((size,) * 3, dtype=np.float32)
        path = write_scene(Path(folder) / "scene.npz", mu, bench_geometry(size, "tilted", DETECTOR))
        for name, peer in (("ct_nb", CtNb), ("nanodrr", Nanodrr)):
            try:
                projector = peer(Scene(path, DEVICE))
                for operation in OPERATIONS:
                    function = getattr(projector, operation, None)
                    if function is None:
                        continue
                    limit = bytes_to_move(operation, size, 2 * DETECTOR**2) / bandwidth
                    rows.append(
                        {
                            "size": size,
                            "projector": name,
                            "operation": operation,
                            "milliseconds": 1e3 * seconds_of(function),
                            "memory_limit_ms": 1e3 * limit,
                        }
                    )
            except Exception as error:  # a peer that fails must not end the check of ours
                if name == "ct_nb":
                    raise
                missing = f"nanodrr at {size}³: {first_line(error)}"
    return rows, missing


# ---------------------------------------------------------------- training
def train(out: Path) -> None:
    "The preset on a few phantoms, from the last checkpoint on; ends when it is killed, or done."
    from ct_nb.drr2ct.train import DRR2CT_PRESETS, DRR2CTRun

    name = "micro" if TINY else "gpu"
    settings = DRR2CT_PRESETS[name]
    if not TINY:
        settings = replace(
            settings,
            render_size=settings.network.size,  # painted in a minute, not in ten
            phantoms=24,
            validation_phantoms=4,
            trainer=replace(settings.trainer, log_every=5, checkpoint_every=25, validate_every=0),
        )
    DRR2CTRun(name, out=str(out), resume=True, settings=settings).open().fit(progress=False)


def history(out: Path) -> list[dict]:
    "Rows of all stages that have begun, in order."
    from ct_nb.drr2ct.objective import get_stages
    from ct_nb.training.trainer import read_history

    return [
        {**row, "stage": stage.name}
        for stage in get_stages()
        for row in read_history(out / "stages" / stage.name)
    ]


def train_for(seconds: float, out: Path) -> dict:
    "Trains for some seconds in a process of its own, and says how far it came."
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("CT_NB_CACHE", str(out.parent / "cache"))
    words = [sys.executable, __file__, "--training", "--out", str(out), *["--tiny"] * TINY]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            words, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None  # the time was up, as it should be
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # a checkpoint is whole or not there
                process.wait()
        said.seek(0)
        last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
    if code:
        return {"failed": last, "seconds": time.monotonic() - start}
    rows = history(out)
    last = rows[-1] if rows else None
    first = next((row for row in rows if row["stage"] == last["stage"]), None)
    return {
        "finished": code == 0,
        "seconds": time.monotonic() - start,
        "first": first,  # of the stage that the last row is of
        "last": last,
    }


# ---------------------------------------------------------------- all of it
def table(record: dict) -> str:
    "What was measured, as Markdown."
    lines = [f"{record['device']}", "", "| kernels | precision | error | same bits twice | |"]
    lines.append("| --- | --- | ---: | --- | --- |")
    for row in record.get("kernels", []):
        lines.append(
            f"| {row['quantity']} | {row['precision']} | {row['error']:.1e} |"
            f" {'yes' if row['repeats'] else 'no'} | {'passed' if row['passed'] else 'FAILED'} |"
        )
    lines += ["", f"A large copy moves {record['copy_bytes_per_second'] / 1e9:.0f} GB/s.", ""]
    lines.append(
        "| size | operation | ct_nb, ms | memory limit, ms | times | nanodrr, ms | ratio |"
    )
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    peers = {
        (r["size"], r["operation"]): r["milliseconds"]
        for r in record["times"]
        if r["projector"] == "nanodrr"
    }
    for row in record["times"]:
        if row["projector"] != "ct_nb":
            continue
        ours, limit = row["milliseconds"], row["memory_limit_ms"]
        peer = peers.get((row["size"], row["operation"]))
        other = f"{peer:.3g} | {peer / ours:.2g}" if peer else "– | –"
        lines.append(
            f"| {row['size']}³ | {row['operation']} | {ours:.3g} | {limit:.3g} |"
            f" {ours / limit:.2g} | {other} |"
        )
    lines += ["", *record["notes"]]
    return "\n".join([*lines, f"training: {training_line(record.get('training'))}"])


def training_line(training: dict | None) -> str:
    "How far the training came."
    if training is None:
        return "no time was left"
    if "failed" in training:
        return f"failed ({training['failed']})"
    spent = f"{training['seconds']:.0f} s in its last call"
    first, last = training["first"], training["last"]
    if last is None:
        return f"no step was logged, {spent}"
    return (
        f"stage {last['stage']}, step {last['step']}, {last['seconds_per_step']:.3g} s a step,"
        f" loss {first['loss']:.3g} at step {first['step']}, now {last['loss']:.3g}; {spent}"
        f"{', finished' if training['finished'] else ''}"
    )


def check(minutes: float, out: Path) -> dict:
    "Everything that the minutes allow; the record, which is also written."
    from peers.harness import copy_bandwidth

    end = time.monotonic() + 60 * minutes - RESERVE_S
    path = out / "gpu_check.json"
    about = {"device": card(), "versions": versions()}
    record = read_json(path) if path.is_file() else {}
    if {key: record.get(key) for key in about} != about:
        record = {**about, "times": [], "notes": []}
    if "kernels" not in record:
        record["kernels"] = check_kernels()
        record["copy_bytes_per_second"] = copy_bandwidth(DEVICE, 8 if TINY else 2048)
        write_json(path, record)
    for size in SIZES:
        if any(row["size"] == size for row in record["times"]):
            continue
        if time.monotonic() > end:
            break
        rows, missing = time_size(size, record["copy_bytes_per_second"])
        record["times"] += rows
        record["notes"] += [missing] if missing else []
        write_json(path, record)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # for the process that trains
    left = end - time.monotonic()
    if left > RESERVE_S:
        record["training"] = train_for(left, out / "training")
    write_json(path, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--tiny", action="store_true", help="everything on the CPU, in seconds")
    parser.add_argument("--training", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with program("gpu_check"):
        if not 0 < options.minutes < 1e6:
            raise InputError("minutes", f"must be above 0, got {options.minutes}")
        if not TINY and not torch.cuda.is_available():
            raise InputError(
                "gpu_check",
                "torch finds no CUDA card here; --tiny runs the whole program on the CPU",
            )
        if options.training:
            train(options.out)
            return
        record = check(options.minutes, options.out)
        print(table(record))
        print(options.out / "gpu_check.json")
        failed = [row for row in record["kernels"] if not row["passed"]]
        if failed or "failed" in record.get("training", {}):
            sys.exit(1)


if __name__ == "__main__":
    main()
