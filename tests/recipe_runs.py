"""Recipes run in this process, which has the imports already; one recipe runs by papermill for real."""

import os

import matplotlib.pyplot as plt
import torch
from execnb.nbio import mk_cell, read_nb
from execnb.shell import CaptureShell
from places import NBS, ROOT


def run_recipe(recipe: str, **parameters):
    """The executed notebook of a recipe, with parameters in place of its own; raises what a cell
    raises.
    """
    notebook = read_nb(NBS / f"{recipe}.ipynb")
    place, cell = next(
        (i, c) for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])
    )
    own = {line.partition(":")[0] for line in cell.source.splitlines() if ": " in line}
    assert set(parameters) <= own, f"{recipe} does not take {set(parameters) - own}"
    given = {
        name: value if isinstance(value, int) else str(value) for name, value in parameters.items()
    }
    assignments = [f"{name} = {value!r}" for name, value in given.items()]
    code = "\n".join(["# Parameters", *assignments])  # as papermill writes it
    notebook.cells.insert(place + 1, mk_cell(code))
    folder = os.getcwd()
    backend = plt.get_backend()
    threads = torch.get_num_threads()
    try:
        os.chdir(ROOT)
        CaptureShell().run_all(notebook, exc_stop=True)
    finally:
        os.chdir(folder)
        plt.close("all")
        plt.switch_backend(backend)
        torch.set_num_threads(threads)
    return notebook
