"""The harness itself: a notebook that is right passes, and each way of being wrong is seen."""

import subprocess

import lab
import nbformat
import numpy as np
import psutil
import pytest

SLIDERS = """
import io, time
import ipywidgets, numpy
from PIL import Image
def picture(number):
    file = io.BytesIO()
    Image.fromarray((numpy.add.outer(numpy.arange(200), numpy.arange(200)) * number % 256).astype("uint8")).save(file, "png")
    return file.getvalue()
image = ipywidgets.Image(value=picture(3), width=200, height=200)
def right(change): image.value = picture(change["new"])
def dead(change): pass
def slow(change): time.sleep(PAUSE); right(change)
def wrong(change): right(change); 1 / 0
sliders = [ipywidgets.IntSlider(3 + 10 * place, 0, 50) for place in range(4)]
for slider, react in zip(sliders, (right, dead, slow, wrong)): slider.observe(react, "value")
ipywidgets.VBox([*sliders, image])""".replace("PAUSE", "2.2")
HTML = "from IPython.display import HTML, display; display(HTML('''{}'''))"
BROKEN = {  # cell → what must be said of it
    "import sys; print('a warning', file=sys.stderr)": "a warning",
    HTML.format("<script>console.error('widget broke')</script>"): "widget broke",
    HTML.format(
        "<script>setTimeout(() => { throw new Error('loose end') }, 0)</script>"
    ): "loose end",
    HTML.format("<img src='https://example.org/x.png'>"): "wants the network: https://example.org",
    "import ipywidgets; out = ipywidgets.Output()\nwith out: int('inside')\nout": (
        "invalid literal for int"
    ),
    "1 / 0": "ZeroDivisionError",
}  # the last, since nothing runs after it


@pytest.fixture
def written(jupyter, reader):
    "Opens a notebook of these cells."

    def write(name: str, *cells: str) -> lab.OpenNotebook:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
        )
        notebook.metadata["kernelspec"] = {
            "display_name": "python3",
            "language": "python",
            "name": "python3",
        }
        nbformat.write(notebook, jupyter.folder / f"{name}.ipynb")
        return reader(f"{name}.ipynb")

    return write


def test_right_dead_slow_and_wrong_widgets(written):
    notebook = written("sliders", SLIDERS)
    assert notebook.run_all() > 0
    image = notebook.pictures()[0]
    assert image.bounding_box()["width"] == 200

    def push(place):
        return lambda: notebook.page.locator(".noUi-handle").nth(place).press("ArrowRight")

    assert 0 < notebook.seconds_to_change(image, push(0)) < lab.CLICK_S
    notebook.save("harness")
    with pytest.raises(AssertionError, match="did not change within 3 s"):
        notebook.seconds_to_change(image, push(1), timeout_s=3)
    assert notebook.seconds_to_change(image, push(2)) > 2.2
    notebook.check()
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        notebook.seconds_to_change(image, push(3))


def test_everything_that_breaks_is_said(written):
    notebook = written("broken", SLIDERS, *BROKEN)
    with pytest.raises(AssertionError) as found:
        notebook.run_all()
    for cell, said in BROKEN.items():
        assert said in str(found.value), f"nothing was said of: {cell}"


def test_a_notebook_without_a_picture_is_seen(written):
    blank = (
        "import numpy; from ct_nb.viewer.canvas import ImageCanvas; p = ImageCanvas(name='blank',"
        " letters=['R', 'L', 'A', 'P'], scale_bar_mm=50.0); p.draw(numpy.zeros((200, 200),"
        " 'uint8')); p"
    )
    for cell in ("1 + 1", HTML.format("<canvas width=200 height=200></canvas>"), blank):
        notebook = written("empty", cell)
        with pytest.raises(AssertionError, match="no picture within"):
            notebook.run_all(timeout_s=3 * lab.SLACK)
    assert notebook.page.locator('[data-ct-nb="blank"]').get_attribute(
        "data-drawn"
    ), "letters on black were there, and were no picture"


def test_processes_that_stay_are_seen():
    left = subprocess.Popen(["sleep", "60"])
    with pytest.raises(AssertionError, match=f"sleep .{left.pid}"):
        lab.check_gone([psutil.Process(left.pid)], 0.2)
    assert left.wait() != 0


def test_differs_counts_pixels():
    a = np.zeros((100, 100, 3), np.uint8)
    b = a.copy()
    b[:3, :3] = 200
    assert not lab.differs(a, b) and lab.differs(a, b, share=5e-4) and lab.differs(a, a[:50])
