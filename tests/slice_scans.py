"""Scans and networks for the tests of slice interpolation."""

import torch

from ct_nb.slices.models import SliceDiffusion
from ct_nb.slices.slice_profile import SliceAxis, SliceProfile, thin_axis

TRAINING_RANGE = {"thick_mm": [4.0, 6.0], "width": [0.8, 1.2], "thin_mm": [1.0, 1.9]}


def random_model(kind, config, seed: int = 0):
    "A network with random weights in its last layers, which are zero in a new network."
    torch.manual_seed(seed)
    model = kind(config).eval()
    torch.nn.init.normal_(model.network.last.weight, std=0.05)
    if kind is SliceDiffusion:
        for layer in (model.vae.squeeze, model.vae.leave):
            torch.nn.init.normal_(layer.weight, std=0.02)
        model.vae.straight.fit([model.vae.window.to_network(body_hu(8, 40))[None, None]])
    return model


def body_hu(slices: int, pixels: int, seed: int = 0) -> torch.Tensor:
    "A body with two lungs in air, (slices, pixels, pixels), whole HU with noise."
    generator = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(
        torch.arange(slices) / slices - 0.5,
        *([torch.arange(pixels) / pixels - 0.5] * 2),
        indexing="ij",
    )
    body = torch.where((y / 0.42) ** 2 + (x / 0.36) ** 2 < 1, 40.0, -1000.0)
    lungs = ((y - 0.02) / 0.2) ** 2 + ((x.abs() - 0.16) / 0.12) ** 2 + (z / 0.6) ** 2 < 1
    body = torch.where(lungs, -820.0, body)
    return (body + 12 * torch.randn(body.shape, generator=generator)).clamp_min(-1024).round()


def thick_scan(slices: int = 14, pixels: int = 40, spacing_mm: float = 1.0) -> tuple:
    "Thick slices of 5 mm, their axis, a thin axis and the profile: arguments of `interpolate`."
    axis = SliceAxis(0.0, 5.0, slices)
    return body_hu(slices, pixels), axis, thin_axis(axis, spacing_mm), SliceProfile(5.0)
