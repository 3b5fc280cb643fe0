"What every figure of anatomy must carry: letters at the ends of images and scale bars."

import re

import numpy as np
import pytest
from matplotlib import pyplot as plt

OPPOSITE = str.maketrans("RLAPHF", "LRPAFH")


def marks_faults(figure, besides=()) -> list[str]:
    """What a figure of anatomy lacks: letters at the four ends of every image, and in every row of
    panels a bar as long as it says, or an axis in mm. `besides`: titles of panels that show none.
    """
    faults, rows = [], {}
    for axis in figure.findobj(plt.Axes):
        if not axis.images or axis.name == "3d" or axis.get_title() in besides:
            continue
        words = [text.get_text() for text in axis.texts]
        ends = {word for word in words if re.fullmatch("[RLAPHF]{1,2}", word)}
        if len(ends) != 4 or {end.translate(OPPOSITE) for end in ends} != ends:
            faults.append(f"{axis.get_title() or axis.get_ylabel()!r}: letters {sorted(ends)}")
        bars = [float(word[:-3]) for word in words if re.fullmatch(r"\d+ mm", word)]
        for length in bars:
            if not any(np.ptp(line.get_xdata()) == pytest.approx(length) for line in axis.lines):
                faults.append(f"{axis.get_title()!r}: a bar that is not {length:g} mm long")
        place = axis.get_subplotspec()
        row = (id(place.get_gridspec()), place.rowspan.start) if place else id(axis)
        rows[row] = (
            rows.get(row, False) or bool(bars) or not place and axis.get_xlabel().endswith(", mm")
        )
    return (
        faults
        + ["a row without a scale bar"] * (len(rows) - sum(rows.values()) if rows else 0)
        + ["no anatomy"] * (not rows)
    )
