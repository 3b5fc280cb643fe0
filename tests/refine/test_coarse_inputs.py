"""Coarse inputs: patients of a coarse model, cascades, the key of the cache, classical methods."""

import json
import subprocess
import sys

import pytest
import torch
from refusals import refused
from refinement_runs import NETWORK, cache, save_coarse, volumes  # noqa: F401 (cache is a fixture)

from ct_nb.cascade.network import Cascade, CascadeConfig, StageConfig
from ct_nb.cascade.train import Sampler
from ct_nb.core.files import write_json
from ct_nb.data.open import open_source
from ct_nb.drr2ct.train import DRR2CTRun
from ct_nb.evaluation.baselines import SIRT
from ct_nb.layers.denoiser import DenoiserConfig
from ct_nb.layers.diffusion import DiffusionConfig
from ct_nb.phantom.chest import phantom
from ct_nb.refine import coarse_inputs as coarse_module
from ct_nb.refine.coarse_inputs import coarse_code, known_cases, known_patients, open_coarse
from ct_nb.refine.train import RefinementRun
from ct_nb.training.checkpoints import save_weights

# patients


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    "Five scans of four patients, and a seed that judges Anna, who was scanned twice."
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("anna_1", "anna_2", "ben", "cleo", "dora")):
        phantom(seed, 32).volume.save(folder / f"{name}.nii.gz")
    (folder / "patients.csv").write_text(
        "case,patient\nanna_1,Anna\nanna_2,Anna\nben,Ben\ncleo,Cleo\ndora,Dora\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CT_NB_CACHE", str(tmp_path_factory.mktemp("cache")))
        source = open_source(str(folder), 32, thorax_only=True).one_per_patient()
    return folder, next(
        seed for seed in range(100) if source.split(0.3, seed)[1].patients == ["Anna"]
    )


@pytest.fixture(scope="module")
def run_after(tmp_path_factory, scans):
    "A function that gives a refiner's run on a drr2ct with these training cases and patients."
    folder = tmp_path_factory.mktemp("trained") / "drr2ct"
    save_coarse(folder)
    config = json.loads((folder / "config.json").read_text())

    def trained_on(**training):
        write_json(folder / "config.json", {**config, "data": str(scans[0]), "training": training})
        return RefinementRun(
            "smoke", str(scans[0]), folder.parent / "out", scans[1], coarse=str(folder)
        )

    return trained_on


@pytest.mark.parametrize(
    "training",
    [
        {"cases": ["anna_2"]},  # her other scan, as runs told before patients were listed
        {"cases": ["an_old_name"], "patients": ["Anna"]},  # her scan has been renamed, or is gone
        {"cases": ["anna_2"], "patients": ["Anna"]},
    ],
)
def test_a_validation_patient_of_the_coarse_models_training_is_refused(run_after, training):
    with refused("coarse", kind=ValueError) as caught:
        run_after(**training).open()
    assert "Anna" in str(caught.value)


def test_a_run_without_patients_still_opens(run_after):
    run = run_after(cases=["an_old_name"]).open()
    assert (
        run.validation.patients == ["Anna"]
        and run.known_training == []
        and "beware" not in run.describe()
    )


@pytest.mark.parametrize(
    "training", [{"cases": ["ben"]}, {"cases": ["an_old_name"], "patients": ["Ben"]}]
)
def test_shared_training_patients_are_described(run_after, training):
    run = run_after(**training).open()
    assert run.known_training == ["ben"]
    assert "beware:       the coarse model was trained on ben, so its errors" in run.describe()


def test_patients_are_stored_and_followed(scans, tmp_path):
    run = DRR2CTRun("smoke", str(scans[0]), tmp_path / "a", scans[1]).open()
    run.model = type("Model", (), {"config": NETWORK})
    config = json.loads(json.dumps(run.configuration(), default=str))
    assert dict(zip(config["training"]["cases"], config["training"]["patients"])) == {
        "ben": "Ben",
        "cleo": "Cleo",
        "dora": "Dora",
    }
    write_json(tmp_path / "a" / "config.json", config)
    write_json(
        tmp_path / "b" / "config.json",
        {
            **config,
            "start": str(tmp_path / "a"),
            "training": {"cases": ["eve_1"], "patients": ["Eve"]},
        },
    )
    assert known_patients(tmp_path / "b") == {"Ben", "Cleo", "Dora", "Eve"} and {
        "eve_1",
        "cleo",
    } < known_cases(tmp_path / "b")


# a cascade

STAGES = tuple(
    StageConfig(
        DenoiserConfig.preset("smoke", size, condition_channels=2), DiffusionConfig(steps=10)
    )
    for size in (16, 32)
)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    "Folder and model of an untrained cascade, 16³ → 32³, as a smoke run writes it."
    folder = tmp_path_factory.mktemp("runs") / "cascade"
    cases = DRR2CTRun("smoke").open()
    torch.manual_seed(0)
    model = Cascade(CascadeConfig(STAGES, "prior", {"size": 16, "modes": 4})).eval()
    model.start.prior.fit(volumes())
    about = {
        "system": "cascade",
        "network": model.config.to_dict(),
        "preset": "smoke",
        "data": "phantom",
        "seed": 0,
        "coarse": None,
        "settings": {"sampling_steps": 2, "samples": 1},
        "training": {"cases": cases.training.ids, "patients": cases.training.patients},
        "validation": {"cases": cases.validation.ids},
    }
    save_weights(folder, model, about)
    save_weights(
        folder / "stages" / "16",
        model.stages[0],
        {**about, "system": "cascade_stage", "network": STAGES[0].to_dict()},
    )
    return folder, model


def test_a_refiner_learns_behind_a_cascade(cascade, tmp_path):
    folder, _ = cascade
    run = RefinementRun("smoke", out=tmp_path, coarse=str(folder)).open()
    item = run.pairs[0]
    assert (
        run.source.size == 32
        and item["coarse"].shape == item["hu"].shape == (32, 32, 32)
        and not known_cases(folder) & {*run.pairs.ids, *run.evaluation_pairs.ids}
    )
    sample = run.source.model.sample(
        item["xrays"][None], item["geometry"], 2, generator=torch.Generator().manual_seed(0)
    )[0].clamp_min(-1000)
    # the detector of a smoke drr2ct
    assert (item["coarse"] - sample).abs().max() <= 0.5 + 1e-2 and run.consistency.detector == 64


def test_a_stage_stands_for_the_cascade_up_to_there(cascade, tmp_path):
    folder, model = cascade
    complete = open_coarse(folder)
    stage = open_coarse(folder / "stages" / "16")
    assert (
        (complete.size, stage.size) == (32, 16)
        and complete.digest("") != stage.digest("")
        and stage.known == complete.known
        and stage.weights == complete.weights
    )
    item = (
        RefinementRun("smoke", out=tmp_path, coarse=str(folder / "stages" / "16"))
        .open()
        .evaluation_pairs[0]
    )
    first = Cascade(CascadeConfig(STAGES[:1], "prior", {"size": 16, "modes": 4})).eval()
    first.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("stages.1.")
        }
    )
    assert (
        Sampler(first, 2).draws(item["xrays"], item["geometry"], 1)[0] - item["coarse"]
    ).abs().max() <= 0.5 + 1e-2
    (folder / "stages" / "16").rename(tmp_path / "alone")
    try:
        with refused("coarse"):
            open_coarse(tmp_path / "alone")
    finally:
        (tmp_path / "alone").rename(folder / "stages" / "16")


def test_a_cascade_has_the_config_of_its_drr2ct(tmp_path):
    run = save_coarse(tmp_path / "drr2ct")
    config = CascadeConfig(STAGES[1:], "drr2ct", NETWORK.to_dict())
    save_weights(
        tmp_path / "cascade",
        Cascade(config),
        {
            "system": "cascade",
            "network": config.to_dict(),
            "preset": "smoke",
            "data": "phantom",
            "seed": 0,
            "coarse": str(tmp_path / "drr2ct"),
            "settings": {"sampling_steps": 2, "samples": 1},
            "training": {"cases": run.training.ids},
            "validation": {"cases": run.validation.ids},
        },
    )
    source = open_coarse(tmp_path / "cascade")
    assert (
        source.drr2ct == NETWORK == open_coarse(tmp_path / "drr2ct").drr2ct
        and set(run.training.ids) < source.known
        and not set(run.validation.ids) & source.known
    )


# the code in the key of the cache


def test_a_change_of_a_network_changes_the_key_of_the_cache(monkeypatch):
    monkeypatch.setattr(coarse_module, "code_digest", lambda *patterns: patterns)
    patterns = coarse_code()
    program = (
        "import sys, ct_nb.drr2ct.predict, ct_nb.cascade.train; print(*(name for name in"
        " sys.modules if name.startswith('ct_nb.')))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {name.split(".")[1] for name in loaded if name.count(".") == 2}
    # storage, training, evaluation and the atlas, a row of the scoreboards, do not determine a
    # volume, and the code of phantoms is part of the digest of their cases
    assert folders - {"core", "training", "evaluation", "atlas"} == {
        pattern.partition("/")[0] for pattern in patterns
    }


# classical solutions


@pytest.mark.usefixtures("cache")
def test_a_classical_solution_is_a_coarse_volume_without_training_cases(tmp_path):
    run = RefinementRun("smoke", "phantom:6", tmp_path, coarse="sirt", steps=2).open()
    item = run.pairs[0]
    assert (
        torch.equal(item["coarse"], SIRT().predict(item["xrays"], item["geometry"]).round())
        and item["coarse"].shape == (16,) * 3
    )
    assert not run.source.known and open_coarse("minimum_norm", 16).digest("a") != open_coarse(
        "sirt", 16
    ).digest("a")
    assert run.configuration()["coarse"] == "sirt" and run.configuration()["coarse_weights"] is None
    with refused("coarse"):
        open_coarse("fdk")
