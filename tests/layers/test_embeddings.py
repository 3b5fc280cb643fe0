"""Area interpolation of token grids, embeddings of positions and times."""

import math

import pytest
import torch
import torch.nn.functional as F
from layers_inputs import random, seeded

from ct_nb.layers.embeddings import (
    PositionEmbedding,
    overlap_weights,
    regrid,
    sinusoids,
    time_embedding,
)


@pytest.mark.parametrize(
    "source, target", [(32, 24), (24, 32), (16, 12), (8, 4), (4, 8), (5, 7), (6, 6)]
)
def test_overlaps_are_areas(source, target):
    weights = overlap_weights(source, target, torch.zeros((), dtype=torch.float64))
    fine = torch.arange(source * target)  # both cells are whole numbers of these
    counted = (
        torch.zeros(target, source, dtype=torch.float64).index_put_(
            (fine // source, fine // target),
            torch.ones(len(fine), dtype=torch.float64),
            accumulate=True,
        )
        / source
    )
    assert torch.allclose(weights, counted) and torch.allclose(
        weights.sum(1), torch.ones(target, dtype=torch.float64)
    )
    # so the mean is preserved
    assert torch.allclose(
        weights.sum(0), torch.full((source,), target / source, dtype=torch.float64)
    )


def test_regrid():
    x = random(0, 2, 3, 8, 8, 8, dtype=torch.float64)
    assert (
        torch.allclose(regrid(x, 4), F.avg_pool3d(x, 2))
        and torch.allclose(regrid(x, 16), F.interpolate(x, scale_factor=2, mode="nearest"))
        and regrid(x, 8) is x
    )
    down = regrid(x, 6)
    assert (
        down.shape == (2, 3, 6, 6, 6)
        and regrid(down, 8).shape == x.shape
        and torch.allclose(down.mean((2, 3, 4)), x.mean((2, 3, 4)), atol=1e-7)
    )
    # a patch at whole tokens has the tokens of the full volume
    assert torch.allclose(regrid(x[..., :4, 4:, :4], 3), down[..., :3, 3:, :3], atol=1e-7)
    only_z = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    assert torch.allclose(
        regrid(only_z, 6)[0, 0, :, 0, 0],
        torch.tensor([0.25, 1.5, 2.75, 4.25, 5.5, 6.75]),
        atol=1e-6,
    )


def test_position_embedding_distinguishes_the_axes():
    place = seeded(PositionEmbedding, 3)
    axis = torch.linspace(-1, 1, 4)

    def shifted(k):
        return (
            place(
                torch.zeros(1, 3, 4, 4, 4),
                torch.stack([axis + (0.5 if a == k else 0) for a in range(3)])[None],
            ).detach()
            - place(torch.zeros(1, 3, 4, 4, 4), axis.expand(1, 3, 4)).detach()
        )

    for k in range(3):
        change = shifted(k)
        others = [a + 2 for a in range(3) if a != k]
        assert change.abs().max() > 0.1 and torch.allclose(
            change, change.mean(others, keepdim=True).expand_as(change), atol=1e-5
        )


def test_sinusoids_and_times_by_hand():
    x = torch.tensor([[0.0, 0.5, -1.0]])
    assert (
        sinusoids(x).shape == (1, 3, 9)
        and torch.allclose(sinusoids(x)[0, 1, :3], torch.tensor([0.5, math.sin(math.pi / 4), 1.0]))
        and torch.allclose(
            sinusoids(x)[0, :, 5], torch.tensor([1.0, math.cos(math.pi / 4), 0.0]), atol=1e-6
        )
    )
    codes = time_embedding(torch.tensor([0.0, 1.0]))
    assert (
        codes.shape == (2, 64)
        and torch.allclose(codes[0], torch.cat([torch.zeros(32), torch.ones(32)]))
        and torch.allclose(codes[1, [0, 31]], torch.tensor([1.0, 100.0]).sin(), atol=1e-4)
    )
