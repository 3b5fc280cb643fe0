"""`pip install ct_nb`: the wheel alone gives a library that imports and commands that run, without
the packages of the extras.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from lock_requirements import LOCK, closure, lock_versions, requirements
from packaging.utils import canonicalize_name
from places import ROOT

from ct_nb.phantom.chest import phantom

BUILD_FILES = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
EXTRA_IMPORTS = {  # modules that nothing outside the extra imports, and what they may import
    "viewer/widgets.py": {"anywidget", "ipywidgets", "traitlets"},  # raises a sentence without them
    # imported for CUDA tensors; a CUDA build of torch has it
    "physics/joseph_triton.py": {"triton"},
}
NEED_WIDGETS = {
    "app.reconstruction_explorer",
    "app.registration_explorer",
    "ct_encoder.explorer",
    "slices.explorer",
    "viewer.canvas",
    "viewer.ct_viewer",
    "viewer.scene3d",
    "viewer.slice_canvas",
    "viewer.widgets",
    "viewer.xray_viewer",
}

# makes an environment look as if only the base requirements were installed
BLOCK_EXTRAS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocked())
"""


def module_imports(tree: ast.AST) -> set[str]:
    "Top-level packages that a module imports when it is imported itself, also within try and if."
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            names |= module_imports(node)
    return names


def test_module_level_imports_are_found():
    source = "import a.b\ntry:\n    from c.d import e\nexcept ImportError:\n    import f\n"
    source += "class G:\n    import h\ndef i():\n    import j\nfrom . import k\n"
    assert module_imports(ast.parse(source)) == {"a", "c", "f", "h"}


def test_no_module_imports_more_than_the_base_requirements():
    base = {canonicalize_name(request.name) for request in requirements(extras=())}
    distributions = packages_distributions()
    for path in sorted((ROOT / "ct_nb").rglob("*.py")):
        module = path.relative_to(ROOT / "ct_nb").as_posix()
        names = module_imports(ast.parse(path.read_text(encoding="utf-8")))
        names -= {"ct_nb", *sys.stdlib_module_names, *EXTRA_IMPORTS.get(module, ())}
        foreign = [
            name
            for name in names
            if not base & {canonicalize_name(d) for d in distributions.get(name, [name])}
        ]
        assert not foreign, f"{module} imports {foreign} at module level"


def test_the_base_requirements_bring_no_notebook_server():
    versions = closure(extras=())
    assert {"torch", "typer", "monai", "scikit-image"} <= set(versions)
    heavy = {"jupyterlab", "papermill", "nbdev", "tensorboard", "ipykernel"}
    assert not heavy & set(versions)


# ---------------------------------------------------------------- the wheel
@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from the source distribution, which must hold everything that this needs."
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ct_nb", source / "ct_nb", ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


def call(environment: Path, *words, cwd: Path) -> subprocess.CompletedProcess:
    "A program of an environment, without this process's PYTHONPATH."
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    program, *rest = map(str, words)
    return subprocess.run(
        [str(environment / "bin" / program), *rest],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with ct_nb of the wheel. It borrows this environment's packages in place
    of downloading them, and hides those that the base requirements do not lead to.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    base = set(closure(extras=()))
    hidden = {
        name
        for name, distributions in packages_distributions().items()
        if not base & {canonicalize_name(d) for d in distributions} and name != "ct_nb"
    }
    assert {"ipywidgets", "jupyterlab", "tensorboard"} <= hidden and "torch" not in hidden
    text = BLOCK_EXTRAS.replace("{names}", repr(sorted(hidden)))
    (site / "sitecustomize.py").write_text(text)
    return folder


def check_commands(environment: Path, folder: Path) -> None:
    "A phantom is X-rayed and compared with itself by the program of an environment."
    done = call(environment, "python", "-c", "import ct_nb; print(ct_nb.__file__)", cwd=folder)
    assert Path(done.stdout.strip()).is_relative_to(environment), (
        "ct_nb of the wheel: " + done.stderr
    )
    phantom(3, 32).volume.save(folder / "ct.nii.gz")
    words = ("drr", "ct.nii.gz", "--azimuth", "-30,30", "--detector-size", "32", "--pixel-mm", "16")
    done = call(environment, "ct-nb", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (folder / "xrays").iterdir()} == {
        "xray_0.png",
        "xray_1.png",
        "xrays.npz",
        "geometry.json",
    }
    done = call(environment, "ct-nb", "evaluate", "ct.nii.gz", "ct.nii.gz", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "SSIM" in done.stdout and "MAE" in done.stdout
    done = call(environment, "ct-nb", "evaluate", "no.nii.gz", "ct.nii.gz", cwd=folder)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_wheel_gives_working_commands(environment, tmp_path):
    check_commands(environment, tmp_path)


def test_every_module_imports_without_the_extras(environment, tmp_path):
    modules = {
        ".".join(path.relative_to(ROOT / "ct_nb").with_suffix("").parts)
        for path in (ROOT / "ct_nb").rglob("*.py")
        if path.stem not in ("__init__", "_modidx", "joseph_triton")
    }
    assert len(modules) > 100 and modules >= NEED_WIDGETS
    script = f"""
import importlib
for name in {sorted(modules)}:
    try:
        importlib.import_module("ct_nb." + name)
    except ImportError as error:
        print(name)
        assert "ct_nb[notebooks]" in str(error), (name, error)
"""
    done = call(environment, "python", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == NEED_WIDGETS


def test_help_takes_less_than_half_a_second(environment, tmp_path):
    seconds = []
    for _ in range(5):  # the fastest: other tests may run beside this one
        begin = time.perf_counter()
        done = call(environment, "ct-nb", "--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - begin)
    assert done.returncode == 0 and "interpolate-slices" in done.stdout
    assert min(seconds) < 0.5, seconds


@pytest.mark.skipif(
    os.environ.get("CT_NB_FRESH_INSTALL") != "1",
    reason="slow: downloads every requirement; set CT_NB_FRESH_INSTALL=1",
)
def test_everything_installs_from_the_index(wheel, tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    torch = f"torch=={lock_versions(LOCK.read_text(encoding='utf-8'))['torch']}"
    for package in (torch, wheel):  # the tested torch first: a later one may bring a CUDA stack
        words = ("-m", "pip", "install", "--quiet", package)
        done = call(folder, "python", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = call(folder, "python", "-m", "pip", "check", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    check_commands(folder, tmp_path)
