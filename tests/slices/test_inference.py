"""Whole scans: tiles without seams, noise of slices, bounded memory, and what is refused."""

import weakref

import numpy as np
import pytest
import torch
from refusals import refused
from slice_scans import TRAINING_RANGE, thick_scan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ct_nb.physics.volume import Volume
from ct_nb.slices.consistency import interpolate_stack
from ct_nb.slices.inference import (
    DiffusionInterpolator,
    RegressorInterpolator,
    check_scan,
    check_training_range,
    interpolate_tiles,
    slice_tiles,
)
from ct_nb.slices.models import SliceDiffusion
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    slice_profile_matrix,
    thin_axis,
)


@pytest.mark.parametrize("count,core,halo", [(1, 4, 2), (7, 3, 2), (23, 5, 1), (24, 40, 3)])
@pytest.mark.parametrize("convention", ["slabs", "centres"])
def test_tiles_cover_every_thin_slice_with_weights_that_sum_to_one(count, core, halo, convention):
    thick = SliceAxis(-3.0, 5.0, count)
    thin = thin_axis(thick, 1.3, convention)
    tiles = slice_tiles(thick, thin, core, halo)
    total = torch.zeros(thin.count)
    for tile in tiles:
        weights = tile.weights
        if weights is None:  # a single tile
            weights = torch.ones(tile.write.stop - tile.write.start)
        assert len(weights) == tile.write.stop - tile.write.start and (weights > 0).all()
        assert tile.read_length <= core + 2 * halo + 1
        total[tile.write] += weights
    assert torch.allclose(total, torch.ones(thin.count), atol=1e-6)
    assert (tiles[0].read.start, tiles[-1].read.stop) == (0, count)


def test_a_tile_needs_a_core_and_a_halo():
    thick = SliceAxis(0.0, 5.0, 9)
    for core, halo in ((0, 2), (2, 0)):
        with refused("core, halo"):
            slice_tiles(thick, thin_axis(thick, 1.0), core, halo)


def test_tiles_of_a_slope_have_no_seams():
    thick_axis = SliceAxis(0.0, 5.0, 20)
    thin = thin_axis(thick_axis, 1.0, "centres")
    slope = torch.arange(20.0)[:, None, None].expand(20, 3, 4) * 50
    whole = interpolate_stack(slope, thick_axis, thin)

    def linear(thick, thick_axis, thin_axis, tile):
        return interpolate_stack(thick, thick_axis, thin_axis)

    def exact(thick, thick_axis, thin_axis, tile):
        return whole[tile.write].clone()

    # what does not depend on the tile is reproduced
    assert torch.allclose(interpolate_tiles(exact, slope, thick_axis, thin, 4, 2), whole, atol=1e-3)
    # the ends of a tile, where the edge slice is held, have a small weight
    blended = interpolate_tiles(linear, slope, thick_axis, thin, 4, 2)
    assert (blended - whole).abs().max() < 6
    # without blending the held end would show
    first = slice_tiles(thick_axis, thin, 4, 2)[0]
    part = interpolate_stack(
        slope[first.read],
        thick_axis.part(first.read.start, first.read.stop),
        thin.part(first.write.start, first.write.stop),
    )
    assert (part[-3:] - whole[first.write][-3:]).abs().max() > 15


def test_the_regressor_in_tiles_is_nearly_the_regressor(regressor):
    scan = thick_scan()
    whole = RegressorInterpolator(regressor, consistent=False).interpolate(*scan)
    with torch.no_grad():
        assert torch.allclose(whole, regressor(scan[0][None], *scan[1:])[0], atol=1e-2)
    tiled = RegressorInterpolator(regressor, consistent=False, memory_gib=0.006, halo=4)
    core, _ = tiled.plan(40, 40, *scan[1:3])
    assert len(slice_tiles(scan[1], scan[2], core, 4)) > 1
    change = (whole - interpolate_stack(*scan[:3])).abs().mean()
    assert (tiled.interpolate(*scan) - whole).abs().mean() < 0.1 * change


@pytest.mark.parametrize("kind", ["regressor", "diffusion"])
@pytest.mark.parametrize("consistent", [True, False])
def test_consistency_holds_across_tiles(kind, consistent, regressor, diffusion):
    scan = thick_scan()
    matrix = torch.from_numpy(slice_profile_matrix(scan[2], scan[1], scan[3]))
    if kind == "regressor":
        model = RegressorInterpolator(regressor, consistent=consistent, memory_gib=0.002)
    else:
        model = DiffusionInterpolator(diffusion, steps=2, consistent=consistent, memory_gib=0.004)
    misfit = float((average_slices(model.interpolate(*scan), matrix) - scan[0]).abs().max())
    assert misfit < 0.05 if consistent else misfit > 1


def test_noise_belongs_to_slices(diffusion, monkeypatch):
    scan = thick_scan()
    noise_at = {}
    sample = SliceDiffusion.sample

    def recorded(self, thick, thick_axis, thin_axis, profile, steps, consistent, noise):
        for z_mm, slice_noise in zip(np.round(thin_axis.positions_mm, 3), noise[0].unbind(1)):
            noise_at.setdefault(z_mm, []).append(slice_noise)
        return sample(
            self, thick, thick_axis, thin_axis, profile, steps, consistent=consistent, noise=noise
        )

    monkeypatch.setattr(SliceDiffusion, "sample", recorded)
    DiffusionInterpolator(diffusion, steps=1, memory_gib=0.004).interpolate(*scan)
    shared = [draws for draws in noise_at.values() if len(draws) > 1]
    assert shared
    assert all(torch.equal(draws[0], other) for draws in shared for other in draws[1:])
    assert not torch.equal(noise_at[0.0][0], noise_at[1.0][0])


def test_samples_repeat_and_differ_and_the_mean_is_their_mean(diffusion):
    scan = thick_scan(5, 24)

    def interpolate(**settings):
        return DiffusionInterpolator(diffusion, steps=2, **settings).interpolate(*scan)

    assert torch.equal(interpolate(), interpolate())
    assert not torch.equal(interpolate(), interpolate(seed=1))
    free = DiffusionInterpolator(diffusion, steps=2, consistent=False, count=3)
    samples = torch.stack([free.sample(n, *scan) for n in range(3)])
    assert torch.allclose(free.interpolate(*scan), samples.mean(0), atol=1e-3)
    assert samples.std(0).mean() > 0.1
    matrix = torch.from_numpy(slice_profile_matrix(scan[2], scan[1], scan[3]))
    assert (average_slices(interpolate(count=3), matrix) - scan[0]).abs().max() < 0.05
    with refused("count"):
        DiffusionInterpolator(diffusion, count=0)


def test_a_shared_cache_samples_once(diffusion, monkeypatch):
    cache = {}
    scan = thick_scan(5, 24)
    numbers = []
    sample = DiffusionInterpolator.sample
    uncached = DiffusionInterpolator(diffusion, steps=1, count=3).interpolate(*scan)

    def recorded(self, number, *scan):
        numbers.append(number)
        return sample(self, number, *scan)

    monkeypatch.setattr(DiffusionInterpolator, "sample", recorded)
    one, free, mean = (
        DiffusionInterpolator(diffusion, steps=1, cache=cache, **settings)
        for settings in ({}, {"consistent": False}, {"count": 3})
    )
    results = [model.interpolate(*scan) for model in (one, free, mean)]
    assert numbers == [0, 1, 2]
    assert torch.equal(results[2], uncached)
    # earlier results are not changed by later ones
    assert torch.equal(free.interpolate(*scan), results[1])
    assert torch.equal(one.interpolate(*scan), results[0])
    assert sum(total.numel() for _, total in cache.values()) == results[0].numel()


def test_a_cache_holds_one_scan(diffusion):
    cache = {}
    scan = thick_scan(5, 24)
    other = (scan[0] + 5, *scan[1:])
    cached = DiffusionInterpolator(diffusion, steps=1, cache=cache)
    first = cached.interpolate(*scan)
    second = cached.interpolate(*other)
    assert not torch.equal(first, second) and len(cache) == 1
    uncached = DiffusionInterpolator(diffusion, steps=1).interpolate(*other)
    assert torch.equal(uncached, cached.interpolate(*other))


class Peak(TorchDispatchMode):
    "Bytes of live tensors while it is on, and their maximum."

    def __init__(self):
        super().__init__()
        self.live = 0
        self.most = 0
        self._storages = set()

    def _freed(self, key, size):
        self.live -= size
        self._storages.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.untyped_storage()._cdata in self._storages
            ):
                continue
            storage = tensor.untyped_storage()
            self._storages.add(storage._cdata)
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize("kind", ["regressor", "diffusion"])
def test_features_do_not_grow_with_the_scan_and_only_the_slices_do(
    kind, regressor, diffusion, monkeypatch
):
    # as small against the scan as it is for a scan of ordinary size
    monkeypatch.setattr("ct_nb.slices.consistency.CONSISTENCY_CHUNK", 2**14)

    def interpolator(memory_gib, **settings):
        if kind == "regressor":
            return RegressorInterpolator(regressor, memory_gib=memory_gib, **settings)
        return DiffusionInterpolator(diffusion, steps=1, memory_gib=memory_gib, **settings)

    def volume_bytes(scan):
        return 4 * scan[2].count * scan[0][0].numel()

    def most(scan, model):
        before = scan[0].clone()
        with Peak() as peak:
            model.interpolate(*scan)
        assert torch.equal(before, scan[0])
        return peak.most

    gib = 0.019 if kind == "diffusion" else 0.042
    few = thick_scan(12, 128, 2.5)
    many = thick_scan(36, 128, 2.5)
    assert interpolator(gib).plan(128, 128, *many[1:3]) == (4, pytest.approx(gib, rel=0.2))
    short = most(few, interpolator(gib))
    long = most(many, interpolator(gib))
    room = 2**21  # matrices along z, and the rows that consistency works on at a time, in float64
    # one volume of thin slices, and nothing else that grows
    assert long - short < volume_bytes(many) - volume_bytes(few) + room
    assert long - volume_bytes(many) < gib * 2**30 + room  # within the plan
    # as a whole it takes more, so the measurement includes features
    whole = most(many, interpolator(9.0))
    assert whole - volume_bytes(many) > 1.5 * (long - volume_bytes(many))
    # a sum beside the sample, not four samples
    if kind == "diffusion":
        assert most(many, interpolator(gib, count=4)) - long < volume_bytes(many) + room


@pytest.mark.parametrize("kind", [RegressorInterpolator, DiffusionInterpolator])
def test_impossible_settings_are_refused(kind, regressor, diffusion):
    model = regressor if kind is RegressorInterpolator else diffusion
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with refused("memory_gib"):
            kind(model, memory_gib=value)
    for value in (-3.0, float("nan"), float("inf")):
        with refused("noise_hu"):
            kind(model, noise_hu=value)


def test_scans_outside_the_training_range():
    axis = SliceAxis(0, 5.0, 9)

    def notes(axis, width_mm, spacing_mm):
        return check_training_range(axis, SliceProfile(width_mm), spacing_mm, TRAINING_RANGE)

    assert not notes(axis, 5.0, 1.0)
    assert not check_training_range(axis, SliceProfile(5.0), 0.5, None)
    for outside in ((axis, 5.0, 0.5), (axis, 9.0, 1.0), (SliceAxis(0, 3.0, 9), 3.0, 1.0)):
        assert len(notes(*outside)) == 1
    with refused("volume"):
        notes(SliceAxis(0, 8.0, 9), 8.0, 1.0)


def test_too_many_thin_slices_are_refused():
    scan = Volume(np.zeros((12, 4, 4), np.float32), np.diag([3.0, 2.5, 5.0, 1.0]))
    # few voxels, but a covariance of 12000²
    with refused("spacing_mm") as caught:
        check_scan(scan, 0.005)
    assert caught.value.slices == 12000
