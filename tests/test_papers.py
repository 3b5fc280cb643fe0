"""The pages of papers/: figures name the command that prints them, and what a page names is there."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "papers").glob("*.md"))
COMMAND = re.compile(r"papermill nbs/\w+\.ipynb|\bmake \w+|\bct_nb_\w+ |python -m ct_nb|nbs/\w+/\w+|\btest_\w+\.py|\b(?:physics|data|nets|learn|view)/\d\d\w+")


def without_command(text: str) -> list[str]:
    "Headings of sections with a table whose cells begin with a decimal, or with a picture, and no command or notebook that makes them, in the section or in the page's head."
    head, *sections = re.split(r"^## ", text, flags=re.M)
    if re.search(r"papermill nbs/", head): return []
    blocks = [s for s in (head, *sections) if re.search(r"^\|.*\| *[*<+−-]*\d+\.\d+", s, flags=re.M) or "![" in s]
    return [block.splitlines()[0] for block in blocks if not COMMAND.search(block)]


def recipes(text: str) -> list[tuple[str, list[str]]]:
    "(notebook, names of parameters) of every papermill command of a page; a command ends with its code."
    return [(words[1], re.findall(r"-p (\w+)", " ".join(words))) for code in re.findall(r"`+([^`]+)`+", text, flags=re.S)
            for line in code.splitlines() if (words := line.split())[:1] == ["papermill"]]


def parameters(notebook: Path) -> set[str]:
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    return set(re.findall(r"^(\w+)(?:: \w+)? =", "".join("".join(cell["source"]) for cell in cells), flags=re.M))


def known_keys() -> list[str]: return re.findall(r"^@\w+\{(\w+),", (ROOT / "papers" / "references.bib").read_text(encoding="utf-8"), flags=re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_figures_name_their_command(page):
    assert not without_command(page.read_text(encoding="utf-8"))


def test_a_figure_without_command_is_found():
    table = "\n| a | b |\n|---|---|\n| x | 21.5 dB |\n"
    assert without_command("# Page\n\n## Phantom\n" + table) == ["Phantom"]
    assert not without_command("# Page\n\n## Phantom\n\n`papermill nbs/evaluate.ipynb out.ipynb`\n" + table)
    assert not without_command("# Page\n\n```\npapermill nbs/evaluate.ipynb out.ipynb\n```\n\n## Phantom\n" + table)
    assert without_command("# Page\n\n## Look\n\n![a chest](chest.png)\n") == ["Look"]
    assert not without_command("# Page\n\n## Words\n\n| a | b |\n|---|---|\n| x | divided by 102.4 |\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_notebooks_and_tests_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    missing = [name for name in re.findall(r"nbs/[\w/]+\.ipynb", text) if not (ROOT / name).is_file()]
    missing += [name for name in re.findall(r"\b(?:physics|data|nets|learn|view)/\d\d\w*", text) if not (ROOT / "nbs" / f"{name}.ipynb").is_file()]
    missing += [name for name in re.findall(r"\btest_\w+\.py", text) if not list((ROOT / "tests").rglob(name))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_have_the_parameters_that_pages_give_them(page):
    for name, given in recipes(page.read_text(encoding="utf-8")):
        unknown = set(given) - parameters(ROOT / name)
        assert not unknown, f"{name} has no parameter {', '.join(sorted(unknown))}"


def test_an_unknown_parameter_is_found():
    (name, given), = recipes("Do `papermill nbs/evaluate.ipynb out.ipynb -p weights runs/x -p nonsense 1` twice.")
    assert set(given) - parameters(ROOT / name) == {"nonsense"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_citations_are_in_the_bibliography(page):
    cited = re.findall(r"@([a-z]+\d{4}\w*)", page.read_text(encoding="utf-8"))
    assert not set(cited) - set(known_keys())


def test_bibliography_keys_are_unique():
    keys = known_keys()
    assert len(keys) > 10 and len(set(keys)) == len(keys)
