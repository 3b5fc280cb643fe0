"""The projector against closed forms, scipy, scikit-image, and other packages where installed.

Other packages run under their own interpreter, CT_NB_PEERS_PYTHON (default: this one);
nbs/bench_projector.ipynb tells how to install them.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from peers.closed_form import blob_phantom, ellipsoid_phantom, line_integrals, rotation, voxelize
from peers.harness import (
    PeerError,
    PeerMissing,
    Worker,
    bench_geometry,
    measure,
    relative_l2,
    write_scene,
)
from places import FULL, ROOT

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid

PEERS_PYTHON = os.environ.get("CT_NB_PEERS_PYTHON", sys.executable)
VIEWS = ("frontal", "tilted", "diagonal")


def error(solids, size, views, detector=64):
    geometry = bench_geometry(size, views, detector)
    mu = torch.from_numpy(voxelize(solids, geometry.grid.shape, geometry.grid.affine))
    truth = line_integrals(solids, geometry.source_mm.numpy(), geometry.pixel_centers_mm().numpy())
    return relative_l2(project(mu, geometry).numpy(), truth)


def test_the_closed_forms_themselves():
    "A ball's central ray, the mass of a voxelised phantom, and a blob against brute summation."
    solids = ellipsoid_phantom()
    grid = Grid.cube(32, 256.0)
    mass = sum(4 / 3 * np.pi * np.prod(s.semi_axes_mm) * s.mu for s in solids)
    assert voxelize(solids, grid.shape, grid.affine).sum() * 8**3 == pytest.approx(mass, rel=2e-3)
    body = solids[0]
    axis = body.rotation[:, 1]
    source = np.array(body.center_mm) - 500 * axis
    pixel = np.array(body.center_mm) + 500 * axis
    assert line_integrals([body], source[None], pixel[None, None, None])[0, 0, 0] == pytest.approx(
        2 * body.semi_axes_mm[1] * body.mu, rel=1e-12
    )
    blob = blob_phantom()[0]
    t = np.linspace(0, 1000, 20001)
    ray = source + t[:, None] * (np.array([7.0, 3.0, -5.0]) - source) / np.linalg.norm(
        np.array([7.0, 3.0, -5.0]) - source
    )
    summed = (
        blob.mu
        * np.exp(-(((ray - np.array(blob.center_mm)) @ blob.matrix.T) ** 2).sum(-1) / 2).sum()
        * (t[1] - t[0])
    )
    assert line_integrals([blob], source[None], np.array([7.0, 3.0, -5.0])[None, None, None])[
        0, 0, 0
    ] == pytest.approx(summed, rel=1e-6)
    assert np.allclose(rotation((0, 0, 1), 90) @ [1, 0, 0], [0, 1, 0])


@pytest.mark.parametrize("views", VIEWS)
def test_smooth_blobs_show_second_order(views):
    "Halving the voxels quarters the error, also where rays run obliquely through the grid."
    coarse, fine = (error(blob_phantom(), size, views) for size in (48, 96))
    assert 3.5 < coarse / fine < 4.6 and fine < 0.004


@pytest.mark.parametrize("views", VIEWS)
def test_ellipsoids_at_128(views):
    """Edges make everyone first order; the bounds are 1.05 times what Joseph's method in RTK has
    here (bench, 256² pixels).
    """
    fine = error(ellipsoid_phantom(), 128, views, detector=256)
    assert fine < 1.05 * {"frontal": 0.01192, "tilted": 0.01122, "diagonal": 0.01049}[views]
    assert error(ellipsoid_phantom(), 64, views, detector=256) / fine > 1.7


@pytest.mark.parametrize("views", VIEWS)
def test_fine_trilinear_sampling_by_scipy(views):
    """Line integrals of the trilinear volume by brute force: equal for a smooth volume, apart from
    how a ray ends at the border, which is empty here.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    geometry = bench_geometry(24, views, detector=20)
    mu = np.zeros(geometry.grid.shape)
    mu[5:-5, 5:-5, 5:-5] = np.random.default_rng(0).random((14, 14, 14))
    mu = gaussian_filter(mu, 2.0, mode="constant", truncate=2.0)
    source = geometry.source_mm.numpy()[:, None, None]
    pixels = geometry.pixel_centers_mm().numpy()
    # of the way to the detector: all of the cube, in steps of 0.2 mm
    t = np.linspace(0.5, 0.85, 3001)
    points = source[..., None, :] + t[:, None] * (pixels - source)[..., None, :]
    index = geometry.grid.mm_to_index(points)
    length = np.linalg.norm(pixels - source, axis=-1) * (t[1] - t[0])
    summed = (
        map_coordinates(mu, index[..., ::-1].reshape(-1, 3).T, order=1)
        .reshape(index.shape[:-1])
        .sum(-1)
        * length
    )
    assert relative_l2(project(torch.from_numpy(mu), geometry).numpy(), summed) < 4e-3


def test_scikit_image_radon_from_far_away():
    "From a kilometre off, the rays are parallel and a slice's projections are its Radon transform."
    from skimage.transform import radon

    size, angles = 65, [0.0, 25.0, 90.0, 140.0]
    grid = Grid(
        (3, size, size),
        np.diag([1.0, 1.0, 1.0, 1.0])
        - np.array([[0, 0, 0, 32.0], [0, 0, 0, 32.0], [0, 0, 0, 1.0], [0, 0, 0, 0]]),
    )
    image = voxelize(
        blob_phantom(),
        (1, size, size),
        np.diag([3.0, 3.0, 3.0, 1.0])
        - np.array([[0, 0, 0, 96.0], [0, 0, 0, 96.0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    )[0]
    image *= np.hypot(*np.ogrid[-32:33, -32:33]) < 31  # nothing outside the circle that is turned
    geometry = ConeBeam.orbit(
        angles,
        grid=grid,
        source_to_isocenter_mm=1e6,
        source_to_detector_mm=1.0001e6,
        detector_shape=(1, size),
        pixel_mm=1.0001,
    )
    ours = project(torch.from_numpy(np.repeat(image[None], 3, 0)).double(), geometry)[:, 0].numpy()
    assert relative_l2(ours, radon(image, angles, circle=True).T) < 0.01


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Three pairs of views of the ellipsoids at 32³: views -> (file, truth, our picture, our
    back-projection of its cotangent).
    """
    from ct_nb.physics.projector import backproject

    folder, made = tmp_path_factory.mktemp("scene"), {}
    for views in VIEWS:
        geometry = bench_geometry(32, views, detector=64)
        mu = voxelize(ellipsoid_phantom(), geometry.grid.shape, geometry.grid.affine)
        path = write_scene(folder / f"{views}.npz", mu, geometry)
        cotangent = torch.from_numpy(np.load(path)["cotangent"])
        made[views] = (
            path,
            line_integrals(
                ellipsoid_phantom(), geometry.source_mm.numpy(), geometry.pixel_centers_mm().numpy()
            ),
            project(torch.from_numpy(mu), geometry).numpy(),
            backproject(cotangent, geometry).numpy(),
        )
    return made


@pytest.mark.parametrize(
    "name", ["rtk", "nanodrr", "diffct", "mbirtorch", "diffdrr_siddon", "plastimatch_exact"]
)
def test_peers(name, scene):
    """Each installed peer sees the scene that we see: its error against the closed form is of our
    size, and RTK's pair, the same method, equals ours.
    """
    with Worker(name, PEERS_PYTHON) as worker:
        for views, (path, truth, ours, back) in scene.items():
            try:
                worker.setup(path)
            except PeerMissing as reason:
                if views == "frontal":
                    pytest.skip(str(reason))
                continue  # a geometry that this peer has no words for
            image = worker.image()
            assert relative_l2(ours, truth) < 1.08 * relative_l2(image, truth)
            assert relative_l2(image, truth) < 1.5 * relative_l2(ours, truth)
            if name == "rtk":
                assert relative_l2(image, ours) < 5e-3
                # RTK leaves out the half voxel between the outermost centres and the border
                inner = (slice(2, -2),) * 3
                assert relative_l2(worker.image("adjoint")[inner], back[inner]) < 3e-2


def test_flashdrr_sees_the_scene_without_its_rim(scene):
    """Its grid ends at the centres of the outermost voxels, so the picture of n voxels is too large
    by n/(n − 1): a larger error than ours, and no flipped axis or wrong unit.
    """
    with Worker("flashdrr", PEERS_PYTHON) as worker:
        for path, truth, ours, _ in scene.values():
            try:
                worker.setup(path)
            except PeerMissing as reason:
                pytest.skip(str(reason))
            image = worker.image()
            assert relative_l2(ours, truth) < relative_l2(image, truth) < 0.15
            assert abs(image.sum() / truth.sum() - 1) < 0.1


def test_measuring_without_peers(tmp_path):
    """The bench's measurement gives all operations of ours, and says of a peer that is not there
    how to install it.
    """
    empty = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(empty)], check=True)
    rows, reasons = measure(
        8,
        ["ct_nb", "nanodrr"],
        str(empty / "bin" / "python"),
        detector=8,
        rounds=1,
        say=lambda _: None,
    )
    assert {r["operation"] for r in rows} == {
        "forward",
        "adjoint",
        "forward_volume",
        "forward_pose",
        "forward_volume_pose",
        "error",
    }
    assert all(
        r["milliseconds"] > 0 and r["peak_mb"] >= 0 for r in rows if r["operation"] != "error"
    )
    assert set(reasons) == {"nanodrr"} and "not installed" in reasons["nanodrr"]


def test_a_worker_that_fails_says_why(tmp_path):
    with Worker("ct_nb") as worker, pytest.raises(PeerError, match="FileNotFoundError"):
        worker.setup(tmp_path / "none.npz")


@FULL
def test_the_bench_runs_without_peers(tmp_path):
    """The recipe by papermill, as small as it goes; it must write its table and name what is
    missing.
    """
    out = tmp_path / "bench"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "nbs" / "bench_projector.ipynb"),
        str(tmp_path / "bench.ipynb"),
        "--no-progress-bar",
        "-p",
        "sizes",
        "8",
        "-p",
        "detector",
        "16",
        "-p",
        "rounds",
        "1",
        "-p",
        "peers",
        "rtk",
        "-p",
        "out",
        str(out),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p.name for p in out.iterdir()} == {
        "results.json",
        "results.csv",
        "table.md",
        "bench.png",
    }
    assert (
        "**ct_nb**" in (out / "table.md").read_text()
        and "roofline" not in (out / "table.md").read_text()
    )
