"""README's tables and pictures are what papers/measured.py makes of papers/measured.json and of what runs leave; tests/recipes/test_recipes.py draws the pictures from smoke runs."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from places import ROOT

spec = importlib.util.spec_from_file_location("measured", ROOT / "papers" / "measured.py")
measured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured)


def kept() -> dict:
    return json.loads(measured.KEPT.read_text(encoding="utf-8"))


def write_run(folder: Path, metrics: dict, data="phantom", fingerprint="abc", **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "versions": {"ct_nb": "0.1.0"},
                "preset": "cpu",
                "data": data,
                "training": {"cases": ["a", "b"], "fingerprint": fingerprint},
                **config,
            }
        )
    )
    return folder


def test_the_readme_has_what_was_measured():
    index = "".join(
        line
        for cell in json.loads(measured.INDEX.read_text(encoding="utf-8"))["cells"]
        for line in cell["source"]
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, expected in measured.blocks(kept(), measured.phantoms_today()).items():
        assert (
            f"<!-- {name} -->\n{expected}\n<!-- /{name} -->" in index
        ), "run `python papers/measured.py` and `make readme`"
        assert re.sub(r"\]\([^)]*\)", "]", expected) in re.sub(
            r"\]\([^)]*\)", "]", readme
        ), "run `make readme`"
    changed = kept()
    changed["drr2ct"]["psnr"] += 1
    assert measured.systems(changed) not in index


def test_the_pictures_are_those_that_were_drawn():
    pictures = kept()["pictures"]
    assert (
        set(pictures) == set(measured.PICTURES) == {path.name for path in measured.IMAGES.iterdir()}
    )
    for name, of in pictures.items():
        assert measured.digest(measured.IMAGES / name) == of["sha256"], (
            f"{name} was not drawn by papers/measured.py; run it where"
            f" runs/{measured.PICTURES[name][0]} is"
        )
        assert f"](nbs/images/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_come_from_the_files_of_a_run(tmp_path):
    run = write_run(
        tmp_path / "thin",
        {
            "predictors": {
                "regressor_consistent": {"psnr": 35.5},
                "cubic": {"psnr": 34.25},
                "linear": {"psnr": 33},
            },
            "thick_mm": 5.0,
            "cases": 1,
        },
        data="THIN",
    )
    assert (
        "5 mm → thin: 35.50 dB, cubic 34.25, linear 33.00; 1 held-out patient, no confidence"
        " interval |" in measured.systems({"slices": measured.slices(run)})
    )
    names = ("model", *measured.BASELINES)
    metrics = {
        "predictors": {
            name: {metric: 20.0 - place for metric in measured.SCORES}
            for place, name in enumerate(names)
        },
        "sd": {name: {metric: 0.5 for metric in measured.SCORES} for name in names},
        "gain_over_best_baseline": {
            "psnr": {"baseline": "mean_atlas", "mean": 3.0, "interval_95": [1.0, 5.0]}
        },
        "cases": 7,
    }
    found = measured.drr2ct(write_run(tmp_path / "drr2ct", metrics))
    assert (
        "20.00 dB, SSIM 20.000, 7 held-out phantoms; best baseline 17.00 dB; gain 3.00 [1.00,"
        " 5.00] dB" in measured.systems({"drr2ct": found})
    )
    table = measured.scores({"drr2ct": found})
    assert (
        "7 held-out phantoms" in table
        and "the 2 training phantoms" in table
        and "| **model** | **20.00 ± 0.50** |" in table
        and "| mean atlas | 17.00 ± 0.50 | 17.000 ± 0.500 | 17 ± 0 |" in table
    )
    assert (
        measured.systems({}).count("not yet") == 5
        and "papermill nbs/train_drr2ct.ipynb" in measured.scores({})
        and "--clone" in measured.waiting({})
    )


def test_a_refiner_is_shown_behind_what_it_learnt_from(tmp_path):
    def found(start, end):
        run = write_run(
            tmp_path / str(start),
            {"predictors": {"refined": {"psnr": end}, "coarse": {"psnr": start}}, "cases": 8},
        )
        (run / "refinement.json").write_text(
            json.dumps(
                {
                    "gain_over": {
                        "coarse": {
                            "psnr": {
                                "mean": end - start,
                                "low": end - start - 1,
                                "high": end - start + 1,
                            }
                        }
                    }
                }
            )
        )
        return {**measured.refinement(run), "made": measured.made(run)}

    both = {
        "refinement": found(27.5, 27.25),
        "refinement_sirt": found(16.5, 22.0),
        "refinement_real": found(17.5, 21.0),
    }
    row = measured.systems(both)
    assert (
        "| after SIRT (`-p coarse sirt`): 16.50 → 22.00 dB, +5.50 [+4.50, +6.50], 8 phantoms;"
        " after SIRT, `-p data CTS`: 17.50 → 21.00 dB, +3.50 [+2.50, +4.50], 8 held-out patients;"
        " after drr2ct: 27.50 → 27.25 dB, -0.25 [-1.25, +0.75], 8 phantoms |" in row
    )
    assert "(refine: ct_nb" in measured.provenance(both) and "after drr2ct" not in measured.systems(
        {"refinement_sirt": both["refinement_sirt"]}
    )


def test_old_figures_are_known_as_such(tmp_path):
    of = measured.made(write_run(tmp_path, {}, fingerprint="today"))
    assert of | {"date": ""} == {
        "version": "0.1.0",
        "date": "",
        "preset": "cpu",
        "data": "phantom",
        "fingerprint": "today",
    } and re.fullmatch(r"\d{4}-\d\d-\d\d", of["date"])
    m = {"drr2ct": {"made": of}, "cascade": {"made": of}, "slices": {}}
    assert (
        f"(cascade, drr2ct: ct_nb 0.1.0, {of['date']}; slices: measured with an earlier version)"
        in measured.provenance(m, "today")
    )
    assert (
        f"(cascade: ct_nb 0.1.0, {of['date']}; drr2ct, slices: measured with an earlier"
        in measured.provenance(m, "tomorrow")
    ), "other phantoms"
    assert "drr2ct, slices: measured" in measured.provenance(
        m | {"drr2ct": {"made": {**of, "fingerprint": "yesterday"}}}, "today"
    )
    assert (
        measured.made(write_run(tmp_path, {}, data="phantom:30"))["data"] == "phantom"
        and measured.made(write_run(tmp_path, {}, data="path/to/CTs"))["data"] == "real"
    )


def test_the_marks_must_stand_once():
    text = "a<!-- scores -->\nold\n<!-- /scores -->b"
    assert (
        measured.put(text, "scores", "new") == text.replace("old", "new")
        and measured.put("<!-- x -->\n<!-- /x -->", "x", "new") == "<!-- x -->\nnew\n<!-- /x -->"
    )
    with pytest.raises(ValueError, match="expected one <!-- scores -->"):
        measured.put("nothing", "scores", "new")


def test_a_newcomers_wait_is_measured(tmp_path, monkeypatch):
    "git and make are played by scripts here."
    (tmp_path / "bin").mkdir()

    def play(name, script):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / "bin" / name).chmod(0o755)

    play("git", 'mkdir "$4"\n')
    play(
        "make",
        'test "$1" = setup && exit 0\ntest -n "$CT_NB_CACHE" -a -z "$PYTHONPATH" || exit 9\nmkdir'
        ' -p runs/drr2ct; touch runs/drr2ct/first.png\necho "first picture after 1 s:'
        ' runs/drr2ct/first.png" >&2; sleep 1.2\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    (tmp_path / "a").mkdir()
    found = measured.clone(tmp_path / "a")
    assert (
        found["seconds"]["clone"]
        <= found["seconds"]["setup"]
        <= found["seconds"]["first_picture"]
        < found["seconds"]["demo"]
        and found["cores"] >= 1
        and found["processor"]
    )
    assert measured.waiting(
        {
            "clone": {
                "seconds": {"setup": 300, "first_picture": 600, "demo": 1800},
                "cores": 2,
                "processor": "X",
                "date": "2026-01-02",
            }
        }
    ).startswith(
        "From `git clone` to the first reconstruction: **10 minutes**, 5 of them for PyTorch and"
        " the rest of `.venv`; to the trained and evaluated network: 30 minutes (2 cores, X,"
        " 2026-01-02"
    )
    play("make", "echo it broke; exit 3\n")
    (tmp_path / "b").mkdir()
    with pytest.raises(SystemExit, match="make setup failed:\nit broke"):
        measured.clone(tmp_path / "b")
    play("make", "exit 0\n")
    (tmp_path / "c").mkdir()
    with pytest.raises(SystemExit, match="drew no first picture"):
        measured.clone(tmp_path / "c")
