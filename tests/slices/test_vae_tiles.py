"""Tiles of the VAE: the numbers of the whole, the halo no larger than needed, bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest
from places import FULL
import torch
from refusals import refused

from ct_nb.layers.tiling import tile_axis
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import WINDOWS
from ct_nb.slices.vae import SliceVAE, SliceVAEConfig
from ct_nb.slices.vae_tiles import decode_tiled, encode_tiled, plan_tiles, tile_bytes

CONFIGS = (
    SliceVAEConfig(fold=8, channels=(12,), blocks=1),
    SliceVAEConfig(fold=4, channels=(8, 12), blocks=1),
    SliceVAEConfig(fold=2, channels=(4, 8, 8), blocks=1),
    SliceVAEConfig(fold=1, channels=(4, 4, 4, 8), blocks=1),
)


@pytest.fixture(scope="module")
def chest():
    return WINDOWS["chest"].to_network(phantom(3, 64).volume.tensor())[None, None]


def drawn(config=CONFIGS[1], seed=0) -> SliceVAE:
    "Random weights everywhere, as if trained: a new network is linear."
    torch.manual_seed(seed)
    vae = SliceVAE(config).eval().requires_grad_(False)
    for layer in (vae.squeeze, vae.leave):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return vae


def worst(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("config", CONFIGS)
def test_tiles_equal_the_whole(config, chest):
    vae, x = drawn(config), chest[..., 20:31, :61, :63]
    latent = vae.encode(x)
    for tile in ((4, 3, 3), (11, 1, 8), (1, 8, 2)):
        found = encode_tiled(vae, x, tile=tile)
        assert (
            worst(found.mean, latent.mean) < 1e-4
            and worst(found.log_variance, latent.log_variance) < 1e-4
        )
        assert (
            worst(
                decode_tiled(vae, latent.mean, x.shape[-2:], tile=tile),
                vae.decode(latent.mean, x.shape[-2:]),
            )
            < 1e-4
        )


@pytest.mark.parametrize("name", ["halo_slices", "encoder_halo", "decoder_halo"])
def test_a_smaller_halo_shows(name, chest, monkeypatch):
    vae, x = drawn(), chest[..., 20:31, :61, :63]
    latent = vae.encode(x)
    image = vae.decode(latent.mean, x.shape[-2:])
    right = getattr(vae.config, name)
    monkeypatch.setattr(SliceVAEConfig, name, property(lambda self: right - 1))
    errors = worst(encode_tiled(vae, x, tile=(4, 3, 3)).mean, latent.mean), worst(
        decode_tiled(vae, latent.mean, x.shape[-2:], tile=(4, 3, 3)), image
    )
    assert max(errors) > 5e-4


def test_the_plan_keeps_its_memory():
    for name in ("cpu", "gpu", "paper"):
        c = SliceVAEConfig.preset(name)
        halo = (c.halo_slices, c.decoder_halo, c.decoder_halo)
        for gib in (2, 4, 20):
            size = plan_tiles(c, (300, 64, 64), halo, gib * 2**30)
            axes = zip((300, 64, 64), size, halo)
            read = [max(tile.read_length for tile in tile_axis(*axis)) for axis in axes]
            assert tile_bytes(c, *read) <= gib * 2**30
    with refused("memory_bytes"):
        plan_tiles(c, (300, 64, 64), halo, 1000)
    assert plan_tiles(c, (3, 2, 2), halo, 2**30) == (3, 2, 2)  # what fits is not cut


PEAK = """
import re, torch
from ct_nb.slices.vae import SliceVAE, SliceVAEConfig
from ct_nb.slices.vae_tiles import decode_tiled, encode_tiled, tile_bytes
torch.set_num_threads(1)
config = SliceVAEConfig(fold=2, channels=(32, 32, 32), blocks=1)
vae = SliceVAE(config).eval()
for layer in (vae.squeeze, vae.leave): torch.nn.init.normal_(layer.weight, std=0.1)
def rss():  # ru_maxrss of a child begins with that of its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
with torch.no_grad(): vae(torch.zeros(1, 1, 2, 16, 16))
x = torch.rand(1, 1, 64, 128, 128) * 2 - 1
before, bound = rss(), 48 * 2 ** 20
z = encode_tiled(vae, x, bound).mean
decode_tiled(vae, z, x.shape[-2:], bound)
tiled = rss() - before
with torch.no_grad(): vae(x)
print(tiled, rss() - before, bound, tile_bytes(config, 64, 16, 16))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(),
    reason="the peak of memory is read from /proc, which only Linux has",
)
@FULL
def test_memory_stays_within_the_bound():
    found = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    ).stdout.split()
    tiled, whole, bound, whole_bound = map(int, found)

    # code and scratch of the convolutions come on top once, 60 to 90 MiB
    def most(size):
        return 1.25 * size + 120 * 2**20

    assert tiled < most(bound) < whole < most(whole_bound)
