import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import lab  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TIMES: list[str] = []
BEGIN = time.monotonic()


def pytest_configure(config):
    if lab.find_browser() is None:
        pytest.exit(
            "no Chromium was found: `apt install chromium` (or Google Chrome), or name a browser in"
            " CT_NB_BROWSER",
            returncode=1,
        )
    # a run that is ended still closes what it opened
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    spent = sum(os.times()[:4])  # with all that were started and have ended
    if TIMES:
        terminalreporter.section(
            "what a reader waits for (in brackets: processor time, of kernel, server and browser)"
        )
    for line in TIMES:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"in all: {time.monotonic() - BEGIN:.0f} ({spent:.0f}) s")
    if lab.SLACK != 1:
        terminalreporter.write_line(
            f"CT_NB_BROWSER_SLACK={lab.SLACK:g}: {lab.FIRST_PICTURE_S:g} s were allowed to the"
            f" first picture and {lab.CLICK_S:g} s after a press, in place of 20 and 2"
        )


@pytest.fixture(scope="session")
def chromium():
    "A browser's context; pages of it forget everything with the session."
    if folder := os.environ.get("CT_NB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with lab.browser(lab.find_browser()) as started:
        yield started


def save_untrained(runs: Path) -> None:
    """Folders such as training leaves them, of the smallest networks, whose weights nobody has
    trained: what is tested is the page.
    """
    from dataclasses import replace

    from ct_nb.ct_encoder.model import ScanLanguage
    from ct_nb.ct_encoder.train import CT_ENCODER_PRESETS
    from ct_nb.slices.models import (
        SliceDiffusion,
        SliceDiffusionConfig,
        SliceRegressor,
        SliceRegressorConfig,
    )
    from ct_nb.slices.train import SliceModels
    from ct_nb.slices.vae import SliceVAE
    from ct_nb.training.checkpoints import save_weights

    torch.manual_seed(0)
    language = ScanLanguage(replace(CT_ENCODER_PRESETS["smoke"].network, words=("lobe", "lung")))
    save_weights(
        runs / "ct_encoder",
        language,
        {
            "system": "ct_encoder",
            "network": language.config.to_dict(),
            "data": "nothing",
            "training": {"cases": ["phantom-02002"]},
        },
    )
    drawn = SliceDiffusionConfig.preset("smoke")
    save_untrained_reconstruction(runs)
    slices = SliceModels(
        SliceRegressor(SliceRegressorConfig.preset("smoke")),
        SliceDiffusion(drawn, SliceVAE(drawn.vae)),
    )
    for network in (slices.regressor.network, slices.diffusion.network):
        torch.nn.init.normal_(network.last.weight, std=0.5)
    seen = {"thick_mm": [4.0, 6.0], "width": [0.8, 1.2], "thin_mm": [1.5, 2.25]}
    save_weights(
        runs / "slices",
        slices,
        {
            "system": "slices",
            "network": slices.networks(),
            "data": "nothing",
            "seen": seen,
            "training": {"cases": []},
        },
    )


def save_untrained_reconstruction(runs: Path) -> None:
    """System A with a refiner and a cascade, all at 32³, and two samples of the explorer's patient,
    which it finds kept.
    """
    from ct_nb.app.compare import reconstruct_all
    from ct_nb.cascade.network import Cascade, CascadeConfig, StageConfig
    from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
    from ct_nb.layers.denoiser import DenoiserConfig
    from ct_nb.layers.diffusion import DiffusionConfig
    from ct_nb.phantom.chest import phantom
    from ct_nb.refine.network import RefinerConfig
    from ct_nb.refine.pipeline import ConsistencySettings, RefinementModel
    from ct_nb.training.checkpoints import save_weights

    others = torch.stack([phantom(seed, 32).volume.tensor() for seed in range(20, 26)])
    coarse = DRR2CT(DRR2CTConfig.preset("smoke"))
    refiner = RefinementModel(RefinerConfig.preset("smoke", 32))
    cascade = Cascade(
        CascadeConfig(
            (
                StageConfig(
                    DenoiserConfig.preset("smoke", 32, condition_channels=2),
                    DiffusionConfig(steps=20),
                ),
            ),
            "prior",
            {"size": 32, "modes": 4, "noise": 0.5, "energy_kev": coarse.config.energy_kev},
        )
    )
    for part in (coarse, cascade.start):
        part.prior.fit(others)
    # it begins as what changes nothing
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_weights(runs / "drr2ct", coarse, {"system": "drr2ct", "network": coarse.config.to_dict()})
    save_weights(
        runs / "refinement",
        refiner,
        {
            "system": "refiner",
            "network": refiner.config.to_dict(),
            "consistency": ConsistencySettings().to_dict(),
        },
    )
    save_weights(
        runs / "cascade", cascade, {"system": "cascade", "network": cascade.config.to_dict()}
    )
    found = reconstruct_all(phantom(4711, 128).volume, runs, samples=2)
    assert (
        list(found.volumes)[-2:] == ["coarse", "refined"]
        and len(found.samples) == 2
        and not found.missing
    ), found.missing


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """A JupyterLab over two copies of the notebooks: `fresh`, where nothing was trained, and
    `trained`, where there are runs.
    """
    top = tmp_path_factory.mktemp("checkouts")
    for name in ("fresh", "trained"):
        shutil.copytree(
            ROOT / "nbs",
            top / name / "nbs",
            symlinks=True,
            ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
        )
        shutil.copy(ROOT / "settings.ini", top / name)
    save_untrained(top / "trained" / "runs")
    with lab.Lab(top, tmp_path_factory.mktemp("jupyter")) as started:
        yield started


@pytest.fixture
def reader(jupyter, chromium):
    """Opens notebooks by their path under `jupyter`'s folder; each is closed and its kernel ended
    with the test.
    """
    opened = []

    def open_notebook(name: str) -> lab.OpenNotebook:
        opened.append(lab.OpenNotebook(jupyter, chromium, name))
        return opened[-1]

    yield open_notebook
    for notebook in opened:

        def say(waited, form):
            return f"{waited[0]:{form}} ({waited[1]:{form}}) s"

        if notebook.clicks:
            TIMES.append(
                f"{notebook.name}: first picture {say(notebook.first, '.1f')};"
                f" {len(notebook.clicks)} times press to picture, median"
                f" {say(sorted(notebook.clicks)[len(notebook.clicks) // 2], '.2f')}, longest"
                f" {say(max(notebook.clicks), '.2f')}"
            )
        notebook.close()
