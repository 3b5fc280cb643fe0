"A drr2ct that corrects a bent atlas: what it starts from, what is kept, what a case may not see."

import json
from dataclasses import replace

import pytest
import torch
from refusals import refused

import ct_nb.atlas.reconstruct as atlas_reconstruct
from ct_nb.atlas.fit import FitSettings, Level
from ct_nb.atlas.reconstruct import AtlasPredictor
from ct_nb.atlas.volumes import Atlas
from ct_nb.data.cache import DiskCache
from ct_nb.drr2ct.atlas_base import AtlasBase
from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
from ct_nb.drr2ct.predict import ModelPredictor, load_drr2ct, reconstruct
from ct_nb.drr2ct.train import DRR2CTRun
from ct_nb.evaluation.metrics import psnr
from ct_nb.phantom.chest import phantom
from ct_nb.physics.drr import render_drr
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid
from ct_nb.training.checkpoints import WeightsError, save_weights

LEVELS = ((16, 4, 8), (16, 8, 6))
SMALL = replace(
    DRR2CTConfig.preset("smoke"),
    size=16,
    latent_size=8,
    prior_modes=2,
    base="atlas",
    atlas_count=3,
    atlas_levels=LEVELS,
)
BEAM = ConeBeam.biplanar(grid=Grid.cube(16), detector_shape=(64, 64), pixel_mm=8.0)


@pytest.fixture(scope="module")
def atlas():
    return Atlas.open("phantom:3", 16, cache_dir=None)


@pytest.fixture(scope="module")
def scene():
    "A phantom that the atlas does not know, (16, 16, 16), and its X-rays (2, 64, 64)."
    fine = phantom(40, 32).volume.tensor().float()
    truth = torch.nn.functional.avg_pool3d(fine[None], 2)[0]
    return truth, render_drr(fine, BEAM.on(Grid.cube(32)))


def network(atlas, config=SMALL):
    torch.manual_seed(0)
    model = DRR2CT(config).eval()
    model.atlas.take(atlas)
    return model


@pytest.fixture
def fits(monkeypatch):
    "How often an atlas is fitted."
    counted = []
    fit = atlas_reconstruct.fit

    def counting(*arguments):
        counted.append(1)
        return fit(*arguments)

    monkeypatch.setattr(atlas_reconstruct, "fit", counting)
    return counted


def test_before_training_it_gives_the_atlas_reconstruction(atlas, scene):
    truth, _ = scene
    xrays = render_drr(truth, BEAM)  # from the grid itself, so that they can be met exactly
    settings = FitSettings(levels=tuple(Level(*level) for level in LEVELS))
    alone = psnr(AtlasPredictor(atlas, settings).predict(xrays, BEAM), truth)
    model = network(atlas)
    untouched = ModelPredictor(model, consistency=False).predict(xrays, BEAM)
    assert psnr(untouched, truth) == pytest.approx(alone, abs=0.05)
    assert psnr(ModelPredictor(model).predict(xrays, BEAM), truth) > alone - 0.05
    with torch.no_grad():
        prediction = model(xrays[None], BEAM)
    assert torch.equal(prediction.base_hu[0].clamp_min(-1000), prediction.unconstrained_hu[0])


def test_a_coarser_grid_corrects_the_whole_volume(atlas, scene):
    _, xrays = scene
    model = network(atlas, replace(SMALL, grid_size=8, latent_size=4))
    torch.nn.init.normal_(model.decoder.last.weight, std=0.1)
    with torch.no_grad():
        found = model(xrays[None], BEAM, consistency=False)
    change = found.unconstrained_hu - found.base_hu
    assert change.shape == (1, 16, 16, 16) and change.std() > 1
    assert (change[..., 1:] - change[..., :-1]).std() < change.std(), "it is not smooth"


def test_the_spread_and_what_the_xrays_moved_reach_the_network(atlas, scene):
    _, xrays = scene
    model = network(atlas)
    torch.nn.init.normal_(model.decoder.last.weight, std=0.1)
    base = model.atlas.of(xrays, BEAM)
    assert (base[2] > 0).any() and not torch.equal(base[0], base[1])
    with torch.no_grad():
        outputs = []
        for change in (0.0, 50.0):
            for channel in (1, 2):
                changed = base.clone()
                changed[channel] += change
                found = model(xrays[None], BEAM, changed[None], consistency=False)
                outputs.append(found.unconstrained_hu)
    same, again, *others = outputs
    assert torch.equal(same, again)
    assert all((same - other).abs().max() > 0.1 for other in others)


def test_a_case_of_the_atlas_is_fitted_without_itself(atlas, scene):
    _, xrays = scene
    base = AtlasBase(16, 3, LEVELS)
    base.take(atlas)
    own = atlas.patients[1]
    assert base.atlas(own).patients == [atlas.patients[0], atlas.patients[2]]
    assert len(base.atlas("somebody else")) == len(base.atlas()) == 3
    without = AtlasPredictor(atlas.without(own), base.settings).predict(xrays, BEAM)
    assert (base.of(xrays, BEAM, own)[0] - without).abs().max() < 1.01
    alone = AtlasBase(16, 1, LEVELS)
    alone.take(atlas.subset([1]))
    with refused("atlas"):
        alone.of(xrays, BEAM, own)


def test_a_base_is_computed_once_and_kept(atlas, scene, fits, tmp_path):
    _, xrays = scene
    first = network(atlas)
    first.atlas.cache = DiskCache(tmp_path)
    hu = ModelPredictor(first).predict(xrays, BEAM)
    again = network(atlas)
    again.atlas.cache = DiskCache(tmp_path)
    assert torch.equal(ModelPredictor(again).predict(xrays, BEAM), hu) and len(fits) == 1
    again.atlas.of(xrays + 0.01, BEAM)
    again.atlas.with_levels(LEVELS[:1]).of(xrays, BEAM)
    again.atlas.of(xrays, BEAM, atlas.patients[0])
    assert len(fits) == 4, "other X-rays, another fit or another atlas take a base of their own"


def test_weights_hold_the_atlas_and_predict_the_same(atlas, scene, tmp_path):
    _, xrays = scene
    model = network(atlas)
    torch.nn.init.normal_(model.decoder.last.weight, std=0.05)
    save_weights(tmp_path, model, {"system": "drr2ct", "network": model.config.to_dict()})
    loaded = load_drr2ct(tmp_path)
    assert torch.equal(loaded.atlas.hu, model.atlas.hu)
    expected, found = (ModelPredictor(one).predict(xrays, BEAM) for one in (model, loaded))
    assert torch.equal(expected, found)
    result = reconstruct(xrays, BEAM, loaded, samples=1)
    assert (result.volume.tensor() - found).abs().max() < 1.0


def test_weights_without_an_atlas_are_refused_with_a_sentence(atlas, tmp_path):
    linear = DRR2CT(replace(SMALL, base="linear"))
    config = {"system": "drr2ct", "network": SMALL.to_dict()}
    save_weights(tmp_path, linear, config)
    with pytest.raises(WeightsError, match="lacks the tensor 'atlas.hu'"):
        load_drr2ct(tmp_path)
    save_weights(tmp_path, DRR2CT(SMALL), config)
    with pytest.raises(WeightsError, match="'atlas.hu' are NaN"):
        load_drr2ct(tmp_path)
    with refused("atlas") as caught:
        DRR2CT(SMALL)(torch.zeros(1, 2, 64, 64), BEAM)
    assert "no atlas yet" in caught.value.reason


def test_what_does_not_fit_is_refused(atlas, tmp_path):
    with refused("base"):
        replace(SMALL, base="mean")
    with refused("atlas_count"):
        replace(SMALL, atlas_count=0)
    with refused("atlas"):
        AtlasBase(16, 2, LEVELS).take(atlas)
    with refused("grid_size"):
        replace(SMALL, grid_size=6)
    with refused("grid_size"):
        replace(SMALL, grid_size=8, decoder="diffusion")
    with refused("stage"):
        DRR2CTRun("atlas", stage="joint fine", out=tmp_path)


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def trained_on_atlas(trained_cache, tmp_path_factory):
    "The smallest run, whose network may not fit an atlas while it is trained."
    folder = tmp_path_factory.mktemp("atlas")
    run = DRR2CTRun("micro", "phantom:9", folder, base="atlas").open()
    run.fit(progress=False)
    return run


def test_a_run_starts_from_phantoms_that_it_does_not_train_on(trained_on_atlas):
    run = trained_on_atlas
    own = {run.cohort.cases().at(0, place)["patient"] for place in range(len(run.cohort.cases()))}
    atlas = set(run.case_base.patients)
    assert len(atlas) == run.model.config.atlas_count == 2
    assert not atlas & (own | set(run.validation.patients)) and atlas <= set(run.training.patients)
    assert {row["stage"] for row in run.history} == {"joint", "latent", "masked", "fine"}
    config = json.loads((run.out / "config.json").read_text())
    assert config["network"]["base"] == "atlas"
    assert not any(stage["mixup"] for stage in config["settings"]["stages"])


def test_training_and_scores_use_what_was_kept(trained_on_atlas, fits, tmp_path):
    again = DRR2CTRun("micro", "phantom:9", tmp_path, base="atlas").open()
    again.fit(progress=False)
    assert not fits
    for name, value in trained_on_atlas.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    start, full = again.baselines[-2:]
    item = again.validation[0]
    untrained = ModelPredictor(again._untrained())  # its last layer is zero
    untrained.model.atlas.hu.copy_(again.model.atlas.hu)
    untrained.consistency = False
    assert torch.equal(
        start.predict(item["xrays"], item["geometry"]),
        untrained.predict(item["xrays"], item["geometry"]),
    )
    assert (start.name, full.name) == ("network_start", "atlas_reconstruction")
    assert full.base.levels != start.base.levels and torch.equal(full.base.hu, start.base.hu)


def test_weights_of_another_base_are_no_start(trained, tmp_path):
    run = DRR2CTRun("micro", "phantom:9", tmp_path, start=str(trained("drr2ct")), base="atlas")
    with refused("start") as caught:
        run.open().build(progress=False)
    assert "base" in caught.value.reason
