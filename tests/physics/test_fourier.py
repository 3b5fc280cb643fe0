"Bands of a spectrum beyond nbs/physics/09_fourier.ipynb."

import pytest
import torch

from ct_nb.physics.fourier import band_power, bands, frequencies, multiplicity, radial_frequency

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 3, 7), (1, 1, 2), (8, 1, 1)])
def test_frequencies_of_plane_waves(shape):
    "A plane wave has its power at the frequency that the table states."
    table = frequencies(shape)
    assert table.shape == (3, shape[0], shape[1], shape[2] // 2 + 1)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).float()
    for index in ((0, 0, shape[2] // 2), (shape[0] // 2, 0, 0), (0, shape[1] // 2, shape[2] // 2)):
        frequency = table[(slice(None), *index)]
        wave = torch.cos(torch.pi * (frequency.view(3, 1, 1, 1) * grid).sum(0))
        power = torch.fft.rfftn(wave).abs()
        assert power[index] > 0.99 * power.max()


def test_radial_frequency_is_the_norm():
    assert torch.allclose(radial_frequency((4, 5, 6)), frequencies((4, 5, 6)).norm(dim=0))
    assert radial_frequency((4, 4, 4)).max() == pytest.approx(3**0.5)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9])
def test_multiplicity_counts_all_waves(width):
    assert multiplicity(width).sum() == width


@pytest.mark.parametrize("shells", [2, 8])
def test_weights_are_a_partition(shells):
    weights = bands((6, 4, 5), shells, CPU)
    assert weights.shape == (3 * shells, 6 * 4 * 3) and 0 <= weights.min() <= weights.max() <= 1
    assert torch.allclose(weights.sum(0)[1:], torch.ones(6 * 4 * 3 - 1)) and not weights[:, 0].any()


def test_power_of_a_wave_is_in_its_direction():
    x = torch.arange(8).float()
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 8
        wave = torch.cos(torch.pi * x / 2).view(shape).expand(1, 1, 8, 8, 8)
        power, has_waves = band_power(torch.fft.rfftn(wave, dim=(-3, -2, -1), norm="ortho"), 8, 5)
        by_direction = (power * has_waves).view(5, 3).sum(0)
        assert by_direction.argmax() == axis and by_direction[axis] > 0.5 * by_direction.sum()
