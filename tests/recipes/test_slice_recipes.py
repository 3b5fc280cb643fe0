"""The recipes of system E, cell by cell as they are written, at their smallest; `train_slices` runs under papermill with the others, in test_recipes.py."""

import json

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from places import ROOT

from ct_nb.slices.open import open_stacks

NBS = ROOT / "nbs"


@pytest.fixture
def run_recipe(monkeypatch):
    """Runs a recipe in this process, which has torch loaded already, with parameters in place of
    its own; returns its names.
    """
    monkeypatch.chdir(NBS.parent)
    plt.switch_backend("agg")
    threads = torch.get_num_threads()

    def run(recipe: str, **parameters) -> dict:
        space = {"In": []}
        for number, cell in enumerate(nbformat.read(NBS / f"{recipe}.ipynb", as_version=4).cells):
            if cell.cell_type != "code":
                continue
            exec(
                compile(
                    "".join(
                        line
                        for line in cell.source.splitlines(keepends=True)
                        if not line.startswith("%")
                    ),
                    f"{recipe}, cell {number}",
                    "exec",
                ),
                space,
            )
            if "parameters" not in cell.metadata.get("tags", []):
                continue
            assert set(parameters) <= set(
                space
            ), f"{recipe} does not take {set(parameters) - set(space)}"
            space.update(parameters)
        return space

    yield run
    plt.close("all")
    torch.set_num_threads(threads)


def test_the_vae_recipe(run_recipe, tmp_path, capsys):
    run_recipe("train_vae", preset="smoke", out=str(tmp_path / "vae"), steps=4)
    said = capsys.readouterr().out
    assert "best baseline" in said and "latent_scale [" in said and "evaluated on:" in said
    assert {
        "model.safetensors",
        "config.json",
        "vae_scores.csv",
        "vae_scores.json",
        "training.png",
        "reconstruction.png",
    } <= {path.name for path in (tmp_path / "vae").iterdir()}
    assert (
        json.loads((tmp_path / "vae" / "config.json").read_text())["settings"]["trainer"]["steps"]
        == 4
    )


def test_the_bench(run_recipe, tmp_path, capsys):
    run_recipe(
        "bench_slices",
        preset="smoke",
        rows=33,
        columns=40,
        slices=6,
        models="regressor",
        steps=2,
        out=str(tmp_path),
    )
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "bench_slices.json").read_text())
    work, ranges = found["work"][0], found["ranges"]
    assert (
        (work["thick"], work["thin"]) == ([6, 33, 40], [30, 33, 40])
        and work["peak_gib"] > work["before_gib"] > 0
        and work["seconds"] >= work["seconds_thinning"] > 0
        and work["seconds_cpu"] > 0
        and work["reaveraged_worst_hu"] < 1
    )
    assert (
        ranges["regressor"]["thick slices, HU"]["low"] >= -1024
        and -1 <= ranges["regressor"]["network input, the start"]["low"] < -0.9
        and ranges["regressor"]["residual, HU"]["rms"] > 0
    )
    assert (
        ranges["diffusion"]["residual that was drawn"]["rms"] > 0.1
        and ranges["diffusion"]["VAE input"]["high"] <= 1
        and "1 thread, torch" in said
    )


def test_the_bench_of_planes(run_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    for number, stack in enumerate(open_stacks("phantom:2", size=64, side_mm=96)):
        stack.volume.save(tmp_path / "data" / f"scan{number}.nii.gz")
    said = run_recipe(
        "bench_planes",
        preset="smoke",
        data=str(tmp_path / "data"),
        protocols="8to2",
        pretrain="smoke",
        steps=3,
        patients=1,
        length_mm=80.0,
        slab_mm=30.0,
        out=str(tmp_path / "out"),
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"slabs.csv", "8to2_scan0.png", "without_scan0"}
    trained = json.loads((tmp_path / "out" / "without_scan0" / "config.json").read_text())
    assert trained["training"]["cases"] == ["scan1"]
    methods = ["linear", "cubic", "back_projection", "planes", "planes_pretrained"]
    assert list(dict.fromkeys(row["predictor"] for row in said["rows"])) == methods
    assert "the worst slab is" in capsys.readouterr().out


def test_training_on_planes(run_recipe, tmp_path, capsys):
    run_recipe("train_planes", preset="smoke", data="phantom:1", out=str(tmp_path / "run"))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "model.safetensors", "training.png"}
    assert "1 scans: phantom0" in capsys.readouterr().out
