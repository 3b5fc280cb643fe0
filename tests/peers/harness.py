"The parent process of the peers: writes scenes, starts workers, compares with closed forms."

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid

from .closed_form import ellipsoid_phantom, line_integrals, voxelize

HERE = Path(__file__).resolve().parent
HOW_TO_INSTALL = {
    "ct_nb": "pip install -e .",
    "rtk": "pip install itk-rtk",
    "nanodrr": "pip install nanodrr",
    "nanodrr_500": "pip install nanodrr",
    "flashdrr": "pip install --no-deps flashdrr",
    "diffct": "pip install --no-deps diffct",
    "mbirtorch": "pip install mbirtorch",
    "diffdrr_siddon": (
        "pip install --no-deps diffdrr && pip install torchio kornia einops roma pandas"
    ),
    "diffdrr_trilinear": (
        "pip install --no-deps diffdrr && pip install torchio kornia einops roma pandas"
    ),
    "plastimatch_exact": "apt-get install plastimatch",
    "plastimatch_uniform": "apt-get install plastimatch",
}


class PeerError(RuntimeError):
    "The peer ran and failed."


class PeerMissing(RuntimeError):
    "The peer is not installed, or cannot do this scene."


@dataclass
class Worker:
    "A projector in its own process under its own interpreter."

    name: str
    python: str = sys.executable
    threads: int = os.cpu_count()
    device: str = "cpu"

    def __post_init__(self):
        environment = dict(os.environ, PYTHONPATH=str(HERE.parents[1]), PYTHONWARNINGS="ignore")
        for variable in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "NUMBA_NUM_THREADS",
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
        ):
            environment[variable] = str(self.threads)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        self.process = subprocess.Popen(
            [self.python, str(HERE / "worker.py"), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def ask(self, **request):
        self.tell(**request)
        return self.hear()

    def tell(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]
            if "ModuleNotFoundError" not in last:
                raise PeerError(
                    f"{self.name}: the worker ended with code {self.process.wait()}; {last}"
                )
            line = json.dumps({"missing": last})
        reply = json.loads(line)
        if "missing" in reply:
            raise PeerMissing(
                f"{self.name}: not installed in {self.python} ({reply['missing']});"
                f" {HOW_TO_INSTALL[self.name]}"
            )
        if "unsupported" in reply:
            raise PeerMissing(f"{self.name}: needs {reply['unsupported']}")
        if "error" in reply:
            raise PeerError(f"{self.name}: {reply['error']}\n{reply['traceback']}")
        return reply

    def setup(self, scene):
        return self.ask(do="setup", scene=str(scene), device=self.device, threads=self.threads)

    def image(self, operation="forward"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.npy"
            self.ask(do="image", operation=operation, path=str(path))
            return np.load(path)

    def time(self, operation, count=1):
        return self.ask(do="time", operation=operation, count=count)["seconds"]

    def memory(self, operation):
        "Peak bytes beyond inputs and outputs of one call, and its seconds."
        reply = self.ask(do="memory", operation=operation)
        return reply["bytes"], reply["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def bench_geometry(size, views="frontal", detector=256, side_mm=256.0, pixel_mm=None):
    """The scene of the bench: source–isocentre 1000 mm, source–detector 1500 mm, 435.2 mm detector,
    a 256 mm cube of `size`³ voxels.
    """
    angles = {
        "frontal": ([0.0, 90.0], 0.0, 0.0),
        "diagonal": ([45.0, 135.0], 0.0, 0.0),
        "tilted": ([20.0, 110.0], [15.0, -10.0], [7.0, -12.0]),
    }[views]
    return ConeBeam.orbit(
        *angles,
        grid=Grid.cube(size, side_mm),
        detector_shape=(detector, detector),
        pixel_mm=pixel_mm or 435.2 / detector,
    )


def write_scene(path, mu, geometry: ConeBeam, cotangent=None, seed=0):
    """The scene as numbers any interpreter reads; `cotangent` defaults to smooth positive noise in
    the image's shape.
    """
    shape = (geometry.views, *geometry.detector_shape)
    if cotangent is None:
        cotangent = np.random.default_rng(seed).random(shape, dtype=np.float32)

    def array(t):
        return t.detach().double().numpy()

    np.savez(
        path,
        mu=np.asarray(mu, dtype=np.float32),
        affine=geometry.grid.affine,
        source=array(geometry.source_mm),
        detector_center=array(geometry.detector_center_mm),
        column_step=array(geometry.column_step_mm),
        row_step=array(geometry.row_step_mm),
        detector_shape=np.array(geometry.detector_shape),
        cotangent=np.asarray(cotangent, dtype=np.float32),
    )
    return path


def relative_l2(image, truth):
    return float(np.linalg.norm(image - truth) / np.linalg.norm(truth))


OPERATIONS = ("forward", "adjoint", "forward_volume", "forward_pose", "forward_volume_pose")
QUICK_SECONDS = 2.0  # an operation that takes longer is called once and not repeated


def measure(
    size,
    names,
    python,
    device="cpu",
    detector=256,
    rounds=7,
    threads=None,
    patience=45.0,
    skip=(),
    say=print,
):
    """Times, memory and errors of the projectors `names` at one size; (rows, reasons).

    All workers stand ready at once and take turns, operation by operation, so that whatever else
    the machine does falls on all of them alike.
    A projector that has used `patience` seconds is not asked for its remaining operations. A row is
    a dict: device, size, peer, version,
    operation, milliseconds (median), low, high, calls, peak_mb; or with operation "error": views
    and error. `reasons`: peer -> why not.
    """
    threads = threads or os.cpu_count()
    rows = []
    reasons = {}
    ready = {}
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        solids = ellipsoid_phantom()
        scenes = {}
        truths = {}
        for views in ("frontal", "tilted", "diagonal"):
            geometry = bench_geometry(size, views, detector)
            if views == "frontal":
                mu = voxelize(solids, geometry.grid.shape, geometry.grid.affine)
            scenes[views] = write_scene(Path(folder) / f"{views}.npz", mu, geometry)
            truths[views] = line_integrals(
                solids, geometry.source_mm.numpy(), geometry.pixel_centers_mm().numpy()
            )
        small = bench_geometry(8, detector=8)
        scenes["small"] = write_scene(Path(folder) / "small.npz", np.ones(small.grid.shape), small)

        def attempt(name, function, *arguments):
            "The result of `function`, or None, with the reason in the list."
            start = time.perf_counter()
            try:
                return function(*arguments)
            except (PeerMissing, PeerError) as error:
                reasons[name] = str(error).split("\n")[0]
            finally:
                spent[name] = spent.get(name, 0) + time.perf_counter() - start

        def compile_all(worker, operations):
            return [worker.time(operation) for operation in operations]

        workers = {
            name: Worker(name, sys.executable if name == "ct_nb" else python, threads, device)
            for name in names
            if name not in skip
        }
        try:
            for worker in workers.values():
                worker.tell(do="setup", scene=str(scenes["small"]), device=device, threads=threads)
            for name, worker in workers.items():
                reply = attempt(name, worker.hear)
                if reply is None:
                    continue
                # on a tiny scene, so that no compiler is timed
                compiled = attempt(name, compile_all, worker, reply["operations"])
                if compiled is not None and attempt(name, worker.setup, scenes["frontal"]):
                    ready[name] = reply
            say(f"{size}³ on {device}: {', '.join(ready)}")

            times, peaks = {}, {}
            for name, reply in ready.items():
                spent[name] = 0.0
                for operation in reply["operations"] if reply["timed"] else ():
                    if spent[name] > patience:
                        break
                    measured = attempt(name, workers[name].memory, operation)
                    if measured is None:
                        break
                    peaks[name, operation] = measured[0]
                    times[name, operation] = [measured[1]]
            quick = {
                key: seconds[0] for key, seconds in times.items() if seconds[0] <= QUICK_SECONDS
            }
            for key in quick:
                times[key] = []
            for turn in range(rounds):
                order = (
                    list(ready)[turn % max(1, len(ready)) :]
                    + list(ready)[: turn % max(1, len(ready))]
                )
                for operation in OPERATIONS:
                    for name in order:
                        enough = (
                            len(times.get((name, operation), ())) >= 2 and spent[name] > patience
                        )
                        if (name, operation) not in quick or name in reasons or enough:
                            continue
                        count = int(np.clip(0.1 / max(quick[name, operation], 1e-6), 1, 10))
                        times[name, operation] += (
                            attempt(name, workers[name].time, operation, count) or []
                        )
            for (name, operation), seconds in times.items():
                milliseconds = 1e3 * np.array(seconds)
                if len(seconds):
                    rows.append(
                        dict(
                            device=device,
                            size=size,
                            peer=name,
                            version=ready[name]["version"],
                            operation=operation,
                            calls=len(seconds),
                            milliseconds=float(np.median(milliseconds)),
                            low=float(milliseconds.min()),
                            high=float(milliseconds.max()),
                            peak_mb=peaks[name, operation] / 1e6,
                        )
                    )

            for name, reply in ready.items():
                for views in scenes.keys() - {"small"}:
                    slow = times.get((name, "forward"), [0])[:1] > [5.0]
                    if name in reasons or (slow and views != "frontal"):
                        continue
                    try:
                        workers[name].setup(scenes[views])
                    except PeerMissing:
                        continue  # a geometry that this projector has no words for
                    image = attempt(name, workers[name].image)
                    if image is not None:
                        rows.append(
                            dict(
                                device=device,
                                size=size,
                                peer=name,
                                version=reply["version"],
                                operation="error",
                                views=views,
                                error=relative_l2(image, truths[views]),
                            )
                        )
        finally:
            for worker in workers.values():
                worker.close()
    return rows, reasons


def copy_bandwidth(device="cpu", megabytes=256, threads=None):
    """Bytes per second read plus written by a large copy: the roofline of anything that streams a
    volume.
    """
    if threads:
        torch.set_num_threads(threads)
    source = torch.ones(megabytes * 2**18, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(9):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # the fastest: a floor must not be raised by what else runs
    return 2 * source.numel() * 4 / min(seconds)


def bytes_to_move(operation, size, pixels):
    """The least an operation must read and write, float32: each input and output once (the second
    factor in a product counts again).
    """
    volume, image = 4 * size**3, 4 * pixels
    return {
        "forward": volume + image,
        "adjoint": volume + image,
        "forward_volume": 2 * (volume + image),
        "forward_pose": 2 * (volume + image),
        "forward_volume_pose": 3 * volume + 2 * image,
    }[operation]
