"""Random tensors, seeded modules and beams for the tests of the layers."""

import torch

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(module, *arguments, **settings):
    torch.manual_seed(0)
    return module(*arguments, **settings)


def beams(batch, *angles, size=16, detector=32, **settings):
    return ConeBeam.stack(
        [
            ConeBeam.orbit(
                list(angles),
                grid=Grid.cube(size),
                detector_shape=(detector, detector),
                pixel_mm=512 / detector,
                **settings,
            ).to(torch.float32)
        ]
        * batch
    )
