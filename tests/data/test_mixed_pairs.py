"""Mixtures of two cases: their X-rays, their weights; seed, epoch and index decide them."""

import pytest
import torch
from refusals import refused

from ct_nb.data.augmentation import MixedPairs
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, hu_to_mu

VIEWS = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(24, 24), pixel_mm=20.0).to(
    torch.float32
)


class Cases:
    "Random volumes, some of it below vacuum, and their X-rays."

    def __init__(self, count, shifts_mm=None):
        self.shifts_mm = shifts_mm or [0.0] * count

    def __len__(self):
        return len(self.shifts_mm)

    def at(self, epoch, index):
        generator = torch.Generator().manual_seed(100 * epoch + index)
        hu = torch.rand(16, 16, 16, generator=generator) * 1600 - 1100
        geometry = translate(VIEWS, [0.0, 0.0, self.shifts_mm[index]])
        xrays = project(hu_to_mu(hu)[None], geometry)[0]
        return {"id": str(index), "hu": hu, "xrays": xrays, "geometry": geometry, "labels": hu > 0}


class Numbers:
    "Case k is k everywhere, and its X-rays are row k of the unit matrix."

    def __len__(self):
        return 400

    def at(self, epoch, index):
        return {"hu": torch.tensor(float(index)), "xrays": torch.eye(400)[index], "geometry": VIEWS}


def test_xrays_of_a_mixture_are_the_mixture_of_xrays():
    cases = Cases(4)
    mixed = MixedPairs(cases, probability=1.0, alpha=2.0)
    for index in range(4):
        item = mixed.at(1, index)
        assert (item["hu"] - cases.at(1, index)["hu"]).abs().max() > 50
        exact = project(hu_to_mu(item["hu"])[None], VIEWS)[0]
        assert (exact - item["xrays"]).abs().max() < 1e-5 * exact.max()
        assert item["id"] == str(index) and "labels" not in item


def test_weights_follow_beta_and_partners_are_others():
    from scipy.stats import beta, kstest

    weights = torch.stack(
        [x["xrays"] for x in map(MixedPairs(Numbers(), 1.0).__getitem__, range(400))]
    )
    assert torch.allclose(weights.sum(1), torch.ones(400)) and ((weights > 0).sum(1) <= 2).all()
    assert kstest(weights.diagonal().numpy(), beta(0.4, 0.4).cdf).pvalue > 0.01
    some = [MixedPairs(Numbers(), 0.25)[index]["xrays"][index] < 1 for index in range(400)]
    assert sum(some) / 400 == pytest.approx(0.25, abs=0.08)


def test_seed_epoch_and_index_decide():
    def mixture(seed, epoch, index):
        return MixedPairs(Numbers(), 1.0, seed=seed).at(epoch, index)["xrays"]

    assert torch.equal(mixture(0, 0, 3), mixture(0, 0, 3))
    assert not torch.equal(mixture(0, 0, 3), mixture(0, 1, 3))
    assert not torch.equal(mixture(0, 0, 3), mixture(1, 0, 3))


def test_what_is_not_mixed_stays():
    for cases, probability in ((Cases(3), 0.0), (Cases(1), 1.0)):
        item = MixedPairs(cases, probability)[0]
        assert torch.equal(item["hu"], cases.at(0, 0)["hu"]) and "labels" in item


def test_different_poses_and_wrong_settings_are_refused():
    with refused("geometry"):
        MixedPairs(Cases(2, [0.0, 0.5]), 1.0)[0]
    with refused("alpha"):
        MixedPairs(Cases(2), alpha=0)
    with refused("probability"):
        MixedPairs(Cases(2), probability=1.5)
