"""Runs of the smallest presets, trained and evaluated once for all tests: by one pytest worker for the others, and again only when the code has changed."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from filelock import FileLock

from ct_nb.data.cache import code_digest

FINISHED = "finished"  # an empty file beside what a run left
KEPT_DAYS = 2  # runs of older code are deleted after that


def run_class(system: str):
    "The run of a system; imported here, so that tests which need none load none."
    if system == "drr2ct":
        from ct_nb.drr2ct.train import DRR2CTRun as found
    elif system == "cascade":
        from ct_nb.cascade.train import CascadeRun as found
    elif system == "refinement":
        from ct_nb.refine.train import RefinementRun as found
    elif system == "vae":
        from ct_nb.slices.vae_train import VAERun as found
    elif system == "slices":
        from ct_nb.slices.train import SlicesRun as found
    else:
        from ct_nb.ct_encoder.train import CTEncoderRun as found
    return found


SYSTEMS = ("drr2ct", "cascade", "refinement", "vae", "slices", "ct_encoder")


def options(system: str, preset: str = "micro") -> dict:
    "What a run of a system needs beside its preset."
    return {"coarse": str(trained_folder("drr2ct", preset))} if system == "refinement" else {}


def base_folder() -> Path:
    "Where runs of the code as it is are kept."
    return Path(tempfile.gettempdir()) / f"ct_nb_trained_{os.getuid()}" / code_digest("*/*.py")


def _delete_old(base: Path) -> None:
    for folder in base.parent.iterdir():
        if folder != base and time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)


def trained_folder(system: str, preset: str = "micro") -> Path:
    "The folder of a finished run with its scores; for reading only, copy it to change it."
    base = base_folder()
    folder = base / f"{system}-{preset}"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / f"{folder.name}.lock"):
        if not (folder / FINISHED).is_file():
            _delete_old(base)
            shutil.rmtree(folder, ignore_errors=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CT_NB_CACHE", str(base / "cache"))
                run = run_class(system)(preset, out=folder, **options(system, preset)).open()
                run.fit(progress=False)
                run.evaluate() if system == "ct_encoder" else run.evaluate(progress=False)
            (folder / FINISHED).touch()
    return folder


def use_cache(patch: pytest.MonkeyPatch) -> None:
    "Take phantoms and X-rays from the cache of these runs."
    patch.setenv("CT_NB_CACHE", str(base_folder() / "cache"))
