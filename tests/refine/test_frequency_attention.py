"""Frequency attention and Laplacian: phase, gains, symmetry, training, invalid arguments."""

import math

import pytest
import torch
from refusals import refused

import ct_nb.refine.frequency_attention as module
from ct_nb.physics.fourier import band_power, bands, frequencies, multiplicity, radial_frequency
from ct_nb.refine.frequency_attention import FrequencyAttention, HighPass, laplacian

AXES = (-3, -2, -1)


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(x):
    return torch.fft.rfftn(x.double(), dim=AXES, norm="ortho")


def opened(channels, std=0.2, seed=0, **settings):
    torch.manual_seed(seed)
    layer = FrequencyAttention(channels, **settings)
    torch.nn.init.normal_(layer.write.weight, std=std)
    return layer


def angle(a, b):
    return (b * a.conj()).angle().abs()[a.abs() > 0.05].max().item()


@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 8, 8), (9, 12, 7), (5, 5, 5), (2, 2, 2)])
def test_phase_is_kept_at_every_frequency_of_the_full_spectrum(shape):
    layer, x = opened(3), random(0, 2, 3, *shape)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    before, after = (torch.fft.fftn(v.double(), dim=AXES, norm="ortho") for v in (x, y))
    assert angle(before, after) < 1e-3
    # and it does something
    assert min(shape) < 4 or not torch.allclose(before.abs(), after.abs(), atol=1e-2)


def test_a_layer_that_moves_phase_is_found():
    layer, x = opened(3), random(0, 2, 3, 8, 8, 8)
    with torch.no_grad():
        moved = layer(x).roll(1, -1)
    assert angle(spectrum(x), spectrum(moved)) > 1


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 12, 7)])
def test_gains_are_hermitian_real_and_within_their_bound(shape, monkeypatch):
    layer = opened(2, std=1.0, most=3.0)
    x = random(1, 1, 2, *shape)
    with torch.no_grad():
        gain = layer.gains(torch.fft.rfftn(x, dim=AXES, norm="ortho"), shape[-1]).double()
        y = layer(x)
    assert not gain.is_complex() and 1 / 3 - 1e-4 <= gain.min() < 0.9 < 1.1 < gain.max() <= 3 + 1e-4
    # k and −k
    for column in (0, -1) if shape[-1] % 2 == 0 else (0,):
        assert torch.allclose(
            gain[..., column], gain[..., column].flip(-1, -2).roll((1, 1), (-1, -2)), atol=1e-6
        )
    # each wave gets the gain it was given
    assert (spectrum(y).abs() - gain * spectrum(x).abs()).abs().max() < 1e-4
    # not an even function of k
    lopsided = bands(tuple(shape), layer.shells, torch.device("cpu")) * (
        1 + 0.9 * frequencies(shape)[0].flatten()
    )
    monkeypatch.setattr(module, "bands", lambda *_: lopsided)
    with torch.no_grad():
        gain = layer.gains(torch.fft.rfftn(x, dim=AXES, norm="ortho"), shape[-1]).double()
        y = layer(x)
    assert (spectrum(y).abs() - gain * spectrum(x).abs()).abs().max() > 1e-2


def test_the_mean_is_kept_whatever_it_is():
    layer, x = opened(2, std=1.0), random(11, 1, 2, 8, 8, 8)
    with torch.no_grad():
        # nor does it count in the gains
        assert torch.allclose(layer(x + 7), layer(x) + 7, atol=1e-4)
        assert not torch.allclose(layer(7 * x), 7 * layer(x), atol=1e-1)


def test_starts_as_nothing_and_learns():
    layer, x = FrequencyAttention(2), random(2, 2, 2, 6, 6, 6)
    assert torch.allclose(layer(x), x, atol=1e-6)
    layer(x).square().sum().backward()
    assert layer.write.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm, right", [("ortho", True), ("backward", False), ("forward", False)])
def test_power_of_a_texture_does_not_depend_on_the_grid(norm, right):
    "White noise of two sizes, and a texture beside copies of itself, with a mean that is not zero."

    def power(x):
        return band_power(torch.fft.rfftn(x, dim=AXES, norm=norm), x.shape[-1], 8)[0][..., 9:].mean(
            1
        )

    noise = power(random(3, 1, 8, 24, 24, 24) + 5) / power(random(4, 1, 8, 12, 12, 12) + 5)
    x = random(5, 1, 8, 12, 12, 12)
    tiled = power(x.repeat(1, 1, 2, 2, 2) + 5) / power(x + 5)
    for ratio in (noise, tiled):
        assert ((ratio - 1).abs().max() < 0.3) == right


def test_the_same_texture_gets_the_same_gains_on_two_grids():
    layer, x = opened(4), random(6, 1, 4, 12, 12, 12)

    def gain(v):
        return layer.gains(torch.fft.rfftn(v, dim=AXES, norm="ortho"), v.shape[-1])

    with torch.no_grad():
        small = gain(x)
        large = gain(x.repeat(1, 1, 2, 2, 2))[..., ::2, ::2, ::2]
        loud = gain(3 * x)
    assert (small / large).log().abs().max() < 0.1 < (small / loud).log().abs().max()


def test_a_smaller_part_of_the_spectrum():
    shape = (6, 5, 8)
    full = 2 * torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, shape), indexing="ij"))
    assert torch.equal(frequencies(shape)[..., :-1], full[..., :4]) and radial_frequency(
        (4, 4, 4)
    ).max() == pytest.approx(math.sqrt(3))
    assert int(multiplicity(8).sum()) == 8 and int(multiplicity(7).sum()) == 7
    share = bands(shape, 8, torch.device("cpu"))
    assert (
        torch.allclose(share.sum(0)[1:], torch.ones(share.shape[1] - 1), atol=1e-6)
        and share.min() >= 0
        and share[:, 0].abs().max() == 0
    )


def test_bands_made_in_inference_serve_training():
    module.bands.cache_clear()
    layer, x = opened(2), random(7, 1, 2, 10, 10, 10)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()


def test_half_precision_is_computed_in_single():
    layer, x = opened(2), random(8, 1, 2, 6, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x)) and layer(x).dtype == torch.float32
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_gets_a_sentence():
    with refused("x"):
        FrequencyAttention(3)(random(0, 1, 2, 4, 4, 4))
    with refused("x"):
        FrequencyAttention(3)(random(0, 1, 3, 1, 4, 4))
    with refused("most"):
        FrequencyAttention(3, most=1.0)
    with refused("shells"):
        FrequencyAttention(3, shells=1)


def test_laplacian_is_a_mean_of_neighbours_and_has_its_response():
    x = random(9, 2, 5, 6, 7)
    padded = torch.nn.functional.pad(x[:, None], (1,) * 6, mode="replicate")[:, 0]
    core = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    brute = x - sum(padded.roll(s, a)[core] for a in (1, 2, 3) for s in (1, -1)) / 6
    assert torch.allclose(laplacian(x), brute, atol=1e-6)
    n = 12
    for k in (1, 3, 6):
        wave = torch.cos(2 * math.pi * k * torch.arange(n, dtype=torch.float64) / n)[
            None, :, None
        ].expand(n, n, n)
        response = 1 - (2 + math.cos(math.pi * 2 * k / n)) / 3
        assert torch.allclose(laplacian(wave)[:, 1:-1], response * wave[:, 1:-1], atol=1e-12)
        assert not torch.allclose(
            laplacian(wave)[:, 1:-1], (response + 0.05) * wave[:, 1:-1], atol=1e-3
        )


def test_high_pass_is_blind_to_level():
    torch.manual_seed(0)
    branch, x = HighPass(3), random(10, 1, 3, 6, 6, 6)
    with torch.no_grad():
        assert torch.allclose(branch(x + 10) - 10, branch(x), atol=1e-4) and not torch.allclose(
            branch(x), x, atol=1e-2
        )
