"""The docs site: `make docs` runs this and leaves the pages in `_docs`.

Three steps. *Execute*: notebooks are stored without outputs and a page needs its pictures, so every notebook runs in a copy; a recipe runs at its smallest size, unless
`runs/NAME.ipynb` holds a run of the same recipe, and what ran is kept in `runs/site` until its code or the library changes. *Write*: nbdev's processing makes front matter and takes
hidden cells away, and the pages get API tables from docstrings, links from symbols and files to their pages, and papers beside the notebooks. *Render*: Quarto, from `environment.yml`.
"""

import ast
import hashlib
import inspect
import json
import os
import posixpath
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from importlib import import_module
from pathlib import Path

import nbformat
from execnb.nbio import dict2nb, mk_cell, nb2dict
from fastcore.docments import docments
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, Processor
from nbdev.processors import hide_, hide_line, rm_header_dash, strip_hidden_metadata
from nbdev.showdoc import showdoc_nm

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("papers/*.md", "CONTRIBUTING.md", "CHANGELOG.md")  # beside the notebooks
FILES = ("papers/references.bib", "_quarto.yml")


# ---------------------------------------------------------------- what goes where
def notebooks(root: Path = ROOT) -> list[str]:
    "Paths of the notebooks under `nbs/`, in order; hidden ones and their folders left out."
    found = (p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*.ipynb"))
    return sorted(p.as_posix() for p in found if not any(part[0] in "._" for part in p.parts))


def page_of(path: str, root: Path = ROOT) -> str | None:
    """Where a file of the repository lies in the site: notebooks and their pictures at the top,
    papers in `papers/`; None for what is not in it.
    """
    if path.startswith("nbs/") and not path.endswith("_quarto.yml"):
        return path.removeprefix("nbs/")
    return (
        path
        if any(Path(path).match(glob) for glob in PAGES)
        or path.startswith("papers/")
        and not path.endswith((".py", ".json"))
        else None
    )


def html_of(page: str) -> str:
    "The rendered page: nbdev drops the number of a chapter."
    folder, name = posixpath.split(page)
    stem = name.rsplit(".", 1)[0]
    return posixpath.join(
        folder,
        (re.sub(r"^\d+[a-z]*_", "", stem.lower()) if page.endswith(".ipynb") else stem) + ".html",
    )


# ---------------------------------------------------------------- execute
SMALL = {  # parameters of a recipe at its smallest, beside `preset`
    "ablations_drr2ct": dict(steps=2, phantoms=12),
    "bench_atlas": dict(data="phantom:4", phantoms=2, size=32, folds=2, few=2, parts="board few views speed"),
    "bench_cascade": dict(sizes="16 32"),
    "bench_ct_encoder": dict(whole=False),
    "bench_drr2ct": dict(repeats=1, batches="1"),
    "bench_phantom": dict(data="phantom:4", patients="all", phantoms=4, size=64, linear=6, parts="measures sets page linear"),
    "bench_planes": dict(data="phantom:1", length_mm=80.0, slab_mm=30.0),
    "bench_projector": dict(sizes="32", detector=32, rounds=1),
    "bench_registration": dict(
        data="phantom:1", cases=1, reaches="0.5", conditions="all single", size=32, starts=16
    ),
    "bench_scores": dict(data="phantom:3", size=32, repeats=50),
    "explore_reconstruction": dict(samples=2),
    "evaluate": dict(data="phantom:2"),
    "reconstruct": dict(size=64),
    "robustness_drr2ct": dict(cases=1),
    "train_planes": dict(data="phantom:1"),
    "two_views": dict(data="phantom:3", flat=16, solid=12, size=16, views="1 2 4", train=12),
}

READ = ("weights", "coarse", "runs")  # parameters that name the folder of a run, or of several


def parameters(notebook, name: str, work: Path, root: Path = ROOT) -> dict:
    """What a recipe is run with for the site; empty for a chapter.

    It writes into `work` and not into `runs`, and reads its weights from there too, unless `runs`
    has them.
    """
    cell = next((c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])), None)
    if cell is None:
        return {}
    defaults = {
        line.target.id: ast.literal_eval(line.value)
        for line in ast.parse(cell.source).body
        if isinstance(line, ast.AnnAssign)
    }
    moved = {
        key: str(work / Path(value).relative_to("runs"))
        for key, value in defaults.items()
        if isinstance(value, str) and Path(value).parts[:1] == ("runs",)
    }
    own = {
        key
        for key in READ
        if key in moved
        and any(
            (root / defaults[key] / config).is_file()
            for config in ("config.json", "drr2ct/config.json")
        )
    }
    return (
        {key: value for key, value in moved.items() if key not in own}
        | ({"preset": "smoke"} if "preset" in defaults else {})
        | SMALL.get(name, {})
    )


def code_of(notebook) -> list[str]:
    return [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def run_one(name: str, work: Path, library: str) -> str | None:
    "Run a notebook into `work/executed`, unless it is there already; the error if it fails."
    import papermill

    source = nbformat.read(ROOT / "nbs" / name, 4)
    target = work / "executed" / name
    given = parameters(source, Path(name).stem, work)
    own = ROOT / "runs" / name
    key = hashlib.sha256(json.dumps([library, code_of(source), given]).encode()).hexdigest()
    if target.exists() and nbformat.read(target, 4).metadata.get("key") in (key, "own run"):
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    if given and own.exists() and code_of(nbformat.read(own, 4)) == code_of(source):
        done, key = nbformat.read(own, 4), "own run"
    else:
        try:
            done = papermill.execute_notebook(
                str(ROOT / "nbs" / name),
                None,
                given,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(ROOT if given else (ROOT / "nbs" / name).parent),
            )
        except papermill.PapermillExecutionError as error:
            return f"nbs/{name}: {error}"
    done.metadata["key"] = key
    nbformat.write(done, target)
    return None


def batches(names: list[str]) -> list[list[str]]:
    """Notebooks in the order in which they can run: those that need no run, those that read the
    weights of one, and explorers, which show all that there is.
    """
    reads = [
        n
        for n in names
        if re.search(
            rf"^({'|'.join(READ)}): str = \"runs",
            "\n".join(code_of(nbformat.read(ROOT / "nbs" / n, 4))),
            flags=re.M,
        )
    ]
    last = [n for n in names if n.startswith("explore_")]
    return [
        [n for n in names if n not in (*reads, *last)],
        [n for n in reads if n not in last],
        last,
    ]


def execute(work: Path) -> None:
    "Run every notebook, as many at a time as there are cores."
    library = hashlib.sha256(
        b"".join(
            p.read_bytes() for p in sorted((ROOT / "ct_nb").rglob("*.py")) if p.name != "_modidx.py"
        )
    ).hexdigest()
    names, faults = notebooks(), []
    os.environ.pop("MPLBACKEND", None)  # a kernel draws into its notebook only with its own backend
    with ProcessPoolExecutor() as pool:
        for batch in batches(names):
            for number, fault in enumerate(
                pool.map(run_one, batch, [work] * len(batch), [library] * len(batch)), 1
            ):
                print(f"executed {number} of {len(batch)}: {batch[number - 1]}", flush=True)
                if fault:
                    faults.append(fault)
    if faults:
        sys.exit("\n\n".join(faults))


# ---------------------------------------------------------------- API tables
def cells_of_table(*cells) -> str:
    return (
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    )


def sentence(text: str | None) -> str:
    return re.split(r"(?<=[.;])\s", inspect.cleandoc(text or "").replace("\n", " "), maxsplit=1)[
        0
    ].rstrip(";")


def plain(annotation: str) -> str:
    return re.sub(r"\b(?:ct_nb\.[\w.]+|collections\.abc|pathlib|typing)\.(?=\w)", "", annotation)


def type_name(annotation) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return f"`{plain(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))}`"


def signature(symbol, name: str, types: bool = True) -> str:
    "As it is called; over several lines where it is long."
    try:
        found = inspect.signature(symbol)
    except (TypeError, ValueError):
        return name
    values = [v for v in found.parameters.values() if v.name not in ("self", "cls")]
    if not types:
        values = [v.replace(annotation=v.empty) for v in values]
        found = found.replace(return_annotation=inspect.Signature.empty)
    call = name + plain(str(found.replace(parameters=values)))
    return (
        call
        if len(call) <= 100
        else textwrap.fill(
            call, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    )


def members(symbol: type) -> list[tuple[str, str, str]]:
    "Name, call and first sentence of the public methods and properties that say what they do."
    found = []
    for name, member in vars(symbol).items():
        bound = getattr(symbol, name) if type(member).__name__ == "_clsmethod" else member  # fastcore
        function = getattr(bound, "fget", None) or getattr(bound, "__func__", bound)
        if name[0] == "_" or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = (
            name
            if isinstance(member, property)
            else " ".join(signature(getattr(symbol, name), name, types=False).split())
        )
        found.append((name, call, sentence(function.__doc__)))
    return found


def anchor(name: str) -> str:
    return f"api-{name}"


def api(symbol, name: str) -> str:
    """Markdown of a function or class: heading, call, docstring, and tables of the parameters and
    methods that are described.
    """
    said, lines = inspect.cleandoc(symbol.__doc__ or ""), []
    # a dataclass's own repetition of its fields
    if inspect.isclass(symbol) and said.startswith(f"{name}("):
        said = ""
    try:
        fields = {
            n: d
            for n, d in docments(symbol, full=True).items()
            if n not in ("self", "cls", "return")
        }
    except (TypeError, ValueError, OSError):
        fields = {}
    described = any(d.docment for d in fields.values())
    lines += [
        f"### {name} {{#{anchor(name)}}}",
        "",
        "```python",
        signature(symbol, name, types=not described),
        "```",
        "",
        *([said, ""] if said else []),
    ]
    if described:
        lines += ["| Parameter | Type | Default | |", "|-----|-----|---|-----------|"]
        for field, parameter in inspect.signature(symbol).parameters.items():
            if field not in fields:
                continue
            default = (
                "" if parameter.default is parameter.empty else f"`{repr(parameter.default)[:60]}`"
            )
            lines.append(
                cells_of_table(
                    f"`{field}`",
                    type_name(parameter.annotation),
                    default,
                    fields[field].docment or "",
                )
            )
        lines.append("")
    if inspect.isclass(symbol) and (methods := members(symbol)):
        lines += [
            "| Method | |",
            "|-------|------|",
            *(
                cells_of_table(f"[`{call}`]{{#{anchor(f'{name}.{method}')}}}", what)
                for method, call, what in methods
            ),
            "",
        ]
    return "\n".join(lines)


class ApiTables(Processor):
    """After an exported cell, what it defines; the cell itself is folded.

    Hidden and naming cells go.
    """

    def begin(self):
        exported = lambda cell: cell.cell_type == "code" and cell.directives_.keys() & {
            "export",
            "exports",
            "exporti",
        }
        module = next(
            (
                import_module(f"ct_nb.{c.directives_['default_exp'][0]}")
                for c in self.nb.cells
                if "default_exp" in c.directives_
            ),
            None,
        )
        cells = []
        for cell in self.nb.cells:
            if cell.directives_.keys() & {"hide", "default_exp"}:
                continue
            if exported(cell):
                for node in ast.parse(cell.source).body:
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
                        name = showdoc_nm(node)
                        cells.append(
                            mk_cell(api(reduce(getattr, name.split("."), module), name), "markdown")
                        )
                cell.source = f'#| code-fold: true\n#| code-summary: "Source"\n{cell.source}'
            cells.append(cell)
        blocks = {
            part
            for cell in cells
            if cell.cell_type == "markdown"
            for part in re.findall(r"^### .* \{#(api-[^}]+)\}$", cell.source, flags=re.M)
        }
        # what has a block of its own is no anchor in its class's table but a link
        for cell in cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(
                    r"(?<=\])\{#(api-[^}]+)\}",
                    lambda found: f"(#{found[1]})" if found[1] in blocks else found[0],
                    cell.source,
                )
        self.nb.cells = cells


# ---------------------------------------------------------------- links
# a link or a picture
TOKEN = re.compile(
    r"(?P<picture>!?)\[(?P<text>(?:[^\[\]\n`]|`[^`\n]*`)*)\]\((?P<target>[^)\s]+)\)"
    # a citation, as papers write it
    r"|\[(?P<keys>@?[a-z]+\d{4}[a-z]*(?:[;,] ?@?[a-z]+\d{4}[a-z]*)*)\](?!\()"
    # a name or a file; other code is passed over
    r"|(?<!\[)`(?P<word>[\w./]+)(?:\(\))?`|`[^`\n]+`"
)


def unaccented(text: str) -> str:
    "Letters without accents, be they Unicode's or LaTeX's."
    return "".join(
        c
        for c in unicodedata.normalize("NFKD", re.sub(r"\\[\W_]|[{}]", "", text))
        if not unicodedata.combining(c)
    )


def first_authors(bibliography: str) -> dict[str, str]:
    "Key → surname of the first author, without accents."
    entries = re.split(r"^@\w+\{", bibliography, flags=re.M)[1:]
    authors = {
        entry.split(",")[0].strip(): re.search(
            r"author\s*=\s*\{(.*?)(?: and |\},?\n)", entry, flags=re.S
        )
        for entry in entries
    }
    return {
        key: unaccented(found[1]).split(",")[0].strip() if found else key
        for key, found in authors.items()
    }


class Links:
    "Turns what the repository's text refers to into links between pages."

    def __init__(self, root: Path = ROOT):
        # full name → page and module; name within its module → full names
        self.root = root
        self.symbols = {}
        self.tails = {}
        for module, names in runpy.run_path(str(root / "ct_nb" / "_modidx.py"))["d"][
            "syms"
        ].items():
            for name, (html, _) in names.items():
                self.symbols[name] = html.split("#")[0], module
                self.tails.setdefault(name.removeprefix(module + "."), []).append(name)
        self.keys = first_authors((root / "papers" / "references.bib").read_text(encoding="utf-8"))
        self.anchors: dict[str, set[str]] = {}

    def scope(self, notebook) -> dict[str, str]:
        "Names that a notebook defines or imports → full names."
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        names = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(re.sub(r"^[%!].*", "", code, flags=re.M)))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ct_nb")
            for alias in node.names
        }
        if own := re.search(r"#\| *default_exp (\S+)", code):
            names |= {
                name.rpartition(".")[2]: name
                for name in self.symbols
                if name.rpartition(".")[0] == f"ct_nb.{own[1]}"
            }
        return names

    def symbol(self, word: str, scope: dict[str, str]) -> tuple[str, str] | None:
        """Page and anchor of what a word in code type names: something of this notebook, a full
        name, or a name that only one module has.
        """
        head, dot, rest = word.partition(".")
        full = scope[head] + dot + rest if head in scope else word
        if full not in self.symbols:
            owners = self.tails.get(word, [])
            # a word, not a name
            if len(owners) != 1 or word.islower() and not set(word) & set("_."):
                return None
            full = owners[0]
        page, module = self.symbols[full]
        return page, anchor(full.removeprefix(module + "."))

    def __call__(self, text: str, here: str, scope: dict[str, str] = {}) -> str:
        "Markdown of the file `here` of the repository, as its page has it."
        page = page_of(here, self.root)
        fenced = False
        lines = []
        to = lambda target: posixpath.relpath(target, posixpath.dirname(page) or ".")

        def replace(match) -> str:
            found = match.groupdict()
            if found["target"]:
                path, mark, part = found["target"].partition("#")
                if re.match(r"[a-z]+:", path) or not path:
                    return match[0]
                target = page_of(
                    posixpath.normpath(posixpath.join(posixpath.dirname(here), path)), self.root
                )
                return (
                    f"{found['picture']}[{found['text']}]({to(target)}{mark}{part})"
                    if target
                    else found["text"]
                )
            if found["keys"]:
                keys = [key.strip().lstrip("@") for key in re.split("[;,]", found["keys"])]
                if not self.keys.keys() >= set(keys):
                    return match[0]
                before = unaccented(match.string[: match.start()][-100:])
                # with -, the year alone
                return (
                    "["
                    + "; ".join(
                        ("-@" if re.search(rf"\b{re.escape(self.keys[key])}\b", before) else "@")
                        + key
                        for key in keys
                    )
                    + "]"
                )
            if found["word"]:
                word = found["word"]
                if (
                    "/" in word
                    and (target := page_of(word, self.root))
                    and (self.root / word).is_file()
                ):
                    return f"[{match[0]}]({to(target)})"
                if symbol := self.symbol(word, scope):
                    html, part = symbol
                    known = self.anchors.get(html, set())
                    part = next((p for p in (part, part.rsplit(".", 1)[0]) if p in known), None)
                    return f"[{match[0]}]({to(html)}{'#' + part if part else ''})"
            return match[0]

        for line in text.split("\n"):
            if line.lstrip().startswith(("```", "~~~")):
                fenced = not fenced
            elif not fenced and not line.startswith(("    ", "#", "---")):
                line = TOKEN.sub(replace, line)
            lines.append(line)
        return "\n".join(lines)


# ---------------------------------------------------------------- write
def with_outputs(notebook, executed) -> None:
    """Outputs and the state of widgets from an executed notebook, matched by the cells' ids; what
    went to stderr stays behind.
    """
    outputs = {
        cell.id: [o for o in cell.outputs if o.get("name") != "stderr"]
        for cell in executed.cells
        if cell.cell_type == "code"
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs.get(cell.id, [])
    if "widgets" in executed.metadata:
        notebook.metadata["widgets"] = executed.metadata["widgets"]


def chapter(
    name: str, target: Path, links: Links, executed: Path | None = None, root: Path = ROOT
) -> dict[str, str]:
    "Process one notebook into `target`; returns its scope, for the links."
    notebook = nbformat.read(root / "nbs" / name, 4)
    scope = links.scope(notebook)
    given = parameters(notebook, Path(name).stem, Path("runs"))
    note = ""
    if executed and executed.exists():
        done = nbformat.read(executed, 4)
        with_outputs(notebook, done)
        if given and done.metadata.get("key") != "own run":
            note = (
                "\n\n::: {.callout-note}\nRun at its smallest size for this page: the pictures"
                " show what the recipe does, not how well it does it. For a real run: `papermill"
                f" nbs/{name} runs/{name}`.\n:::"
            )
    place, first = next((i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "markdown")
    # nbdev drops the cell that the title stands in
    title, rest = re.match(r"(# .+\n+(?:> .+\n?)*)([\s\S]*)", first.source + "\n").groups()
    first.source = title.strip()
    if (rest + note).strip():
        notebook.cells.insert(
            place + 1, nbformat.v4.new_markdown_cell((rest.strip() + note).strip())
        )
    notebook = dict2nb(json.loads(nbformat.writes(notebook)))
    notebook.path_ = name
    processor = NBProcessor(
        nb=notebook,
        procs=[FrontmatterProc, ApiTables, hide_line, rm_header_dash, hide_, strip_hidden_metadata],
    )
    processor.process()
    links.anchors[html_of(name)] = {
        a
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for a in re.findall(r"\{#([^}]+)\}", cell.source)
    }
    page = nbformat.from_dict(nb2dict(notebook))
    for number, cell in enumerate(page.cells):
        cell["id"] = f"cell-{number:03d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page, target)
    return scope


def write(target: Path, executed: Path | None = None, root: Path = ROOT) -> None:
    """The project that Quarto renders, in an empty folder: processed notebooks, papers and the
    files they need.
    """
    links = Links(root)
    scopes = {
        name: chapter(name, target / name, links, executed and executed / name, root)
        for name in notebooks(root)
    }
    for name, scope in scopes.items():
        notebook = nbformat.read(target / name, 4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = links(cell.source, f"nbs/{name}", scope)
        nbformat.write(notebook, target / name)
    for path in (p.relative_to(root).as_posix() for glob in PAGES for p in sorted(root.glob(glob))):
        text = (root / path).read_text(encoding="utf-8")
        title, rest = re.match(r"# (.+)\n([\s\S]*)", text).groups()
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(
            f"---\ntitle: {json.dumps(title, ensure_ascii=False)}\n---\n{links(rest, path)}",
            encoding="utf-8",
        )
    others = [
        p
        for folder in ("nbs", "papers")
        for p in (root / folder).rglob("*")
        if p.suffix in (".png", ".svg", ".gif", ".jpg", ".css")
    ]
    for path in (*(p.relative_to(root).as_posix() for p in others), *FILES):
        (target / (page_of(path, root) or path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, target / (page_of(path, root) or path))


def main(root: Path = ROOT) -> None:
    if shutil.which("quarto") is None:
        sys.exit(
            "Quarto is not installed: `conda env create -f environment.yml` brings it, or see"
            " https://quarto.org/docs/get-started; `pytest tests/repository/test_site.py` checks the pages"
            " without it"
        )
    work = root / "runs" / "site"
    project = root / "_proc"
    pages = root / "_docs"
    execute(work)
    for folder in (project, pages):
        shutil.rmtree(folder, ignore_errors=True)
    write(project, work / "executed")
    if subprocess.run(["quarto", "render", "--no-cache"], cwd=project).returncode:
        sys.exit("quarto render failed; the project it was given is _proc")
    shutil.move(project / "_docs", pages)
    print("the site is in _docs: open _docs/index.html")


if __name__ == "__main__":
    main()
