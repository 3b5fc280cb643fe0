"Digitally reconstructed radiographs beyond nbs/physics/08_drr.ipynb."

import pytest
import torch
from refusals import refused

from ct_nb.physics.drr import render_drr
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, hu_to_mu

VIEWS = ConeBeam.orbit([20.0, 100.0], 5.0, detector_shape=(9, 8), pixel_mm=40.0)


def test_the_projection_of_the_attenuation():
    hu = 500 * torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = project(hu_to_mu(hu, 80.0), VIEWS.on(Grid.cube(12, 320.0)))
    assert torch.equal(render_drr(hu, VIEWS, 80.0), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.float64])
def test_any_dtype_gives_float32(dtype):
    hu = torch.full((8, 8, 8), 100).to(dtype)
    xray = render_drr(hu, VIEWS)
    assert xray.dtype == torch.float32 and torch.allclose(xray, render_drr(hu.float(), VIEWS))


def test_gradients_to_hu_and_pose():
    hu = torch.zeros(8, 8, 8, requires_grad=True)
    source = VIEWS.source_mm.clone().requires_grad_()
    views = ConeBeam(
        source,
        VIEWS.detector_center_mm,
        VIEWS.column_step_mm,
        VIEWS.row_step_mm,
        VIEWS.detector_shape,
        VIEWS.grid,
    )
    render_drr(hu, views).sum().backward()
    assert hu.grad.min() >= 0 and hu.grad.any()
    assert torch.isfinite(source.grad).all() and source.grad.any()


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8, 8)])
def test_a_volume_that_has_not_three_axes(shape):
    with refused("shape"):
        render_drr(torch.zeros(shape), VIEWS)


def test_an_energy_outside_the_table():
    with refused("energy_kev"):
        render_drr(torch.zeros(8, 8, 8), VIEWS, 5.0)
