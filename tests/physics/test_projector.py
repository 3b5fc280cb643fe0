"The projector pair: transpose, gradients, agreement of the backends, and degenerate rays."

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.projector import backproject, project
from ct_nb.physics.volume import Grid

BACKENDS = ("torch", "numba")


def grid(shape=(7, 6, 8), spacing=(9.0, 11.0, 8.0), turn=0.0):
    affine = np.diag([*spacing, 1.0])
    c, s = np.cos(turn), np.sin(turn)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return Grid(shape, affine)


GEOMETRIES = {
    "biplanar": dict(azimuth_deg=[0.0, 90.0]),
    "diagonal": dict(azimuth_deg=[45.0, 135.0]),
    "tilted and rolled": dict(
        azimuth_deg=[20.0, 110.0], elevation_deg=[15.0, -20.0], roll_deg=[10.0, -5.0]
    ),
    "from above": dict(azimuth_deg=[0.0, 30.0], elevation_deg=[89.0, 75.0]),
}


def views(name="biplanar", box=None, **changes):
    settings = (
        dict(
            source_to_isocenter_mm=300.0,
            source_to_detector_mm=450.0,
            detector_shape=(9, 10),
            pixel_mm=14.0,
        )
        | GEOMETRIES[name]
        | changes
    )
    return ConeBeam.orbit(
        settings.pop("azimuth_deg"),
        settings.pop("elevation_deg", 0.0),
        settings.pop("roll_deg", 0.0),
        grid=box or grid(),
        **settings,
    )


def random(*shape, dtype=torch.float64, seed=0):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# each backend, dtype and geometry, in pairs; the kernels in all of them
PAIRS = [
    *(("numba", name, dtype) for name in GEOMETRIES for dtype in (torch.float32, torch.float64)),
    ("torch", "tilted and rolled", torch.float32),
    ("torch", "diagonal", torch.float64),
]


@pytest.mark.parametrize("backend, name, dtype", PAIRS)
def test_backproject_is_the_transpose(backend, name, dtype):
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    geometry = views(
        name, grid((33, 21, 30), (3.0, 4.0, 2.5), turn=0.2), detector_shape=(40, 37), pixel_mm=4.0
    )
    x = random(33, 21, 30, dtype=dtype)
    y = random(2, 40, 37, dtype=dtype, seed=1)
    left = (project(x, geometry, backend).double() * y.double()).sum()
    right = (x.double() * backproject(y, geometry, backend).double()).sum()
    assert left > 0 and abs(left - right) <= limit * abs(left)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_kernels_are_the_reference(name, dtype, limit):
    geometry = views(
        name, grid((33, 21, 30), (3.0, 4.0, 2.5), turn=0.2), detector_shape=(40, 37), pixel_mm=4.0
    )
    x = random(33, 21, 30, dtype=dtype)
    y = random(2, 40, 37, dtype=dtype, seed=1)
    for function, argument in ((project, x), (backproject, y)):
        ours = function(argument, geometry, "numba")
        reference = function(argument, geometry, "torch")
        assert (ours - reference).norm() <= limit * reference.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["biplanar", "tilted and rolled"])
def test_gradcheck_to_volume_and_pose(backend, name):
    geometry = views(name, detector_shape=(4, 5), pixel_mm=26.0)
    fields = ("source_mm", "detector_center_mm", "column_step_mm", "row_step_mm")
    tensors = [
        (getattr(geometry, f) + 1e-3 * random(2, 3, seed=7 + i)).requires_grad_()
        for i, f in enumerate(fields)
    ]
    mu = random(7, 6, 8).requires_grad_()

    def forward(mu, *pose):
        return project(mu, replace(geometry, **dict(zip(fields, pose))), backend)

    assert torch.autograd.gradcheck(forward, (mu, *tensors), eps=1e-6, atol=1e-5, rtol=1e-3)
    image = random(2, 4, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: backproject(y, geometry, backend), (image,), eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_views_and_a_batch_in_one_call(backend):
    first, second = views(), views("tilted and rolled")
    x = random(2, 7, 6, 8)
    together = project(x, ConeBeam.stack([first, second]), backend)
    for b, geometry in enumerate((first, second)):
        assert torch.allclose(together[b], project(x[b], geometry, backend), rtol=1e-12)
        for v in range(2):
            assert torch.allclose(
                together[b, v], project(x[b], geometry.select([v]), backend)[0], rtol=1e-12
            )
    assert torch.allclose(project(x, first, backend)[1], project(x[1], first, backend), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_rays_are_finite(backend):
    """Misses, grazing rays, rays in a plane of the grid and along an edge, a source inside, a
    detector in front of the volume.
    """
    box = grid((8, 8, 8), (10.0, 10.0, 10.0))
    hard = {
        "misses": translate(views(box=box), [2000.0, 0.0, 0.0]),
        "grazes": translate(views(box=box), [40.0, 40.0, 40.0]),
        "in a plane": translate(
            views(box=box, detector_shape=(9, 9), azimuth_deg=[0.0]), [5.0, 0.0, 5.0]
        ),
        "source inside": views(box=box, source_to_isocenter_mm=10.0, source_to_detector_mm=200.0),
        "detector in front": views(
            box=box, source_to_isocenter_mm=300.0, source_to_detector_mm=120.0
        ),
    }
    for name, geometry in hard.items():
        mu = random(8, 8, 8).requires_grad_()
        geometry = geometry._map(lambda t: t.clone().requires_grad_())
        image = project(mu, geometry, backend)
        image.square().sum().backward()
        for tensor in (
            image,
            mu.grad,
            geometry.source_mm.grad,
            geometry.detector_center_mm.grad,
            geometry.row_step_mm.grad,
        ):
            assert torch.isfinite(tensor).all(), name
        if name in ("misses", "detector in front"):
            assert not image.any(), name


def test_a_box_gives_length_times_attenuation():
    box = grid((16, 16, 16), (10.0, 10.0, 10.0))
    image = project(
        torch.full((16, 16, 16), 0.02, dtype=torch.float64),
        views(box=box, detector_shape=(1, 1), pixel_mm=1.0, azimuth_deg=[0.0]),
    )
    assert abs(image.item() - 0.02 * 160) < 1e-9  # the central ray crosses 160 mm


def test_repeats_are_equal_to_the_bit_and_do_not_depend_on_threads():
    geometry = views("tilted and rolled", grid((33, 21, 30), (3.0, 4.0, 2.5)))
    x = random(33, 21, 30, dtype=torch.float32)
    y = random(2, 9, 10, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append((project(x, geometry), backproject(y, geometry)))
    finally:
        torch.set_num_threads(before)
    for a, b in results[1:]:
        assert torch.equal(a, results[0][0]) and torch.equal(b, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_came(dtype):
    x = random(7, 6, 8).to(dtype)
    assert project(x, views()).dtype == dtype
    assert torch.allclose(project(x, views()).float(), project(x.float(), views()), rtol=1e-2)


def test_a_volume_that_is_not_contiguous():
    x = random(8, 6, 7).permute(2, 1, 0)
    assert torch.equal(project(x, views()), project(x.contiguous(), views()))


def test_a_forked_worker_can_project():
    "Data loaders fork after the threads of the pool have started."
    from torch.utils.data import DataLoader

    class Projections(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return project(random(7, 6, 8, seed=i), views())

    here = [Projections()[i] for i in range(2)]
    there = list(DataLoader(Projections(), batch_size=None, num_workers=2))
    for a, b in zip(here, there):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda: project(torch.zeros(7, 6, 9), views()), "mu"),
        (lambda: backproject(torch.zeros(3, 9, 10), views()), "image"),
        (lambda: project(torch.zeros(3, 7, 6, 8), ConeBeam.stack([views()] * 2)), "mu"),
        (lambda: project(torch.zeros(7, 6, 8), views(), "cuda"), "backend"),
    ],
)
def test_wrong_shapes_name_the_argument(call, argument):
    with refused(argument):
        call()


@pytest.mark.parametrize("mu", [torch.zeros(7, 6, 8, dtype=torch.int16), np.zeros((7, 6, 8))])
def test_wrong_types(mu):
    with pytest.raises(TypeError):
        project(mu, views())
