"""What is installed: settings.ini, environment.yml, requirements.lock and the Makefile say the same; CITATION.cff and CONTRIBUTING.md are true."""

import ast
import re
from configparser import ConfigParser

import pytest
import yaml
from lock_requirements import EXTRAS, LOCK, ROOT, conflicts, lock_versions, requirements
from packaging.requirements import Requirement


def environment_faults(text: str) -> list[str]:
    """What conda's list must say: the Python of settings.ini, Quarto, and everything else from
    settings.ini at the lock's versions.
    """
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    content, found = yaml.safe_load(text), []
    packages = [package for package in content["dependencies"] if isinstance(package, str)]
    pip = next(
        (package["pip"] for package in content["dependencies"] if isinstance(package, dict)), []
    )
    if f"python={settings['DEFAULT']['min_python']}" not in packages:
        found.append(
            f"environment.yml: expected python={settings['DEFAULT']['min_python']}, as settings.ini"
            " says"
        )
    if not any(package.startswith("quarto") for package in packages):
        found.append("environment.yml: Quarto is missing")
    if pip != ["-c requirements.lock", "-e .[dev]"]:
        found.append(
            f"environment.yml: pip installs {pip}; expected the package at the lock's versions and"
            " nothing else"
        )
    names = {re.split("[<>=]", package)[0] for package in packages}
    if twice := names & {request.name.lower() for request in requirements()}:
        found.append(f"environment.yml: {sorted(twice)} stand in settings.ini already")
    return found


def makefile_faults(text: str) -> list[str]:
    """What `make setup` must do: install the package at the lock's versions, and again when a list
    has changed.
    """
    wanted = set(re.search(r"^\$\(STAMP\):(.*)$", text, flags=re.M)[1].split())
    installs = re.findall(r"pip install(.*)", text)
    found = [
        f"Makefile: the stamp does not depend on {name}"
        for name in ("settings.ini", "requirements.lock")
        if name not in wanted
    ]
    return (
        found
        + [
            f"Makefile: 'pip install{words}' does not take the lock's versions"
            for words in installs
            if not words.endswith(" -c requirements.lock -e '.[dev]'")
        ]
        + ["Makefile: nothing is installed"] * (not installs)
    )


def test_the_lists_agree():
    assert (
        conflicts(requirements(), lock_versions(LOCK.read_text(encoding="utf-8"))) == []
    ), "run `python tests/lock_requirements.py --write`"
    assert environment_faults((ROOT / "environment.yml").read_text(encoding="utf-8")) == []
    assert makefile_faults((ROOT / "Makefile").read_text(encoding="utf-8")) == []


def test_the_lock_holds_plain_versions_in_order():
    lines = [
        line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names)) and len(names) > 100
    assert all(
        re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines
    ), "no build marks such as +cpu, no paths"
    for request in requirements(extras=()):
        operators = sorted(specifier.operator for specifier in request.specifier)
        assert operators == ["<", ">="], f"{request}: a library asks for ranges"
    exact = {r.name for r in requirements(EXTRAS) if str(r.specifier).startswith("==")}
    assert {"nbdev", "ruff", "import-linter"} <= exact, "tools whose every version writes otherwise"


def test_lists_that_disagree_are_found():
    lock = lock_versions(LOCK.read_text(encoding="utf-8"))
    assert conflicts([Requirement("numpy==1.0")], lock) == [
        f"requirements.lock has numpy=={lock['numpy']}, settings.ini asks for ==1.0"
    ]
    assert conflicts([Requirement("nothing-like-this==1")], lock) == [
        "requirements.lock has no nothing-like-this, which settings.ini asks for"
    ]
    import importlib.metadata as metadata

    if metadata.version("nbformat") == lock["nbformat"]:
        assert "requirements.lock has no traitlets, which nbformat asks for" in conflicts(
            [], {k: v for k, v in lock.items() if k != "traitlets"}
        )
        assert any(
            "nbformat asks for" in fault for fault in conflicts([], {**lock, "traitlets": "1.0"})
        )
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert environment_faults(text.replace("python=3.11", "python=3.9"))[0].startswith(
        "environment.yml: expected python=3.11"
    )
    assert environment_faults(text.replace("  - quarto>=1.4\n", "")) == [
        "environment.yml: Quarto is missing"
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile_faults(makefile.replace(" requirements.lock setup.py", " setup.py")) == [
        "Makefile: the stamp does not depend on requirements.lock"
    ]
    assert len(
        makefile_faults(makefile.replace("-c requirements.lock -e", "-e"))
    ) == 1 and makefile_faults(makefile.replace("pip install", "conda install")) == [
        "Makefile: nothing is installed"
    ]
    assert (
        len(environment_faults(text.replace("-e .[dev]", "-e ."))) == 1
        and len(environment_faults(text.replace("  - pip\n", "  - pip\n  - numpy\n"))) == 1
    )


# ---------------------------------------------------------------- citation
def citation_file_faults(text: str) -> list[str]:
    "What the Citation File Format 1.2.0 requires, and that the version is the package's."
    content, found = yaml.safe_load(text), []
    found += [
        f"CITATION.cff has no {key}"
        for key in ("cff-version", "message", "title", "authors")
        if not content.get(key)
    ]
    if content.get("cff-version") != "1.2.0":
        found.append("CITATION.cff: cff-version must be 1.2.0")
    if content.get("type", "software") not in ("software", "dataset"):
        found.append(f"CITATION.cff: type is {content['type']!r}")
    if not all(
        author.get("name") or author.get("family-names") for author in content.get("authors") or []
    ):
        found.append("CITATION.cff: an author has no name")
    allowed = {
        "abstract",
        "authors",
        "cff-version",
        "commit",
        "contact",
        "date-released",
        "doi",
        "identifiers",
        "keywords",
        "license",
        "license-url",
        "message",
        "preferred-citation",
        "references",
        "repository",
        "repository-artifact",
        "repository-code",
        "title",
        "type",
        "url",
        "version",
    }
    found += [
        f"CITATION.cff: {key!r} is not in the format" for key in content if key not in allowed
    ]
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    if content.get("version") != settings["DEFAULT"]["version"]:
        found.append(
            f"CITATION.cff: version {content.get('version')}, settings.ini has"
            f" {settings['DEFAULT']['version']}"
        )
    return found


def test_the_citation_file_is_valid():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert citation_file_faults(text) == [] and yaml.safe_load(text)["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    bibtex = dict(
        re.findall(
            r"^  (\w+) *= \{(.*?)\},?$",
            re.search(
                r"@software\{.*?^\}",
                (ROOT / "README.md").read_text(encoding="utf-8"),
                flags=re.S | re.M,
            )[0],
            flags=re.M,
        )
    )
    cff = yaml.safe_load(text)
    assert (
        bibtex["version"],
        bibtex["license"],
        bibtex["title"].replace("{", "").replace("}", ""),
    ) == (
        cff["version"],
        cff["license"],
        cff["title"],
    ), "README and CITATION.cff name different things"


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("title:", "titel:", "CITATION.cff has no title"),
        ("cff-version: 1.2.0", "cff-version: 1.1.0", "CITATION.cff: cff-version must be 1.2.0"),
        ("type: software", "type: book", "CITATION.cff: type is 'book'"),
        ("  - name: The", "  - alias: The", "CITATION.cff: an author has no name"),
        ("\nversion:", "\nedition:", "CITATION.cff: 'edition' is not in the format"),
    ],
)
def test_a_broken_citation_file_is_found(old, new, fault):
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert old in text and fault in citation_file_faults(text.replace(old, new))


# ---------------------------------------------------------------- contributing
def defined_names() -> set[str]:
    """What the library and the tests define: modules, functions, classes, methods, fields,
    arguments.
    """
    names = set()
    for path in (*(ROOT / "ct_nb").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        names |= {path.stem, path.parent.name}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
                names |= {t.attr for t in targets if isinstance(t, ast.Attribute)}
    return names


# of other programs, and names of files, columns, options and presets
ELSEWHERE = set(
    "nn Module nbdev_export nbdev_clean nbdev_update lint-imports ruff case patient patients csv"
    " labels json notebooks deepspeed dev micro smoke cpu gpu paper".split()
)


def unknown_names(text: str) -> list[str]:
    "Names in code type of a text that nothing defines, and files that are not there."
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    known = defined_names() | ELSEWHERE | set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.M))
    unknown = []
    for code in re.findall(r"`([A-Za-z_][\w./-]*)(?:\([^`]*\))?`", text):
        if "NAME" in code or (ROOT / code).exists() or (ROOT / "nbs" / code).exists():
            continue
        if not set(re.split(r"[./]", code.rstrip("/"))) <= known:
            unknown.append(code)
    return sorted(set(unknown))


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert unknown_names(text) == []
    # an English word, a misspelt name and a lost file are not taken for names
    wrong = "`Trainer`, `chair`, `Trainerr`, `tests/vanished.py` and `nbs/00_files.ipynb`"
    assert unknown_names(wrong) == ["Trainerr", "chair", "nbs/00_files.ipynb", "tests/vanished.py"]
    for chapter in (
        "The house",
        "A new system",
        "A new data set",
        "A new metric",
        "How a notebook becomes a module",
    ):
        assert f"\n## {chapter}\n" in text
    for target in re.findall(r"^make ([\w-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), target
