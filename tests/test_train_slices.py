"""Training of system E: crops that are what they say, one row of steps to a board, runs that resume to the same weights, and bad input in a sentence."""

import json
import shutil

import numpy as np
import pytest
import torch

import ct_nb.learn.train_slices as training
from ct_nb.data.slab_archives import open_stacks
from ct_nb.data.slabs import SlabPairs, SlabRange, collate_slabs
from ct_nb.data.slice_crops import KeptStacks, SliceCrops, thinned_less
from ct_nb.learn.checkpoints import WeightsError
from ct_nb.learn.train_slices import SLICES_PRESETS, Slices, SlicesRun, _Learner, get_slices_preset, load_slices, slices_cut_figure
from ct_nb.nets.slices import SliceDiffusion, SliceRegressor
from ct_nb.view.figures import training_figure


@pytest.fixture(scope="module")
def pairs(): return SlabPairs(KeptStacks(open_stacks("phantom:2", size=64, side_mm=192)), SlabRange((9.0, 12.0), (0.8, 1.2), (0.0, 1.0), ("rectangular", "gaussian")), 32, 3)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A smoke run through fit and judge."
    out = tmp_path_factory.mktemp("run")
    run = SlicesRun("smoke", out=out).open()
    history = run.fit(progress=False)
    return run, history, run.judge(progress=False)


def test_padding_in_a_batch_teaches_nothing(pairs):
    crops = SliceCrops(pairs)
    items = [thinned_less(pairs.at(3, 0), 4.0), pairs.at(3, 0)]
    batch = collate_slabs(items)
    assert not batch["mask"].all()
    torch.manual_seed(0)
    model = SliceRegressor(training.SliceRegressorConfig.preset("smoke"))
    given = lambda b: [b[key] for key in ("thin", "thick", "thick_axis", "thin_axis", "profile", "mask")]
    spoilt = dict(batch, thin=torch.where(batch["mask"][..., None, None], batch["thin"], 900.0))
    assert model.loss(*given(batch))[0] == model.loss(*given(spoilt))[0] != model.loss(*given(spoilt)[:-1])[0]


def test_a_step_draws_the_same_again(pairs):
    batch = collate_slabs([SliceCrops(pairs).at(0, 0)])
    torch.manual_seed(0)
    learner = _Learner(SliceDiffusion(training.SliceDiffusionConfig.preset("smoke")), 3)
    losses = [learner(batch, step)[1]["diffusion"] for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_both_are_of_one_size():
    for name, preset in SLICES_PRESETS.items():
        with torch.device("meta"): sizes = [sum(p.numel() for n, p in kind(config(preset.network)).network.named_parameters() if "time" not in n) for kind, config in ((SliceRegressor, training.SliceRegressorConfig), (SliceDiffusion, training.SliceDiffusionConfig))]
        assert abs(sizes[0] / sizes[1] - 1) < 0.06, (name, sizes)


def test_the_run_leaves_what_it_promises(done):
    run, history, board = done
    out = run.out
    for name in ("model.safetensors", "config.json", "scoreboard.csv", "metrics.json", "scoreboard.png", "cuts.png", "stages/regressor/history.jsonl", "stages/diffusion/model.safetensors", "vae/model.safetensors"): assert (out / name).is_file(), name
    assert not list(out.rglob("training_state.pt"))
    config = json.loads((out / "config.json").read_text())
    assert config["system"] == "slices" and config["versions"]["torch"] and config["training"]["fingerprint"] != config["validation"]["fingerprint"]
    assert config["seen"]["thick_mm"] == pytest.approx([9.6, 14.4]) and config["seen"]["thin_mm"] == pytest.approx([3.75, 5.625])
    assert not set(config["training"]["cases"]) & set(config["validation"]["cases"]) and not set(run.training.patients) & set(run.validation.patients)
    assert [row["step"] for row in history] == [4, 8, 12, 16] and training_figure(history)


def test_the_board_holds_networks_floors_and_ceilings(done):
    run, _, board = done
    assert board.models == ["regressor_consistent", "regressor", "diffusion_sample", "diffusion_sample_free", "diffusion_mean"]
    assert board.floors == ["nearest", "linear", "cubic", "back_projection"] and {"ceiling_vae", "ceiling_residual"} <= set(board.predictors)
    for name in ("regressor_consistent", "diffusion_mean", "diffusion_sample"): assert board.mean(name, "reaveraged_worst_hu") < 1
    assert board.mean("diffusion_sample_free", "reaveraged_worst_hu") > 1
    assert board.mean("ceiling_residual", "psnr") >= board.mean("back_projection", "psnr") - 0.5
    assert set(board.patients) == {run.validation.patients[0]} and board.about["thick_mm"] == 12


def test_weights_are_read_as_they_were(done):
    run = done[0]
    again = load_slices(run.out)
    assert not again.training and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), run.slices.state_dict().values()))
    assert again.about["preset"] == "smoke" and float(again.diffusion.residual_scale.min()) > 0 and not torch.equal(again.diffusion.residual_scale, torch.ones(1, 4, 1, 1, 1))
    with pytest.raises(WeightsError, match="slice_vae"): load_slices(run.out / "vae")


def test_a_killed_run_ends_with_the_same_weights(done, tmp_path):
    run = done[0]
    class Killed(Exception): pass
    again = SlicesRun("smoke", out=tmp_path, vae=str(run.out / "vae"), model="regressor").open()
    step = training._one_step
    def until(learner, batch, number):
        if number == 6: raise Killed
        return step(learner, batch, number)
    training._one_step = until
    try:
        with pytest.raises(Killed): again.fit(progress=False)
    finally: training._one_step = step
    resumed = SlicesRun("smoke", out=tmp_path, vae=str(run.out / "vae"), model="regressor", resume=True).open()
    history = resumed.fit(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.slices.regressor.state_dict().values(), run.slices.regressor.state_dict().values())) and [row["step"] for row in history] == [4, 8]
    assert resumed.slices.diffusion is None and load_slices(tmp_path).diffusion is None
    board = resumed.judge(progress=False)
    assert board.models == ["regressor_consistent", "regressor"] and "ceiling_vae" not in board.predictors
    other = SlicesRun("smoke", out=tmp_path, vae=str(run.out / "vae"), model="diffusion", steps=4).open()
    other.fit(progress=False)
    assert other.slices.regressor is not None and other.slices.diffusion is not None  # the one that was there was taken


def test_bad_settings_get_a_sentence(done, tmp_path):
    with pytest.raises(ValueError, match="preset: must be one of"): get_slices_preset("huge")
    with pytest.raises(ValueError, match="model: must be both"): SlicesRun("smoke", model="gan")
    with pytest.raises(ValueError, match="needs a regressor"): Slices()
    with pytest.raises(WeightsError, match="no such file"): SlicesRun("smoke", out=tmp_path, vae=str(tmp_path / "none")).open()
    shutil.copytree(done[0].out / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config["training"]["cases"] += config["validation"]["cases"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="would be judged here"): SlicesRun("smoke", out=tmp_path / "run", vae=str(tmp_path / "vae")).open()


def test_steps_and_spacing_are_taken():
    run = SlicesRun("cpu", steps=10, thick_mm=3.0, seed=4)
    assert run.settings.regressor.steps == run.settings.diffusion.steps == 10 and run.settings.regressor.warmup_steps == 2 and run.settings.thick_mm == 3 and run.settings.diffusion.seed == 4
    assert SlicesRun("cpu").settings.thick_mm == 5


def test_the_picture_shows_what_is_there(pairs):
    item = SlabPairs(pairs.source, SlabRange((9.0, 9.0)))[0]
    figure = slices_cut_figure(item, {"linear": item["thin"], "unknown": item["thin"]})
    titles = [axis.get_title() for axis in figure.axes]
    assert {"thick", "linear", "truth"} <= set(titles) and "unknown" not in titles and "error, mean 0 HU" in titles
