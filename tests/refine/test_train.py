"""A refiner's run from end to end on a tiny drr2ct: what it leaves, what it learns from; and a reconstruction refined. That a killed run resumes is in tests/training/test_resume.py."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from places import FULL
import torch
from refinement_runs import NETWORK, cache, save_coarse  # noqa: F401 (cache is a fixture)
from refusals import refused
from torch import nn

from ct_nb.app.reconstruct_files import reconstruct_files, report
from ct_nb.core.files import write_json
from ct_nb.data.cohort import RepeatedConcatDataset
from ct_nb.data.open import phantom_source
from ct_nb.data.radiograph_io import write_radiographs
from ct_nb.data.xray_pairs import XrayPairs
from ct_nb.drr2ct.predict import reconstruct
from ct_nb.evaluation.inference import view_residuals
from ct_nb.evaluation.sharpness import SHARPNESS_METRICS
from ct_nb.phantom.chest import phantom
from ct_nb.physics.detector import bin_pixels
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.solvers import data_consistency
from ct_nb.physics.volume import Grid, Volume, hu_to_mu, mu_to_hu
from ct_nb.refine import train as train_refinement
from ct_nb.refine.baselines import gaussian_high_pass
from ct_nb.refine.coarse_inputs import (
    CoarsePairs,
    FrozenCoarse,
    known_cases,
    open_coarse,
    unseen_phantoms,
    weights_digest,
)
from ct_nb.refine.figures import draw_run
from ct_nb.refine.losses import RefinementWeights
from ct_nb.refine.network import Refiner, RefinerConfig
from ct_nb.refine.pipeline import (
    ConsistencySettings,
    RefinementModel,
    load_refiner,
    refine_reconstruction,
)
from ct_nb.refine.train import (
    REFINEMENT_PRESETS,
    RefinementLearner,
    RefinementRun,
    collate_coarse,
)
from ct_nb.training.checkpoints import WeightsError, save_weights


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "drr2ct"
    save_coarse(folder)
    return folder


@pytest.fixture(scope="module")
def run(coarse):
    done = RefinementRun("smoke", out=coarse.parent / "refinement", coarse=str(coarse)).open()
    done.history = done.fit(progress=False)
    done.board = done.evaluate(progress=False)
    return done


# a run from end to end


def test_a_run_leaves_weights_scores_and_a_folder_for_each_case(run):
    config = json.loads((run.out / "config.json").read_text())
    assert (
        config["system"] == "refiner"
        and config["network"]["size"] == 16
        and config["validation"]["cases"] == run.validation.ids
        and config["training"]["fingerprint"]
    )
    assert {
        "refined",
        "refined_without_consistency",
        "coarse",
        "unsharp_mask",
        "consistency_alone",
        "linear_prior",
        "atlas_reconstruction",
    } == set(run.board.predictors) and set(run.board.baselines) == {
        "coarse",
        "unsharp_mask",
        "consistency_alone",
        "linear_prior",
        "atlas_reconstruction",
    }
    head = (run.out / "scoreboard.csv").read_text().splitlines()[0].split(",")
    assert {"psnr", "ssim", "drr_error", "drr_error_held_out", *SHARPNESS_METRICS} <= set(head)
    metrics, told = (
        json.loads((run.out / f"{name}.json").read_text()) for name in ("metrics", "refinement")
    )
    assert (
        set(SHARPNESS_METRICS)
        <= set(metrics["predictors"]["refined"]) & set(metrics["definitions"])
    )
    assert {"psnr", "edge_response", "null_right", "null_invented"} <= set(
        told["gain_over"]["consistency_alone"]
    ) and len(told["spectra"]["truth"]) == len(told["spectra"]["power"]["refined"]) == 8
    means = [model.refiner.seen_mean for model in (run.model, load_refiner(run.out))]
    # measured on training cases, and stored with the weights
    assert means[0].abs().max() > 0.1 and torch.equal(*means)
    folders = sorted((run.out / "cases").iterdir())
    assert [folder.name for folder in folders] == sorted(run.evaluation_pairs.ids)
    for folder in folders:
        case = json.loads((folder / "metrics.json").read_text())
        assert case["predictors"]["coarse"]["null_added"] == 0 and set(case["predictors"]) == set(
            run.board.predictors
        ) == set(case["spectra"]["power"])
    assert np.allclose(
        told["spectra"]["power"]["refined"],
        np.mean(
            [
                json.loads((folder / "metrics.json").read_text())["spectra"]["power"]["refined"]
                for folder in folders
            ],
            axis=0,
        ),
    )


def test_its_pictures_are_drawn_from_its_files(run):
    drawn = {str(path.relative_to(run.out)) for path in draw_run(run.out)}
    assert drawn == {
        "training.png",
        "spectra.png",
        *(
            f"cases/{case}/{picture}.png"
            for case in run.evaluation_pairs.ids
            for picture in ("comparison", "spectrum")
        ),
    }
    assert all((run.out / name).stat().st_size > 5000 for name in drawn)
    with pytest.raises(
        ValueError, match="holds no refinement.json, so it is no evaluated run of a refiner"
    ):
        draw_run(run.out / "cases")


def test_the_command_says_how_to_draw_them(run):
    *before, last = run.summary(run.board).splitlines()
    assert before[-len(run.verdict) :] == run.verdict
    assert last == f"the pictures: python -m ct_nb.refine.figures {run.out}"
    (run.out / "spectra.png").unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, "-W", "ignore", *shlex.split(last.split("python ")[1])],
        check=True,
        capture_output=True,
    )
    assert (run.out / "spectra.png").stat().st_size > 5000


def test_the_refiner_loads_as_it_was(run, coarse):
    item, again = run.evaluation_pairs[0], load_refiner(run.out)
    for consistency in (True, False):
        assert torch.equal(
            again.refine(item["coarse"], item["xrays"], item["geometry"], consistency),
            run.model.refine(item["coarse"], item["xrays"], item["geometry"], consistency),
        )
    assert not torch.equal(again.spread_hu, RefinementModel(run.settings.network).spread_hu)
    with pytest.raises(WeightsError, match="system 'drr2ct', but 'refiner'"):
        load_refiner(coarse)


def test_the_layer_takes_back_what_the_xrays_deny(run):
    item = run.evaluation_pairs[0]
    denser = 1.2 * (item["coarse"] + 1000) - 1000
    error = {
        consistency: max(
            view_residuals(
                run.model.refine(denser, item["xrays"], item["geometry"], consistency),
                item["xrays"],
                item["geometry"],
            )[0]
        )
        for consistency in (True, False)
    }
    assert error[True] < 0.5 * error[False]


# who may be judged


def test_training_pairs_are_of_phantoms_the_coarse_model_has_not_seen(run, coarse):
    known = known_cases(coarse)
    assert (
        known
        and not known & set(run.pairs.ids)
        and not set(run.pairs.ids) & set(run.evaluation_pairs.ids)
        and not known & set(run.evaluation_pairs.ids)
    )
    assert run.pairs.ids[0] == "phantom-00014"


@FULL
def test_a_refiner_is_judged_on_patients_of_another_folder(run, coarse, tmp_path):
    for seed in (901, 902):
        phantom(seed, 64).volume.save(tmp_path / "cts" / f"patient-{seed}.nii.gz")
    again = RefinementRun("smoke", out=tmp_path / "out", coarse=str(coarse)).open()
    with pytest.raises(
        ValueError,
        match="trained on phantom-00000 of phantom:3; evaluate it on other patients",
    ):
        again.on_others(run.out, "phantom:3")
    board = again.on_others(run.out, str(tmp_path / "cts")).evaluate(progress=False)
    again.settings = replace(
        again.settings, network=replace(again.settings.network, energy_kev=80.0)
    )
    with pytest.raises(
        ValueError,
        match="is for energy_kev 60.0, this run has 80.0; open the run as the refiner's was",
    ):
        again.on_others(run.out, str(tmp_path / "cts"))
    assert (
        board.patients == ["patient-901", "patient-902"]
        and board.metrics
        and {"refined", "coarse"} <= set(board.predictors)
    )
    assert len(list((tmp_path / "out" / "cases").iterdir())) == 2


def test_a_coarse_model_that_knows_a_judged_patient_is_refused(tmp_path):
    first = save_coarse(tmp_path / "knows")
    config = json.loads((tmp_path / "knows" / "config.json").read_text())
    config["training"]["cases"].append(first.validation.ids[0])
    write_json(tmp_path / "knows" / "config.json", config)
    with pytest.raises(
        ValueError,
        match=(
            f"was trained on {first.validation.ids[0]}, a patient that this refiner would be"
            " evaluated on"
        ),
    ):
        RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "knows")).open()


def test_what_a_coarse_model_started_from_counts(tmp_path):
    first = save_coarse(tmp_path / "teacher", training=[])
    save_coarse(tmp_path / "pupil", training=[], teacher=str(tmp_path / "teacher"))
    assert not known_cases(tmp_path / "pupil")
    save_coarse(tmp_path / "teacher", training=first.validation.ids)
    assert known_cases(tmp_path / "pupil") == set(first.validation.ids)
    with pytest.raises(ValueError, match="would be evaluated on"):
        RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "pupil")).open()
    # learned from phantoms beside real CT
    save_coarse(tmp_path / "real", training=["lidc-0001"], data="../a/folder")
    assert known_cases(tmp_path / "real") == {
        "lidc-0001",
        *(f"phantom-{seed:05d}" for seed in range(12)),
    }
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

    data = RepeatedConcatDataset((XrayPairs(phantom_source(2, 32), size=16), 1))
    make = lambda: CoarsePairs(data, Counting(coarse), 1, tmp_path / "kept")
    first = [make()[place]["coarse"] for place in range(2)]
    assert asked == ["phantom-00000", "phantom-00001"]
    again = make()
    assert (
        torch.equal(again[0]["coarse"], first[0])
        and torch.equal(again[-1]["coarse"], first[1])
        and len(asked) == 2
    )
    assert (first[0] - FrozenCoarse(coarse).answer(data[0])).abs().max() <= 0.5 + 1e-3
    save_coarse(tmp_path / "other")
    model = open_coarse(tmp_path / "other").model
    with torch.no_grad():
        model.prior.mean_hu += 100
    save_weights(
        tmp_path / "other", model, json.loads((tmp_path / "other" / "config.json").read_text())
    )
    CoarsePairs(data, type("Other", (Counting,), {})(tmp_path / "other"), 1, tmp_path / "kept")[0]
    assert len(asked) == 3  # other weights, other answers


def test_the_learner_trains_the_refiner_alone_in_whole_and_in_patches(run):
    batch = collate_coarse([run.pairs[0], run.pairs[1]])
    for config in (run.settings.network, replace(run.settings.network, patch=8)):
        torch.manual_seed(0)
        learner = RefinementLearner(Refiner(config), RefinementWeights())
        loss, figures = learner(batch, 0)
        loss.backward()
        assert (
            set(figures) == {"absolute", "frequency", "gradient", "perceptual", "consistency"}
            and learner.refiner.last.weight.grad.abs().max() > 0
        )
        assert torch.equal(learner(batch, 0)[0], loss)
    assert not torch.equal(learner(batch, 1)[0], loss)  # another patch


class Edges(nn.Module):
    "A network for the perceptual term, with weights of its own."

    name = "edges of a test"

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv3d(1, 2, 3)

    def forward(self, x):
        return [self.filter(x)]


def test_a_perceptual_network_may_be_given_and_is_named(run, coarse, tmp_path):
    given = RefinementRun("smoke", out=tmp_path, coarse=str(coarse), features=Edges()).open()
    assert (
        json.loads((run.out / "config.json").read_text())["perceptual"]
        == "random convolutions, seed 0, channels 8-16-32"
        and given.configuration()["perceptual"] == "edges of a test"
    )
    given.settings = replace(given.settings, weights=RefinementWeights(perceptual=0.0))
    assert given.configuration()["perceptual"] is None
    with refused("features"):
        RefinementRun("smoke", out=tmp_path, coarse=str(coarse), features=lambda x: [x])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_refinement,
            "Trainer",
            lambda learner, *told: (
                pytest.fail("learns with another network")
                if learner.others[0] is not given.features
                else (_ for _ in ()).throw(InterruptedError)
            ),
        )
        with pytest.raises(InterruptedError):
            given.fit(progress=False)
    batch, features = collate_coarse([run.pairs[0]]), Edges()
    torch.manual_seed(0)
    learner = RefinementLearner(
        Refiner(run.settings.network), RefinementWeights(), features=features
    )
    loss, figures = learner(batch, 0)
    loss.backward()
    assert (
        all(p.grad is None for p in features.parameters())
        and {id(p) for p in learner.parameters()} == {id(p) for p in learner.refiner.parameters()}
        and not any("filter" in name for name in learner.state_dict())
    )
    given = (batch["coarse"][:, None], batch["hu"][:, None])
    ours, theirs = (
        features(learner.refiner.window.to_network(x).clamp(-1, 1) / 2 + 0.5)[0] for x in given
    )
    # an untrained refiner answers its input
    assert figures["perceptual"] == pytest.approx((ours - theirs).abs().mean().item(), rel=1e-3)


# reconstructions


@pytest.fixture(scope="module")
def found(coarse, run):
    item = run.evaluation_pairs[0]
    centre = np.array([12.0, -8.0, 40.0])
    return reconstruct(
        item["xrays"],
        translate(item["geometry"], torch.from_numpy(centre)).on(Grid.cube(16, 320.0, centre)),
        open_coarse(coarse).model,
        samples=2,
    )


def test_a_reconstruction_is_refined_where_it_lies(found, run):
    item = run.evaluation_pairs[0]
    refined = refine_reconstruction(found, run.model)
    assert (
        refined.volume.grid == found.volume.grid
        and refined.how == "refined"
        and len(refined.samples) == 2
        and refined.spread is found.spread
        and "before refinement" in refined.notes[-1]
    )
    expected = run.model.refine(found.volume.tensor().float(), item["xrays"], item["geometry"])
    assert torch.allclose(
        refined.volume.tensor().float(), expected, atol=0.5
    ) and not np.array_equal(refined.volume.hu, found.volume.hu)
    assert (
        refined.reprojection.shape == found.reprojection.shape
        and not np.array_equal(refined.reprojection, found.reprojection)
        and len(refined.residual) == len(found.residual)
    )
    alone = refine_reconstruction(
        replace(found, consistent=False, how="without the data-consistency layer"), run.model
    )
    assert alone.how == "without the data-consistency layer, refined" and not np.array_equal(
        alone.volume.hu, refined.volume.hu
    )


def test_an_untrained_refiner_is_data_consistency_alone(found, run):
    torch.manual_seed(0)
    c = ConsistencySettings(noise=0.1, iterations=5, detector=32, rounds=3)
    item = run.evaluation_pairs[0]
    model = RefinementModel(run.settings.network, c).eval()
    y, beam = bin_pixels(item["xrays"], item["geometry"].to(torch.float32), 32)
    mu = hu_to_mu(found.volume.tensor(), 60.0)
    for _ in range(3):
        mu = data_consistency(
            mu, y, beam, 5, damping=0.01, prior_std=model.spread_hu * (hu_to_mu(0.0, 60.0) / 1000)
        ).clamp_min(0)
    refined = refine_reconstruction(found, model)
    assert np.allclose(
        refined.volume.hu, mu_to_hu(mu, 60.0).clamp_min(-1000).numpy(), atol=0.5
    ) and not np.allclose(refined.volume.hu, found.volume.hu, atol=0.5)
    # the settings count
    assert not np.allclose(
        refine_reconstruction(found, RefinementModel(run.settings.network)).volume.hu,
        refined.volume.hu,
        atol=0.5,
    )


def test_the_layer_is_that_of_the_coarse_model(coarse, run, tmp_path):
    assert (
        run.consistency
        == ConsistencySettings(
            NETWORK.consistency_noise, NETWORK.consistency_iterations, NETWORK.consistency_detector
        )
        != ConsistencySettings()
    )
    assert (
        load_refiner(run.out).consistency == run.model.consistency == run.consistency
        and json.loads((run.out / "config.json").read_text())["consistency"]["detector"] == 64
    )
    save_coarse(
        tmp_path / "drr2ct",
        network=replace(NETWORK, consistency_detector=16, consistency_noise=0.2).to_dict(),
    )
    assert RefinementRun(
        "smoke", out=tmp_path, coarse=str(tmp_path / "drr2ct")
    ).consistency == ConsistencySettings(0.2, NETWORK.consistency_iterations, 16)


def test_residuals_are_those_of_the_refined_volume(found, run):
    item, model = run.evaluation_pairs[0], load_refiner(run.out)
    assert model.limit == pytest.approx(
        1.25
        * max(
            max(
                view_residuals(
                    run.model.refine(i["coarse"], i["xrays"], i["geometry"]),
                    i["xrays"],
                    i["geometry"],
                )[0]
            )
            for i in run._fitting_items()
        ),
        rel=1e-3,
    )
    refined = refine_reconstruction(found, model)
    assert (
        refined.residual == refined.residual_consistent != found.residual_consistent
        and refined.residual_layer == refined.tolerance == []
        and refined.limit == model.limit
    )
    for told, consistency in (
        (refined.residual_consistent, True),
        (refined.residual_unconstrained, False),
    ):
        assert told == pytest.approx(
            view_residuals(
                model.refine(found.volume.tensor(), item["xrays"], item["geometry"], consistency),
                item["xrays"],
                item["geometry"],
            )[0],
            abs=1e-3,
        )
    said = replace(
        found, contradictions=["view 1: beyond"], notes=["averaged", "view 1: beyond"], limit=0.001
    )
    model.limit = 1e-6
    denied = refine_reconstruction(said, model)
    assert (
        [note.split(":")[0] for note in denied.notes[:4]]
        == ["averaged", "before refinement, view 1", "view 0", "view 1"]
        and denied.notes[2:4] == denied.contradictions
        and f"({1e-6:.3f})" in denied.notes[2]
    )
    views = report(denied)["residual"]
    assert (
        [view["with_consistency"] for view in views] == denied.residual
        and all(view["contradicts"] for view in views)
        and "reached_by_the_layer" not in views[0]
    )
    model.limit = None
    assert (
        refine_reconstruction(said, model).contradictions is None
        and report(refine_reconstruction(said, model))["contradiction"]["found"] is None
    )


def test_a_refiner_behind_another_coarse_model_says_so(found, coarse, run, tmp_path):
    model = load_refiner(run.out)
    assert model.coarse_weights == weights_digest(coarse) and not any(
        "other weights" in note for note in refine_reconstruction(found, model, coarse=coarse).notes
    )
    save_coarse(tmp_path)
    other = open_coarse(tmp_path).model
    with torch.no_grad():
        other.prior.mean_hu += 1
    save_weights(tmp_path, other, json.loads((tmp_path / "config.json").read_text()))
    assert "learnt behind other weights than those in" in refine_reconstruction(
        found, model, coarse=tmp_path
    ).notes[-1] and not any(
        "other weights" in note for note in refine_reconstruction(found, model).notes
    )
    write_radiographs(tmp_path / "xrays", torch.as_tensor(found.xrays), found.geometry)
    for weights, said in ((tmp_path, True), (coarse, False)):
        assert (
            any(
                "other weights" in note
                for note in reconstruct_files(
                    tmp_path / "xrays", found.geometry, weights, None, refine=run.out
                ).notes
            )
            == said
        )
    model.coarse_weights = None  # learnt from files, or before runs told
    assert not any(
        "other weights" in note
        for note in refine_reconstruction(found, model, coarse=tmp_path).notes
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda f: replace(
                f,
                volume=Volume(
                    np.zeros((8, 8, 8), np.float32),
                    Grid.cube(8, 320.0, f.geometry.grid.center_mm).affine,
                ),
            ),
            "8×8×8 voxels of 40.00 mm, this refiner is for 16×16×16 of 20.00 mm",
        ),
        (
            lambda f: replace(f, window="soft_tissue"),
            (
                "window: this refiner was made for coarse volumes in the window 'chest', got"
                " 'soft_tissue'"
            ),
        ),
        (
            lambda f: replace(f, energy_kev=80.0),
            "energy_kev: this refiner was made for X-rays of 60 keV, got 80",
        ),
        (
            lambda f: replace(f, xrays=None),
            "takes its detail from X-rays, and this reconstruction has none",
        ),
    ],
)
def test_a_reconstruction_that_does_not_fit_gets_a_sentence(found, run, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        refine_reconstruction(change(found), run.model)


def test_missing_xrays_get_a_sentence(run):
    item = run.evaluation_pairs[0]
    with refused("xrays"):
        run.model.refine(item["coarse"], None, item["geometry"])
    with refused("geometry"):
        run.model.refine(item["coarse"], item["xrays"], None)


# where coarse volumes come from


def test_a_folder_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="run `make demo` first"):
        RefinementRun("smoke", out=tmp_path, coarse=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds neither a trained run"):
        RefinementRun("smoke", out=tmp_path, coarse=str(tmp_path))


def test_settings_that_are_not_the_coarse_models_are_refused(coarse, tmp_path):
    smoke = REFINEMENT_PRESETS["smoke"]
    with pytest.raises(
        ValueError, match="refiner is for size 32, the coarse volumes of .* have 16"
    ):
        RefinementRun(
            "smoke",
            out=tmp_path,
            coarse=str(coarse),
            settings=replace(smoke, network=RefinerConfig.preset("smoke", 32)),
        )
    with pytest.raises(
        ValueError, match="refiner is for window soft_tissue, the coarse volumes of .* have chest"
    ):
        RefinementRun(
            "smoke",
            out=tmp_path,
            coarse=str(coarse),
            settings=replace(smoke, network=replace(smoke.network, window="soft_tissue")),
        )
    with refused("preset"):
        RefinementRun("tiny", out=tmp_path, coarse=str(coarse))


def test_coarse_files_on_another_grid_or_of_other_cases_get_a_sentence(run, tmp_path):
    ids = [run.training.ids[0], run.validation.ids[0]]
    items = [run.training[0], run.validation[0]]
    for id, item in zip(ids, items):
        Volume(item["hu"].round().numpy(), item["affine"].numpy()).save(
            tmp_path / "files" / id / "coarse.nii.gz"
        )
    from_files = RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open()
    assert (
        from_files.pairs.ids == ids[:1]
        and from_files.evaluation_pairs.ids == ids[1:]
        and "beware" in from_files.describe()
    )
    assert torch.equal(from_files.evaluation_pairs[0]["coarse"], items[1]["hu"].round())
    (tmp_path / "files" / ids[1] / "coarse.nii.gz").unlink()
    with pytest.raises(
        ValueError,
        match=(
            "has no file for any of the cases to evaluate; name the files after the cases, like"
            f" {ids[1]}.nii.gz"
        ),
    ):
        RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open()
    Volume(items[1]["hu"][:8].numpy(), items[1]["affine"].numpy()).save(
        tmp_path / "files" / f"{ids[1]}.nii.gz"
    )
    with pytest.raises(ValueError, match="is on 8×16×16 voxels .* its case on 16×16×16"):
        RefinementRun("smoke", out=tmp_path / "out", coarse=str(tmp_path / "files")).open().evaluation_pairs[
            0
        ]


def test_a_file_clipped_to_another_window_gets_a_sentence(run, tmp_path):
    item = run.validation[0]

    def asked(low, high):
        Volume(item["hu"].clip(low, high).round().numpy(), item["affine"].numpy()).save(
            tmp_path / f"{item['id']}.nii.gz"
        )
        return open_coarse(tmp_path).answer(item)

    for low, high, said in (
        (
            -1350,
            150,
            "nothing above 150 HU and much of it exactly there, as if clipped by the window lung",
        ),
        (-1024, 60, "as if clipped by a window that ends at 60 HU"),
        (-200, 200, "no air near -1000"),
    ):
        with pytest.raises(ValueError, match=said):
            asked(low, high)
    assert torch.equal(asked(-1024, 1024), item["hu"].round().clip(-1024, 1024))


@FULL
def test_coarse_volumes_that_are_too_sharp_are_told_in_the_end(run, tmp_path):
    "From files to the verdict: a halo on every edge."
    for pairs in (run.training, run.validation):
        for item in (pairs[n] for n in range(min(2, len(pairs)))):
            Volume(
                (item["hu"] + 1.5 * gaussian_high_pass(item["hu"], 1.0))
                .clamp(-1020, 3000)
                .round()
                .numpy(),
                item["affine"].numpy(),
            ).save(tmp_path / "files" / f"{item['id']}.nii.gz")
    sharp = RefinementRun(
        "smoke", out=tmp_path / "out", coarse=str(tmp_path / "files"), steps=1
    ).open()
    sharp.fit(progress=False)
    board = sharp.evaluate(progress=False)
    # the mask of least error softens
    assert board.mean("coarse", "edge_response") > 1.1 and board.mean(
        "unsharp_mask", "edge_response"
    ) < board.mean("coarse", "edge_response")
    assert (
        sharp.verdict[-1].startswith("The coarse volumes are already sharper than the CTs")
        and json.loads((tmp_path / "out" / "refinement.json").read_text())["verdict"]
        == sharp.verdict
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["coarse_weights"] is None
