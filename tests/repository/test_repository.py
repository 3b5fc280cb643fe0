"""The repository as a whole: files stay small, and nothing personal or local is committed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


def test_quarto_configuration_is_one_file():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_chapters(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 300_000
    words = [cell for cell in content["cells"] if cell["cell_type"] == "markdown"]
    first = "".join(words[0]["source"])
    assert (
        first.startswith("# ") and "\n> " in first
    ), "a chapter begins with a title and one line that says what it is"
    assert 4 * len(words) >= len(content["cells"]), "fewer than one cell in four explains anything"


def test_nothing_local_is_tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [n for n in done.stdout.split("\0") if n and n != "tests/repository/test_repository.py"]
    assert not [n for n in names if n.endswith((".nii.gz", ".dcm", ".safetensors", ".pt", ".zip"))]
    home = re.compile(r"/(?:home|Users|root|work|tmp)/[\w.]")
    local = [
        n
        for n in names
        if (ROOT / n).is_file()
        and not n.startswith("tests/")
        and (ROOT / n).stat().st_size < 2_000_000
        and home.search((ROOT / n).read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not local, f"paths of a machine stand in {local}"


def test_every_warning_escapes_the_names_in_it():
    "`ct_nb.core.errors.warn` does; `warnings.warn` would let a file's name speak to the terminal."
    others = [
        path.name
        for path in (ROOT / "ct_nb").rglob("*.py")
        if "warnings.warn(" in path.read_text(encoding="utf-8")
    ]
    assert others == ["errors.py"]


def test_environment_says_nothing_that_settings_do_not():
    text = (ROOT / "environment.yml").read_text()
    assert "-e .[dev]" in text and "==" not in text


def broken_contracts(checkout: Path) -> list[str]:
    "Names of the import contracts of pyproject.toml that a checkout breaks."
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return re.findall(r"^(.+) BROKEN", done.stdout, flags=re.M)


@pytest.mark.parametrize(
    "module, line, broken",
    [
        ("core/files.py", "", []),
        ("physics/volume.py", "from ct_nb.data.read import read_ct", "Imports go only downward"),
        ("slices/vae.py", "from ct_nb.ct_encoder import encoder", "Rooms import each other only"),
        ("physics/volume.py", "def f():\n    import ct_nb.physics.geometry", "No circles"),
    ],
    ids=["as it is", "upward", "another room", "a lazy circle"],
)
def test_contracts_find_an_import_that_breaks_the_house(module, line, broken, tmp_path):
    shutil.copytree(
        ROOT / "ct_nb", tmp_path / "ct_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "ct_nb" / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    found = broken_contracts(tmp_path)
    assert any(name.startswith(broken) for name in found) if broken else found == []
