"""What must hold of the notebooks before anything else is worth running; `--write` mends instead of complaining.

Clean: no outputs or metadata but where they are meant. In sync: ct_nb/ is what the notebooks export, README.md is what nbs/index.ipynb says.
Everything is done on a copy, so a check never changes the checkout.
"""

import filecmp
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def copy_of_checkout(target: Path) -> Path:
    for name in ("nbs", "ct_nb"):
        shutil.copytree(
            ROOT / name,
            target / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc"),
        )
    for name in ("settings.ini", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


def run(*command: str, cwd: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(cwd),
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def write_readme(root: Path) -> None:
    "README.md from nbs/index.ipynb: nbconvert's Markdown, with links that hold from the top level."
    run(
        "jupyter",
        "nbconvert",
        "--to",
        "markdown",
        "--log-level",
        "ERROR",
        "nbs/index.ipynb",
        "--output-dir",
        str(root),
        "--output",
        "README",
        "--TagRemovePreprocessor.enabled=True",
        "--TagRemovePreprocessor.remove_cell_tags=hide",
        cwd=root,
    )
    text = (root / "README.md").read_text(encoding="utf-8")
    moved = re.sub(
        r"\]\((?![a-z]+:|#)([^)\s]+)\)",
        lambda found: f"]({posixpath.normpath(f'nbs/{found[1]}')})",
        text,
    )
    (root / "README.md").write_text(moved.strip() + "\n", encoding="utf-8")


def different(a: Path, b: Path) -> list[str]:
    "Files that differ between two folders, by name."
    names = {
        p.relative_to(base)
        for base in (a, b)
        for p in base.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts
    }
    return sorted(
        str(n)
        for n in names
        if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False))
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_checkout(Path(folder))
        run("nbdev_clean", cwd=copy)
        shutil.rmtree(copy / "ct_nb")
        (copy / "ct_nb").mkdir()
        run("nbdev_export", cwd=copy)
        write_readme(copy)
        dirty = different(ROOT / "nbs", copy / "nbs")
        stale = different(ROOT / "ct_nb", copy / "ct_nb")
        readme = not filecmp.cmp(ROOT / "README.md", copy / "README.md", shallow=False)
        if "--write" in sys.argv[1:]:
            for name in dirty:
                shutil.copy(copy / "nbs" / name, ROOT / "nbs" / name)
            shutil.rmtree(ROOT / "ct_nb")
            shutil.copytree(copy / "ct_nb", ROOT / "ct_nb")
            shutil.copy(copy / "README.md", ROOT / "README.md")
            print(f"mended {len(dirty)} notebooks, {len(stale)} modules, {int(readme)} README")
            return
        if dirty:
            sys.exit(f"not clean (run `nbdev_clean`): {', '.join(dirty)}")
        if stale:
            sys.exit(
                "ct_nb/ is not what the notebooks export (run `nbdev_export`, or `nbdev_update` to"
                f" keep an edit of ct_nb/): {', '.join(stale)}"
            )
        if readme:
            sys.exit("README.md is not what nbs/index.ipynb says (run `make readme`)")
        print("clean and in sync")


if __name__ == "__main__":
    main()
