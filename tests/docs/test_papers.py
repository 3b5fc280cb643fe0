"""The pages of papers/: every section with figures names the command that prints them or says that nobody can repeat them, and what a page names is there."""

import json
import re
from pathlib import Path

import pytest
from places import ROOT

PAGES = sorted((ROOT / "papers").glob("*.md"))
ROOMS = "|".join(path.name for path in (ROOT / "ct_nb").iterdir() if path.is_dir())
COMMAND = re.compile(
    r"papermill nbs/\w+\.ipynb|`make \w+|\bct-nb \w|python -m"
    rf" ct_nb|\bnbs/[\w/]+\.ipynb|\btest_\w+\.py|\b(?:{ROOMS})/\d\d\w+"
)
ONCE = "cannot be repeated"  # a run of a state of the library that is no more, and says so
NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?"
MEASURED = re.compile(
    rf"({NUMBER}(?:\s*(?:±|to|and|/|against|,)\s*{NUMBER})*)\s?(?:dB|%|ms|s|GB|GiB|MB|minutes)(?![\w²-])"
)


def sections(text: str) -> list[tuple[str, str]]:
    """(heading, text) of a page's sections, those under ## and those under ###; what stands before
    the first is no section.
    """
    parts = re.split(
        r"^###? (.+)$",
        re.sub(
            r"^```.*?^```", lambda found: found[0].replace("\n#", "\n "), text, flags=re.S | re.M
        ),
        flags=re.M,
    )
    return list(zip(parts[1::2], parts[2::2]))


def figures(text: str) -> list[str]:
    """Numbers that somebody measured: those with a unit of results, and decimals at the beginning
    of a table's cells. Not in code, formulas and citations, nor in the first column of a table,
    where claims and settings stand.
    """
    text = re.sub(r"```.*?```|`[^`]*`|\[@[^\]]*\]|\$[^$]*\$|\]\([^)]*\)", "", text, flags=re.S)
    text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    cells = [
        cell.strip()
        for line in text.splitlines()
        if line.startswith("|")
        for cell in line.strip("|").split("|")
    ]
    groups = [found[1] for found in MEASURED.finditer(text)] + [
        cell for cell in cells if re.match(r"[*<+−-]*\d+\.\d+", cell)
    ]
    return [
        number.replace(",", "")
        for group in groups
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?", group)
    ]


def repeats(number: str, known: set[str]) -> bool:
    "Whether a figure is one of these, rounded perhaps."
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return any(abs(float(other) - float(number)) <= half + 1e-9 for other in known)


def without_command(text: str) -> list[str]:
    """Headings of sections whose figures, in tables, pictures or prose, have no command, notebook
    or test that makes them in that section, are not said to be beyond repeating, and are not all
    told in an earlier section that does, or on a page that is named.
    """
    found, known = [], set()
    for heading, body in sections(text):
        here = figures(body)
        if COMMAND.search(body) or ONCE in body:
            known |= set(here)
            continue
        elsewhere = {
            number
            for name in re.findall(r"`papers/(\w+)\.md`", body)
            for number in figures((ROOT / "papers" / f"{name}.md").read_text(encoding="utf-8"))
        }
        if "![" in body or not all(repeats(number, known | elsewhere) for number in here):
            found.append(heading)
    return found


def recipes(text: str) -> list[tuple[str, list[str]]]:
    """(notebook, names of parameters) of every papermill command of a page; a command ends with its
    code.
    """
    return [
        (words[1], re.findall(r"-p (\w+)", " ".join(words)))
        for code in re.findall(r"`+([^`]+)`+", text, flags=re.S)
        for line in code.splitlines()
        if (words := line.split())[:1] == ["papermill"]
    ]


def parameters(notebook: Path) -> set[str]:
    cells = [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    return set(
        re.findall(
            r"^(\w+)(?:: \w+)? =", "".join("".join(cell["source"]) for cell in cells), flags=re.M
        )
    )


def known_keys() -> list[str]:
    return re.findall(
        r"^@\w+\{(\w+),",
        (ROOT / "papers" / "references.bib").read_text(encoding="utf-8"),
        flags=re.M,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_figures_name_their_command(page):
    assert (
        without_command(page.read_text(encoding="utf-8")) == []
    ), "name what prints these figures, or say that they cannot be repeated and why"


def test_a_figure_without_command_is_found():
    command = "`papermill nbs/evaluate.ipynb out.ipynb`\n"
    table = "\n| a | b |\n|---|---|\n| x | 21.5 |\n"
    assert without_command("# Page\n\n## Phantom\n" + table) == ["Phantom"] and not without_command(
        "# Page\n\n## Phantom\n\n" + command + table
    )
    assert without_command("# Page\n\n" + command + "\n## Phantom\n" + table) == [
        "Phantom"
    ], "a command in the page's head says nothing of a section"
    assert without_command(
        "# Page\n\n## Phantom\n\n"
        + command
        + table
        + "\n### More\n\nIt gains 3.2 dB and takes 7 s.\n"
    ) == ["More"], "nor does one of another section"
    assert without_command("# Page\n\n## Words\n\nIt holds 93 % of them.\n") == [
        "Words"
    ] and without_command("# Page\n\n## Look\n\n![a chest](chest.png)\n") == ["Look"]
    assert not without_command(
        "# Page\n\n## Phantom\n\n"
        + command
        + table
        + "\n## Claims\n\n| claim | measured |\n|---|---|\n| 35 dB | 22 dB: no |\n"
    ), "what is only repeated, rounded"
    assert without_command(
        "# Page\n\n## Phantom\n\n"
        + command
        + table
        + "\n## Claims\n\n| claim | measured |\n|---|---|\n| 35 dB | 23 dB |\n"
    ) == ["Claims"]
    assert not without_command(
        "# Page\n\n## Claims\n\nIt has 16.7 dB (`papers/drr2ct.md`).\n"
    ) and without_command("# Page\n\n## Claims\n\nIt has 55.5 dB (`papers/drr2ct.md`).\n")
    assert not without_command(
        "# Page\n\n## Then\n\nIt gained 3.2 dB, which cannot be repeated: the network was"
        " another.\n"
    )
    assert not without_command(
        "# Page\n\n## Words\n\n| a | b |\n|---|---|\n| x | divided by 102.4 |\n\nA cube of 320 mm,"
        " `0.5 dB`, $p < 5 %$.\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_notebooks_and_tests_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    missing = [
        name for name in re.findall(r"nbs/[\w/]+\.ipynb", text) if not (ROOT / name).is_file()
    ]
    missing += [
        name
        for name in re.findall(rf"\b(?:{ROOMS})/\d\d\w*", text)
        if not (ROOT / "nbs" / f"{name}.ipynb").is_file()
    ]
    missing += [
        name
        for name in re.findall(r"\btest_\w+\.py", text)
        if not list((ROOT / "tests").rglob(name))
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_have_the_parameters_that_pages_give_them(page):
    for name, given in recipes(page.read_text(encoding="utf-8")):
        unknown = set(given) - parameters(ROOT / name)
        assert not unknown, f"{name} has no parameter {', '.join(sorted(unknown))}"


def test_an_unknown_parameter_is_found():
    ((name, given),) = recipes(
        "Do `papermill nbs/evaluate.ipynb out.ipynb -p weights runs/x -p nonsense 1` twice."
    )
    assert set(given) - parameters(ROOT / name) == {"nonsense"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_citations_are_in_the_bibliography(page):
    cited = re.findall(r"@([a-z]+\d{4}\w*)", page.read_text(encoding="utf-8"))
    assert not set(cited) - set(known_keys())


def test_bibliography_keys_are_unique():
    keys = known_keys()
    assert len(keys) > 10 and len(set(keys)) == len(keys)
