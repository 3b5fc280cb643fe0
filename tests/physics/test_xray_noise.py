"Noise and pose errors beyond nbs/physics/07_xray_noise.ipynb: faults and reproducibility."

import math

import pytest
import torch
from refusals import refused

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.xray_noise import PoseNoise, XrayNoise, add_xray_noise, cut_out, perturb_pose


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "kind, values, argument",
    [
        (XrayNoise, dict(photons_per_pixel=0.5), "photons_per_pixel"),
        (XrayNoise, dict(photons_per_pixel=math.inf), "photons_per_pixel"),
        (XrayNoise, dict(readout_photons=5.0), "readout_photons"),
        (XrayNoise, dict(photons_per_pixel=1e4, readout_photons=-1.0), "readout_photons"),
        (XrayNoise, dict(floor_photons=0.0), "floor_photons"),
        (XrayNoise, dict(photons_per_pixel=10.0, floor_photons=11.0), "floor_photons"),
        (XrayNoise, dict(exposure_sd=-0.1), "exposure_sd"),
        (XrayNoise, dict(beam_quality_sd=math.nan), "beam_quality_sd"),
        (XrayNoise, dict(cutout_mm=1e5), "cutout_mm"),
        (PoseNoise, dict(jitter_rotation_deg=90.0), "jitter_rotation_deg"),
        (PoseNoise, dict(detector_shift_mm=-1.0), "detector_shift_mm"),
    ],
)
def test_numbers_out_of_range(kind, values, argument):
    with refused(argument):
        kind(**values)


def test_the_generator_decides():
    clean = 3 * torch.rand(2, 8, 8, generator=generator())
    noise = XrayNoise.radiograph()
    once, again = (add_xray_noise(clean, noise, generator(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, add_xray_noise(clean, noise, generator(6)))


def test_a_block_larger_than_the_detector_covers_at_most_all_of_it():
    views = ConeBeam.biplanar(detector_shape=(6, 5), pixel_mm=2.0)
    clean = torch.rand(2, 6, 5, generator=generator())
    for seed in range(20):
        assert torch.isfinite(cut_out(clean, views, 1000.0, generator(seed))).all()
    assert torch.equal(cut_out(clean, views, 0.0, generator()), clean)


def test_recorded_and_true_pose():
    views = ConeBeam.biplanar()
    true, recorded = perturb_pose(views, PoseNoise(jitter_shift_mm=5.0), generator())
    assert torch.equal(true.source_mm, recorded.source_mm)
    assert torch.allclose(true.detector_center_mm, recorded.detector_center_mm)
    assert not torch.equal(recorded.source_mm, views.source_mm)
    true, recorded = perturb_pose(views, PoseNoise(detector_rotation_deg=5.0), generator())
    assert torch.equal(recorded.column_step_mm, views.column_step_mm)
    lengths = true.column_step_mm.norm(dim=-1)
    assert torch.allclose(lengths, views.column_step_mm.norm(dim=-1))
