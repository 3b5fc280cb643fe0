"""JupyterLab in a real browser: a server, a notebook, what a reader sees; faults are assertions."""

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from playwright.sync_api import Error, Locator, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SETTINGS = {  # of JupyterLab, in place of its own
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # cells that are out of sight are drawn, too
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
# times these, on a machine that is busy with other things
SLACK = float(os.environ.get("CT_NB_BROWSER_SLACK", 1))
FIRST_PICTURE_S, CLICK_S = 20.0 * SLACK, 2.0 * SLACK


def find_browser() -> str | None:
    "Path of a Chromium: $CT_NB_BROWSER, or one of `BROWSERS`; None where there is none."
    named = os.environ.get("CT_NB_BROWSER")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def processor_s() -> float:
    """Processor time, s, of everything that this process has started and that still runs:
    JupyterLab, kernels, browser.
    """
    total = 0.0
    for process in descendants(os.getpid()):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def check_gone(processes: list[psutil.Process], timeout_s: float = 10.0) -> None:
    "Ends what is still there after a while, and complains of it."
    _, left = psutil.wait_procs(processes, timeout_s)
    names = [
        f"{p.name()} ({p.pid})"
        for p in left
        if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    ]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not names, f"processes were left behind: {', '.join(names)}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    """A JupyterLab on a free port of this machine that serves `folder` and knows nothing of the
    user's settings; `with Lab(folder) as lab`.
    """

    def __init__(self, folder: Path, private: Path):
        self.folder = Path(folder)
        self.private = Path(private)
        self.port = free_port()
        self.token = secrets.token_hex(16)
        self.log = self.private / "jupyterlab.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Lab":
        p = self.private
        places = {
            "HOME": p / "home",
            "JUPYTER_CONFIG_DIR": p / "config",
            "JUPYTER_DATA_DIR": p / "data",
            "JUPYTER_RUNTIME_DIR": p / "runtime",
            "IPYTHONDIR": p / "ipython",
            "JUPYTERLAB_SETTINGS_DIR": p / "settings",
            "JUPYTERLAB_WORKSPACES_DIR": p / "workspaces",
            "MPLCONFIGDIR": p / "matplotlib",
        }
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        (p / "config" / "labconfig").mkdir()
        (p / "config" / "labconfig" / "default_setting_overrides.json").write_text(
            json.dumps(SETTINGS)
        )
        environment = {
            **os.environ,
            **{name: str(place) for name, place in places.items()},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        # a kernel draws into its notebook only with its own backend
        environment.pop("MPLBACKEND", None)
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.folder}",
            "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly",
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 180
        while True:
            assert (
                self.process.poll() is None
            ), f"JupyterLab did not start:\n{self.log.read_text()[-2000:]}"
            with contextlib.suppress(OSError, urllib.error.URLError):
                if (
                    urllib.request.urlopen(
                        f"{self.url}/api/status?token={self.token}", timeout=5
                    ).status
                    == 200
                ):
                    return self
            assert (
                time.monotonic() < end
            ), f"JupyterLab does not answer:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.2)

    def __exit__(self, *_) -> None:
        started = descendants(self.process.pid)
        self.process.terminate()  # JupyterLab ends its kernels itself
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill(), self.process.wait()
        check_gone(started)


@contextlib.contextmanager
def browser(executable: str):
    "A headless Chromium that reaches this machine alone."
    before = set(psutil.Process().children())
    with sync_playwright() as playwright:
        driver = [child for child in psutil.Process().children() if child not in before]
        chromium = playwright.chromium.launch(
            executable_path=executable, headless=True, args=list(OFFLINE)
        )
        # one for all pages: what JupyterLab is made of is read once
        try:
            yield chromium.new_context(viewport={"width": 1400, "height": 1000})
        finally:
            started = [
                *driver,
                *(process for child in driver for process in descendants(child.pid)),
            ]
            chromium.close()
    check_gone(started)


WATCH = """() => {
    window.heard = [];
    const context = jupyterapp.shell.currentWidget.sessionContext;
    context.iopubMessage.connect((_, message) => {
        const kind = message.header.msg_type, content = message.content;
        if (kind === "error") heard.push(content.traceback.join("\\n"));
        if (kind === "stream" && content.name === "stderr") heard.push(content.text);
    });
}"""
IDLE = (
    "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status ==="
    " 'idle'"
)
DONE = """() => {
    const selector = ".jp-Notebook .jp-CodeCell .jp-InputPrompt";
    const prompts = [...document.querySelectorAll(selector)].map(e => e.textContent.trim());
    const running = prompts.some(text => text.includes("*"));
    return prompts.length > 0 && !running && prompts.some(text => /\\d/.test(text));
}"""
PICTURES = ".jp-Notebook .jp-OutputArea-output img, .jp-Notebook .jp-OutputArea-output canvas"
# large, drawn by ct_nb if it is a canvas, and more than letters on an empty ground
DRAWN = """selector => [...document.querySelectorAll(selector)].some(e => {
    const box = e.closest(".ct-nb-picture"), small = document.createElement("canvas"), side = 48;
    if (e.clientWidth <= 60 || e.clientHeight <= 60) return false;
    const ready = e.tagName === "CANVAS"
        ? box?.dataset.frame && box.dataset.drawn > 0
        : e.complete && e.naturalWidth > 60;
    if (!ready) return false;
    small.width = small.height = side;
    const g = small.getContext("2d");
    g.drawImage(e, 0, 0, side, side);
    const d = g.getImageData(0, 0, side, side).data;
    let others = 0;
    for (let i = 0; i < d.length; i += 4) {
        const apart = [0, 1, 2].reduce((sum, c) => sum + Math.abs(d[i + c] - d[c]), 0);
        if (apart > 30) others++;
    }
    return others > 0.05 * side * side;
})"""
WRONG = """() => {
    const selectors = [
        '.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]',
        '.jp-Notebook [data-mime-type="application/vnd.jupyter.error"]',
        '.jp-Notebook .jp-OutputArea-output',
    ];
    const isWrong = e => e.dataset.mimeType?.match(/stderr|error/)
        || e.innerText.includes("Traceback (most recent call last)");
    const outputs = [...document.querySelectorAll(selectors.join(", "))];
    return outputs.filter(isWrong).map(e => e.innerText);
}"""
# the page asks for widgets before the notebook has imported them
NOT_YET = re.compile(r"(?:.*No such comm.*\n?)+")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


class OpenNotebook:
    """A notebook of a `Lab` in a browser's tab.

    What goes wrong in kernel, page or widgets gathers in `complaints`; `check` raises it.
    `first` and `clicks` are what a reader waited for: seconds, and seconds of processor time.
    """

    def __init__(self, lab: Lab, context, name: str):
        self.lab = lab
        self.name = name
        self._complaints = []
        self.clicks = []
        self.page = page = context.new_page()
        page.set_default_timeout(120_000)
        page.on(
            "console",
            lambda message: (
                self._complaints.append(f"console: {message.text}")
                if message.type == "error"
                else None
            ),
        )
        page.on("pageerror", lambda error: self._complaints.append(f"page: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(
                    (lab.url, lab.url.replace("http", "ws"), "data:", "blob:")
                )
                else self._complaints.append(f"wants the network: {request.url[:120]}")
            ),
        )
        page.goto(f"{lab.url}/lab/tree/{name}?token={lab.token}&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(IDLE)
        page.evaluate(WATCH)

    def close(self) -> None:
        with contextlib.suppress(Error):
            self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()

    @property
    def complaints(self) -> list[str]:
        heard = self.page.evaluate("() => window.heard ?? []") + self.page.evaluate(WRONG)
        heard = [
            text
            for said in heard
            if (text := COLOURS.sub("", said).strip()) and not NOT_YET.fullmatch(text)
        ]
        return [*self._complaints, *heard]

    def check(self) -> None:
        found = list(dict.fromkeys(self.complaints))
        assert not found, f"{self.name}: " + "\n".join(text[-1500:] for text in found)

    def run_all(self, timeout_s: float = 120.0) -> float:
        "Run → Run All Cells; seconds to the first picture. Waits until all is done, and checks."
        self.page.click('.lm-MenuBar-item:has-text("Run")')
        self.page.get_by_text("Run All Cells", exact=True).click()
        spent, begin = processor_s(), time.monotonic()
        try:
            self.page.wait_for_function(DRAWN, arg=PICTURES, timeout=1000 * timeout_s, polling=50)
        except Error:
            self.check()
            raise AssertionError(f"{self.name}: no picture within {timeout_s:g} s") from None
        first = time.monotonic() - begin
        self.first = first, processor_s() - spent
        self.page.wait_for_function(DONE, timeout=1000 * timeout_s)
        self.settle()
        self.check()
        return first

    def settle(self) -> None:
        "Until the kernel has nothing to do, and has not for a moment."
        for _ in range(2):
            self.page.wait_for_function(IDLE)
            self.page.wait_for_timeout(150)

    def picture(self, name: str) -> Locator:
        "The canvas of a `Picture` of ours, by its name."
        return self.page.locator(f'[data-ct-nb="{name}"] canvas')

    def frame(self, name: str) -> str:
        "What tells the pixels of a `Picture` from others."
        return self.page.locator(f'[data-ct-nb="{name}"]').get_attribute("data-frame")

    def slider(self, name: str, which: int = 0) -> Locator:
        "The handle of a slider, by its label; `which` of several."
        return (
            self.page.locator(".widget-slider")
            .filter(has=self.page.locator("label", has_text=re.compile(f"^{re.escape(name)}$")))
            .nth(which)
            .locator(".noUi-handle")
        )

    def menu(self, name: str) -> Locator:
        return (
            self.page.locator(".widget-dropdown")
            .filter(has=self.page.locator("label", has_text=re.compile(f"^{re.escape(name)}$")))
            .locator("select")
        )

    def pictures(self) -> list[Locator]:
        "What is drawn, in the order of the page."
        return [
            one
            for one in self.page.locator(PICTURES).all()
            if (box := one.bounding_box()) and min(box["width"], box["height"]) > 60
        ]

    def pixels(self, picture: Locator) -> np.ndarray:
        "(rows, columns, 3) uint8 of an element as it is seen."
        return np.asarray(
            Image.open(io.BytesIO(picture.screenshot(animations="disabled"))).convert("RGB")
        )

    def seconds_to_change(self, picture: Locator, act, timeout_s: float = 30.0) -> float:
        """Seconds from `act()` until the picture looks different: more than one pixel in a
        thousand. Waits until the kernel is idle, and checks.
        """
        before, spent = self.pixels(picture), processor_s()
        begin = time.monotonic()
        act()
        while not differs(before, self.pixels(picture)):
            if time.monotonic() - begin > timeout_s:
                self.check()
                raise AssertionError(
                    f"{self.name}: the picture did not change within {timeout_s:g} s"
                )
        waited = time.monotonic() - begin
        self.settle()
        self.clicks.append((waited, processor_s() - spent))
        self.check()
        return waited

    def save(self, name: str, element: Locator | None = None) -> None:
        """A picture of the page, or of an element, in the folder $CT_NB_SCREENSHOTS, where that is
        set.
        """
        folder = os.environ.get("CT_NB_SCREENSHOTS")
        if folder:
            (element or self.page).screenshot(path=Path(folder) / f"{name}.png")


def differs(a: np.ndarray, b: np.ndarray, share: float = 1e-3, grey: int = 12) -> bool:
    "Whether more than `share` of the pixels differ by more than `grey` levels in a colour."
    return a.shape != b.shape or (np.abs(a.astype(int) - b).max(-1) > grey).mean() > share
