"""Methods from elsewhere: how they are found, what they may predict, and their board."""

import json

import numpy as np
import pytest
import torch
from commands import ct_nb, refusal
from refusals import refused

from ct_nb.app import benchmark as board_module
from ct_nb.app.benchmark import BASELINES, benchmark
from ct_nb.app.foreign_predictor import open_predictor
from ct_nb.core.files import read_table
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.volume import Grid

QUICK = {"size": 32, "folds": 2, "baselines": ("minimum_norm",), "progress": False}
NEAREST = '''
class Nearest:
    """The CT of the other folds with the nearest X-rays."""

    def fit(self, cases):
        with open("fits.txt", "a") as log:
            print(*[case["patient"] for case in cases], file=log)
        self.known = [(case["xrays"], case["hu"]) for case in cases]

    def predict(self, xrays, geometry):
        with open("predictions.txt", "a") as log:
            print(len(self.known), file=log)
        distance = [float((xrays - known).square().mean()) for known, _ in self.known]
        return self.known[distance.index(min(distance))][1].numpy()
'''
SHAPES = """
import numpy as np
import torch
import {missing}

class Answers:
    value = -900.0

    def predict(self, xrays, geometry):
        return np.full(geometry.grid.shape, self.value)

class Flipped(Answers):
    def predict(self, xrays, geometry):
        return super().predict(xrays, geometry)[::-1]

class Unit(Answers):
    def predict(self, xrays, geometry):
        return np.linspace(0, 1, geometry.grid.shape[0] ** 3).reshape(geometry.grid.shape)

class Flat(Answers):
    def predict(self, xrays, geometry):
        return super().predict(xrays, geometry)[0]

class Holes(Answers):
    def predict(self, xrays, geometry):
        hu = super().predict(xrays, geometry)
        hu[0, 0, 0] = np.nan
        return hu

class Nothing(Answers):
    def predict(self, xrays, geometry):
        xrays.zero_()

class Random(Answers):
    def predict(self, xrays, geometry):
        rows = torch.randn(geometry.grid.shape) + np.random.rand() - 900
        return rows * torch.ones(1, requires_grad=True)

class Needs(Answers):
    def __init__(self, weights):
        pass

class Learns(Answers):
    def fit(self, cases):
        self.value -= 1

class Locked(Learns):
    def __deepcopy__(self, memo):
        raise TypeError("holds a file")

def made():
    return Learns()

one = Learns()
locked = Locked()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    "The current folder, whose modules are found and forgotten afterwards."
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def geometry():
    return ConeBeam.biplanar(grid=Grid.cube(8), detector_shape=(4, 4))


def test_a_class_a_function_and_an_object_are_found(here, geometry):
    (here / "answers.py").write_text(SHAPES.format(missing="math"))
    xrays = torch.ones(2, 4, 4)
    for name, learns in (("Answers", 0), ("Flipped", 0), ("made", 1), ("one", 1), ("Learns", 1)):
        method = open_predictor(f"answers:{name}")
        assert method.learns == bool(learns)
        for _ in range(2):  # an object does not go on from the fold before
            method.fit([])
        assert (method.predict(xrays, geometry) == -900 - learns).all()


def test_a_call_has_gradients_its_own_xrays_and_the_same_random_numbers(here, geometry):
    (here / "answers.py").write_text(SHAPES.format(missing="math"))
    xrays = torch.ones(2, 4, 4)
    method = open_predictor("answers:Random")
    torch.manual_seed(3)
    np.random.seed(3)
    with torch.no_grad():
        first = method.predict(xrays, geometry)
        after = torch.rand(1), np.random.rand()
        assert torch.equal(method.predict(xrays, geometry), first)
    assert not first.requires_grad and first.std() > 0.5
    torch.manual_seed(3)
    np.random.seed(3)
    assert after == (torch.rand(1), np.random.rand())
    with refused("predictor") as caught:
        open_predictor("answers:Nothing").predict(xrays, geometry)
    assert "NoneType" in str(caught.value) and (xrays == 1).all()


def test_names_that_cannot_be_used_get_their_sentence(here):
    (here / "answers.py").write_text(SHAPES.format(missing="math"))
    (here / "broken.py").write_text(SHAPES.format(missing="not_installed_anywhere"))
    for name, words in {
        "answers": "MODULE:NAME",
        "./answers.py:Answers": "MODULE:NAME",
        "missing.part:Answers": "no module 'missing'",
        "answers.part:Answers": "no module 'answers.part'",
        "broken:Answers": "imports 'not_installed_anywhere'",
        "answers:answer": "has no 'answer'",
        "answers:np": "no method predict",
        "answers:Needs": "without arguments",
        "answers:locked": "name its class",
    }.items():
        with refused("predictor") as caught:
            open_predictor(name)
        assert words in str(caught.value), name


@pytest.mark.parametrize(
    "name, words",
    [
        ("Unit", "values from 0 to 1; Hounsfield"),
        ("Flat", "expected HU of shape (32, 32, 32), got (32, 32)"),
        ("Holes", "1 voxels are NaN"),
    ],
)
def test_predictions_that_have_no_score(here, name, words):
    (here / "answers.py").write_text(SHAPES.format(missing="math"))
    with refused() as caught:
        benchmark(f"answers:{name}", "phantom:2", "board", **QUICK)
    assert words in str(caught.value) and f"answers:{name}" in str(caught.value)
    assert not (here / "board" / "cases.csv").exists()


def test_a_board_of_each_patient_once_beside_all_baselines(here, monkeypatch):
    monkeypatch.setattr(board_module, "PHANTOMS", 3)
    (here / "nearest.py").write_text(NEAREST)
    options = ("--data", "phantom:2", "--size", 32, "--out", "board")
    said = ct_nb("benchmark", "nearest:Nearest", *options).stdout
    assert "not exceeded: " in said and said.endswith("board/page.md\n")
    rows = [cells for _, cells in read_table(here / "board" / "cases.csv")]
    assert [row["predictor"] for row in rows] == 2 * ["nearest:Nearest", *BASELINES]
    fitted = (here / "fits.txt").read_text().split()
    assert sorted(fitted) == ["phantom-00000", "phantom-00001"]
    assert [row["patient"] for row in rows[::5]] == fitted[::-1], "judged by the other"
    row = json.loads((here / "board" / "row.json").read_text())
    assert row["name"] == "nearest:Nearest" and row["cases"] == row["patients"] == 2
    assert set(row["gains"]) == set(BASELINES) and row["versions"]["torch"]
    psnr = [[float(r["psnr"]) for r in rows[k::5]] for k in (0, 1)]
    gain = row["gains"]["atlas_reconstruction"]["psnr"]
    assert np.isclose(gain["mean"], np.mean(psnr[0]) - np.mean(psnr[1])) and gain["mean"] < 0
    assert gain["interval_95"][0] < gain["mean"] < gain["interval_95"][1]
    page = (here / "board" / "page.md").read_text(encoding="utf-8")
    assert "phantom-0" not in page and f"{gain['mean']:+.2f} [" in page
    assert "in: none of these." in page and row["data"] in page


def test_a_run_goes_on_and_its_folder_is_no_others(here):
    (here / "nearest.py").write_text(NEAREST)
    whole = benchmark("nearest:Nearest", "phantom:4", "board", **QUICK)
    table = (here / "board" / "cases.csv").read_text()
    lines = table.splitlines(keepends=True)
    (here / "board" / "cases.csv").write_text("".join(lines[:6]))  # 2 cases, half of the third
    (here / "predictions.txt").unlink()
    again = benchmark("nearest:Nearest", "phantom:4", "board", **QUICK)
    assert len((here / "predictions.txt").read_text().splitlines()) == 2
    assert [r["case"] for r in again.rows] == [r["case"] for r in whole.rows]
    assert [r["psnr"] for r in again.rows] == [r["psnr"] for r in whole.rows]
    for data, changes in (("phantom:3", {}), ("phantom:4", {"folds": 3})):
        with refused("out") as caught:
            benchmark("nearest:Nearest", data, "board", **QUICK | changes)
        assert "board was begun with another" in str(caught.value).replace("other data", "another")
    (here / "nearest.py").write_text(NEAREST + "\n# another version\n")
    with refused("out") as caught:
        benchmark("nearest:Nearest", "phantom:4", "board", **QUICK)
    assert "version of the predictor's code" in str(caught.value)


def test_data_that_cannot_be_judged(here):
    (here / "nearest.py").write_text(NEAREST)
    say = ("benchmark", "nearest:Nearest", "--out", "board", "--data")
    assert refusal(*say, "none").startswith("--data: 'none' is neither")
    assert "at least two are needed" in refusal(*say, "phantom:1")
    assert refusal(*say, "phantom:3", "--size", 48).startswith("--size: must be one of 32")
    assert refusal(*say, "phantom:3", "--size", 32, "--folds", 4).startswith("--folds: ")
    assert not (here / "board").exists()
