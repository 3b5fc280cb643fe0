"""Refinement losses: closed forms, independence of the grid, patches, invalid arguments."""

import math
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import WINDOWS, Grid, hu_to_mu
from ct_nb.refine.losses import (
    RandomFeatures,
    RefinementWeights,
    frequency_error,
    frequency_weight,
    laplacian_error,
    paste_patch,
    perceptual_error,
    refinement_loss,
)

CHEST = WINDOWS["chest"]
NAMES = [f.name for f in fields(RefinementWeights)]


def seeded(number):
    return torch.Generator().manual_seed(number)


def volumes(*seeds, n=16, batch=2):
    return [
        F.pad(
            torch.rand(batch, n - 4, n - 4, n - 4, generator=seeded(s)) * 600 - 300,
            (2,) * 6,
            value=-1000.0,
        )
        for s in seeds
    ]


def field(n, seed, most=6):
    "40 cosines across the cube sampled at n³ points, HU (1, n, n, n)."
    g = seeded(seed)
    k = torch.randint(-most, most + 1, (40, 3), generator=g).double()
    phase = torch.rand(40, generator=g, dtype=torch.float64)
    at = torch.stack(
        torch.meshgrid(*[torch.arange(n, dtype=torch.float64) / n] * 3, indexing="ij"), -1
    )
    return (40 * torch.cos(2 * math.pi * (at @ k.T + phase)).sum(-1))[None].float()


def only(name):
    return RefinementWeights(**{n: float(n == name) for n in NAMES})


@pytest.fixture(scope="module")
def scene():
    refined, truth = volumes(0, 1)
    geometry = ConeBeam.stack(
        [ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(24, 24), pixel_mm=500 / 24)] * 2
    ).to(torch.float32)
    return (
        refined,
        truth,
        dict(
            features=RandomFeatures(), xrays=project(hu_to_mu(truth), geometry), geometry=geometry
        ),
    )


# the sum


def test_weights_of_the_design(scene):
    assert asdict(RefinementWeights()) == {
        "absolute": 1.0,
        "frequency": 0.5,
        "gradient": 0.3,
        "perceptual": 0.2,
        "consistency": 0.1,
    }
    refined, truth, given = scene
    total, parts = refinement_loss(refined, truth, CHEST, **given)
    assert list(parts) == NAMES and total.item() == pytest.approx(
        sum(w * parts[n] for n, w in zip(NAMES, (1, 0.5, 0.3, 0.2, 0.1))), rel=1e-5
    )
    assert total.item() != pytest.approx(sum(parts.values()), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_each_term_alone(scene, name):
    refined, truth, given = scene
    refined = refined.clone().requires_grad_()
    alone, parts = refinement_loss(refined, truth, CHEST, only(name), **given)
    everything = refinement_loss(refined, truth, CHEST, **given)[1]
    assert (
        list(parts) == [name]
        and alone.item() == pytest.approx(everything[name], rel=1e-5)
        and alone.item() > 0
    )
    alone.backward()
    assert refined.grad.abs().max() > 0 and torch.isfinite(refined.grad).all()
    assert abs(refinement_loss(truth, truth, CHEST, only(name), **given)[0].item()) < 1e-6
    twice, _ = refinement_loss(
        refined, truth, CHEST, RefinementWeights(**{n: 2.0 * (n == name) for n in NAMES}), **given
    )
    assert twice.item() == pytest.approx(2 * alone.item(), rel=1e-6)


def test_a_perfect_prediction_has_finite_gradients(scene):
    _, truth, given = scene
    x = truth.clone().requires_grad_()
    refinement_loss(x, truth, CHEST, **given)[0].backward()
    assert torch.isfinite(x.grad).all()


# frequency


def test_weight_of_a_frequency():
    f = torch.tensor([0.0, 0.1, 1.0])
    assert torch.allclose(
        frequency_weight(f), torch.tensor([1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-9))])
    )


def by_hand(a, b, norm="forward", unit=32):
    "The term with the full spectrum and loops over nothing but cases."
    values = []
    for p, t in zip(a, b):
        c = torch.fft.fftn((p - t).double() / CHEST.width_hu, norm=norm).abs().square()
        f = (
            torch.stack(
                torch.meshgrid(
                    *[torch.fft.fftfreq(p.shape[0], 1 / p.shape[0], dtype=torch.float64)] * 3,
                    indexing="ij",
                )
            ).norm(dim=0)
            / unit
        )
        values.append((c / (1 + torch.exp(-10 * (f - 0.1)))).sum().sqrt())
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("n", [12, 15])
def test_frequency_error_is_its_formula(n):
    a, b = volumes(2, 3, n=n)
    ours = frequency_error(a, b, CHEST).item()
    assert ours == pytest.approx(by_hand(a, b), rel=1e-4)
    for wrong in (by_hand(a, b, norm="ortho"), by_hand(a, b, unit=n / 2)):
        assert abs(ours / wrong - 1) > 0.01


def test_frequency_error_does_not_depend_on_the_grid():
    ours = [frequency_error(field(n, 0), field(n, 1), CHEST).item() for n in (16, 32, 40)]
    assert max(ours) / min(ours) - 1 < 1e-4
    for wrong in ({"norm": "ortho"}, {"norm": "backward"}):
        found = [by_hand(field(n, 0), field(n, 1), **wrong) for n in (16, 32)]
        assert found[1] / found[0] > 2
    # of each grid's own
    nyquist = [by_hand(field(n, 0), field(n, 1), unit=n / 2) for n in (16, 32)]
    assert abs(nyquist[1] / nyquist[0] - 1) > 0.01
    coarse, fine = (
        frequency_error(f(16), torch.zeros(1, 16, 16, 16), CHEST) / f(16).std()
        for f in (lambda n: field(n, 0, 1), lambda n: field(n, 0, 7))
    )
    assert fine > 1.05 * coarse  # of the same size, what is fine costs more


def test_frequency_error_hears_a_shift_that_magnitudes_do_not():
    a = field(16, 4)
    magnitudes = (
        torch.fft.fftn(a).abs() - torch.fft.fftn(a.roll(3, -1)).abs()
    ).abs().max() / torch.fft.fftn(a).abs().max()
    assert magnitudes < 1e-5 and frequency_error(a.roll(3, -1), a, CHEST) > 0.5 * frequency_error(
        torch.zeros_like(a), a, CHEST
    )


def test_share_of_the_cube():
    """A field with the period of a patch costs the same in the patch, told its share, as in the
    whole cube.
    """
    a, b = (field(16, s, 3) for s in (5, 6))
    whole = [v.repeat(1, 2, 2, 2) for v in (a, b)]
    assert frequency_error(a, b, CHEST, share=0.5).item() == pytest.approx(
        frequency_error(*whole, CHEST).item(), rel=1e-4
    )
    assert (
        abs(frequency_error(a, b, CHEST).item() / frequency_error(*whole, CHEST).item() - 1) > 0.02
    )
    with refused("share"):
        frequency_error(a, b, CHEST, share=0.0)


# gradient, perceptual


def test_laplacian_error_is_its_formula():
    a, b = volumes(7, 8)
    d = F.pad((a - b)[:, None] / CHEST.width_hu, (1,) * 6, mode="replicate")
    kernel = torch.zeros(1, 1, 3, 3, 3)
    kernel[0, 0, 1, 1] = kernel[0, 0, 1, :, 1] = kernel[0, 0, :, 1, 1] = -1 / 6
    wrong = kernel.clone()
    kernel[0, 0, 1, 1] = torch.tensor([-1 / 6, 1.0, -1 / 6])
    kernel[0, 0, 1, 0, 1] = kernel[0, 0, 1, 2, 1] = -1 / 6
    assert laplacian_error(a, b, CHEST).item() == pytest.approx(
        F.conv3d(d, kernel).abs().mean().item(), rel=1e-5
    )
    assert laplacian_error(a, b, CHEST).item() != pytest.approx(
        F.conv3d(d, wrong).abs().mean().item(), rel=0.05
    )
    assert laplacian_error(b.clamp(-900, 900) + 60, b.clamp(-900, 900), CHEST) < 1e-6


def test_features_are_fixed_by_their_seed_and_may_be_given():
    a, b = volumes(9, 10)
    first = RandomFeatures(3)
    second = RandomFeatures(3)
    other = RandomFeatures(4)
    x = a[:, None]
    assert all(torch.equal(p, q) for p, q in zip(first(x), second(x))) and not torch.equal(
        first(x)[0], other(x)[0]
    )
    assert "seed 3" in first.name and not list(first.parameters()) and not first.state_dict()
    assert [tuple(m.shape[1:]) for m in first(x)] == [(8, 16, 16, 16), (16, 8, 8, 8), (32, 4, 4, 4)]

    def own(v):
        return [2 * v, v[..., ::2]]

    expected = (2 * (a - b).abs().mean() + (a - b)[..., ::2].abs().mean()) / 2 / CHEST.width_hu
    assert perceptual_error(a, b, CHEST, own).item() == pytest.approx(expected.item(), rel=1e-5)
    truth = b.clone().requires_grad_()
    perceptual_error(a.requires_grad_(), truth, CHEST, first).backward()
    assert truth.grad is None and a.grad.abs().max() > 0


def test_features_of_chests_have_unit_order():
    maps = RandomFeatures()(torch.rand(1, 1, 16, 16, 16, generator=seeded(0)))
    assert all(0.1 < m.square().mean().sqrt() < 3 for m in maps)


# consistency


def test_consistency_counts_scale(scene):
    _, truth, given = scene
    for factor in (0.9, 1.2):
        error = refinement_loss(
            factor * (truth + 1000) - 1000, truth, CHEST, only("consistency"), **given
        )[0].item()
        assert error == pytest.approx(abs(factor - 1), rel=1e-3)
    at_other_energy = refinement_loss(
        truth, truth, CHEST, only("consistency"), **given, energy_kev=100.0
    )[0].item()
    assert at_other_energy > 0.1


def test_a_patch_is_judged_in_its_volume(scene):
    refined, truth, given = scene
    corner = (8, 0, 4)
    here = (..., slice(8, 16), slice(0, 8), slice(4, 12))
    patch = refined[here].clone().requires_grad_()
    loss, parts = refinement_loss(patch, truth[here], CHEST, around=(truth, corner), **given)
    mixed = truth.clone()
    mixed[here] = refined[here]
    assert torch.equal(paste_patch(patch, truth, corner), mixed)
    assert parts["consistency"] == pytest.approx(
        refinement_loss(mixed, truth, CHEST, only("consistency"), **given)[0].item(), rel=1e-5
    )
    assert parts["frequency"] == pytest.approx(
        frequency_error(patch, truth[here], CHEST, 0.5).item(), rel=1e-5
    )
    loss.backward()
    assert patch.grad.abs().max() > 0
    for wrong in ((9, 0, 0), (-1, 0, 0)):
        with refused("corner"):
            paste_patch(patch, truth, wrong)


def test_missing_arguments_are_refused(scene):
    refined, truth, given = scene
    with refused("features"):
        refinement_loss(refined, truth, CHEST, xrays=given["xrays"], geometry=given["geometry"])
    with refused("geometry"):
        refinement_loss(refined, truth, CHEST, features=given["features"], xrays=given["xrays"])
    with refused("xrays"):
        refinement_loss(
            refined, truth, CHEST, features=given["features"], geometry=given["geometry"]
        )
    with refused("refined_hu"):
        refinement_loss(refined, truth[:1], CHEST, **given)
    with refused("frequency"):
        RefinementWeights(frequency=-0.5)
    with refused("gradient"):
        RefinementWeights(gradient=math.nan)
    with pytest.raises(ValueError, match="all weights of"):
        refinement_loss(refined, truth, CHEST, RefinementWeights(0, 0, 0, 0, 0))
    assert list(
        refinement_loss(refined, truth, CHEST, RefinementWeights(perceptual=0, consistency=0))[1]
    ) == ["absolute", "frequency", "gradient"]
