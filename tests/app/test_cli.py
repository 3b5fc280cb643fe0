"""`ct-nb`: its help, its options, and what it says of input that cannot be used."""

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ct_nb, refusal
from ct_files import affine_of, body, write_series
from refusals import refused

from ct_nb.app import cli
from ct_nb.core.errors import InputError
from ct_nb.data.cache import DiskCache, content_digest
from ct_nb.evaluation.inference import Reconstruction
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry_io import load_geometry
from ct_nb.physics.volume import Volume
from ct_nb.slices.slice_profile import SliceAxis

# command → options that its help must explain, and words that must stand there
HELP = {
    "drr": (
        (
            "--out --azimuth --elevation --sod-mm --source-to-isocenter-mm --sdd-mm"
            " --source-to-detector-mm --detector-size --pixel-mm --kev --cube-mm --series"
        ),
        ["DICOM folder", "in degrees", "in keV", "in mm", "[default: 0,90]", "10<=x<=500"],
    ),
    "reconstruct": (
        (
            "--geometry --setup --pixel-mm --weights --out --num-samples --data-consistency"
            " --no-data-consistency --seed --guidance --refine --input-kind --i0 --invert"
            " --no-invert --max-value --log-step"
        ),
        ["PNG", "Hounsfield units", "standard deviation", "c-arm", "<soft|exact>", "x>=0"],
    ),
    "register": (
        (
            "--geometry --out --similarity --separate --source --rotation-deg --shift-mm --size"
            " --kev --seed --series --input-kind --i0 --invert --no-invert --max-value --log-step"
        ),
        ["in the CT's frame", "degrees", "in mm", "[default: posed.json]", "or doubtful and why"],
    ),
    "evaluate": (
        "--labels --prediction-labels --out --series --prediction-series",
        ["The true CT", "Dice and HD95 (mm)", "JSON", "SeriesInstanceUID", "UID:VALUE"],
    ),
    "interpolate-slices": (
        (
            "--weights --spacing-mm --out --series --fwhm-mm --profile --method --num-samples"
            " --steps --seed --noise-hu --memory-gib --cover --force"
        ),
        ["thick slices", "in mm", "in HU", "in GiB", "<rectangular|gaussian>", "<extent|centers>"],
    ),
    "embed": ("--weights --out", ["DICOM folders", "label map", ".parquet"]),
    "search": (
        "--index --weights --region --top-k",
        ["cosine similarity (-1 to 1)", "[default: 10; x>=1]", "nodule"],
    ),
    "benchmark": (
        "--data --out --size --folds",
        ["MODULE:NAME", "HU (N, N, N)", "goes on with a run", "[default: 64]", "By default 7"],
    ),
    "cache": ("--clear", ["CT_NB_CACHE", "what else lies in the folder stays"]),
}


def options_of(text: str) -> dict[str, str]:
    "Option → its whole entry in a help text, in one line."
    entries = text.split("\nOptions:\n")[1].split("\n  -")
    joined = [" ".join(f"-{entry}".split()) for entry in entries]
    return {
        word.rstrip(","): entry
        for entry in joined
        for word in entry.replace("---", "--").split()
        if word.startswith("--")
    }


@pytest.mark.parametrize("command", HELP)
def test_help_reads_alone(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    names, words = HELP[command]
    text = ct_nb(command, "--help").stdout
    options = options_of(text)
    assert set(names.split()) <= set(options)
    for name in names.split():
        assert len(options[name].split()) >= 5, f"{command} {name} is not explained"
    joined = " ".join(text.split())
    assert [word for word in words if word not in joined] == []


def test_every_command_is_in_the_table():
    lines = ct_nb("--help").stdout.split("Commands:\n")[1].strip().splitlines()
    assert {line.split()[0] for line in lines} == set(HELP)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), "cut short"


def test_version_and_unknown_options():
    from ct_nb import __version__

    assert ct_nb("--version").stdout == f"ct-nb {__version__}\n"
    assert "--azimut" in ct_nb("drr", "ct.nii.gz", "--azimut", "0", exit_code=2).stderr
    assert "--kev" in ct_nb("drr", "ct.nii.gz", "--kev", "5", exit_code=2).stderr


def test_importing_the_program_leaves_torch_alone():
    script = (
        "import sys, ct_nb.app.cli; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_completion_scripts_are_offered():
    variables = {**os.environ, "_CT_NB_COMPLETE": "complete_bash", "COMP_WORDS": "ct-nb ev"}
    script = (
        "import sys; sys.argv = ['ct-nb']; from ct_nb.app.cli import app; app(prog_name='ct-nb')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**variables, "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["evaluate"], done.stderr


# ---------------------------------------------------------------- register
def test_register_prints_the_movement_and_a_verdict(tmp_path):
    scan = tmp_path / "ct.nii.gz"
    phantom(5, 32).volume.save(scan)
    ct_nb("drr", scan, "--out", tmp_path, "--detector-size", 32, "--pixel-mm", 16)
    words = ("register", scan, tmp_path, "--geometry", tmp_path / "geometry.json")
    posed = tmp_path / "posed.json"
    lines = ct_nb(*words, "--out", posed, "--size", 32, "--shift-mm", 5).stdout.splitlines()
    assert lines[-3].startswith("all views: turned by (") and "±" in lines[-3]
    assert lines[-2:] == ["verdict: accepted", str(posed)]
    load_geometry(posed)
    other = tmp_path / "other.nii.gz"
    phantom(11, 32).volume.save(other)
    words = ("register", other, *words[2:], "--separate", "--size", 32, "--out", posed)
    lines = ct_nb(*words).stdout.splitlines()
    assert lines[-2] == "verdict: doubtful" and lines[-3].startswith("doubt: view")
    assert "none.json" in refusal("register", scan, tmp_path, "--geometry", tmp_path / "none.json")


# ---------------------------------------------------------------- the cache
def test_the_cache_is_shown_and_cleared_of_what_is_its_own(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CT_NB_CACHE", str(folder))
    assert ct_nb("cache").stdout == f"{folder}: 0 entries, 0.0 MiB\n"
    assert not folder.exists()
    cache = DiskCache(folder)
    names = [content_digest("x", number) for number in range(3)]
    for name in names:
        cache.get(name, lambda: {"a": np.zeros(2**17)})
    part = cache.path(names[0]).parent
    (tmp_path / "scan.entry").touch()
    others = [folder / "notes.txt", part / "notes.entry", folder / "ab.entry"]
    for path in others:
        path.touch()
    link = part / f"{part.name}{'0' * 30}.entry"
    link.symlink_to(tmp_path / "scan.entry")
    assert ct_nb("cache").stdout == f"{folder}: 3 entries, 3.0 MiB\n"
    said = ct_nb("cache", "--clear").stdout
    assert said == f"removed 3 entries, 3.0 MiB, from {folder}\n"
    assert not any(cache.path(name).exists() for name in names)
    assert {path for path in folder.rglob("*") if not path.is_dir()} == {*others, link}
    assert (tmp_path / "scan.entry").exists()
    for path in (*others, link):
        path.unlink()
    assert ct_nb("cache", "--clear").stdout.startswith("removed 0 entries, 0.0 MiB")
    assert not folder.exists()


# ---------------------------------------------------------------- values
def test_numbers_in_text():
    assert cli.parse_numbers(["-30,30", "60 90"], "azimuth") == [-30, 30, 60, 90]
    for words in (["front"], [""], ["1,nan"], ["inf"]):
        with refused("azimuth"):
            cli.parse_numbers(words, "azimuth")
    assert cli.parse_direct_beam(None) is None and cli.parse_direct_beam("4095") == 4095
    for text in ("1,2", "white"):
        with refused("i0"):
            cli.parse_direct_beam(text)


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    phantom(3, 32).volume.save(path)
    return path


SMALL = ("--detector-size", 16, "--pixel-mm", 32, "--cube-mm", 320)


@pytest.mark.parametrize(
    "words, azimuth_deg",
    [
        (("--azimuth", "-30,30"), [-30, 30]),
        (("--azimuth=-30,30",), [-30, 30]),
        (("--azimuth", "-30", "--azimuth", "30", "--elevation", "-10"), [-30, 30]),
        ((), [0, 90]),
    ],
)
def test_angles_may_be_negative_and_repeated(ct, words, azimuth_deg, tmp_path):
    ct_nb("drr", ct, "--out", tmp_path, *SMALL, *words)
    geometry = load_geometry(tmp_path / "geometry.json")
    rays = (geometry.detector_center_mm - geometry.source_mm).numpy()
    # azimuth 0 runs to the back (+y), 90 to the patient's left (+x)
    assert np.allclose(np.rad2deg(np.arctan2(rays[:, 0], rays[:, 1])), azimuth_deg)
    assert (rays[:, 2] < -100).all() == ("-10" in words)


def test_standard_and_long_names_of_distances_agree(ct, tmp_path):
    for folder, names in (
        ("short", ("--sod-mm", "--sdd-mm")),
        ("long", ("--source-to-isocenter-mm", "--source-to-detector-mm")),
    ):
        words = (names[0], 900, names[1], 1200)
        ct_nb("drr", ct, "--out", tmp_path / folder, *SMALL, *words)
    one, other = (load_geometry(tmp_path / name / "geometry.json") for name in ("short", "long"))
    assert np.array_equal(one.source_mm, other.source_mm)
    assert np.allclose((one.source_mm - one.detector_center_mm).norm(dim=-1), 1200)


def test_a_series_is_chosen_wherever_a_dicom_folder_comes_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hu = body((24, 64, 80))
    write_series(tmp_path / "scans", hu, series="1.2.3")
    names = [f"b{k:03d}.dcm" for k in range(len(hu))]
    write_series(tmp_path / "scans", hu + 50, names=names, series="1.2.4")
    Volume(hu, affine_of()).save(tmp_path / "ct.nii.gz")
    assert "series" in refusal("drr", "scans", *SMALL)
    ct_nb("drr", "scans", "--series", "1.2.4", *SMALL)
    assert "series" in refusal("evaluate", "ct.nii.gz", "scans")
    assert "series" in refusal("evaluate", "scans", "ct.nii.gz")
    for series, expected in (("1.2.3", 0), ("1.2.4", 50)):
        words = ("--out", "score.json")
        ct_nb("evaluate", "ct.nii.gz", "scans", "--series", series, *words)
        first = json.loads((tmp_path / "score.json").read_text())["metrics"]["mae_hu"]
        ct_nb("evaluate", "scans", "ct.nii.gz", "--prediction-series", series, *words)
        second = json.loads((tmp_path / "score.json").read_text())["metrics"]["mae_hu"]
        assert abs(first - expected) < 1 and abs(second - expected) < 1


@pytest.fixture
def calls(monkeypatch):
    "Arguments by name of the functions behind `reconstruct` and `interpolate-slices`."
    import ct_nb.app.reconstruct_files as reconstruct_files
    import ct_nb.slices.thin_ct_files as thin_ct_files

    calls = []

    def record(module, name, result):
        signature = inspect.signature(getattr(module, name))

        def function(*args, **settings):
            bound = signature.bind(*args, **settings)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return result

        monkeypatch.setattr(module, name, function)

    reconstruction = Reconstruction(Volume(np.zeros((2, 2, 2)), np.eye(4)), [0.1], np.zeros(0))
    record(reconstruct_files, "reconstruct_files", reconstruction)
    thick = SliceAxis(0.0, 5.0, 9)
    thin = SliceAxis(0.0, 1.0, 41)
    axes = SimpleNamespace(thick_axis=thick, thin_axis=thin, reaveraged_hu=0.25, notes=["a note"])
    record(thin_ct_files, "interpolate_file", axes)
    return calls


RECONSTRUCT = ("reconstruct", "a.png", "b.png", "--geometry", "g.json", "--weights", "run")


def test_reconstruct_passes_its_options_on(calls):
    words = ("--num-samples", 3, "--no-data-consistency", "--seed", 7, "--guidance", "exact")
    pixels = ("--input-kind", "intensity", "--i0", 4095, "--no-invert", "--max-value", 1)
    text = ct_nb(*RECONSTRUCT, *words, *pixels, "--refine", "sharp", "--out", "c.nii").stdout
    (call,) = calls
    assert [str(path) for path in call["xrays"]] == ["a.png", "b.png"]
    assert (str(call["geometry"]), str(call["weights"])) == ("g.json", "run")
    assert (call["samples"], call["consistency"], call["seed"]) == (3, False, 7)
    assert (call["guidance"], str(call["refine"]), str(call["out"])) == ("exact", "sharp", "c.nii")
    expected = {"kind": "intensity", "i0": 4095.0, "inverted": False, "white": 1.0}
    assert call["pixels"] == expected
    assert "view 0: residual 0.100\n" in text and text.endswith("c.nii\n")


def test_reconstruct_leaves_open_what_is_not_said(calls):
    ct_nb(*RECONSTRUCT)
    ct_nb(*RECONSTRUCT, "--i0", "border", "--invert", "--log-step", 0.001)
    assert calls[0]["pixels"] == {} and calls[0]["consistency"] is True
    assert calls[1]["pixels"] == {"i0": "border", "inverted": True, "scale": 0.001}
    assert refusal(*RECONSTRUCT, "--i0", "white").startswith("--i0: ") and len(calls) == 2


def test_interpolate_slices_passes_its_options_on(calls):
    command = ("interpolate-slices", "ct", "--weights", "run")
    ct_nb(*command)
    words = ("--spacing-mm", 0.5, "--series", "1.2", "--fwhm-mm", 4, "--profile", "gaussian")
    words += ("--method", "regression", "--num-samples", 2, "--steps", 5, "--seed", 9)
    words += ("--noise-hu", 10, "--memory-gib", 1.5, "--cover", "centers", "--force")
    text = ct_nb(*command, *words, "--out", "thin.nrrd").stdout
    plain, call = calls
    assert (plain["model"], plain["convention"], plain["anyway"]) == (None, "slabs", False)
    assert (plain["width_mm"], plain["spacing_mm"], plain["series"]) == (None, 1.0, None)
    assert (call["spacing_mm"], call["series"], call["width_mm"]) == (0.5, "1.2", 4.0)
    assert (call["shape"], call["model"], call["samples"]) == ("gaussian", "regressor", 2)
    assert (call["steps"], call["seed"], call["noise_hu"]) == (5, 9, 10.0)
    assert (call["memory_gib"], call["convention"], call["anyway"]) == (1.5, "centres", True)
    assert "note: a note\n9 slices 5 mm apart → 41 slices 1 mm apart" in text
    assert "at most 0.25 HU\nthin.nrrd\n" in text


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "words, beginning",
    [
        (("drr", "nothing.nii.gz"), "nothing.nii.gz: "),
        (("drr", "CT", "--azimuth", "front"), "--azimuth: "),
        (("drr", "CT", "--elevation", "1,2,3"), "--elevation: "),
        (("drr", "CT", "--cube-mm", "-1"), "--cube-mm: "),
        (("drr", "CT", "--cube-mm", "1e9"), "--cube-mm: "),
        (("drr", "CT", "--pixel-mm", "inf"), "--pixel-mm: "),
        (("interpolate-slices", "CT", "--weights", "no_run", "--spacing", "nan"), "--spacing-mm: "),
        (("evaluate", "a.nii.gz", "CT"), "a.nii.gz: "),
        (("reconstruct", "a.png", "--geometry", "no.json", "--weights", "no_run"), "no_run"),
        (("interpolate-slices", "CT", "--weights", "no_run"), "no_run"),
        (("embed", "CT", "--weights", "no_run"), "no_run"),
        (("search", "nodule", "--index", "no.parquet"), "no.parquet: "),
    ],
)
def test_a_refusal_is_one_sentence_and_writes_nothing(words, beginning, ct, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(*(str(ct) if word == "CT" else word for word in words)).startswith(beginning)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argument, beginning",
    [
        ("width_mm", "--fwhm-mm: too wide"),
        ("convention", "--cover: too wide"),
        ("memory_gib", "--memory-gib: too wide"),
        ("ct", "ct: too wide"),  # no option
        ("SliceProfile", "SliceProfile: too wide"),
    ],
)
def test_a_refusal_names_the_option(argument, beginning, monkeypatch):
    import ct_nb.slices.thin_ct_files as thin_ct_files

    def refuse(*args, **settings):
        raise InputError(argument, "too wide")

    monkeypatch.setattr(thin_ct_files, "interpolate_file", refuse)
    assert refusal("interpolate-slices", "ct", "--weights", "run") == beginning


def test_every_other_name_of_an_option_is_one():
    import typer

    commands = typer.main.get_command(cli.app).commands.values()
    names = {parameter.name for command in commands for parameter in command.params}
    assert set(cli.OPTION_NAMES.values()) <= names
    assert not set(cli.OPTION_NAMES) & names


def test_a_place_that_cannot_be_written_is_a_sentence(ct, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal("drr", ct, "--out", tmp_path / "file", *SMALL)


def test_a_note_cannot_speak_to_the_terminal(ct, monkeypatch):
    "Notes hold names of files, and text out of them."
    notes = ["IM\x1b[2J\nview 0: residual 0.000 is damaged"]
    monkeypatch.setattr("ct_nb.app.commands.simulate_drrs", lambda *args, **kwargs: ([], notes))
    said = ct_nb("drr", ct).stdout
    assert said == "note: IM\\x1b[2J\\nview 0: residual 0.000 is damaged\n"


def test_a_defect_keeps_its_traceback(ct, monkeypatch):
    import ct_nb.app.commands as commands

    def broken(*args, **settings):
        raise ValueError("a shape")

    monkeypatch.setattr(commands, "simulate_drrs", broken)
    with pytest.raises(ValueError, match="a shape"):
        ct_nb("drr", ct)


@pytest.mark.parametrize("option", ["--sod-mm", "--sdd-mm", "--pixel-mm"])
def test_no_tube_stands_beyond_a_kilometre(option, ct):
    for length in ("1e18", "0"):
        assert refusal("drr", ct, option, length).startswith(f"{option}: must be above 0 and up")


def test_a_terminal_of_ascii_and_a_user_without_a_home(ct, tmp_path):
    script = (
        "import os, pwd; pwd.getpwuid = lambda uid: {}[uid]; from ct_nb.app.cli import main; main()"
    )
    path = tmp_path / "Thorax für → µm.nii.gz"
    path.write_bytes(ct.read_bytes())
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PYTHONIOENCODING": "ascii",
        "TMPDIR": str(tmp_path),
    }
    words = [str(word) for word in ("drr", path, "--out", tmp_path / "out", *SMALL)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*.png"))
