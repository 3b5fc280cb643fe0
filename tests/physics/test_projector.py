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


def gradients(x, geometry, cotangent, backend):
    "Of ⟨cotangent, project(x)⟩ to the volume and to the tensors of the geometry."
    fields = ("source_mm", "detector_center_mm", "column_step_mm", "row_step_mm")
    pose = {f: getattr(geometry, f).clone().requires_grad_() for f in fields}
    x = x.clone().requires_grad_()
    image = project(x, replace(geometry, **pose), backend)
    return torch.autograd.grad(image, (x, *pose.values()), cotangent)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rolled", [0.0, 90.0])  # 90: lines along another axis than those of view 0
@pytest.mark.parametrize("name", GEOMETRIES)
def test_both_gradients_of_the_kernels_are_those_of_the_reference(name, rolled, dtype, limit):
    geometry = views(
        name,
        grid((33, 21, 30), (3.0, 4.0, 2.5)),
        detector_shape=(40, 37),
        pixel_mm=4.0,
        **({"roll_deg": [0.0, rolled]} if rolled else {}),
    )
    # rays through voxel centres, where interpolation has a kink, are avoided
    geometry = replace(
        geometry,
        source_mm=geometry.source_mm + random(2, 3, seed=7),
        detector_center_mm=geometry.detector_center_mm + random(2, 3, seed=8),
    )
    x = random(2, 33, 21, 30, dtype=dtype)
    y = random(2, 2, 40, 37, dtype=dtype, seed=1)
    ours = gradients(x, geometry, y, "numba")
    for gradient, reference in zip(ours, gradients(x, geometry, y, "torch")):
        assert (gradient - reference).norm() <= limit * reference.norm()


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
            results.append(
                (
                    project(x, geometry),
                    backproject(y, geometry),
                    *gradients(x, geometry, y, "numba"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for repeated in results[1:]:
        assert all(map(torch.equal, repeated, results[0]))


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


# ---------------------------------------------------------------- a geometry changed in place
def _in_inference_mode(beam):
    with torch.inference_mode():
        beam.source_mm.add_(7.0)


def _through_data(beam):
    beam.detector_center_mm.data.add_(7.0)


def _through_numpy(beam):
    beam.row_step_mm.detach().numpy()[:] *= 1.3


def _in_place(beam):
    beam.column_step_mm.mul_(1.3)


def _grid(beam):
    beam.grid.affine[:3, 3] += 7.0


@pytest.mark.parametrize(
    "change", [_in_inference_mode, _through_data, _through_numpy, _in_place, _grid]
)
def test_a_geometry_changed_in_place_gives_new_xrays(change):
    mu, beam = random(7, 6, 8), views(box=grid())
    if change is _grid:
        beam.grid.affine.setflags(write=True)
    if change is _in_inference_mode:
        with torch.inference_mode():
            beam = beam._map(torch.clone)
    before = project(mu, beam)
    back = backproject(random(2, 9, 10), beam)
    change(beam)
    fresh = replace(beam)  # never seen before
    assert not torch.allclose(project(mu, beam), before)
    assert torch.equal(project(mu, beam), project(mu, fresh))
    changed = backproject(random(2, 9, 10), beam)
    assert not torch.allclose(changed, back)
    assert torch.equal(changed, backproject(random(2, 9, 10), fresh))


def test_column_numbers_are_computed_once_for_one_geometry(monkeypatch):
    from ct_nb.physics import projector

    calls = []
    real = projector.column_parameters
    monkeypatch.setattr(projector, "column_parameters", lambda g: (calls.append(g), real(g))[1])
    mu, beam = random(7, 6, 8), views()
    for _ in range(3):
        project(mu, beam)
    # a transform of the volume neither spoils the cache nor misses it
    torch.func.vmap(lambda m: project(m, beam))(mu[None])
    torch.func.grad(lambda m: project(m, beam).sum())(mu)
    project(mu, beam)
    assert len(calls) == 1


# ---------------------------------------------------------------- torch.func
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_the_volume(backend):
    beam, mu = views("tilted and rolled"), random(3, 7, 6, 8)

    def a(m):
        return project(m, beam, backend)

    def back(y):
        return backproject(y, beam, backend)

    images = a(mu)
    assert torch.allclose(torch.func.vmap(a)(mu), images)
    assert torch.allclose(torch.func.vmap(a, in_dims=1)(mu.movedim(0, 1)), images)
    assert torch.allclose(torch.func.vmap(back)(images), back(images))
    assert torch.allclose(torch.func.jvp(a, (mu,), (mu.flip(0),))[1], images.flip(0))
    assert torch.allclose(
        torch.func.jvp(back, (images,), (images.flip(0),))[1], back(images).flip(0)
    )
    matrix = torch.func.jacrev(a)(mu[0])
    assert torch.allclose(matrix.flatten(-3) @ mu[1].flatten(), images[1])
    assert torch.allclose(torch.func.jacfwd(a)(mu[0]), matrix)
    each = torch.func.vmap(torch.func.grad(lambda m: a(m).square().sum()))(mu)
    assert torch.allclose(each, 2 * back(images))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(mu, mu.flip(0))
        tangent = torch.autograd.forward_ad.unpack_dual(a(dual)).tangent
    assert torch.allclose(tangent, images.flip(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_the_geometry(backend):
    mu, beam = random(7, 6, 8), views("tilted and rolled")
    still = torch.zeros(3, dtype=torch.float64)

    def moved(shift):
        return project(mu, replace(beam, source_mm=beam.source_mm + shift), backend)

    def loss(shift):
        return moved(shift).square().sum()

    wanted = torch.autograd.functional.jacobian(moved, still)
    assert torch.allclose(torch.func.jacrev(moved)(still), wanted)
    assert torch.allclose(torch.func.jacfwd(moved)(still), wanted)
    along = torch.func.jvp(moved, (still,), (still + 1,))[1]
    assert torch.allclose(along, wanted.sum(-1))
    hessian = torch.func.hessian(loss)(still)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(loss, still))
    with refused("source_mm"):
        torch.func.vmap(moved)(still.expand(2, 3))


def test_vmap_of_a_batch_with_its_own_geometries():
    beam = views()._map(lambda t: torch.stack([t, t + 1, t + 2]))
    mu = random(2, 3, 7, 6, 8)
    found = torch.func.vmap(lambda m: project(m, beam))(mu)
    assert torch.allclose(found, torch.stack([project(m, beam) for m in mu]))


# ---------------------------------------------------------------- ends inside the grid
BLOCK = Grid.cube(21, 210.0)


def pixels(beam):
    "Centres of the pixels of the first view, (R, C, 3) mm."
    rows, columns = beam.detector_shape
    r, c = torch.meshgrid(
        torch.arange(rows) + 0.5 - rows / 2,
        torch.arange(columns) + 0.5 - columns / 2,
        indexing="ij",
    )
    steps = (c[..., None] * beam.column_step_mm[0], r[..., None] * beam.row_step_mm[0])
    return beam.detector_center_mm[0] + sum(steps)


def beam_along_y(source, detector):
    vectors = [torch.tensor([v], dtype=torch.float64) for v in ((4.0, 0, 0), (0, 0, 4.0))]
    return ConeBeam(source, detector, *vectors, (5, 6), BLOCK)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [-104.9, -97.0, -3.2, 0.0, 4.9, 5.1, 95.0, 104.0, 105.5])
def test_a_source_inside_a_block(backend, depth):
    "μ times the way to the surface; a millimetre along the ray takes μ away."
    source = torch.tensor([[1.3, depth, 2.2]], dtype=torch.float64, requires_grad=True)
    beam = beam_along_y(source, torch.tensor([[0.0, 400, 0]], dtype=torch.float64))
    image = project(torch.full(BLOCK.shape, 0.02, dtype=torch.float64), beam, backend)[0]
    ray = pixels(beam) - source.detach()
    length = ray.norm(dim=-1)
    share = max(105 - depth, 0) / (400 - depth)
    assert torch.allclose(image, 0.02 * length * share, atol=1e-9)
    slope = torch.autograd.grad(image[2, 3], source)[0][0] @ (ray / length[..., None])[2, 3]
    assert float(slope) == pytest.approx(-0.02 if depth < 105 else 0, abs=1e-9)


@pytest.mark.parametrize("depth", [-50.3, -5.0, 0.0, 33.3, 104.0])
def test_a_detector_inside_a_block(depth):
    detector = torch.tensor([[0.0, depth, 0]], dtype=torch.float64, requires_grad=True)
    source = torch.tensor([[1.3, -400.0, 2.2]], dtype=torch.float64)
    beam = beam_along_y(source, detector)
    image = project(torch.full(BLOCK.shape, 0.02, dtype=torch.float64), beam)[0]
    length = (pixels(beam).detach() - source[0]).norm(dim=-1)
    assert torch.allclose(image, 0.02 * length * (depth + 105) / (depth + 400), atol=1e-9)
    slope = torch.autograd.grad(image[2, 3], detector)[0][0, 1]
    ray = (pixels(beam).detach() - source[0])[2, 3]
    # towards the detector a millimetre of y is 1/cos of a millimetre of ray, seen from the source
    share, whole = (depth + 105) / (depth + 400), ray.norm()
    change = 0.02 * (295 / (depth + 400) ** 2 * whole + share * ray[1] / whole)
    assert float(slope) == pytest.approx(float(change), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ends_inside_stay_transposes_with_gradients(backend):
    "Of an oblique view with source and detector in the grid, also in one slice."
    for reach in (150.0, 4.0):
        beam = ConeBeam.orbit(
            [20.0, 75.0],
            [10.0, -15.0],
            grid=grid((7, 6, 8), (30.0, 25.0, 28.0)),
            source_to_isocenter_mm=30.0,
            source_to_detector_mm=reach,
            detector_shape=(4, 5),
            pixel_mm=3.0,
        )
        mu, image = random(7, 6, 8), random(2, 4, 5, seed=1)
        left = (project(mu, beam, backend) * image).sum()
        right = (mu * backproject(image, beam, backend)).sum()
        assert left > 0 and torch.allclose(left, right)
        shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def moved(shift, mu, beam=beam):
            return project(mu, replace(beam, source_mm=beam.source_mm + shift), backend)

        assert torch.autograd.gradcheck(moved, (shift, mu.requires_grad_()), fast_mode=True)
