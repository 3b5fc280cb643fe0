"""One projector in a process of its own: loads a scene and times, measures or returns operations.

Started as `PYTHON worker.py NAME`; one JSON object a line in, one out. It needs numpy and the
projector NAME, nothing of ct_nb (except for the peer `ct_nb` itself), so it runs under any
interpreter. Every adapter converts the same physical scene, in millimetres, to the convention of
its projector; the parent compares each with closed-form line integrals before it uses a time.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

import numpy as np


class Scene:
    """Volume (D, H, W) in mm⁻¹ with its affine, and V views: source, detector centre, pixel steps
    in mm; `cotangent` is an image (V, R, C).
    """

    def __init__(self, path, device):
        with np.load(path) as file:
            vars(self).update({name: file[name] for name in file.files})
        self.device = device
        self.rows, self.columns = (int(n) for n in self.detector_shape)
        self.column_mm, self.row_mm = (
            np.linalg.norm(step, axis=-1) for step in (self.column_step, self.row_step)
        )
        self.column = self.column_step / self.column_mm[:, None]
        self.row = self.row_step / self.row_mm[:, None]
        self.normal = np.cross(self.column, self.row)
        self.distance = ((self.detector_center - self.source) * self.normal).sum(-1)
        self.offset = np.stack(
            [
                ((self.source - self.detector_center) * axis).sum(-1)
                for axis in (self.column, self.row)
            ],
            -1,
        )

    def camera(self, x, y):
        """(V, 4, 4) camera to world: the camera stands at the source and looks along the normal,
        its image axes are x and y.
        """
        matrix = np.tile(np.eye(4), (len(self.source), 1, 1))
        matrix[:, :3, 0] = x
        matrix[:, :3, 1] = y
        matrix[:, :3, 2] = self.normal
        matrix[:, :3, 3] = self.source
        return matrix.astype(np.float32)

    def needs(self, *conditions):
        for met, reason in conditions:
            if not met:
                raise NotImplementedError(reason)


class TorchPeer:
    """What every autograd peer shares: `project(volume, pose)` is its call, `volume` and `pose` are
    leaf tensors.
    """

    def __init__(self, scene):
        import torch

        self.torch, self.scene = torch, scene
        self.cotangent = torch.from_numpy(scene.cotangent.astype(np.float32)).to(scene.device)
        self.setup()

    def tensor(self, array):
        return self.torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(
            self.scene.device
        )

    def forward(self):
        with self.torch.no_grad():
            return self.image(self.project(self.volume, self.pose))

    def gradients(self, volume, pose):
        self.volume.grad = None
        for tensor in self.pose:
            tensor.grad = None
        self.volume.requires_grad_(volume)
        for tensor in self.pose:
            tensor.requires_grad_(pose)
        image = self.image(self.project(self.volume, self.pose))
        image.backward(self.cotangent)
        result = [image.detach()] + [
            tensor.grad for tensor in (self.volume, *self.pose) if tensor.grad is not None
        ]
        for tensor in (self.volume, *self.pose):
            tensor.grad = None
        self.volume.requires_grad_(False)
        for tensor in self.pose:
            tensor.requires_grad_(False)
        return result

    def forward_volume(self):
        return self.gradients(True, False)

    def forward_pose(self):
        return self.gradients(False, True)

    def forward_volume_pose(self):
        return self.gradients(True, True)

    def image(self, out):
        return out

    def numpy(self, out):
        return out.detach().cpu().numpy()

    def bytes(self, out):
        return sum(t.numel() * t.element_size() for t in (out if isinstance(out, list) else [out]))


class CtNb(TorchPeer):
    distribution = "ct_nb"

    def setup(self):
        from ct_nb.physics.geometry import ConeBeam
        from ct_nb.physics.projector import backproject, project
        from ct_nb.physics.volume import Grid

        self.volume, s = self.tensor(self.scene.mu), self.scene
        # named, so that no slower one steps in unseen
        grid = Grid(s.mu.shape, s.affine)
        backend = "triton" if s.device == "cuda" else "numba"
        self.pose = [
            self.tensor(t) for t in (s.source, s.detector_center, s.column_step, s.row_step)
        ]
        self.project = lambda volume, pose: project(
            volume, ConeBeam(*pose, (s.rows, s.columns), grid), backend
        )
        self.back = lambda: backproject(
            self.cotangent, ConeBeam(*self.pose, (s.rows, s.columns), grid), backend
        )

    def adjoint(self):
        with self.torch.no_grad():
            return self.back()

    def forget(self):
        "Buffers that are reused between calls count as memory, too."
        from ct_nb.physics import joseph_numba

        joseph_numba._buffers.clear()


class Nanodrr(TorchPeer):
    distribution = "nanodrr"
    samples = None

    def setup(self):
        from nanodrr.data import Subject
        from nanodrr.drr import DRR
        from torchio import ScalarImage

        s = self.scene
        s.needs(
            (
                np.ptp(s.distance) < 1e-3 and np.ptp(s.offset, axis=0).max() < 1e-3,
                "all views share one set of intrinsics",
            )
        )
        subject = Subject.from_images(
            ScalarImage(
                tensor=self.torch.from_numpy(s.mu.transpose(2, 1, 0)[None].copy()), affine=s.affine
            ),
            convert_to_mu=False,
        ).to(s.device)
        drr = DRR.from_carm_intrinsics(
            float(s.distance[0]),
            float(s.column_mm[0]),
            float(s.row_mm[0]),
            float(s.offset[0, 0]),
            float(s.offset[0, 1]),
            s.rows,
            s.columns,
            dtype=self.torch.float32,
            device=s.device,
        )
        self.volume, self.pose = subject._image_hu, [self.tensor(s.camera(s.column, s.row))]
        samples = self.samples or max(s.mu.shape)
        self.project = lambda volume, pose: drr(subject, pose[0], n_samples=samples)

    def image(self, out):
        return out[:, 0]


class Nanodrr500(Nanodrr):
    samples = 500


class DiffDRR(TorchPeer):
    distribution = "diffdrr"
    renderer = "siddon"

    def setup(self):
        from diffdrr.drr import DRR
        from diffdrr.pose import RigidTransform
        from torchio import ScalarImage, Subject

        s = self.scene
        s.needs(
            (
                np.ptp(s.distance) < 1e-3 and abs(s.offset).max() < 1e-3,
                "all views share one set of intrinsics without offsets",
            )
        )
        image = ScalarImage(
            tensor=self.torch.from_numpy(s.mu.transpose(2, 1, 0)[None].copy()), affine=s.affine
        )
        subject = Subject(volume=image, density=image, mask=None, reorient=self.torch.eye(4)[None])
        subject.mask = None
        drr = DRR(
            subject,
            sdd=float(s.distance[0]),
            height=s.rows,
            width=s.columns,
            delx=float(s.column_mm[0]),
            dely=float(s.row_mm[0]),
            reverse_x_axis=True,
            renderer=self.renderer,
        ).to(s.device)
        self.volume, self.pose = drr.density, [self.tensor(s.camera(-s.column, -s.row))]
        self.project = lambda volume, pose: drr(RigidTransform(pose[0]))

    def image(self, out):
        return out[:, 0]


class DiffDRRTrilinear(DiffDRR):
    renderer = "trilinear"


class FlashDRR(TorchPeer):
    """Sums samples of `grid_sample` times a step in cm, and places the centres of the outermost
    voxels where the borders of the grid are meant to be, so half a voxel of the rim is missing.
    """

    distribution = "flashdrr"

    def setup(self):
        from flashdrr.rendering import VolumeRaycaster

        s = self.scene
        s.needs(
            (
                np.ptp(s.distance) < 1e-3 and abs(s.offset).max() < 1e-3,
                "all views share one field of view without offsets",
            ),
            (
                s.rows == s.columns and abs(s.row_mm / s.column_mm - 1).max() < 1e-6,
                "the detector is square",
            ),
        )
        # the field of view reaches from the centre of the first row to that of the last
        half = (s.rows - 1) / 2 * s.row_mm[0] / s.distance[0]
        raycaster = VolumeRaycaster(
            resolution=(s.columns, s.rows),
            fov=float(np.rad2deg(2 * np.arctan(half))),
            return_tau=True,
        ).to(s.device)
        to_index = self.tensor(np.linalg.inv(s.affine))
        # its up is against our rows
        self.volume = self.tensor(s.mu.transpose(2, 1, 0)[None, None])
        self.pose = [self.tensor(s.camera(s.column, -s.row))]
        self.project = lambda volume, pose: raycaster(
            volume, pose[0], to_index, triton=s.device == "cuda"
        )

    def image(self, out):
        return 10 * out[:, 0]


class Diffct(TorchPeer):
    distribution = "diffct"

    def setup(self):
        from diffct import Projector

        s = self.scene
        affine = s.affine.copy()
        center = affine[:3, :3] @ ((np.array(s.mu.shape[::-1]) - 1) / 2) + affine[:3, 3]
        spacing = np.diag(affine)[:3]
        s.needs(
            (
                np.allclose(affine[:3, :3], np.diag(spacing)) and (spacing > 0).all(),
                "axes of the grid along the frame",
            ),
            (abs((s.column * s.row).sum(-1)).max() < 1e-6, "square pixels"),
        )
        pose = [
            self.tensor(t) for t in (s.source - center, s.detector_center - center, s.column, s.row)
        ]
        self.volume, self.pose = self.tensor(s.mu), pose
        projector = Projector(
            tuple(pose),
            s.mu.shape,
            (s.columns, s.rows),
            detector_spacing=(float(s.column_mm[0]), float(s.row_mm[0])),
            voxel_spacing=tuple(float(x) for x in spacing[::-1]),
            backend="numba" if s.device == "cuda" else "torch",
        )
        self.project = lambda volume, pose: projector.project(volume, trajectory=tuple(pose))
        self.back = lambda: projector.backproject(self.cotangent.mT)

    def adjoint(self):
        with self.torch.no_grad():
            return self.back()

    def image(self, out):
        return out.mT


class Mbirtorch(TorchPeer):
    distribution = "mbirtorch"
    forward_pose = forward_volume_pose = None

    def setup(self):
        import mbirtorch
        from mbirtorch.autograd import TorchProjector

        s = self.scene
        spacing = np.linalg.norm(s.affine[:3, :3], axis=0)
        distance = np.linalg.norm(s.source, axis=-1)
        s.needs(
            (
                np.allclose(s.row, (0, 0, -1), atol=1e-6),
                "a circular orbit, neither tilted nor rolled",
            ),
            (
                np.allclose(s.source[:, 2], 0)
                and abs(s.offset).max() < 1e-3
                and np.ptp(spacing) < 1e-6,
                "a centred detector, cubic voxels",
            ),
        )
        angles = np.arctan2(s.normal[:, 0], s.normal[:, 1])
        model = mbirtorch.ConeBeamModel(
            (len(angles), s.rows, s.columns), -angles, float(s.distance[0]), float(distance[0])
        )
        d, h, w = s.mu.shape
        model.set_params(
            delta_det_channel=float(s.column_mm[0]),
            delta_det_row=float(s.row_mm[0]),
            delta_voxel=float(spacing[0]),
            recon_shape=(h, w, d),
            verbose=0,
        )
        self.operator = TorchProjector(model)
        self.volume = self.tensor(s.mu[::-1, ::-1].transpose(1, 2, 0))
        self.pose = []
        self.project = lambda volume, pose: self.operator(volume)

    def adjoint(self):
        with self.torch.no_grad():
            return self.operator.adjoint(self.cotangent).permute(2, 0, 1).flip(0, 1)


class Rtk:
    "The Reconstruction Toolkit's matched Joseph pair."

    distribution = "itk-rtk"

    def __init__(self, scene):
        import itk
        from itk import RTK as rtk

        self.itk, s = itk, scene
        geometry = rtk.ThreeDCircularProjectionGeometry.New()
        for source, detector, column, row in zip(s.source, s.detector_center, s.column, s.row):
            if not geometry.AddProjection(
                *(tuple(map(float, v)) for v in (source, detector, column, row))
            ):
                raise NotImplementedError("RTK refuses this view")
        spacing = np.linalg.norm(s.affine[:3, :3], axis=0)
        direction = s.affine[:3, :3] / spacing
        origin = s.affine[:3, 3]

        def volume(array):
            image = itk.image_from_array(np.ascontiguousarray(array, dtype=np.float32))
            image.SetSpacing([float(x) for x in spacing])
            image.SetOrigin([float(x) for x in origin])
            image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))
            return image

        def stack(array):
            image = itk.image_from_array(np.ascontiguousarray(array, dtype=np.float32))
            image.SetSpacing([float(s.column_mm[0]), float(s.row_mm[0]), 1.0])
            image.SetOrigin(
                [
                    -(s.columns - 1) / 2 * float(s.column_mm[0]),
                    -(s.rows - 1) / 2 * float(s.row_mm[0]),
                    0.0,
                ]
            )
            return image

        image = itk.Image[itk.F, 3]
        self.forward_filter = rtk.JosephForwardProjectionImageFilter[image, image].New(
            Geometry=geometry
        )
        self.adjoint_filter = rtk.JosephBackProjectionImageFilter[image, image].New(
            Geometry=geometry
        )
        self.inputs = [
            stack(np.zeros_like(s.cotangent)),
            volume(s.mu),
            volume(np.zeros_like(s.mu)),
            stack(s.cotangent),
        ]
        for filter, inputs in (
            (self.forward_filter, self.inputs[:2]),
            (self.adjoint_filter, self.inputs[2:]),
        ):
            filter.InPlaceOff()
            for i, x in enumerate(inputs):
                filter.SetInput(i, x)

    def run(self, filter):
        filter.Modified()
        filter.Update()
        return filter.GetOutput()

    def forward(self):
        return self.run(self.forward_filter)

    def adjoint(self):
        return self.run(self.adjoint_filter)

    def numpy(self, out):
        return self.itk.array_from_image(out)

    def bytes(self, out):
        return self.numpy(out).nbytes


def _numbers(vector) -> str:
    return " ".join(f"{x:.9g}" for x in vector)


class Plastimatch:
    """The command-line DRR of plastimatch, a process and two files a view: judged for accuracy, not
    timed.
    """

    distribution = "plastimatch"
    algorithm = "exact"
    timed = False

    def __init__(self, scene):
        if shutil.which("plastimatch") is None:
            raise ImportError("no program plastimatch")
        s = self.scene = scene
        affine = s.affine
        s.needs(
            (
                np.allclose(affine[:3, :3], np.diag(np.diag(affine)[:3])),
                "axes of the grid along the frame",
            ),
            (abs(s.offset).max() < 1e-3, "no offsets"),
        )
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "mu.mha"
        d, h, w = s.mu.shape
        header = (
            "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB ="
            f" False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = {affine[0, 3]} {affine[1, 3]}"
            f" {affine[2, 3]}\nElementSpacing = {affine[0, 0]} {affine[1, 1]}"
            f" {affine[2, 2]}\nDimSize = {w} {h} {d}\nElementType = MET_FLOAT\nElementDataFile ="
            " LOCAL\n"
        )
        path.write_bytes(header.encode() + np.ascontiguousarray(s.mu, dtype="<f4").tobytes())

    def forward(self):
        s = self.scene
        folder = Path(self.folder.name)
        views = []
        for source, normal, row, distance in zip(s.source, s.normal, s.row, s.distance):
            to_center = float((-source * normal).sum())
            isocenter = source + to_center * normal
            command = [
                "plastimatch",
                "drr",
                "-i",
                self.algorithm,
                "-P",
                "none",
                "-t",
                "pfm",
                "--sad",
                f"{to_center:.9g}",
                "--sid",
                f"{distance:.9g}",
                "-n",
                _numbers(-normal),
                "--vup",
                _numbers(-row),
                "-o",
                _numbers(isocenter),
                "-r",
                f"{s.rows} {s.columns}",
                "-z",
                _numbers((s.rows * s.row_mm[0], s.columns * s.column_mm[0])),
                "-I",
                str(folder / "mu.mha"),
                "-O",
                str(folder / "drr"),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            file = next(folder.glob("drr*.pfm"))
            kind, shape, scale, data = file.read_bytes().split(b"\n", 3)
            # plastimatch integrates in cm
            views.append(10 * np.frombuffer(data, dtype="<f4").reshape(s.rows, s.columns))
            file.unlink()
        return np.stack(views)

    def numpy(self, out):
        return out

    def bytes(self, out):
        return out.nbytes


class PlastimatchUniform(Plastimatch):
    algorithm = "uniform"


PEERS = {
    "ct_nb": CtNb,
    "rtk": Rtk,
    "nanodrr": Nanodrr,
    "nanodrr_500": Nanodrr500,
    "flashdrr": FlashDRR,
    "diffct": Diffct,
    "mbirtorch": Mbirtorch,
    "diffdrr_siddon": DiffDRR,
    "diffdrr_trilinear": DiffDRRTrilinear,
    "plastimatch_exact": Plastimatch,
    "plastimatch_uniform": PlastimatchUniform,
}
OPERATIONS = ("forward", "adjoint", "forward_volume", "forward_pose", "forward_volume_pose")


def version(peer):
    try:
        return f"{peer.distribution} {metadata.version(peer.distribution)}"
    except metadata.PackageNotFoundError:
        return (
            subprocess.run(
                [peer.distribution, "--version"], capture_output=True, text=True
            ).stdout.strip()
            or peer.distribution
        )


def use_threads(threads):
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "numba" in sys.modules:
        sys.modules["numba"].set_num_threads(
            min(threads, sys.modules["numba"].config.NUMBA_NUM_THREADS)
        )
    if "itk" in sys.modules:
        sys.modules["itk"].MultiThreaderBase.SetGlobalDefaultNumberOfThreads(threads)


def synchronize(device):
    if device == "cuda":
        sys.modules["torch"].cuda.synchronize()


def measure_time(operation, count, device):
    """Seconds of `count` calls, one by one, after one that warms the caches; the result is freed
    outside the timed span.
    """
    operation()
    times = []
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        out = operation()
        synchronize(device)
        times.append(time.perf_counter() - start)
        del out
    return times


def _status_kb(field):
    return int(
        next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]
    )


def measure_memory(peer, operation, device):
    """Bytes that one call needs at its peak beyond what was there before and what it returns; and
    its seconds.
    """
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    if device == "cuda":
        cuda = sys.modules["torch"].cuda
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        out = operation()
        synchronize(device)
        return (
            max(0, cuda.max_memory_allocated() - before - peer.bytes(out)),
            time.perf_counter() - start,
        )
    ctypes.CDLL(None).malloc_trim(0)
    # resets VmHWM, the peak of resident memory, to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kb("VmRSS")
    out = operation()
    seconds = time.perf_counter() - start
    return max(0, (_status_kb("VmHWM") - before) * 1024 - peer.bytes(out)), seconds


def serve(name, requests, replies):
    peer = device = None
    for line in requests:
        request = json.loads(line)
        try:
            do, reply = request["do"], {}
            if do == "setup":
                peer = None
                device = request["device"]
                peer = PEERS[name](Scene(request["scene"], device))
                use_threads(request["threads"])
                reply["operations"] = [x for x in OPERATIONS if getattr(peer, x, None)]
                reply["timed"] = getattr(peer, "timed", True)
                reply["version"] = version(peer)
            elif do == "image":
                np.save(request["path"], peer.numpy(getattr(peer, request["operation"])()))
            elif do == "time":
                reply["seconds"] = measure_time(
                    getattr(peer, request["operation"]), request["count"], device
                )
            elif do == "memory":
                # code that is read in and compiled at the first call is not what a call needs
                getattr(peer, request["operation"])()
                getattr(peer, "forget", lambda: None)()
                reply["bytes"], reply["seconds"] = measure_memory(
                    peer, getattr(peer, request["operation"]), device
                )
        except NotImplementedError as error:
            reply = {"unsupported": str(error)}
        except ImportError as error:
            reply = {"missing": str(error)}
        except Exception as error:
            reply = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # what a peer prints goes to the standard error, not between the replies
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)
