"""Tiles: they cover the axis, their weights sum to one, and the result is that of the whole."""

import pytest
import torch
from refusals import refused

from ct_nb.layers.tiling import (
    Tile,
    blend_tiles,
    normalize_weights,
    overlapping_tiles,
    stitch,
    tile_axis,
    tile_starts,
    tile_weights,
)


@pytest.mark.parametrize("length,size,halo", [(20, 8, 2), (37, 5, 3), (7, 9, 0), (1, 1, 4)])
def test_cores_cover_the_axis_once(length, size, halo):
    tiles = tile_axis(length, size, halo)
    written = [i for tile in tiles for i in range(tile.write.start, tile.write.stop)]
    assert written == list(range(length))
    for tile in tiles:
        core = tile.write.stop - tile.write.start
        assert core <= size and tile.read_length <= size + 2 * halo
        assert tile.read.start == max(tile.write.start - halo, 0)
        assert tile.read.stop == min(tile.write.stop + halo, length)
        assert tile.read.start + tile.inner.start == tile.write.start
        assert tile.inner.stop - tile.inner.start == core


def test_sizes_that_make_no_tile_are_refused():
    with refused("size"):
        tile_axis(10, 0, 1)
    with refused("halo"):
        tile_axis(10, 4, -1)


def test_a_scaled_tile_ends_with_the_axis():
    tile = tile_axis(5, 2, 1)[-1]  # core 3 to 5, read from 2
    coarse = tile.scaled(read=8)
    assert coarse.read == slice(16, 40) and coarse.write == slice(3, 5)
    fine = tile.scaled(write=8, length=37)
    assert fine.read == slice(2, 5) and fine.write == slice(24, 37)
    assert fine.inner == slice(8, 21)


@pytest.mark.parametrize(
    "size,patch,overlap,halo", [(40, 16, 8, 2), (64, 64, 16, 2), (37, 20, 6, 0), (256, 64, 16, 2)]
)
def test_patches_cover_and_their_weights_sum_to_one(size, patch, overlap, halo):
    starts = tile_starts(size, patch, overlap)
    assert starts[0] == 0 and starts[-1] + patch == size
    assert all(b + overlap <= a + patch for a, b in zip(starts, starts[1:]))
    total = torch.zeros(size)
    for tile in overlapping_tiles(size, patch, overlap, halo):
        total[tile.write] += tile.weights
    assert torch.allclose(total, torch.ones(size), atol=1e-6)


def test_the_halo_of_a_patch_has_no_weight():
    weights = tile_weights(40, [0, 8, 16, 24], 16, 8, 2)
    assert not weights[1, :2].any() and not weights[1, -2:].any()
    assert weights[0, 0] == 1 and weights[3, -1] == 1  # at the ends of the volume


def test_a_position_without_a_tile_is_refused():
    with refused("weights"):
        normalize_weights(10, [0, 6], [torch.ones(5), torch.ones(4)])


@pytest.fixture(scope="module")
def convolution():
    "A convolution that reaches 2 voxels, a volume, and the result for the whole."
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 1, 5, padding=2).requires_grad_(False)
    x = torch.randn(1, 1, 24, 24, 24)
    return layer, x, layer(x)


def test_blended_patches_equal_the_whole_only_with_the_halo(convolution):
    layer, x, whole = convolution

    def predict(z, y, x0, n):
        return layer(x[..., z : z + n, y : y + n, x0 : x0 + n])

    assert torch.allclose(blend_tiles(predict, 24, 12, 6, 2), whole, atol=1e-6)
    assert not torch.allclose(blend_tiles(predict, 24, 12, 6, 0), whole, atol=1e-3)
    with refused("halo"):
        blend_tiles(predict, 24, 12, 6, 3)
    with refused("patch, overlap"):
        blend_tiles(predict, 24, 12, 8)


def test_exact_tiles_equal_the_whole_only_with_the_halo(convolution):
    layer, x, whole = convolution

    def predict(z, y, x0):
        return layer(x[..., z.read, y.read, x0.read])

    exact = [tile_axis(24, size, 2) for size in (5, 24, 7)]
    assert torch.allclose(stitch(predict, exact), whole, atol=1e-6)
    short = [tile_axis(24, size, 1) for size in (5, 24, 7)]
    assert not torch.allclose(stitch(predict, short), whole, atol=1e-3)


def test_outputs_into_given_tensors():
    x = torch.arange(10.0)
    double = torch.empty(10, dtype=torch.float64)
    negative = torch.empty(10)
    result = stitch(lambda t: (x[t.read], -x[t.read]), [tile_axis(10, 4, 1)], [double, negative])
    assert result[0] is double and result[1] is negative
    assert torch.equal(double, x.double()) and torch.equal(negative, -x)
    tiles = [tile.scaled(write=2) for tile in tile_axis(10, 4, 1)]
    finer = stitch(lambda t: x[t.read].repeat_interleave(2), [tiles])
    assert torch.equal(finer, x.repeat_interleave(2))


def test_weights_on_one_axis_only():
    x = torch.randn(6, 3)
    weights = [torch.tensor([1.0, 1, 0.5, 0.5]), torch.tensor([0.5, 0.5, 1, 1])]
    rows = [
        Tile(slice(start, start + 4), slice(start, start + 4), weights=w)
        for start, w in zip((0, 2), weights)
    ]
    result = stitch(lambda y, x0: x[y.read, x0.read], [rows, [Tile.full(3)]])
    assert torch.allclose(result, x)


def test_blending_is_the_sum_that_it_was():
    "Bit for bit: the order of the sums is part of the result of the trained cascade and refiner."
    torch.manual_seed(1)
    x = torch.randn(1, 2, 20, 20, 20)
    starts = tile_starts(20, 8, 2)
    weights = tile_weights(20, starts, 8, 2, 0)
    expected = torch.zeros_like(x)
    for i, z in enumerate(starts):
        for j, y in enumerate(starts):
            for k, x0 in enumerate(starts):
                part = torch.sin(x[..., z : z + 8, y : y + 8, x0 : x0 + 8])
                weight = weights[i][:, None, None] * weights[j][:, None] * weights[k]
                expected[..., z : z + 8, y : y + 8, x0 : x0 + 8] += weight * part
    result = blend_tiles(
        lambda z, y, x0, n: torch.sin(x[..., z : z + n, y : y + n, x0 : x0 + n]), 20, 8, 2, 0
    )
    assert torch.equal(result, expected)
