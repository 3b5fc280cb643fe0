"""The drr2ct network: batches, views, consistency, exchangeable parts, invalid arguments."""

from dataclasses import replace

import pytest
from places import FULL
import torch
from refusals import refused

from ct_nb.cascade.guidance import XrayGuidance
from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import Grid, hu_to_mu

SMOKE = DRR2CTConfig.preset("smoke")


def scene(seed=3, azimuth=(0.0, 90.0)):
    "Target (1, 32, 32, 32), X-rays (1, V, 256, 256) from twice the resolution, geometry."
    geometry = ConeBeam.orbit(list(azimuth), grid=Grid.cube(32)).to(torch.float32)
    fine = phantom(seed, 64).volume.tensor()
    xrays = project(hu_to_mu(fine), geometry.on(Grid.cube(64)))
    return torch.nn.functional.avg_pool3d(fine[None], 2), xrays[None], geometry


def network(config=SMOKE, fitted=True):
    torch.manual_seed(0)
    model = DRR2CT(config)
    if fitted:
        model.prior.fit(torch.stack([phantom(seed, 32).volume.tensor() for seed in range(20, 26)]))
    return model


@pytest.mark.parametrize("azimuth", [(0.0,), (0.0, 90.0), (0.0, 45.0, 90.0)])
def test_any_number_of_views(azimuth):
    _, xrays, geometry = scene(azimuth=azimuth)
    with torch.no_grad():
        prediction = network().eval()(xrays, geometry)
    assert prediction.hu.shape == (1, 32, 32, 32) and torch.isfinite(prediction.hu).all()


def test_the_order_of_the_views_does_not_matter():
    _, xrays, geometry = scene()
    model = network().eval()
    with torch.no_grad():
        a = model(xrays, geometry).hu
        b = model(xrays.flip(1), geometry.select([1, 0])).hu
    assert (a - b).abs().max() < 0.5


def test_consistency_lowers_the_error_on_the_given_xrays():
    _, xrays, geometry = scene()
    water = float(hu_to_mu(0.0))
    with torch.no_grad():
        prediction = network(
            replace(SMOKE, consistency_noise=0.0, consistency_iterations=40), fitted=False
        ).eval()(xrays, geometry)

    def error(hu):
        return (project((1 + hu[0] / 1000) * water, geometry) - xrays[0]).norm() / xrays[0].norm()

    assert error(prediction.hu) < 0.1 * error(prediction.unconstrained_hu), (
        error(prediction.hu),
        error(prediction.unconstrained_hu),
    )


def test_every_parameter_gets_a_gradient():
    "At 64³ all three strides of the pyramid are lifted; at 32³ the finest has no grid to go to."
    truth, xrays, geometry = scene()
    model = DRR2CT(
        DRR2CTConfig(
            size=64,
            view_channels=(8, 8, 8, 8),
            lifted_channels=(4, 4, 4),
            grid_channels=(8, 8, 8),
            latent_channels=8,
            latent_blocks=1,
            bottleneck_channels=4,
            prior_modes=2,
        )
    )
    wide = torch.nn.functional.interpolate(truth[None], size=(64, 64, 64))[0]
    found = model(xrays, geometry.on(Grid.cube(64)))
    (
        (found.hu - wide).abs().mean() + found.view_tokens.sum() + found.latent_tokens.sum()
    ).backward()
    assert not [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]


@FULL
def test_it_learns_one_case_by_heart():
    truth, xrays, geometry = scene()
    model = network(fitted=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = (model(xrays, geometry).hu - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_batch_equals_one_by_one():
    pairs = [scene(seed) for seed in (3, 4)]
    model = network().eval()
    with torch.no_grad():
        together = model(torch.cat([x for _, x, _ in pairs]), pairs[0][2]).hu
        alone = torch.cat([model(x, g).hu for _, x, g in pairs])
    assert (together - alone).abs().max() < 0.5


def test_what_is_hidden_does_not_reach_the_network():
    _, xrays, geometry = scene()
    model = network().eval()
    hidden = torch.zeros(1, 2, 256, 256, dtype=torch.bool)
    hidden[:, 0, 64:128, 64:128] = True
    changed = torch.where(hidden, xrays + 1, xrays)
    with torch.no_grad():
        base = model(xrays, geometry).base_hu
        a, b = (
            model(x, geometry, base=base, hidden=hidden, consistency=False)
            for x in (xrays, changed)
        )
        seen = model(changed, geometry, base=base, consistency=False)
    assert (
        torch.equal(a.features[0], b.features[0])
        and (seen.features[0] - a.features[0]).abs().max() > 1e-3
    )


def test_consistency_can_be_left_out_of_one_answer():
    _, xrays, geometry = scene()
    model = network().eval()
    with torch.no_grad():
        free, held = (model(xrays, geometry, consistency=c) for c in (False, True))
    assert (
        torch.equal(free.hu, free.unconstrained_hu)
        and torch.equal(free.unconstrained_hu, held.unconstrained_hu)
        and not torch.equal(free.hu, held.hu)
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(latent_size=8),
        dict(latent_size=12),
        dict(latent_size=24),
        dict(decoder="implicit"),
        dict(epipolar_strides=()),
        dict(epipolar_gate=False),
    ],
)
def test_its_parts_can_be_exchanged(changes):
    _, xrays, geometry = scene()
    with torch.no_grad():
        found = network(replace(SMOKE, **changes)).eval()(xrays, geometry)
    assert (
        found.hu.shape == (1, 32, 32, 32)
        and torch.isfinite(found.hu).all()
        and found.latent.mean.shape[-1] == changes.get("latent_size", 16)
    )


def test_the_latent_is_drawn_only_when_asked():
    _, xrays, geometry = scene()
    model = network().eval()
    with torch.no_grad():
        mean, again, drawn = (
            model(xrays, geometry, sample=s, consistency=False).hu for s in (None, False, True)
        )
        other = model(xrays, geometry, sample=True, consistency=False).hu
    assert (
        torch.equal(mean, again) and not torch.equal(drawn, other) and not torch.equal(mean, drawn)
    )


def test_settings_go_through_json():
    import json

    config = DRR2CTConfig.preset("gpu")
    assert DRR2CTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown settings"):
        DRR2CTConfig.from_dict({"sise": 64})
    with pytest.raises(ValueError, match="window"):
        DRR2CTConfig(window="chess")
    with pytest.raises(ValueError, match="latent_size"):
        DRR2CTConfig(latent_size=18)
    with pytest.raises(ValueError, match="multiple of 4"):
        DRR2CTConfig(size=30)


@pytest.mark.parametrize(
    "shape, words",
    [
        ((1, 3, 256, 256), "geometry describes"),
        ((1, 2, 128, 256), "geometry describes"),
        ((2, 256, 256), "geometry describes"),
    ],
)
def test_wrong_xrays_are_a_sentence(shape, words):
    geometry = ConeBeam.biplanar(grid=Grid.cube(32))
    with pytest.raises(ValueError, match=words):
        network(fitted=False)(torch.zeros(shape), geometry)


def test_detectors_that_do_not_fit_the_strides_are_a_sentence():
    geometry = ConeBeam.biplanar(grid=Grid.cube(32), detector_shape=(100, 100), pixel_mm=5.0)
    with pytest.raises(ValueError, match="multiples of 32"):
        network(fitted=False)(torch.zeros(1, 2, 100, 100), geometry)


def test_guidance_reaches_the_guesses_of_a_sampling_decoder():
    truth, _, geometry = scene()
    geometry = ConeBeam.stack([geometry])
    # of a CT on the network's grid, so that equality is possible
    xrays = project(hu_to_mu(truth), geometry)
    model = network(replace(SMOKE, decoder="diffusion", consistency=False)).eval()
    with torch.no_grad():
        free, guided = (
            model(xrays, geometry, guide=guide).hu
            for guide in (None, XrayGuidance(xrays, geometry, mode="exact"))
        )

    def error(hu):
        return float((project(hu_to_mu(hu), geometry) - xrays).norm() / xrays.norm())

    assert error(guided) < 0.5 * error(free)
    with refused("guide"):
        network()(xrays, geometry, guide=XrayGuidance(xrays, geometry))
