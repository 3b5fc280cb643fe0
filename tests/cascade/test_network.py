"""The cascade: four of ten regression tests for known bugs, patches, stages, guidance, bad input.

`papers/cascade.md` lists the ten. Too large a learning rate of v-prediction is no test: the value
of the large presets is a setting whose effect would take a full training to show.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from refusals import refused

from ct_nb.cascade.network import (
    SMALLEST_STD,
    Cascade,
    CascadeConfig,
    CascadeStage,
    ResidualStd,
    StageConfig,
    local_log_std,
    physics_error,
    resized,
)
from ct_nb.cascade.train import (
    CASCADE_PRESETS,
    CascadeRun,
    Sampler,
    load_cascade,
    sanity_checks,
)
from ct_nb.layers.denoiser import DenoiserConfig
from ct_nb.layers.diffusion import DiffusionConfig
from ct_nb.layers.tiling import blend_tiles, tile_starts, tile_weights
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.volume import WINDOWS, Grid, hu_to_mu
from ct_nb.training.trainer import TrainingStopped

STAGE = StageConfig(
    DenoiserConfig.preset("smoke", 16, condition_channels=2), DiffusionConfig(steps=20)
)


def scene(seeds=(1, 2), size=16):
    hu = torch.stack([phantom(seed, size).volume.tensor() for seed in seeds])
    geometry = ConeBeam.stack(
        [ConeBeam.biplanar(grid=Grid.cube(size), detector_shape=(32, 32), pixel_mm=16.0)] * len(hu)
    ).to(torch.float32)
    return hu, project(hu_to_mu(hu), geometry), geometry


@pytest.fixture(scope="module")
def cascade():
    torch.manual_seed(0)
    cascade = Cascade(
        CascadeConfig(
            (
                STAGE,
                replace(
                    STAGE,
                    network=DenoiserConfig.preset("smoke", 32, condition_channels=2),
                    coarse_noise=0.1,
                ),
            ),
            "prior",
            {"size": 16, "modes": 4},
        )
    ).eval()
    cascade.start.prior.fit(
        torch.stack([phantom(seed, 16).volume.tensor() for seed in range(10, 16)])
    )
    return cascade


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# regression tests for known bugs


def soft_tissue_share(window):
    return 400 / WINDOWS[window].width_hu


def test_defect_04_the_window_leaves_room_for_soft_tissue_and_is_stored(tmp_path):
    for preset in CASCADE_PRESETS.values():
        for stage in preset.stages:
            assert soft_tissue_share(stage.window) > 0.15
            assert (
                StageConfig.from_dict(json.loads(json.dumps(stage.to_dict()))).window
                == stage.window
            )
    assert soft_tissue_share("full") < 0.1  # the window that lost it
    low, high = (
        float(CascadeStage(STAGE).to_range(torch.full((1, 2, 2, 2), hu)).mean())
        for hu in (-160.0, 240.0)
    )
    assert high - low > 0.3


def per_image(error):
    "The wrong formula: every image is scaled to its own range first."

    def scaled(hu, xrays, geometry, energy_kev=60.0):
        projections, xrays = (
            (t - t.amin((-2, -1), keepdim=True))
            / (t.amax((-2, -1), keepdim=True) - t.amin((-2, -1), keepdim=True))
            for t in (project(hu_to_mu(hu, energy_kev), geometry), xrays)
        )
        return (projections - xrays).flatten(1).norm(dim=1) / xrays.flatten(1).norm(dim=1)

    return scaled


def test_defect_05_the_physics_loss_sees_scale_and_is_off_in_the_coarse_stage():
    hu, xrays, geometry = scene()
    denser = 1.5 * (hu + 1000) - 1000
    assert physics_error(hu, xrays, geometry).max() < 1e-5
    assert torch.allclose(physics_error(denser, xrays, geometry), torch.tensor(0.5), atol=0.01)
    # blind to half as much again
    assert per_image(physics_error)(denser, xrays, geometry).max() < 0.01
    for preset in CASCADE_PRESETS.values():
        assert preset.stages[0].physics_weight == 0 and all(
            stage.physics_weight > 0 for stage in preset.stages[1:]
        )
    stage = CascadeStage(replace(STAGE, physics_weight=1.0))
    assert (
        "physics" in stage.loss(hu, xrays, geometry, resized(hu, 8), seeded())[1]
        and "physics"
        not in CascadeStage(STAGE).loss(hu, xrays, geometry, resized(hu, 8), seeded())[1]
    )


def test_defect_09_beer_lambert():
    hu, _, geometry = scene()
    mu = hu_to_mu(hu)
    front, back = mu.clone(), mu.clone()
    front[:, :, 8:], back[:, :, :8] = 0, 0
    whole = project(mu, geometry)
    parts = (project(front, geometry), project(back, geometry))
    # what is behind one another multiplies
    assert torch.allclose(torch.exp(-whole), torch.exp(-parts[0]) * torch.exp(-parts[1]), atol=1e-5)
    # the sum of exponentials
    assert not torch.allclose(
        torch.exp(-whole), torch.exp(-parts[0]) + torch.exp(-parts[1]), atol=0.1
    )


def test_defect_10_the_lateral_view_has_its_own_angle():
    geometry = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(32, 32), pixel_mm=16.0).to(
        torch.float32
    )
    assert abs(float(geometry.azimuth_deg[1] - geometry.azimuth_deg[0])) == pytest.approx(
        90, abs=1e-3
    )
    box = torch.zeros(16, 16, 16)
    box[6:10, 7:9, 2:14] = 0.02  # broad from the front, narrow from the side
    frontal, lateral = project(box, geometry)
    wide = [int((image.amax(0) > 0.01).sum()) for image in (frontal, lateral)]
    assert wide[0] > 2 * wide[1]
    twice = project(box, geometry.select([0, 0]))  # the defect: the frontal view once more
    assert torch.equal(twice[0], twice[1]) and not torch.allclose(frontal, lateral)


# patches


def test_patches_cover_and_their_weights_sum_to_one():
    for size, patch, overlap, halo in (
        (40, 16, 8, 2),
        (64, 64, 16, 2),
        (37, 20, 6, 0),
        (256, 64, 16, 2),
    ):
        starts = tile_starts(size, patch, overlap)
        total = torch.zeros(size)
        for start, weight in zip(starts, tile_weights(size, starts, patch, overlap, halo)):
            total[start : start + patch] += weight
        assert (
            torch.allclose(total, torch.ones(size), atol=1e-6)
            and starts[0] == 0
            and starts[-1] + patch == size
        )
        assert all(b + overlap <= a + patch for a, b in zip(starts, starts[1:]))


def test_blended_is_whole_for_a_convolution_and_only_with_the_halo():
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(1, 1, 5, padding=2).requires_grad_(False)
    x = torch.randn(1, 1, 24, 24, 24)

    def cut(z, y, w, n):
        return layer(x[..., z : z + n, y : y + n, w : w + n])

    assert torch.allclose(blend_tiles(cut, 24, 12, 6, 2), layer(x), atol=1e-6)
    assert not torch.allclose(blend_tiles(cut, 24, 12, 6, 0), layer(x), atol=1e-3)
    with refused("halo"):
        blend_tiles(cut, 24, 12, 6, 3)
    with pytest.raises(ValueError, match="patch, overlap: need"):
        blend_tiles(cut, 24, 12, 8)


def test_a_stage_of_patches_trains_and_samples():
    stage = CascadeStage(replace(STAGE, patch=8, physics_weight=0.1))
    torch.nn.init.normal_(stage.network.last.weight, std=0.05)
    hu, xrays, geometry = scene((1,))
    losses = [stage.loss(hu, xrays, geometry, resized(hu, 8), seeded(n)) for n in range(3)]
    sum(loss for loss, _ in losses).backward()
    # at a step of pure noise it counts nothing
    assert max(figures["physics"] for _, figures in losses) > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.network.parameters())
    found = stage.eval().sample(resized(hu, 8), xrays, geometry, steps=2, generator=seeded())
    assert found.shape == hu.shape and torch.isfinite(found).all()


# stages and the cascade


def test_an_untrained_stage_returns_its_coarse_volume_when_guessing_at_once():
    hu, xrays, geometry = scene()
    found = CascadeStage(STAGE).eval().sample(hu, xrays, geometry, steps=1, generator=seeded())
    assert torch.allclose(found, hu.clamp(-1024, 1024), atol=0.1)


def test_the_noise_level_is_an_input_and_noise_is_added():
    stage = CascadeStage(replace(STAGE, coarse_noise=0.2))
    hu, xrays, geometry = scene()
    level = torch.tensor([0.0, 0.2])
    clean = stage._coarse(hu, torch.zeros(2))
    noisy = stage._coarse(hu, level, seeded())
    assert torch.equal(clean[0], noisy[0]) and (noisy[1] - clean[1]).std().item() == pytest.approx(
        0.2, rel=0.05
    )
    condition = stage._condition(xrays, geometry, noisy, level)
    assert torch.equal(condition.extra[:, 1].amax((1, 2, 3)), level)


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(cascade):
    torch.nn.init.normal_(cascade.stages[0].network.last.weight, std=0.05, generator=seeded())
    _, xrays, geometry = scene((1,), 32)
    a, b, c = (cascade.sample(xrays, geometry, steps=2, generator=seeded(n)) for n in (0, 0, 1))
    assert a.shape == (1, 32, 32, 32) and torch.equal(a, b) and (a - c).abs().max() > 1


def test_exact_guidance_agrees_with_the_xrays(cascade):
    hu, xrays, geometry = scene((1,), 32)
    error = {
        mode: float(
            physics_error(
                cascade.sample(xrays, geometry, steps=2, guidance=mode, generator=seeded()),
                xrays,
                geometry,
            )
        )
        for mode in ("off", "soft", "exact")
    }
    assert error["exact"] < error["off"] / 5 and error["soft"] < error["off"]


def test_weights_come_back(cascade, tmp_path):
    from ct_nb.training.checkpoints import save_weights

    save_weights(tmp_path, cascade, {"system": "cascade", "network": cascade.config.to_dict()})
    _, xrays, geometry = scene((1,), 32)
    ours, theirs = (
        c.sample(xrays, geometry, steps=2, generator=seeded())
        for c in (cascade, load_cascade(tmp_path))
    )
    assert torch.equal(ours, theirs)


def test_samples_of_a_scan_are_cached(cascade):
    _, xrays, geometry = scene((1,), 32)
    sampler, calls = Sampler(cascade, steps=1), []
    plain = cascade.sample
    cascade.sample = lambda *a, **k: calls.append(1) or plain(*a, **k)
    try:
        first = sampler.draws(xrays[0], geometry[0], 2)
        again = sampler.draws(xrays[0], geometry[0], 2)
        more = sampler.draws(xrays[0], geometry[0], 3)
        sampler.draws(xrays[0] + 0.01, geometry[0], 1)
        assert len(calls) == 4
        # the same images, told otherwise, are another scan
        sampler.draws(xrays[0] + 0.01, geometry[0].select([1, 0]), 1)
    finally:
        del cascade.sample
    assert len(calls) == 5 and torch.equal(first, again) and torch.equal(first, more[:2])


def test_local_log_std_is_the_standard_deviation():
    ramp = (torch.arange(12.0) * 0.02).view(1, 1, 12, 1, 1).expand(1, 1, 12, 12, 12).contiguous()
    near, wide = ((2 * (r - 1.5)).exp() - SMALLEST_STD for r in local_log_std(ramp)[0])
    assert torch.allclose(near[5, 5, 5], torch.tensor(0.02 * (2 / 3) ** 0.5), rtol=1e-3)
    # three boxes in turn: their variances add
    assert torch.allclose(wide[5, 5, 5], torch.tensor(0.02 * (3 * 2 / 3) ** 0.5), rtol=1e-3)
    assert (
        local_log_std(torch.full((1, 1, 8, 8, 8), 0.7))[0] - (math.log(SMALLEST_STD) / 2 + 1.5)
    ).abs().max() < 0.1


def test_residual_std_starts_with_one_value_and_learns_where_errors_are():
    torch.manual_seed(0)
    model = ResidualStd(0.15)
    coarse = torch.zeros(2, 2, 16, 16, 16)
    coarse[:, 0, 8:] = 0.8
    assert torch.allclose(model(coarse), torch.tensor(0.15))
    lacking = 0.01 * torch.randn(2, 1, 16, 16, 16, generator=seeded())
    lacking[:, :, 7:9] *= 20  # wrong at the edge
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        scale = model(coarse)
        optimizer.zero_grad()
        ((lacking / scale).square() / 2 + scale.log()).mean().backward()
        optimizer.step()
    found = model(coarse)[0, 0].mean((1, 2))
    assert 0.1 < found[7] < 0.4 and found[2] < 0.02 and found[13] < 0.02


def test_the_two_losses_do_not_move_each_others_networks(cascade, monkeypatch):
    import ct_nb.cascade.network as module

    hu, xrays, geometry = scene()
    stage, moved = cascade.stages[0], {}
    for weight in (0.0, 1.0):
        monkeypatch.setattr(module, "STD_LOSS_WEIGHT", weight)
        stage.zero_grad()
        stage.loss(hu, xrays, geometry, hu, seeded())[0].backward()
        moved[weight] = [
            [p.grad.clone() for p in part.parameters() if p.grad is not None]
            for part in (stage.error_scale, stage.network)
        ]
    stage.zero_grad()
    assert all(g.abs().max() == 0 for g in moved[0.0][0]) and any(
        g.abs().max() > 0 for g in moved[1.0][0]
    )
    assert all(torch.equal(a, b) for a, b in zip(moved[0.0][1], moved[1.0][1]))


# bad input


def test_invalid_arguments_are_refused(cascade):
    hu, xrays, geometry = scene((1,), 32)
    with refused("geometry"):
        cascade.sample(xrays, None, guidance="off")
    with refused("xrays"):
        cascade.sample(xrays * torch.nan, geometry)
    with refused("xrays"):
        cascade.sample(xrays[:, :1], geometry)
    with refused("steps"):
        cascade.sample(xrays, geometry, steps=21)
    with refused("mode"):
        cascade.sample(xrays, geometry, guidance="hard")
    with refused("coarse_hu"):
        cascade.sample(xrays, geometry, coarse_hu=torch.full((1, 16, 16, 16), torch.nan))
    with refused("hu"):
        cascade.stages[0].loss(hu, xrays, geometry, hu)
    with refused("window"):
        replace(STAGE, window="bones")
    with refused("network"):
        StageConfig(DenoiserConfig.preset("smoke", 16))
    with refused("stages"):
        CascadeConfig((STAGE, STAGE))
    with refused("stages"):
        CascadeConfig(
            (
                STAGE,
                replace(
                    STAGE,
                    network=DenoiserConfig.preset("smoke", 32, condition_channels=2),
                    window="full",
                ),
            )
        )
    with refused("coarse_noise"):
        replace(STAGE, coarse_noise=-0.1)
    with refused("physics_weight"):
        replace(STAGE, physics_weight=-0.1)
    with refused("start"):
        CascadeConfig((STAGE,), "drr2ct", {"window": "full", "energy_kev": 60.0})
    with refused("start"):
        CascadeConfig((STAGE,), "prior", {"energy_kev": 80.0})
    with refused("start"):
        CascadeConfig((STAGE,), "nothing")
    with refused("preset"):
        CascadeRun("huge")
    with refused("stage"):
        CascadeRun("smoke", stage=48)


def test_a_collapsed_output_stops_the_run():
    truth = phantom(1, 16).volume.tensor()
    assert sanity_checks(truth[None] + 10, truth)["structure"] > 0.8
    with pytest.raises(TrainingStopped, match="has collapsed: all voxels are about 3 HU"):
        sanity_checks(torch.full_like(truth, 3.0)[None], truth)
    with pytest.raises(TrainingStopped, match="the output is noise"):
        sanity_checks(1000 * torch.randn(truth.shape, generator=seeded())[None], truth)
    with pytest.raises(TrainingStopped, match="NaN"):
        sanity_checks(truth[None] * torch.nan, truth)


def test_a_coarse_model_that_knows_the_judged_cases_is_refused(tmp_path):
    from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
    from ct_nb.training.checkpoints import save_weights

    model = DRR2CT(DRR2CTConfig.preset("smoke"))
    judged = CascadeRun("smoke").open().validation.ids

    def save(cases, patients=()):
        return save_weights(
            tmp_path,
            model,
            {
                "system": "drr2ct",
                "network": model.config.to_dict(),
                "training": {"cases": cases, "patients": list(patients)},
            },
        )

    for cases, patients in (
        (judged, []),
        (["another scan"], CascadeRun("smoke").open().validation.patients[:1]),
    ):
        save(cases, patients)
        with refused("coarse"):
            CascadeRun("smoke", coarse=str(tmp_path)).open()
    save(["phantom-09999"])
    run = CascadeRun("smoke", "phantom:30", coarse=str(tmp_path)).open()
    assert not set(run.cohorts[64].phantoms_for_network.ids) & set(
        run.validation.ids
    ) and run.sizes == [32, 64]


def test_each_case_has_its_own_noise(cascade):
    from ct_nb.cascade.train import _Learner

    hu, xrays, geometry = scene()
    learner = _Learner(cascade, 0, 0)
    losses = [
        learner({"id": [name], "hu": hu[:1], "xrays": xrays[:1], "geometry": geometry[:1]}, 3)[
            0
        ].item()
        for name in ("phantom-00001", "phantom-00002", "phantom-00001")
    ]
    assert losses[0] != losses[1] and losses[0] == losses[2]
