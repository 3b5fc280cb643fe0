"""The recipes end to end, as a user runs them: papermill for training, then the other recipes and
the commands of `ct-nb` on the run.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from commands import ct_nb, refusal
from places import FULL, ROOT
from recipe_runs import run_recipe

from ct_nb.cascade.train import CASCADE_PRESETS
from ct_nb.physics.geometry_io import load_geometry

BIN = Path(sys.executable).parent


def run(*command):
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    # a kernel draws into its notebook only with its own backend
    environment.pop("MPLBACKEND", None)
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# every recipe's cells run with these presets; `make test-all` takes the larger
PRESET = "smoke" if os.environ.get("CT_NB_TEST_ALL") else "micro"


def papermill(recipe, target, **parameters):
    words = [word for name, value in parameters.items() for word in ("-p", name, value)]
    run("papermill", ROOT / "nbs" / f"{recipe}.ipynb", target, "--no-progress-bar", *words)
    return nbformat.read(target, as_version=4)


def pictures(notebook) -> int:
    return sum(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with what the training recipe leaves under papermill, and the executed notebook."
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", papermill(
        "train_drr2ct", folder / "train_drr2ct.ipynb", preset=PRESET, out=folder / "run"
    )


def test_the_training_recipe_takes_parameters_and_shows_pictures(trained):
    out, notebook = trained
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
    assert pictures(notebook) >= 7
    said = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    first, trains = (
        next(place for place, text in enumerate(said) if words in text)
        for words in ("first picture after", "stage joint")
    )
    assert (
        first < trains
        and f"s: {out / 'first.png'}" in said[first]
        and (out / "first.png").is_file()
    ), "a picture before the network trains"
    assert "by the atlas, without training" in said[first]
    by_atlas, before, after = next(
        map(float, found.groups())
        for text in said
        if (
            found := re.search(
                r"([\d.]+) dB by the atlas, ([\d.]+) dB before training, ([\d.]+) dB after", text
            )
        )
    )
    assert f"{by_atlas:.1f} dB" in said[first], "the same case, by the same atlas"
    case = json.loads((out / "config.json").read_text())["validation"]["cases"][0]
    rows = [line.split(",") for line in (out / "scoreboard.csv").read_text().splitlines()]
    columns = {name: place for place, name in enumerate(rows[0])}
    scores = {
        row[columns["predictor"]]: float(row[columns["psnr"]])
        for row in rows[1:]
        if row[columns["case"]] == case
    }
    # the row of the scoreboard is what the two pictures show
    assert scores["atlas_reconstruction"] == pytest.approx(by_atlas, abs=0.06)
    assert scores["model"] == pytest.approx(after, abs=0.06) and before > 0


def readme_picture(name, runs, images) -> dict:
    "Draw one of README's pictures from these runs, as papers/measured.py does."
    spec = importlib.util.spec_from_file_location("measured", ROOT / "papers" / "measured.py")
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    return measured.redraw(name, runs, images)


def test_readme_s_first_picture_comes_from_a_run(trained, tmp_path):
    out, _ = trained
    (tmp_path / "drr2ct").symlink_to(out)
    kept = readme_picture("comparison.png", tmp_path, tmp_path)
    assert (
        (tmp_path / "comparison.png").stat().st_size > 50_000
        and kept["preset"] == PRESET
        and kept["fingerprint"]
        == json.loads((out / "config.json").read_text())["training"]["fingerprint"]
    )


@FULL
def test_the_cascade_runs_through_its_stages(tmp_path):
    notebook = run_recipe("train_cascade", preset=PRESET, out=tmp_path / "cascade")
    assert pictures(notebook) >= 4
    out = tmp_path / "cascade"
    config = json.loads((tmp_path / "cascade" / "config.json").read_text())
    assert config["system"] == "cascade" and [
        stage["network"]["size"] for stage in config["network"]["stages"]
    ] == [stage.network.size for stage in CASCADE_PRESETS[PRESET].stages]
    assert {"model", "model_single", "model_exact", "model_unguided", "prior_start"} <= set(
        json.loads((out / "metrics.json").read_text())["predictors"]
    )
    assert json.loads((out / "uncertainty.json").read_text())["intervals"] and not list(
        out.rglob("training_state.pt")
    )
    readme_picture("samples.png", tmp_path, tmp_path)
    assert (tmp_path / "samples.png").stat().st_size > 50_000


@FULL
def test_slices_run_from_vae_to_scoreboard(tmp_path):
    notebook = run_recipe("train_slices", preset=PRESET, out=tmp_path / "slices")
    assert pictures(notebook) >= 3
    out = tmp_path / "slices"
    config = json.loads((tmp_path / "slices" / "config.json").read_text())
    assert (
        config["system"] == "slices"
        and (out / "vae" / "model.safetensors").is_file()
        and not list(out.rglob("training_state.pt"))
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"regressor_consistent", "diffusion_sample", "cubic", "upper_bound_vae"} <= set(
        metrics["predictors"]
    ) and metrics["targets"]
    assert metrics["predictors"]["diffusion_sample"]["reaveraged_worst_hu"] < 1


@FULL
def test_the_refiner_runs_on_the_trained_model(trained, tmp_path):
    out, _ = trained
    notebook = run_recipe(
        "train_refinement",
        preset=PRESET,
        coarse=out,
        out=tmp_path / "refinement",
    )
    assert pictures(notebook) >= 5
    found = tmp_path / "refinement"
    assert json.loads((found / "config.json").read_text())["system"] == "refiner" and {
        "coarse",
        "unsharp_mask",
        "consistency_alone",
        "linear_prior",
        "atlas_reconstruction",
    } == set(json.loads((found / "refinement.json").read_text())["gain_over"])
    case = next((found / "cases").iterdir())
    assert {
        "coarse.nii.gz",
        "refined.nii.gz",
        "ground_truth.nii.gz",
        "comparison.png",
        "spectrum.png",
        "metrics.json",
    } <= {p.name for p in case.iterdir()}
    for name in ("training.png", "spectra.png", "scoreboard.png"):
        assert (found / name).stat().st_size > 5000, name


def test_the_encoder_runs_from_scans_to_retrieval(tmp_path):
    notebook = run_recipe(
        "train_ct_encoder",
        preset=PRESET,
        out=tmp_path / "ct_encoder",
    )
    assert pictures(notebook) >= 2
    metrics = json.loads((tmp_path / "ct_encoder" / "metrics.json").read_text())
    assert {"sentence_place", "preprocessing", "map"} <= set(metrics) and (
        tmp_path / "ct_encoder" / "retrieval.csv"
    ).is_file()


def test_the_run_leaves_what_the_readme_promises(trained):
    out, _ = trained
    for name in (
        "model.safetensors",
        "config.json",
        "scoreboard.csv",
        "metrics.json",
        "scoreboard.png",
        "comparison.png",
        "history.jsonl",
    ):
        assert (out / name).is_file(), name
    assert len(list(out.rglob("truth.nii.gz"))) >= 1 and len(list(out.rglob("model.nii.gz"))) >= 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["predictors"]) == {
        "model",
        "model_without_consistency",
        "air",
        "mean_atlas",
        "nearest_neighbour",
        "minimum_norm",
        "sirt",
        "linear_prior",
        "atlas_consistent",
        "atlas_reconstruction",
    }
    for row in metrics["predictors"].values():
        assert {
            "psnr",
            "ssim",
            "mae_hu",
            "drr_error",
            "drr_error_held_out",
            "null_space_error",
        } <= set(row)
    assert metrics["cases"] >= 1
    config = json.loads((out / "config.json").read_text())
    assert (
        config["system"] == "drr2ct"
        and config["training"]["fingerprint"]
        and config["versions"]["torch"]
    )
    rows = (out / "scoreboard.csv").read_text().splitlines()
    assert len(rows) == 1 + len(metrics["predictors"]) * metrics["cases"]


def test_the_parameters_cell_is_typed_and_commented():
    text = run("papermill", "--help-notebook", ROOT / "nbs" / "train_drr2ct.ipynb")
    for name in (
        "preset: str",
        "data: str",
        "out: str",
        "seed: int",
        "resume: bool",
        "stage: str",
        "start: str",
        "teacher: str",
    ):
        assert name in text, text
    assert "Unknown type" not in text


@FULL
def test_reconstruct_and_evaluate_recipes(trained, tmp_path):
    out, _ = trained
    notebook = run_recipe("reconstruct", weights=out, out=tmp_path / "ct.nii.gz")
    assert (tmp_path / "ct.nii.gz").is_file() and pictures(notebook) >= 3
    notebook = run_recipe(
        "evaluate",
        weights=out,
        data="phantom:2",
        out=tmp_path / "evaluation",
    )
    assert (
        json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["cases"] == 2
        and pictures(notebook) >= 2
    )


def test_the_commands_from_ct_to_ct(trained, tmp_path):
    out, _ = trained
    from ct_nb.data.read import read_ct
    from ct_nb.phantom.chest import phantom
    from ct_nb.physics.volume import Grid, Volume

    ct = tmp_path / "ct.nii.gz"
    Volume(phantom(11, 64).volume.hu, Grid.cube(64, center_mm=(12, -30, 250)).affine).save(ct)
    ct_nb("drr", ct, "--out", tmp_path / "xrays")
    geometry = tmp_path / "xrays" / "geometry.json"
    images = sorted((tmp_path / "xrays").glob("*.png"))
    assert len(images) == 2 and load_geometry(geometry).views == 2
    reconstruction = tmp_path / "reconstruction.nii.gz"
    words = ("--geometry", geometry, "--weights", out, "--out", reconstruction)
    text = ct_nb("reconstruct", *images, *words).stdout
    assert float(re.search(r"view 1: residual (0\.\d+)", text)[1]) < 0.2
    center_mm = read_ct(reconstruction).grid.center_mm
    assert np.abs(center_mm - load_geometry(geometry).grid.center_mm).max() < 1e-3
    text = ct_nb("evaluate", reconstruction, ct, "--out", tmp_path / "score.json").stdout
    assert "PSNR" in text
    assert json.loads((tmp_path / "score.json").read_text())["metrics"]["psnr"] > 12


def test_reconstruct_refuses_a_wrong_count_and_wrong_weights(trained, tmp_path):
    out, _ = trained
    from ct_nb.data.radiograph_io import write_radiographs
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.training.checkpoints import save_weights

    images = write_radiographs(tmp_path / "x", torch.rand(2, 256, 256), ConeBeam.biplanar())
    words = ("--geometry", tmp_path / "x" / "geometry.json", "--out", tmp_path / "ct.nii.gz")
    sentence = refusal("reconstruct", images[0], *words, "--weights", out)
    assert "1 images for a geometry of 2 views (xray_0.png)" in sentence
    save_weights(tmp_path / "other", torch.nn.Linear(2, 2), {"system": "vae", "network": {}})
    assert "'vae'" in refusal("reconstruct", *images, *words, "--weights", tmp_path / "other")
    assert not (tmp_path / "ct.nii.gz").exists()


def test_a_parameter_that_a_recipe_does_not_have_ends_it(tmp_path):
    words = ("-p", "Steps", "5", "-p", "out", str(tmp_path / "run"))
    done = subprocess.run(
        [BIN / "papermill", ROOT / "nbs" / "train_vae.ipynb", tmp_path / "out.ipynb", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "did you mean steps?" in done.stderr
    assert not (tmp_path / "run").exists()
