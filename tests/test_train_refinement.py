"""The refiner's run: pairs of a frozen coarse model, who may be judged, what is written, and a sentence for what does not fit."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ct_nb.data.pairs import XrayPairs
from ct_nb.data.sources import phantoms
from ct_nb.files import write_json
from ct_nb.learn import train_refinement
from ct_nb.learn.checkpoints import WeightsError, save_weights
from ct_nb.learn.coarse import CoarsePairs, FrozenCoarse, known_cases, open_coarse, unseen_phantoms
from ct_nb.learn.reconstruction import reconstruct
from ct_nb.learn.refinement import RefinementModel, load_refiner, refine_reconstruction
from ct_nb.learn.refinement_losses import RefinementWeights
from ct_nb.learn.train import DRR2CTRun, Mixture, get_preset
from ct_nb.learn.train_refinement import REFINEMENT_PRESETS, RefinementLearner, RefinementRun, collate_coarse, gain, refinement_verdict
from ct_nb.nets.drr2ct import DRR2CT
from ct_nb.nets.refine import Refiner, RefinerConfig
from ct_nb.physics.volume import Grid, Volume
from ct_nb.view.refinement_figure import refinement_figure

NETWORK = replace(get_preset("smoke").network, size=16, latent_size=8, prior_modes=4)


def save_coarse(folder, training=None, **changes):
    "What a smoke run of system A leaves, with the linear prior fitted and the network as it began."
    run = DRR2CTRun("smoke", "phantom", folder, settings=replace(get_preset("smoke"), network=NETWORK)).open()
    torch.manual_seed(0)
    model = DRR2CT(NETWORK)
    model.prior.fit(torch.stack([phantoms(6, 16)[i].volume.tensor().float() for i in range(6)]))
    save_weights(folder, model, {"system": "drr2ct", "network": NETWORK.to_dict(), "preset": "smoke", "data": "phantom", "seed": 0, "settings": {"phantoms": 12, "validation_phantoms": 2},
                                 "training": {"cases": run.fitted.ids if training is None else training}, "validation": {"cases": run.validation.ids}, **changes})
    return run


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CT_NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "drr2ct"
    save_coarse(folder)
    return folder


@pytest.fixture(scope="module")
def run(coarse):
    done = RefinementRun("smoke", out=coarse.parent / "refinement", coarse=str(coarse)).open()
    done.history = done.fit(progress=False)
    done.board = done.judge(picture=refinement_figure, progress=False)
    return done


# a run from end to end

def test_a_run_leaves_weights_scores_and_a_folder_for_each_case(run):
    config = json.loads((run.out / "config.json").read_text())
    assert config["system"] == "refiner" and config["network"]["size"] == 16 and config["validation"]["cases"] == run.validation.ids and config["training"]["fingerprint"]
    assert {"refined", "refined_without_consistency", "coarse", "unsharp_mask", "consistency_alone"} == set(run.board.predictors) and set(run.board.floors) == {"coarse", "unsharp_mask", "consistency_alone"}
    head = (run.out / "scoreboard.csv").read_text().splitlines()[0].split(",")
    assert {"psnr", "ssim", "drr_error", "drr_error_held_out", "edge_error", "spectrum_error_db", "null_right", "null_invented"} <= set(head)
    told = json.loads((run.out / "refinement.json").read_text())
    assert set(told["gain_over"]["coarse"]["psnr"]) == {"mean", "low", "high", "patients"} and len(told["spectra"]["truth"]) == len(told["spectra"]["power"]["refined"]) == 8
    folders = sorted((run.out / "cases").iterdir())
    assert [folder.name for folder in folders] == sorted(run.judged.ids)
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"coarse.nii.gz", "refined.nii.gz", "ground_truth.nii.gz", "comparison.png", "metrics.json"}
        assert json.loads((folder / "metrics.json").read_text())["predictors"]["coarse"]["null_added"] == 0


def test_the_refiner_loads_as_it_was(run, coarse):
    item, again = run.judged[0], load_refiner(run.out)
    for consistency in (True, False):
        assert torch.equal(again.refine(item["coarse"], item["xrays"], item["geometry"], consistency), run.model.refine(item["coarse"], item["xrays"], item["geometry"], consistency))
    assert not torch.equal(again.spread_hu, RefinementModel(run.settings.network).spread_hu)
    with pytest.raises(WeightsError, match="system 'drr2ct', but 'refiner'"): load_refiner(coarse)


def test_a_killed_run_ends_with_the_same_weights(run, coarse, tmp_path):
    half = RefinementRun("smoke", out=tmp_path, coarse=str(coarse)).open()
    stop, step = RuntimeError("killed"), train_refinement._one_step
    def dies(learner, batch, number):
        if number == 4: raise stop
        return step(learner, batch, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_refinement, "_one_step", dies)
        with pytest.raises(RuntimeError, match="killed"): half.fit(progress=False)
    after = RefinementRun("smoke", out=tmp_path, coarse=str(coarse), resume=True).open()
    after.fit(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(after.model.state_dict().values(), run.model.state_dict().values()))


def test_the_layer_is_no_worse_on_the_xrays_than_the_network_alone(run):
    assert run.board.mean("refined", "drr_error") <= run.board.mean("refined_without_consistency", "drr_error")


# who may be judged

def test_training_pairs_are_of_phantoms_the_coarse_model_has_not_seen(run, coarse):
    known = known_cases(coarse)
    assert known and not known & set(run.pairs.ids) and not set(run.pairs.ids) & set(run.judged.ids) and not known & set(run.judged.ids)
    assert run.pairs.ids[0] == "phantom-00014"


def test_a_coarse_model_that_knows_a_judged_patient_is_refused(tmp_path):
    first = save_coarse(tmp_path / "knows")
    config = json.loads((tmp_path / "knows" / "config.json").read_text())
    config["training"]["cases"].append(first.validation.ids[0])
    write_json(tmp_path / "knows" / "config.json", config)
    with pytest.raises(ValueError, match=f"was trained on {first.validation.ids[0]}, a patient that this refiner would be judged on"): RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "knows")).open()


def test_what_a_coarse_model_started_from_counts(tmp_path):
    first = save_coarse(tmp_path / "teacher", training=[])
    save_coarse(tmp_path / "pupil", training=[], teacher=str(tmp_path / "teacher"))
    assert not known_cases(tmp_path / "pupil")
    save_coarse(tmp_path / "teacher", training=first.validation.ids)
    assert known_cases(tmp_path / "pupil") == set(first.validation.ids)
    with pytest.raises(ValueError, match="would be judged on"): RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "pupil")).open()
    save_coarse(tmp_path / "real", training=["lidc-0001"], data="../a/folder")  # learned from phantoms beside real CT
    assert known_cases(tmp_path / "real") == {"lidc-0001", *(f"phantom-{seed:05d}" for seed in range(12))}
    assert unseen_phantoms(known_cases(tmp_path / "real"), 1, 16).ids == ["phantom-00012"]


def test_a_run_that_went_on_from_itself_ends(tmp_path):
    save_coarse(tmp_path, start=str(tmp_path))
    assert known_cases(tmp_path)


# pairs

def test_pairs_are_kept_under_the_weights_and_the_case(coarse, tmp_path):
    asked = []
    class Counting(FrozenCoarse):
        def answer(self, item):
            asked.append(item["id"])
            return super().answer(item)
    data = Mixture((XrayPairs(phantoms(2, 32), size=16), 1))
    make = lambda: CoarsePairs(data, Counting(coarse), 1, tmp_path / "kept")
    first = [make()[place]["coarse"] for place in range(2)]
    assert asked == ["phantom-00000", "phantom-00001"]
    again = make()
    assert torch.equal(again[0]["coarse"], first[0]) and torch.equal(again[-1]["coarse"], first[1]) and len(asked) == 2
    assert (first[0] - FrozenCoarse(coarse).answer(data[0])).abs().max() <= 0.5 + 1e-3
    save_coarse(tmp_path / "other")
    model = open_coarse(tmp_path / "other").model
    with torch.no_grad(): model.prior.mean_hu += 100
    save_weights(tmp_path / "other", model, json.loads((tmp_path / "other" / "config.json").read_text()))
    CoarsePairs(data, type("Other", (Counting,), {})(tmp_path / "other"), 1, tmp_path / "kept")[0]
    assert len(asked) == 3  # other weights, other answers


def test_the_learner_trains_the_refiner_alone_in_whole_and_in_patches(run):
    batch = collate_coarse([run.pairs[0], run.pairs[1]])
    for config in (run.settings.network, replace(run.settings.network, patch=8)):
        torch.manual_seed(0)
        learner = RefinementLearner(Refiner(config), RefinementWeights())
        loss, figures = learner(batch, 0)
        loss.backward()
        assert set(figures) == {"absolute", "frequency", "gradient", "perceptual", "consistency"} and learner.refiner.last.weight.grad.abs().max() > 0
        assert torch.equal(learner(batch, 0)[0], loss)
    assert not torch.equal(learner(batch, 1)[0], loss)  # another patch


# verdicts

def rows(*gains):
    return [{"case": n, "patient": n, "predictor": name, "psnr": 20 + 3 * n + (g if name == "refined" else 0), "ssim": 0.5, "drr_error": 0.02, "drr_error_held_out": 0.02, "edge_error": 0.5, "edge_response": 0.5,
             "null_added": 0.1, "null_right": 0.1, "null_invented": 0.1} for n, g in enumerate(gains) for name in ("refined", "coarse", "unsharp_mask", "consistency_alone")]


def test_gains_are_paired():
    found = gain(rows(1.0, 1.1, 0.9), "psnr", "coarse")
    assert found.mean == pytest.approx(1.0) and 0.7 < found.low < 1 < found.high < 1.3 and found.patients == 3  # unpaired, the patients differ by 3 dB
    assert "a gain" in refinement_verdict(rows(1.0, 1.1, 0.9))[0] and "no gain is shown" in refinement_verdict(rows(1.0, -1.1, 0.9))[0] and "a loss" in refinement_verdict(rows(-1.0, -1.1, -0.9))[0]
    assert "one patient gives no interval" in refinement_verdict(rows(1.0))[0]
    assert "edge_error" in train_refinement.BETTER and gain([{**row, "edge_error": 0.4 if row["predictor"] == "refined" else 0.5} for row in rows(0, 0)], "edge_error", "coarse").mean == pytest.approx(0.1)


def test_a_coarse_volume_sharper_than_the_truth_is_told():
    sharp = [{**row, "edge_response": 1.3} for row in rows(0.1, 0.2)]
    assert "already sharper" in refinement_verdict(sharp)[-1] and "sharper" not in refinement_verdict(rows(0.1, 0.2))[-1]


# reconstructions

@pytest.fixture(scope="module")
def found(coarse, run):
    item = run.judged[0]
    centre = np.array([12.0, -8.0, 40.0])
    return reconstruct(item["xrays"], item["geometry"].moved(torch.from_numpy(centre)).on(Grid.cube(16, 320.0, centre)), open_coarse(coarse).model, samples=2)


def test_a_reconstruction_is_refined_where_it_lies(found, run):
    item, refined = run.judged[0], refine_reconstruction(found, run.model)
    assert refined.volume.grid == found.volume.grid and refined.how == "refined" and len(refined.samples) == 2 and refined.spread is found.spread and "before refinement" in refined.notes[-1]
    expected = run.model.refine(found.volume.tensor().float(), item["xrays"], item["geometry"])
    assert torch.allclose(refined.volume.tensor().float(), expected, atol=0.5) and not np.array_equal(refined.volume.hu, found.volume.hu)
    assert refined.reprojection.shape == found.reprojection.shape and not np.array_equal(refined.reprojection, found.reprojection) and len(refined.residual) == len(found.residual)
    alone = refine_reconstruction(replace(found, consistent=False, how="without the data-consistency layer"), run.model)
    assert alone.how == "without the data-consistency layer, refined" and not np.array_equal(alone.volume.hu, refined.volume.hu)


@pytest.mark.parametrize("change, sentence", [
    (lambda f: replace(f, volume=Volume(np.zeros((8, 8, 8), np.float32), Grid.cube(8, 320.0, f.geometry.grid.center_mm).affine)), "8×8×8 voxels of 40.00 mm, this refiner is for 16×16×16 of 20.00 mm"),
    (lambda f: replace(f, window="soft_tissue"), "window: this refiner was made for coarse volumes in the window 'chest', got 'soft_tissue'"),
    (lambda f: replace(f, energy_kev=80.0), "energy_kev: this refiner was made for X-rays of 60 keV, got 80"),
    (lambda f: replace(f, xrays=None), "takes its detail from X-rays, and this reconstruction has none")])
def test_a_reconstruction_that_does_not_fit_gets_a_sentence(found, run, change, sentence):
    with pytest.raises(ValueError, match=sentence): refine_reconstruction(change(found), run.model)


def test_missing_xrays_get_a_sentence(run):
    item = run.judged[0]
    with pytest.raises(ValueError, match="xrays: a refiner takes its detail from X-rays"): run.model.refine(item["coarse"], None, item["geometry"])
    with pytest.raises(ValueError, match="geometry: a refiner takes its detail"): run.model.refine(item["coarse"], item["xrays"], None)


# where coarse volumes come from

def test_a_folder_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="run `make demo` first"): RefinementRun("smoke", out=tmp_path, coarse=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds neither a trained run"): RefinementRun("smoke", out=tmp_path, coarse=str(tmp_path))


def test_settings_that_are_not_the_coarse_models_are_refused(coarse, tmp_path):
    smoke = REFINEMENT_PRESETS["smoke"]
    with pytest.raises(ValueError, match="refiner is for size 32, the coarse volumes of .* have 16"): RefinementRun("smoke", out=tmp_path, coarse=str(coarse), settings=replace(smoke, network=RefinerConfig.preset("smoke", 32)))
    with pytest.raises(ValueError, match="refiner is for window soft_tissue, the coarse volumes of .* have chest"):
        RefinementRun("smoke", out=tmp_path, coarse=str(coarse), settings=replace(smoke, network=replace(smoke.network, window="soft_tissue")))
    with pytest.raises(ValueError, match="preset: must be one of"): RefinementRun("tiny", out=tmp_path, coarse=str(coarse))


def test_coarse_files_on_another_grid_or_of_other_cases_get_a_sentence(run, tmp_path):
    ids = [run.cases.fitted.ids[0], run.validation.ids[0]]
    items = [run.cases.fitted[0], run.validation[0]]
    for id, item in zip(ids, items): Volume(item["hu"].round().numpy(), item["affine"].numpy()).save(tmp_path / "files" / id / "coarse.nii.gz")
    from_files = RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open()
    assert from_files.pairs.ids == ids[:1] and from_files.judged.ids == ids[1:] and "beware" in from_files.describe()
    assert torch.equal(from_files.judged[0]["coarse"], items[1]["hu"].round())
    (tmp_path / "files" / ids[1] / "coarse.nii.gz").unlink()
    with pytest.raises(ValueError, match=f"has no file for any of the cases to judge on; name the files after the cases, like {ids[1]}.nii.gz"): RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open()
    Volume(items[1]["hu"][:8].numpy(), items[1]["affine"].numpy()).save(tmp_path / "files" / f"{ids[1]}.nii.gz")
    with pytest.raises(ValueError, match="is on 8×16×16 voxels .* its case on 16×16×16"): RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open().judged[0]
