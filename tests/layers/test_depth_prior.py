"""The depth prior: rays, depth, number of views, and patches as parts of the volume."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from layers_inputs import beams, random, seeded

import ct_nb.layers.depth_prior as depth_prior_module
from ct_nb.layers.depth_prior import DepthPrior, project_patch_voxels
from ct_nb.layers.lifting import project_voxels
from ct_nb.physics.volume import Grid


def test_prior_reads_the_true_rays():
    "A bright pixel changes the prior only where its ray passes; parallel rays would end elsewhere."
    prior = seeded(DepthPrior, 16, 4)
    geometry = beams(1, 25.0, source_to_isocenter_mm=500.0, source_to_detector_mm=900.0)
    for block in prior.views.blocks:
        torch.nn.init.zeros_(block.second.weight)
    # features of the pixel's 3×3 neighbourhood alone
    for up in prior.views.up:
        torch.nn.init.zeros_(up.weight)
    dark = torch.full((1, 1, 32, 32), 2.0)
    bright = dark.clone()
    bright[..., 9, 22] = 6.0
    with torch.no_grad():
        changed = (prior(bright, geometry) != prior(dark, geometry)).any(1).flatten()
    uv, _ = geometry.project_points(geometry.grid.centers_mm().reshape(1, -1, 3))
    near = ((uv[0, 0] - torch.tensor([22.5, 9.5])).abs() < 2).all(-1)  # 3×3 pixels, read bilinearly
    assert changed.any() and torch.equal(changed, near)


def test_prior_knows_the_depth():
    prior, geometry = seeded(DepthPrior, 16, 8), beams(1, 0.0)

    def along():
        return prior(torch.full((1, 1, 32, 32), 3.0), geometry)[0, :, 8, :, 8].detach()

    assert (along().amax(1) - along().amin(1)).median() > 0.2
    with torch.no_grad():
        prior.first.weight[:, 8:] = 0  # without the depth
    assert (along().amax(1) - along().amin(1)).max() < 0.02


def test_prior_of_any_views_and_any_batch():
    prior = seeded(DepthPrior, 16, 4)
    geometry = beams(2, 0.0, 90.0, 40.0)
    xrays = 2 + random(0, 2, 3, 32, 32)
    order = [2, 0, 1]
    with torch.no_grad():
        full = prior(xrays, geometry)
        assert torch.allclose(prior(xrays[:, order], geometry.select(order)), full, atol=1e-5)
        assert torch.allclose(prior(xrays[1:], geometry[1:2]), full[1:], atol=1e-5)
        # one geometry for all scans
        assert torch.allclose(prior(xrays, geometry[0]), full, atol=1e-5)
        for views in ([1], [0, 1]):
            assert not torch.allclose(
                prior(xrays[:, views], geometry.select(views)), full, atol=1e-2
            )


def test_a_view_that_does_not_see_a_voxel_does_not_count():
    prior = seeded(DepthPrior, 16, 4)
    xrays = 2 + random(0, 1, 2, 32, 32)
    narrow = beams(1, 0.0, 90.0)
    narrow = replace(
        narrow,
        column_step_mm=narrow.column_step_mm * torch.tensor([[[1.0], [0.2]]]),
        row_step_mm=narrow.row_step_mm * torch.tensor([[[1.0], [0.2]]]),
    )
    outside = ~project_voxels(narrow, 16).seen[0, 1].view(16, 16, 16)
    with torch.no_grad():
        both = prior(xrays, narrow)[0]
        first = prior(xrays[:, :1], narrow.select([0]))[0]
        second = prior(xrays[:, 1:], narrow.select([1]))[0]
    # no view covers it: the bias alone
    assert torch.equal(second[:, outside], prior.last.bias[:, None].expand(-1, int(outside.sum())))
    assert (
        0 < outside.float().mean() < 1
        and torch.allclose(both[:, outside], first[:, outside], atol=1e-5)
        and not torch.allclose(both[:, ~outside], first[:, ~outside], atol=1e-2)
    )


def test_prior_of_a_patch_is_cut_from_the_full_volume():
    geometry = beams(1, 10.0, 75.0)
    full = project_voxels(geometry, 16)
    part = project_patch_voxels(geometry, 16, (4, 8, 0, 8))

    def cut(t):
        return t.unflatten(2, (16,) * 3)[:, :, 4:12, 8:16, 0:8].flatten(2, 4)

    assert all(torch.allclose(cut(a).float(), b.float(), atol=1e-5) for a, b in zip(full, part))
    naive = project_voxels(geometry.on(Grid((8, 8, 8), patch_affine(geometry.grid, (4, 8, 0)))), 8)
    # the depth of the patch's own middle would be wrong
    assert not torch.allclose(naive.depth, cut(full.depth), atol=0.1)
    prior = seeded(DepthPrior, 16, 4)
    with torch.no_grad():
        assert torch.allclose(
            prior(2 + random(0, 1, 2, 32, 32), geometry, (4, 8, 0, 8)),
            prior(2 + random(0, 1, 2, 32, 32), geometry)[..., 4:12, 8:16, 0:8],
            atol=1e-4,
        )


def test_voxels_are_lifted_in_chunks(monkeypatch):
    "As many at a time as memory allows: the same values and gradients."
    geometry = beams(1, 10.0, 75.0)
    xrays = 2 + random(0, 1, 2, 32, 32)
    outcomes = []
    for chunk in (2**20, 1000):
        monkeypatch.setattr(depth_prior_module, "DEPTH_PRIOR_CHUNK", chunk)
        prior = seeded(DepthPrior, 16, 4, recompute=True)
        out = prior(xrays, geometry)
        (out * random(1, *out.shape)).sum().backward()
        outcomes.append([out, *(p.grad for p in prior.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*outcomes))


def patch_affine(grid, corner):
    affine = grid.affine.copy()
    affine[:3, 3] = grid.index_to_mm(corner[::-1])
    return affine


def test_a_fine_detector_is_binned_to_the_grid():
    prior = seeded(DepthPrior, 16, 4)
    fine = 2 + random(0, 1, 1, 128, 128)
    with torch.no_grad():
        a = prior(fine, beams(1, 0.0, detector=128))
        b = prior(F.avg_pool2d(fine, 4), beams(1, 0.0))
    assert torch.allclose(a, b, atol=1e-4)
