"""Checks of the Triton kernels for tests/physics/test_joseph_triton.py.

A process of its own, since Triton decides when a kernel is defined whether to interpret it.

python joseph_cuda.py interpret     against the reference, on the CPU; a line of JSON per case
python joseph_cuda.py compile       for two generations of GPU, none needed; a line per kernel
"""

import json
import os
import re
import sys
import tempfile
import time

MODE = sys.argv[1]
os.environ.pop("TRITON_INTERPRET", None)
if MODE == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from ct_nb.physics import joseph_reference as joseph
from ct_nb.physics import joseph_triton
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import backproject, project
from ct_nb.physics.volume import Grid

GRID = Grid(
    (5, 8, 6), np.array([[5.0, 0, 0, -12.5], [0, 4.0, 0, -14], [0, 0, 6.0, -12], [0, 0, 0, 1]])
)
VIEW = dict(
    grid=GRID,
    source_to_isocenter_mm=200.0,
    source_to_detector_mm=300.0,
    detector_shape=(5, 7),
    pixel_mm=9.0,
)


def batched(geometry):
    "The column parameters of a geometry with a batch axis."
    parameters = joseph.column_parameters(geometry)
    return parameters if geometry.batch_shape else parameters.map(lambda t: t[None])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def compare(geometry, batch=1):
    """Forward, transpose and gradient against the reference in float64; the largest difference
    relative to the largest value.
    """
    p = batched(geometry)
    volume = random(batch, *geometry.grid.shape)
    image = random(batch, geometry.views, *geometry.detector_shape, seed=1)
    pairs = [(joseph_triton.forward(volume, p), joseph.forward(volume, p))]
    pairs += zip(joseph_triton.gradient(volume, image, p), joseph.gradient(volume, image, p))
    for ours, expected in pairs:
        assert ours.shape == expected.shape and ours.isfinite().all()
    return max(
        float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        for ours, expected in pairs
    )


def tilted_batch():
    """two samples with their own geometry, two views each, tilted and rolled, one of which changes
    its marching axis on the way
    """
    return compare(
        ConeBeam.orbit(
            [[20.0, 47.0], [100.0, -44.0]],
            [[15.0, -8.0], [0.0, 5.0]],
            [[12.0, 0.0], [0.0, -30.0]],
            **VIEW,
        ),
        batch=2,
    )


def shared_geometry():
    "one geometry for a batch of two"
    return compare(ConeBeam.orbit([10.0], [5.0], [3.0], **VIEW), batch=2)


def several_patches():
    "more columns, rows and voxels than one program takes, seen from above: marching along z"
    grid = Grid(
        (3, 35, 18),
        np.diag([4.0, 2.0, 5.0, 1.0])
        + np.array([[0, 0, 0, -34.0], [0, 0, 0, -34], [0, 0, 0, -5], [0, 0, 0, 0]]),
    )
    return compare(
        ConeBeam.orbit(
            [5.0], [80.0], [85.0], **(VIEW | dict(grid=grid, detector_shape=(10, 18), pixel_mm=7.0))
        )
    )


def steep_rows():
    """an elevation of 55° and a source so near that some rays of a column turn away from its middle
    ray (w < MINIMUM_W)
    """
    geometry = ConeBeam.orbit(
        [0.0],
        [55.0],
        **(
            VIEW
            | dict(
                source_to_isocenter_mm=40.0,
                source_to_detector_mm=60.0,
                pixel_mm=16.0,
                detector_shape=(13, 5),
            )
        ),
    )
    assert 1 - 6 * batched(geometry).values[..., 7].abs().max() < joseph.MINIMUM_W
    return compare(geometry)


def source_inside():
    "the source lies inside the volume: only voxels in front of it count"
    return compare(
        ConeBeam.orbit(
            [33.0],
            **(
                VIEW
                | dict(
                    source_to_isocenter_mm=6.0,
                    source_to_detector_mm=50.0,
                    pixel_mm=8.0,
                    detector_shape=(5, 6),
                )
            ),
        )
    )


def misses():
    "rays that all miss are zero, and so are the gradients"
    p = batched(
        ConeBeam.orbit(
            [0.0], isocenter_mm=(500.0, 0.0, 0.0), **(VIEW | dict(detector_shape=(4, 5)))
        )
    )
    volume, image = random(1, *GRID.shape), random(1, 1, 4, 5)
    return max(
        float(t.abs().max())
        for t in (joseph_triton.forward(volume, p), *joseph_triton.gradient(volume, image, p))
    )


def single_precision():
    """float32: the pair is matched to 1e-5, two calls give equal bits, and the result is that of
    float64 to 1e-5
    """
    geometry = ConeBeam.orbit([20.0, 75.0], [15.0, 0.0], [12.0, 0.0], **VIEW)
    p = batched(geometry)
    volume = random(1, *GRID.shape, dtype=torch.float32)
    image = random(1, 2, 5, 7, seed=1, dtype=torch.float32)
    ours = joseph_triton.forward(volume, p)
    back = joseph_triton.adjoint(image, p)
    assert ours.dtype == back.dtype == torch.float32
    assert torch.equal(back, joseph_triton.adjoint(image, p)), "two calls differ in their bits"
    left = (ours.double() * image).sum()
    right = (volume.double() * back).sum()
    assert abs(left - right) <= 1e-5 * abs(left)
    expected = joseph.forward(volume.double(), p)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    return 0.0


def through_the_projector():
    """`project` and `backproject` with backend='triton': values and gradients to volume, image and
    pose are those of the reference
    """
    worst = 0.0
    for function, shape in ((project, GRID.shape), (backproject, (1, 5, 7))):
        results = []
        for backend in ("triton", "torch"):
            geometry = ConeBeam.orbit([25.0], [10.0], [5.0], **VIEW)
            leaves = [
                t.requires_grad_()
                for t in (
                    random(*shape),
                    geometry.source_mm,
                    geometry.detector_center_mm,
                    geometry.column_step_mm,
                    geometry.row_step_mm,
                )
            ]
            out = function(leaves[0], geometry, backend=backend)
            (out * random(*out.shape, seed=2)).sum().backward()
            results.append([out.detach()] + [t.grad for t in leaves])
        worst = max(
            [worst] + [float((x - y).abs().max() / y.abs().max()) for x, y in zip(*results)]
        )
    return worst


CASES = (
    tilted_batch,
    shared_geometry,
    several_patches,
    steep_rows,
    source_inside,
    misses,
    single_precision,
    through_the_projector,
)


def interpret(names):
    for case in CASES:
        if names and case.__name__ not in names:
            continue
        start = time.perf_counter()
        try:
            reply = {"error": case()}
        except Exception as failure:
            reply = {"failure": f"{type(failure).__name__}: {failure}"}
        print(
            json.dumps(
                {"case": case.__name__, "seconds": round(time.perf_counter() - start, 2)} | reply
            ),
            flush=True,
        )


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict(volume="T", image="T", values="T", slope="T", axes="*i64", slices="*i64")
    patch = dict(MINIMUM_W=joseph.MINIMUM_W, ROWS=8, COLUMNS=16)
    block = dict(MINIMUM_W=joseph.MINIMUM_W, M=1, A=2, B=0, TILE_A=16, TILE_B=32, SEARCH=256)
    for name, constants, warps in (
        ("_forward_kernel", patch, 4),
        ("_slope_kernel", patch, 4),
        ("_adjoint_kernel", block, 1),
    ):
        for capability, kind in ((80, "*fp32"), (90, "*fp32"), (90, "*fp64")):
            kernel = getattr(joseph_triton, name)
            signature = {
                n: "constexpr" if n in constants else pointers.get(n, "i32").replace("T", kind)
                for n in kernel.arg_names
            }
            build = triton.compile(
                ASTSource(kernel, signature, constexprs=constants),
                target=GPUTarget("cuda", capability, 32),
                options=dict(num_warps=warps),
            )
            print(
                json.dumps(
                    {
                        "kernel": name,
                        "capability": capability,
                        "kind": kind,
                        "cubin": len(build.asm["cubin"]),
                        "atomics": bool(re.search(r"\b(atom|red)\.", build.asm["ptx"])),
                    }
                )
            )


if __name__ == "__main__":
    if MODE == "interpret":
        interpret(sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            compile_all()
