"The Triton kernels: interpreted on any machine, compiled for two GPUs, and run where there is one."

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from places import PROGRAMS
from refusals import refused

PROGRAM = PROGRAMS / "joseph_cuda.py"
CASES = (
    "tilted_batch",
    "shared_geometry",
    "several_patches",
    "steep_rows",
    "source_inside",
    "misses",
    "single_precision",
    "through_the_projector",
)
KERNELS = ("_forward_kernel", "_slope_kernel", "_adjoint_kernel")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed here; pip install triton==3.7.1 (Linux)",
)


def run(mode):
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")]),
        PYTHONWARNINGS="ignore",
        CUDA_VISIBLE_DEVICES="",
    )
    completed = subprocess.run(
        [sys.executable, str(PROGRAM), mode],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    return [json.loads(line) for line in completed.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted():
    return {reply["case"]: reply for reply in run("interpret")}


@pytest.fixture(scope="module")
def compiled():
    return run("compile")


@pytest.mark.parametrize("case", CASES)
def test_arithmetic_is_the_references(interpreted, case):
    assert "failure" not in interpreted[case], interpreted[case]["failure"]
    assert interpreted[case]["error"] < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_gpus_without_atomics(compiled, kernel):
    builds = [reply for reply in compiled if reply["kernel"] == kernel]
    assert {(r["capability"], r["kind"]) for r in builds} == {
        (80, "*fp32"),
        (90, "*fp32"),
        (90, "*fp64"),
    }
    assert all(r["cubin"] > 0 and not r["atomics"] for r in builds)


def test_a_cpu_tensor_is_refused_in_one_sentence():
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.physics.projector import project
    from ct_nb.physics.volume import Grid

    with refused("backend"):
        project(
            torch.zeros(4, 4, 4),
            ConeBeam.biplanar(grid=Grid.cube(4), detector_shape=(4, 4)),
            backend="triton",
        )


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU here; the interpreter checks the arithmetic"
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_on_the_gpu(dtype, tolerance):
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.physics.projector import backproject, project
    from ct_nb.physics.volume import Grid

    geometry = ConeBeam.orbit(
        [[20.0, 47.0, 90.0]] * 2,
        [[15.0, -8.0, 0.0]] * 2,
        [[12.0, 0.0, 90.0]] * 2,
        grid=Grid.cube(48),
        detector_shape=(70, 90),
        pixel_mm=6.0,
    )
    volume = torch.rand(2, 48, 48, 48, dtype=dtype)
    image = torch.rand(2, 3, 70, 90, dtype=dtype)
    results = []
    for device, backend, kind in (("cuda", "triton", dtype), ("cpu", "torch", torch.float64)):
        leaves = [
            t.to(device, copy=True).requires_grad_()
            for t in (volume.to(kind), geometry.source_mm, geometry.detector_center_mm)
        ]
        beam = ConeBeam(
            leaves[1],
            leaves[2],
            geometry.column_step_mm.to(device),
            geometry.row_step_mm.to(device),
            geometry.detector_shape,
            geometry.grid,
        )
        out = project(leaves[0], beam, backend=backend)
        (out * image.to(device, kind)).sum().backward()
        results.append(
            [
                t.detach().cpu().double()
                for t in (
                    out,
                    backproject(image.to(device, kind), beam, backend=backend),
                    *(t.grad for t in leaves),
                )
            ]
        )
    for ours, expected in zip(*results):
        assert (ours - expected).norm() <= 20 * tolerance * expected.norm()
    device_image = image.to("cuda")
    assert torch.equal(backproject(device_image, geometry), backproject(device_image, geometry))
