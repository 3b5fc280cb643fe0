import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lab

ROOT = Path(__file__).resolve().parents[2]
TIMES: list[str] = []


def pytest_configure(config):
    if lab.find_browser() is None: pytest.exit("no Chromium was found: `apt install chromium` (or Google Chrome), or name a browser in CT_NB_BROWSER", returncode=1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended still closes what it opened


def pytest_terminal_summary(terminalreporter):
    if TIMES: terminalreporter.section("what a reader waits for")
    for line in TIMES: terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def chromium():
    "A browser's context; pages of it forget everything with the session."
    if folder := os.environ.get("CT_NB_SCREENSHOTS"): Path(folder).mkdir(parents=True, exist_ok=True)
    with lab.browser(lab.find_browser()) as started: yield started


def save_untrained(runs: Path) -> None:
    "Folders such as training leaves them, of the smallest networks, whose weights nobody has trained: what is tested is the page."
    from dataclasses import replace
    from ct_nb.learn.checkpoints import save_weights
    from ct_nb.learn.scan_language import ScanLanguage
    from ct_nb.learn.train_ct_encoder import get_ct_encoder_preset
    from ct_nb.learn.train_slices import Slices
    from ct_nb.nets.slices import SliceDiffusion, SliceDiffusionConfig, SliceRegressor, SliceRegressorConfig
    from ct_nb.nets.vae import SliceVAE
    torch.manual_seed(0)
    language = ScanLanguage(replace(get_ct_encoder_preset("smoke").network, words=("lobe", "lung")))
    save_weights(runs / "ct_encoder", language, {"system": "ct_encoder", "network": language.config.to_dict(), "data": "nothing", "training": {"cases": ["phantom-02002"]}})
    drawn = SliceDiffusionConfig.preset("smoke")
    slices = Slices(SliceRegressor(SliceRegressorConfig.preset("smoke")), SliceDiffusion(drawn, SliceVAE(drawn.vae)))
    for network in (slices.regressor.network, slices.diffusion.network): torch.nn.init.normal_(network.last.weight, std=0.5)
    seen = {"thick_mm": [4.0, 6.0], "width": [0.8, 1.2], "thin_mm": [1.5, 2.25]}
    save_weights(runs / "slices", slices, {"system": "slices", "network": slices.networks(), "data": "nothing", "seen": seen, "training": {"cases": []}})


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    "A JupyterLab over two copies of the notebooks: `fresh`, where nothing was trained, and `trained`, where there are runs."
    top = tmp_path_factory.mktemp("checkouts")
    for name in ("fresh", "trained"):
        shutil.copytree(ROOT / "nbs", top / name / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copy(ROOT / "settings.ini", top / name)
    save_untrained(top / "trained" / "runs")
    with lab.Lab(top, tmp_path_factory.mktemp("jupyter")) as started: yield started


@pytest.fixture
def reader(jupyter, chromium):
    "Opens notebooks by their path under `jupyter`'s folder; each is closed and its kernel ended with the test."
    opened = []
    def open_notebook(name: str) -> lab.OpenNotebook:
        opened.append(lab.OpenNotebook(jupyter, chromium, name))
        return opened[-1]
    yield open_notebook
    for notebook in opened:
        if notebook.clicks: TIMES.append(f"{notebook.name}: first picture {notebook.first:.1f} s; {len(notebook.clicks)} times press to picture, median {sorted(notebook.clicks)[len(notebook.clicks) // 2]:.2f} s, longest {max(notebook.clicks):.2f} s")
        notebook.close()
