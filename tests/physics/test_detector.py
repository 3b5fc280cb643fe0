"X-rays against their geometry and binning, beyond nbs/physics/01d_detector.ipynb."

import pytest
import torch
from refusals import refused

from ct_nb.physics.detector import bin_pixels, batched_geometry, require_matching_geometry
from ct_nb.physics.geometry import ConeBeam

PAIR = ConeBeam.biplanar(detector_shape=(12, 18), pixel_mm=20.0)


@pytest.mark.parametrize("geometry", [PAIR, ConeBeam.stack([PAIR] * 3)])
def test_what_fits(geometry):
    xrays = torch.zeros(3, 2, 12, 18)
    require_matching_geometry(xrays, geometry)
    batched = batched_geometry(xrays, geometry.to(torch.float64))
    assert batched.batch_shape == (3,) and batched.dtype == torch.float32
    assert torch.allclose(batched[2].source_mm, PAIR.source_mm.float())


@pytest.mark.parametrize(
    "shape, geometry, argument",
    [
        ((3, 2, 12, 17), PAIR, "xrays"),
        ((3, 2, 18, 12), PAIR, "xrays"),
        ((3, 1, 12, 18), PAIR, "xrays"),
        ((2, 12, 18), PAIR, "xrays"),
        ((3, 2, 12, 18), ConeBeam.stack([PAIR] * 2), "geometry"),
        ((3, 2, 12, 18), None, "geometry"),
        ((3, 2, 12, 18), PAIR.matrices(), "geometry"),
    ],
)
def test_what_does_not_fit(shape, geometry, argument):
    for function in (require_matching_geometry, batched_geometry):
        with refused(argument):
            function(torch.zeros(shape), geometry)


# 18/4 rounds up to blocks of 5, but 5 divides neither side: 6 does
@pytest.mark.parametrize("most, shape", [(18, (12, 18)), (17, (6, 9)), (6, (4, 6)), (4, (2, 3))])
def test_binning_divides_both_sides_and_keeps_the_mean(most, shape):
    geometry, xrays = PAIR, torch.rand(2, 12, 18)
    means, coarse = bin_pixels(xrays, geometry, most)
    assert means.shape == (2, *shape) and coarse.detector_shape == shape
    assert torch.allclose(means.mean(), xrays.mean())
    # the detector is the same
    center = geometry.pixel_centers_mm((1, 1))
    assert torch.allclose(coarse.pixel_centers_mm((1, 1)), center)
    extent = coarse.column_step_mm * shape[1]
    assert torch.allclose(extent, geometry.column_step_mm * geometry.detector_shape[1])


def test_binning_of_a_batch_and_its_gradient():
    xrays = torch.rand(3, 2, 12, 18, dtype=torch.float64, requires_grad=True)
    means, coarse = bin_pixels(xrays, ConeBeam.stack([PAIR] * 3), 6)
    assert means.shape == (3, 2, 4, 6) and coarse.batch_shape == (3,)
    blocks = xrays.unflatten(3, (6, 3)).unflatten(2, (4, 3)).mean((3, 5))
    assert torch.allclose(means, blocks)
    (gradient,) = torch.autograd.grad(means.sum(), xrays)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 9))
