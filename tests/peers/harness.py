"""The parent's side of the peers: write a scene, start workers, ask them, and compare with closed forms."""
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid

HERE = Path(__file__).resolve().parent
HOW_TO_INSTALL = {
    "ct_nb": "pip install -e .", "rtk": "pip install itk-rtk", "nanodrr": "pip install nanodrr", "nanodrr_500": "pip install nanodrr",
    "diffct": "pip install --no-deps diffct", "mbirtorch": "pip install mbirtorch",
    "diffdrr_siddon": "pip install --no-deps diffdrr && pip install torchio kornia einops roma pandas",
    "diffdrr_trilinear": "pip install --no-deps diffdrr && pip install torchio kornia einops roma pandas",
    "plastimatch_exact": "apt-get install plastimatch", "plastimatch_uniform": "apt-get install plastimatch"}


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
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
            environment[variable] = str(self.threads)
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([self.python, str(HERE / "worker.py"), self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=environment)

    def ask(self, **request):
        self.tell(**request)
        return self.hear()

    def tell(self, **request):
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError: pass

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise PeerError(f"{self.name}: the worker ended with code {self.process.wait()}; {self.errors.read()[-500:].strip()}")
        reply = json.loads(line)
        if "missing" in reply: raise PeerMissing(f"{self.name}: not installed in {self.python} ({reply['missing']}); {HOW_TO_INSTALL[self.name]}")
        if "unsupported" in reply: raise PeerMissing(f"{self.name}: needs {reply['unsupported']}")
        if "error" in reply: raise PeerError(f"{self.name}: {reply['error']}\n{reply['traceback']}")
        return reply

    def setup(self, scene): return self.ask(do="setup", scene=str(scene), device=self.device, threads=self.threads)

    def image(self, operation="forward"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.npy"
            self.ask(do="image", operation=operation, path=str(path))
            return np.load(path)

    def time(self, operation, count=1): return self.ask(do="time", operation=operation, count=count)["seconds"]
    def memory(self, operation): return self.ask(do="memory", operation=operation)["bytes"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        try: self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self): return self
    def __exit__(self, *_): self.close()


def bench_geometry(size, views="frontal", detector=256, side_mm=256.0, pixel_mm=None):
    "The scene of the bench: source–isocentre 1000 mm, source–detector 1500 mm, 435.2 mm detector, a 256 mm cube of `size`³ voxels."
    angles = {"frontal": ([0.0, 90.0], 0.0, 0.0), "diagonal": ([45.0, 135.0], 0.0, 0.0), "tilted": ([20.0, 110.0], [15.0, -10.0], [7.0, -12.0])}[views]
    return ConeBeam.orbit(*angles, grid=Grid.cube(size, side_mm), detector_shape=(detector, detector), pixel_mm=pixel_mm or 435.2 / detector)


def write_scene(path, mu, geometry: ConeBeam, cotangent=None, seed=0):
    "The scene as numbers any interpreter reads; `cotangent` defaults to smooth positive noise in the image's shape."
    shape = (geometry.views, *geometry.detector_shape)
    if cotangent is None: cotangent = np.random.default_rng(seed).random(shape, dtype=np.float32)
    array = lambda t: t.detach().double().numpy()
    np.savez(path, mu=np.asarray(mu, dtype=np.float32), affine=geometry.grid.affine, source=array(geometry.source_mm),
             detector_center=array(geometry.detector_center_mm), column_step=array(geometry.column_step_mm), row_step=array(geometry.row_step_mm),
             detector_shape=np.array(geometry.detector_shape), cotangent=np.asarray(cotangent, dtype=np.float32))
    return path


def relative_l2(image, truth): return float(np.linalg.norm(image - truth) / np.linalg.norm(truth))
