"""The docs site as far as it can be checked without Quarto: pages, sidebar, links, pictures, citations, API tables, HTML; and that each check can fail."""

import re
from html import escape
from pathlib import Path

import build_site
import nbformat
import pytest
import yaml
from build_site import ROOT, html_of, notebooks

ROOMS = (
    *("drr2ct", "cascade", "refine", "ct_encoder", "slices", "app"),
    *("viewer", "evaluation", "training", "layers", "data", "phantom", "physics", "core"),
)
FOR_QUARTO = re.compile(r"^#\| (code-fold: true|code-summary: \"Source\")$")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The project that Quarto would render, of the whole repository, without outputs."
    folder = tmp_path_factory.mktemp("site")
    build_site.write(folder)
    return folder


def pages_of(site: Path) -> dict[str, str]:
    "Page → its Markdown, code left out of notebooks."
    found = {}
    for path in sorted(site.rglob("*")):
        name = path.relative_to(site).as_posix()
        if path.suffix == ".ipynb":
            found[name] = "\n\n".join(
                cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
            )
        elif path.suffix == ".md":
            found[name] = path.read_text(encoding="utf-8")
    return found


def chapters(site: Path) -> list[str]:
    return [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.ipynb"))]


def prose(text: str) -> str:
    "Without fences, code and formulas."
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]+`", "", re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.S))


# ---------------------------------------------------------------- front matter
def front_matter_faults(site: Path) -> list[str]:
    faults = []
    for name in pages_of(site):
        path = site / name
        text = (
            nbformat.read(path, 4).cells[0].source
            if name.endswith(".ipynb")
            else path.read_text(encoding="utf-8")
        )
        found = re.match(r"---\n(.*?)\n---", text, flags=re.S)
        fields = yaml.safe_load(found[1]) if found else {}
        for field in (
            ("title", "description", "output-file") if name.endswith(".ipynb") else ("title",)
        ):
            if not fields.get(field):
                faults.append(f"{name}: its front matter has no {field}")
        if (
            name.endswith(".ipynb")
            and fields.get("output-file")
            and fields["output-file"] != Path(html_of(name)).name
        ):
            faults.append(f"{name}: becomes {fields['output-file']}, links say {html_of(name)}")
    return faults


def test_every_page_says_what_it_is(site):
    assert front_matter_faults(site) == []
    assert chapters(site) == notebooks()


def test_a_page_without_a_title_is_found(tmp_path):
    for name, source in (
        ("00_good.ipynb", "---\ntitle: a\ndescription: b\noutput-file: good.html\n---"),
        ("01_bad.ipynb", "---\ntitle: a\noutput-file: worse.html\n---"),
    ):
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell(source)]), tmp_path / name
        )
    (tmp_path / "paper.md").write_text("no front matter\n")
    assert front_matter_faults(tmp_path) == [
        "01_bad.ipynb: its front matter has no description",
        "01_bad.ipynb: becomes worse.html, links say bad.html",
        "paper.md: its front matter has no title",
    ]


# ---------------------------------------------------------------- sidebar
def sidebar(contents, pages) -> list[str]:
    """Pages that the sidebar's entries name, in order; patterns give what they match, by name, as
    Quarto does.
    """
    found = []
    for item in [contents] if isinstance(contents, str) else contents:
        if isinstance(item, dict):
            found += [href for href in [item.get("href")] if href] + sidebar(
                item.get("contents", []), pages
            )
        elif "*" in item:
            found += sorted(
                page
                for page in pages
                if Path(page).match(item) and page.count("/") == item.count("/")
            )
        else:
            found.append(item)
    return found


def sidebar_faults(contents, pages) -> list[str]:
    named = sidebar(contents, pages)
    return (
        [
            f"_quarto.yml: the sidebar has no line for {page}"
            for page in sorted(set(pages) - set(named))
        ]
        + [
            f"_quarto.yml: the sidebar names {page}, which is not there"
            for page in sorted(set(named) - set(pages))
        ]
        + [
            f"_quarto.yml: the sidebar names {page} {named.count(page)} times"
            for page in sorted(set(named))
            if named.count(page) > 1
        ]
    )


@pytest.fixture(scope="module")
def configuration() -> dict:
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def test_the_sidebar_has_every_page_once_in_the_order_of_the_rooms(site, configuration):
    contents = configuration["website"]["sidebar"]["contents"]
    pages = list(pages_of(site))
    assert sidebar_faults(contents, pages) == []
    places = [page.split("/")[0] for page in sidebar(contents, pages)]
    assert list(dict.fromkeys(place for place in places if place in (*ROOMS, "papers"))) == [
        *ROOMS,
        "papers",
    ]
    order = [place.removesuffix(".ipynb") for place in places]
    assert order[0] == "index" and order.index("physics") < order.index(
        "train_drr2ct"
    ) < order.index("explore_ct") < order.index("papers")
    rendered = [glob.lstrip("/") for glob in configuration["project"]["render"]]
    assert [
        page
        for page in pages
        if not any(
            Path(page).match(glob) and page.count("/") == glob.count("/") for glob in rendered
        )
    ] == []


def test_a_forgotten_a_missing_and_a_doubled_entry_are_found():
    pages = ["index.ipynb", "physics/00_a.ipynb", "physics/01_b.ipynb", "train.ipynb"]
    contents = [
        {"text": "home", "href": "index.ipynb"},
        {"section": "Physics", "contents": "physics/*.ipynb"},
        {"section": "Recipes", "contents": ["train.ipynb"]},
    ]
    assert sidebar_faults(contents, pages) == [] and sidebar(contents, pages) == pages
    assert sidebar_faults(contents[:2], pages) == [
        "_quarto.yml: the sidebar has no line for train.ipynb"
    ]
    assert sidebar_faults([*contents, "gone.ipynb"], pages) == [
        "_quarto.yml: the sidebar names gone.ipynb, which is not there"
    ]
    assert sidebar_faults([*contents, "physics/01_b.ipynb"], pages) == [
        "_quarto.yml: the sidebar names physics/01_b.ipynb 2 times"
    ]


def test_the_configuration_is_what_settings_say(configuration):
    from configparser import ConfigParser

    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert (
        configuration["website"]["title"],
        configuration["website"]["description"],
        configuration["project"]["output-dir"],
    ) == tuple(settings["DEFAULT"][key] for key in ("title", "description", "doc_path"))
    assert settings["DEFAULT"]["custom_sidebar"] == "True" and configuration["execute"] == {
        "enabled": False
    }
    assert (ROOT / configuration["bibliography"]).is_file() and (
        ROOT / "nbs" / configuration["format"]["html"]["css"]
    ).is_file()
    assert (
        configuration["website"]["search"]
        and set(configuration["format"]["html"]["theme"]) == {"light", "dark"}
        and configuration["format"]["html"]["code-fold"]
    )


# ---------------------------------------------------------------- directives and hidden cells
def directive_faults(notebook, name: str) -> list[str]:
    return [
        f"{name}: {line.strip()!r} would be printed"
        for cell in notebook.cells
        if cell.cell_type == "code"
        for line in cell.source.split("\n")
        if re.match(r"\s*#\s*\|", line) and not FOR_QUARTO.match(line)
    ]


def test_no_directive_is_left_over(site):
    assert [
        fault
        for name in chapters(site)
        for fault in directive_faults(nbformat.read(site / name, 4), name)
    ] == []
    assert not [
        name
        for name in chapters(site)
        if "nbdev_export()" in (site / name).read_text(encoding="utf-8")
    ], "a hidden cell is shown"


def test_a_leftover_directive_is_found():
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell('#| code-fold: true\n#| code-summary: "Source"\nx = 1'),
            nbformat.v4.new_code_cell("#| export\nx = 1"),
            nbformat.v4.new_code_cell("# | hide\nx = 1"),
        ]
    )
    assert directive_faults(notebook, "a") == [
        "a: '#| export' would be printed",
        "a: '# | hide' would be printed",
    ]


def test_nothing_that_a_chapter_says_is_lost(site):
    """Every heading and the last words of every shown Markdown cell are on the page; nbdev by
    itself drops what stands under the title.
    """
    for name in chapters(site):
        page = bare(
            "\n\n".join(
                cell.source
                for cell in nbformat.read(site / name, 4).cells
                if cell.cell_type != "raw"
            )
        )
        for number, cell in enumerate(
            c for c in nbformat.read(ROOT / "nbs" / name, 4).cells if c.cell_type == "markdown"
        ):
            lines = [line for line in cell.source.split("\n") if line.strip()]
            if number == 0:
                lines = [line for line in lines if not line.startswith(("# ", "> "))]
            for line in lines:
                assert bare(line) in page, f"{name}: {line!r} is not on its page"


def bare(text: str) -> str:
    "Without link targets, citation marks and blanks."
    return re.sub(r"\]\([^)\s]*\)|-?@|[\[\];,]|\s", "", text)


# ---------------------------------------------------------------- links, pictures and named files
LINK = re.compile(r"(?<!`)!?\[(?:[^\[\]\n`]|`[^`\n]*`)*\]\(([^)\s]+)\)")


def link_faults(pages: dict[str, str], folder: Path, rendered: dict[str, str]) -> list[str]:
    """Links of pages that lead to no file in `folder` and to no rendered page (HTML → page), or to
    a part that is not there.
    """
    faults = []
    parts = {
        page: (
            set(re.findall(r"\{#([^}]+)\}", text))
            | {heading_part(h) for h in re.findall(r"^#+ (.+)$", text, flags=re.M)}
        )
        for page, text in pages.items()
    }
    for page, text in pages.items():
        text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M)
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, part = target.partition("#")
            there = (
                (folder / page).parent.joinpath(path).resolve()
                if path
                else (folder / page).resolve()
            )
            name = (
                there.relative_to(folder.resolve()).as_posix()
                if there.is_relative_to(folder.resolve())
                else None
            )
            name = rendered.get(name, name)
            if name is None or not (folder / name).is_file():
                faults.append(f"{page}: {target} leads nowhere")
            elif part and name in parts and part not in parts[name]:
                faults.append(f"{page}: {target}: {name} has no part of this name")
    return faults


def heading_part(heading: str) -> str:
    "The identifier that Pandoc gives a heading."
    plain = re.sub(r"\{#.*?\}|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain)))


def named_file_faults(texts: dict[str, str], root: Path) -> list[str]:
    """Files that a text names in code type, by their path from the top of the repository (a
    notebook also without its ending), and that are not there.
    """
    there = lambda path: (root / path).exists() or (root / f"{path}.ipynb").exists()
    return [
        f"{name} names `{path}`, which is not there"
        for name, text in texts.items()
        for path in re.findall(r"`((?:nbs|papers|tests|ct_nb|launch)/[\w./-]+)`", text)
        if not there(path)
    ]


def test_every_link_of_the_site_leads_somewhere(site):
    pages = pages_of(site)
    assert link_faults(pages, site, {html_of(page): page for page in pages}) == []
    links = [target for text in pages.values() for target in LINK.findall(text)]
    assert (
        sum(".html" in target for target in links) > 300
        and sum("#api-" in target for target in links) > 300
    ), "symbols are not linked"


def test_every_link_of_the_repository_leads_somewhere():
    texts = {
        path: (ROOT / path).read_text(encoding="utf-8")
        for path in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            *(p.relative_to(ROOT).as_posix() for p in (ROOT / "papers").glob("*.md")),
        )
    }
    texts |= {
        f"nbs/{name}": "\n\n".join(
            c.source
            for c in nbformat.read(ROOT / "nbs" / name, 4).cells
            if c.cell_type == "markdown"
        )
        for name in notebooks()
    }
    assert link_faults(texts, ROOT, {}) == []
    assert named_file_faults(texts, ROOT) == []


def test_broken_links_pictures_parts_and_names_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/b.ipynb", "a/picture.png", "c.md"):
        (tmp_path / name).write_text("")
    pages = {
        "a/b.ipynb": (
            "[good](../c.md) ![](picture.png) [`x`](../d.html) [part](#here) ## no\n#"
            " Here\n`[code](nowhere)` <https://x.org> [web](https://x.org/y)"
        ),
        "c.md": "[up](a/b.ipynb#here) [z](a/b.html#api-z)\n### z {#api-z}",
    }
    rendered = {"a/b.html": "a/b.ipynb"}
    assert link_faults(pages, tmp_path, rendered) == [
        "a/b.ipynb: ../d.html leads nowhere",
        "c.md: a/b.html#api-z: a/b.ipynb has no part of this name",
    ]
    assert link_faults(
        {"c.md": "![](a/gone.png) [out](../../etc/x) [p](a/b.ipynb#gone)", "a/b.ipynb": ""},
        tmp_path,
        rendered,
    ) == [
        "c.md: a/gone.png leads nowhere",
        "c.md: ../../etc/x leads nowhere",
        "c.md: a/b.ipynb#gone: a/b.ipynb has no part of this name",
    ]
    assert (
        heading_part("Are 3 X-rays *enough*? `yes`") == "are-3-x-rays-enough-yes"
        and heading_part("2. Joseph's method") == "josephs-method"
    )
    assert named_file_faults(
        {"t": "see `nbs/index.ipynb`, `nbs/gone.ipynb` and `nbs/train_*.ipynb`"}, ROOT
    ) == ["t names `nbs/gone.ipynb`, which is not there"]


# ---------------------------------------------------------------- citations
def citation_faults(pages: dict[str, str], keys: set[str]) -> list[str]:
    faults = []
    for page, text in pages.items():
        cited = re.findall(r"(?<![\w.@/])@([A-Za-z][\w:-]*\w)", prose(text)) + [
            key.strip()
            for group in re.findall(
                r"\[([a-z]+\d{4}[a-z]*(?:[;,] ?[a-z]+\d{4}[a-z]*)*)\](?!\()", prose(text)
            )
            for key in re.split("[;,]", group)
        ]
        faults += [
            f"{page}: cites {key}, which papers/references.bib does not have"
            for key in dict.fromkeys(cited)
            if key not in keys
        ]
    return faults


def cited(pages: dict[str, str]) -> set[str]:
    """Keys that pages cite as the site needs it, [@key], [@key; @other] or, after the author's
    name, [-@key].
    """
    return {
        key
        for text in pages.values()
        for group in re.findall(r"\[(-?@[^\]]*)\]", prose(text))
        for key in re.findall(r"@([A-Za-z][\w:-]*\w)", group)
    }


def test_citations_resolve(site):
    bibliography = (ROOT / "papers" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,\s]+)", bibliography, flags=re.M)
    assert len(keys) == len(set(keys)) and bibliography.count("{") == bibliography.count("}")
    assert citation_faults(pages_of(site), set(keys)) == []
    assert not (
        left := sorted(set(keys) - cited(pages_of(site)))
    ), f"papers/references.bib: nobody cites {', '.join(left)}"
    assert "[-@joseph1982]" in (site / "papers" / "projector.md").read_text(encoding="utf-8")


def test_an_author_who_is_named_is_not_named_twice():
    bibliography = """@article{hu2018,
  author  = {Hu, Jie and Shen, Li},
}

@book{lopez2001,
  author = {L{\\'o}pez, A.},
  year = {2001}
}
"""
    assert build_site.first_authors(bibliography) == {"hu2018": "Hu", "lopez2001": "Lopez"}
    links = build_site.Links()
    assert (
        links(
            "Ho et al. [@ho2020] and Kingma & Welling [@kingma2014] (SIRT [@gregor2008])",
            "nbs/index.ipynb",
        )
        == "Ho et al. [-@ho2020] and Kingma & Welling [-@kingma2014] (SIRT [@gregor2008])"
    )


def test_an_unknown_citation_is_found():
    pages = {
        "a.md": "as [@known2020; @other2021] and [known2020, gone1999], `@code`, a@b.org, @patch"
    }
    assert citation_faults(pages, {"known2020"}) == [
        f"a.md: cites {key}, which papers/references.bib does not have"
        for key in ("other2021", "patch", "gone1999")
    ]
    assert cited(pages) == {
        "known2020",
        "other2021",
    }, "what is not cited as the site needs it is not cited"


# ---------------------------------------------------------------- API tables
def test_every_exported_symbol_is_described_on_its_page(site):
    """Public functions and classes have a block with their call, and methods that are patched in
    have one too.
    """
    links = build_site.Links()
    pages = pages_of(site)
    missing = []
    parts = {
        html_of(page): set(re.findall(r"\{#(api-[^}]+)\}", text)) for page, text in pages.items()
    }
    for name, (html, module) in links.symbols.items():
        short = name.removeprefix(module + ".")
        if (
            "." not in short
            and not short.startswith("_")
            and build_site.anchor(short) not in parts[html]
        ):
            missing.append(name)
    assert missing == []
    twice = {
        page: [part for part in found if found.count(part) > 1]
        for page, found in (
            (page, re.findall(r"\{#([^}]+)\}", text)) for page, text in pages.items()
        )
    }
    assert not any(
        twice.values()
    ), f"one anchor stands twice: { {page: parts for page, parts in twice.items() if parts} }"
    geometry = pages["physics/01_geometry.ipynb"]
    assert (
        "### ConeBeam.orbit {#api-ConeBeam.orbit}" in geometry
        and "| `detector_shape` | `tuple[int, int]` |" in geometry
    )
    assert (
        "| `length_mm` |" not in geometry
        and "scale_bar(axis, length_mm: float = 50.0) -> None" in pages["viewer/00_figures.ipynb"]
    )


def test_api_blocks_come_from_docstrings_and_comments():
    from ct_nb.drr2ct.network import DRR2CTConfig
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.refine.figures import refinement_figure

    block = build_site.api(refinement_figure, "refinement_figure")
    assert (
        "| `at_mm` |  | `None` | LPS mm, intersection of the planes; the middle by default |" in block
        and "| `coarse` | `Volume` |  |  |" in block
        and "| `window` |  | `'chest'` | a Window or its name |" in block
        and "Raises InputError for different grids." in block
    )
    assert "[`orbit(azimuth_deg, elevation_deg=0.0" in build_site.api(
        ConeBeam, "ConeBeam"
    ) and "| C-arm views from angles in degrees, (*batch, V) or a number;" not in build_site.api(
        ConeBeam, "ConeBeam"
    )
    # not the repetition that dataclasses write
    assert "DRR2CTConfig(" not in build_site.api(DRR2CTConfig, "DRR2CTConfig").split("```")[2]


def test_words_become_links_only_where_they_are_names():
    links = build_site.Links()
    links.anchors = {
        "physics/geometry.html": {"api-ConeBeam", "api-ConeBeam.orbit"},
        "viewer/figures.html": {"api-plane"},
    }
    text = links(
        "`ConeBeam.orbit()`, `plane`, `ct_nb.physics.geometry.ConeBeam`, `ConeBeam.views`,"
        " `forward`, [see](../physics/01_geometry.ipynb), `nbs/index.ipynb`,"
        " `nbs/gone.ipynb`\n```\n`ConeBeam`\n```\n## `ConeBeam`",
        "nbs/viewer/00_figures.ipynb",
        {"plane": "ct_nb.viewer.figures.plane"},
    )
    assert (
        text == "[`ConeBeam.orbit()`](../physics/geometry.html#api-ConeBeam.orbit),"
        " [`plane`](figures.html#api-plane),"
        " [`ct_nb.physics.geometry.ConeBeam`](../physics/geometry.html#api-ConeBeam),"
        " [`ConeBeam.views`](../physics/geometry.html#api-ConeBeam), `forward`,"
        " [see](../physics/01_geometry.ipynb), [`nbs/index.ipynb`](../index.ipynb),"
        " `nbs/gone.ipynb`\n```\n`ConeBeam`\n```\n## `ConeBeam`"
    )
    assert (
        links("`papers/measured.py` [bib](references.bib)", "papers/projector.md")
        == "`papers/measured.py` [bib](references.bib)"
    ), "a script is no page"
    assert (
        links(
            "[rtk](../nbs/index.ipynb) [joseph1982, siddon1985] [licence](../LICENSE) [joseph1982;"
            " unknown2001]",
            "papers/projector.md",
        )
        == "[rtk](../index.ipynb) [@joseph1982; @siddon1985] licence [joseph1982; unknown2001]"
    )


# ---------------------------------------------------------------- pictures and HTML
def test_a_page_gets_the_outputs_of_its_run(tmp_path, monkeypatch):
    "A notebook is run once; its pictures and printed lines are on the page, warnings are not."
    monkeypatch.delenv("MPLBACKEND", raising=False)
    assert build_site.run_one("core/02_plot_style.ipynb", tmp_path, "library") is None
    executed = tmp_path / "executed" / "core" / "02_plot_style.ipynb"
    stamp = executed.stat().st_mtime_ns
    # not run twice
    assert (
        build_site.run_one("core/02_plot_style.ipynb", tmp_path, "library") is None
        and executed.stat().st_mtime_ns == stamp
    )
    content = nbformat.read(executed, 4)
    content.cells[-2].outputs.append(
        nbformat.v4.new_output("stream", name="stderr", text="a warning")
    )
    nbformat.write(content, executed)
    build_site.chapter("core/02_plot_style.ipynb", tmp_path / "page.ipynb", build_site.Links(), executed)
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "page.ipynb", 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1 and any(
        "closest pair" in output.get("text", "") for output in outputs
    )
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_what_reads_a_run_comes_after_what_leaves_it():
    first, then, last = build_site.batches(notebooks())
    assert sorted(first + then + last) == notebooks() and {
        "train_drr2ct.ipynb",
        "train_slices.ipynb",
        "train_ct_encoder.ipynb",
        "physics/01_geometry.ipynb",
    } <= set(first)
    assert (
        {"train_refinement.ipynb", "robustness_drr2ct.ipynb", "evaluate.ipynb"} <= set(then)
        and last == [name for name in notebooks() if name.startswith("explore_")]
        and len(last) == 6
    )


def test_recipes_run_small_and_say_so(tmp_path):
    recipe = nbformat.read(ROOT / "nbs" / "train_drr2ct.ipynb", 4)
    given = lambda name: build_site.parameters(
        nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4), name, tmp_path / "work", tmp_path
    )
    assert given("core/02_plot_style") == {} and given("train_drr2ct") == {
        "preset": "smoke",
        "out": str(tmp_path / "work" / "drr2ct"),
    }
    assert given("reconstruct") == {
        "size": 64,
        "out": str(tmp_path / "work" / "reconstruction.nii.gz"),
    }
    small = {"data": "phantom:2", "out": str(tmp_path / "work" / "evaluation")}
    assert given("evaluate") == {"weights": str(tmp_path / "work" / "drr2ct"), **small}
    (tmp_path / "runs" / "drr2ct").mkdir(parents=True)
    (tmp_path / "runs" / "drr2ct" / "config.json").write_text("{}")
    assert given("evaluate") == small, "weights that were trained are used"
    for name, given in build_site.SMALL.items():
        cell = next(
            c
            for c in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells
            if "parameters" in c.metadata.get("tags", [])
        )
        assert all(
            re.search(rf"^{key}: {type(value).__name__} = ", cell.source, flags=re.M)
            for key, value in given.items()
        ), name
    for key, told in (("a hash", True), ("own run", False)):
        recipe.metadata["key"] = key
        nbformat.write(recipe, tmp_path / "run.ipynb")
        build_site.chapter(
            "train_drr2ct.ipynb",
            tmp_path / "page.ipynb",
            build_site.Links(),
            tmp_path / "run.ipynb",
        )
        assert (
            "Run at its smallest size" in (tmp_path / "page.ipynb").read_text(encoding="utf-8")
        ) == told


def test_every_notebook_becomes_html(site):
    from nbconvert import HTMLExporter

    # our own cells need no washing and no colours, which take longest
    plain = {
        "clean_html": lambda html: html,
        "highlight_code": lambda source, **_: f"<pre>{escape(source)}</pre>",
    }
    exporter = HTMLExporter(template_name="basic", filters=plain)
    for name in chapters(site):
        notebook = nbformat.read(site / name, 4)
        nbformat.validate(notebook)
        html, _ = exporter.from_notebook_node(notebook)
        headings = [
            line
            for cell in notebook.cells
            if cell.cell_type == "markdown"
            for line in prose(cell.source).split("\n")
            if re.match(r"#{1,6} ", line)
        ]
        assert len(re.findall(r"<h[1-6][ >]", html)) >= len(headings) and len(html) > 2000, name


def test_the_one_command(tmp_path, monkeypatch):
    """Without Quarto a sentence and no work; with it, the pages end in _docs.

    Quarto is played by a script here.
    """
    monkeypatch.setattr(build_site, "execute", lambda work: None)
    monkeypatch.setattr(build_site, "write", lambda project, executed: project.mkdir())
    monkeypatch.setattr(build_site.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="Quarto is not installed"):
        build_site.main(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(build_site, "execute", lambda work: None)
    monkeypatch.setattr(build_site, "write", lambda project, executed: project.mkdir())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "quarto").write_text(
        '#!/bin/sh\n[ "$1" = render ] && mkdir _docs && echo page > _docs/index.html\n'
    )
    (tmp_path / "bin" / "quarto").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for _ in range(2):
        build_site.main(tmp_path)
    assert (tmp_path / "_docs" / "index.html").read_text() == "page\n"
    (tmp_path / "bin" / "quarto").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="quarto render failed"):
        build_site.main(tmp_path)
    assert "\tdocs: " not in (
        makefile := (ROOT / "Makefile").read_text(encoding="utf-8")
    ) and re.search(r"^docs:.*\n\t.*tests/build_site\.py", makefile, flags=re.M)
