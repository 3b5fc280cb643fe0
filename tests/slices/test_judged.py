"""Slabs, regions and paired gains; protocols of thick slices."""

import numpy as np
import pytest
import torch
from refusals import refused
from slice_scans import body_hu

from ct_nb.evaluation.metrics import psnr
from ct_nb.slices.judged import PROTOCOLS, Protocol, protocol_item, slab_gain, slab_rows
from ct_nb.slices.slice_profile import SliceAxis, ThinStack


@pytest.fixture(scope="module")
def stack():
    return ThinStack("a", "a", body_hu(96, 48).numpy(), SliceAxis(0.0, 1.0, 96), (3.0, 3.0))


def test_rows_are_the_scores_of_the_slabs(stack):
    item = protocol_item(stack, PROTOCOLS["5to1"])
    truth = item["thin"]
    off = truth + torch.linspace(0, 40, len(truth))[:, None, None]
    rows = slab_rows(item, {"exact": truth, "off": off}, 30.0)
    assert {row["slab"] for row in rows} == {0, 1, 2}
    third = len(truth) / 3
    for row in rows:
        if row["predictor"] == "off" and row["region"] == "all":
            part = slice(round(row["slab"] * third), round((row["slab"] + 1) * third))
            assert row["psnr"] == pytest.approx(psnr(off[part], truth[part]))
        if row["predictor"] == "exact" and row["region"] == "all":
            assert row["z_edge_error"] == 0 and row["step_error_hu"] == 0
            assert row["reaveraged_worst_hu"] < 0.1
    lungs = [r for r in rows if r["region"] == "lung" and r["predictor"] == "off"]
    assert len(lungs) == 3 and all(np.isfinite(row["psnr"]) for row in lungs)
    assert not [row for row in rows if row["region"] == "bone"]  # the body has none


def test_gains_are_paired_by_slab():
    value = {("p", 0): 1.0, ("p", 1): 3.0, ("q", 0): 10.0, ("q", 1): 10.0}
    rows = [
        {"patient": p, "slab": s, "region": "all", "predictor": name, "psnr": v + more}
        for (p, s), v in value.items()
        for name, more in (("base", 0.0), ("model", 1.0 + s))
    ]
    gain = slab_gain(rows, "model", "base")
    assert gain.patients["p"].mean == gain.patients["q"].mean == 1.5
    assert gain.overall.mean == 1.5 and gain.overall.patients == 2
    assert gain.patients["p"].low < 1 < 2 < gain.patients["p"].high
    assert gain.overall.low == pytest.approx(1.5)
    with refused("predictor"):
        slab_gain(rows, "nobody", "base")


def test_protocols(stack):
    count = {name: protocol_item(stack, p)["thick_axis"].count for name, p in PROTOCOLS.items()}
    assert count["5to1"] == 19 and count["3to1"] == 32 and count["6x"] == 16
    assert count["5to1_overlap"] == 18 and count["5to1_gap"] == 19
    gap = protocol_item(stack, PROTOCOLS["5to1_gap"])
    assert gap["profile"].width_mm == 3.0 and gap["thick_axis"].spacing_mm == 5.0
    assert protocol_item(stack, PROTOCOLS["8to2"])["thin_axis"].spacing_mm == 2.0
    middle = protocol_item(stack, Protocol(5.0, 1.0), 40.0)
    assert middle["thick_axis"].count == 8
    with refused("slab_mm"):
        slab_rows(middle, {}, 50.0)
