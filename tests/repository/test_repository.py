"""The repository as a whole: files stay small, and nothing personal or local is committed."""

import json
import re
import subprocess
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


def test_environment_says_nothing_that_settings_do_not():
    text = (ROOT / "environment.yml").read_text()
    assert "-e .[dev]" in text and "==" not in text


def test_floors_import_only_downward():
    order = ["files", "physics", "data", "nets", "learn", "view"]
    allowed = {"view": ["style"], "console": order}
    wrong = []
    for path in (ROOT / "ct_nb").rglob("*.py"):
        floor = path.relative_to(ROOT / "ct_nb").parts[0].removesuffix(".py")
        if floor not in order:
            continue
        for name in re.findall(
            r"^\s*(?:from|import) (?:ct_nb|\.\.)\.?(\w+)",
            path.read_text(encoding="utf-8"),
            flags=re.M,
        ):
            if name in order and order.index(name) > order.index(floor):
                wrong.append(f"{path.name} imports {name}")
    assert not wrong, wrong
