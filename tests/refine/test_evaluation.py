"""The scoreboard of a refiner: paired gains, definitions, and sentences from intervals."""

import pytest

from ct_nb.evaluation.scoreboard import scoreboard_content
from ct_nb.evaluation.sharpness import SHARPNESS_METRICS
from ct_nb.refine.evaluation import REFINEMENT_MAIN, RefinementScoreboard

PREDICTORS = (
    "refined",
    "coarse",
    "unsharp_mask",
    "consistency_alone",
    "linear_prior",
    "atlas_reconstruction",
)


def rows(*gains, refined=(), **columns):
    """A patient for each gain in dB; `refined` changes its columns, one value for all patients or a
    list.
    """
    plain = {
        "ssim": 0.5,
        "mae_hu_body": 50.0,
        "drr_error": 0.02,
        "drr_error_held_out": 0.02,
        "null_space_error": 0.3,
        "edge_response": 0.5,
        "edge_mismatch": 0.5,
        "edge_error": 0.5,
        "edges_elsewhere_db": -2.0,
        "spectrum_error_db": 5.0,
        "fine_correlation": 0.3,
        "null_added": 0.1,
        "null_right": 0.1,
        "null_invented": 0.1,
        **columns,
    }

    def of_patient(n):
        return {
            key: value[n] if isinstance(value, list) else value
            for key, value in dict(refined).items()
        }

    return [
        {
            "case": n,
            "patient": n,
            "predictor": name,
            "psnr": 20 + 3 * n + (g if name == "refined" else 0),
            **plain,
            **(of_patient(n) if name == "refined" else {}),
        }
        for n, g in enumerate(gains)
        for name in PREDICTORS
    ]


def verdict(*gains, **changes):
    return RefinementScoreboard(rows(*gains, **changes)).verdict()


def test_gains_are_paired():
    gain = RefinementScoreboard(rows(1.0, 1.1, 0.9)).gain("coarse", "psnr")
    # unpaired, the patients differ by 3 dB
    assert (
        gain.mean == pytest.approx(1.0)
        and 0.7 < gain.low < 1 < gain.high < 1.3
        and gain.patients == 3
    )
    assert [
        verdict(*gains)[0].rsplit(": ", 1)[1]
        for gains in ((1.0, 1.1, 0.9), (1.0, -1.1, 0.9), (-1.0, -1.1, -0.9))
    ] == ["a gain.", "no gain is shown.", "a loss."]
    assert "one patient gives no interval" in verdict(1.0)[0] and "a gain." not in " ".join(
        verdict(1.0)
    )
    for place, baseline in enumerate(PREDICTORS[1:]):
        told = verdict(1.0, 1.1, 0.9)[place]
        assert f"over {baseline}: +1.00" in told and told.endswith("a gain.")
    # less is better
    assert RefinementScoreboard(rows(0, 0, refined={"edge_error": 0.4})).gain(
        "coarse", "edge_error"
    ).mean == pytest.approx(0.1)


@pytest.mark.parametrize("metric, line", [("drr_error", 7), ("drr_error_held_out", 8)])
@pytest.mark.parametrize(
    "after, conclusion",
    [
        ([0.0201, 0.02011, 0.02012], "worse."),  # by 1 %, and certainly
        ([0.0199, 0.01989, 0.01988], "no worse."),
        ([0.02, 0.02, 0.02], "no worse."),
        ([0.03, 0.01, 0.021], "whether it is worse cannot be said."),
    ],
)
def test_worse_on_the_xrays_is_what_the_interval_says(metric, line, after, conclusion):
    sentences = verdict(0, 0, 0, refined={metric: after})
    assert sentences[line].rsplit(": ", 1)[1] == conclusion and "DRR error" in sentences[line]
    assert sentences[15 - line].rsplit(": ", 1)[1] == "no worse."  # the other views did not change
    assert verdict(0, refined={metric: 0.5})[line].endswith(
        "one patient gives no interval: whether it is worse cannot be said."
    )


def test_the_error_on_given_views_stands_beside_that_of_the_cts():
    def sentence(truth, after):
        return verdict(0, 0, 0, drr_error_of_truth=truth, refined={"drr_error": after})[7]

    assert sentence(0.05, [0.03, 0.031, 0.029]).endswith(
        ": worse; the CTs themselves, on this grid, have 0.0500, so before and after are within"
        " what noise and anatomy finer than a voxel explain."
    )
    # farther than a CT is
    assert sentence(0.025, [0.03, 0.031, 0.029]).endswith(
        ": worse; the CTs themselves, on this grid, have 0.0250."
    )
    assert sentence(0.03, [0.03, 0.04, 0.02]).endswith("have 0.0300.")  # not certainly below
    # the input was above
    assert sentence(0.01, [0.005, 0.006, 0.004]).endswith(
        ": no worse; the CTs themselves, on this grid, have 0.0100."
    )


def test_the_spectrum_has_a_sentence():
    nearer, farther = (
        verdict(
            0,
            0,
            0,
            refined={
                "spectrum_error_db": [5 + s, 5 + 1.1 * s, 5 + 0.9 * s],
                "fine_correlation": [0.3 - 0.1 * s, 0.3 - 0.11 * s, 0.3 - 0.09 * s],
            },
        )[9]
        for s in (-1, 1)
    )
    assert (
        "5.0 dB off that of the CTs before, 4.0 after" in nearer
        and "nearer to the truth" in nearer
        and nearer.endswith("0.30 before, 0.40 after: a gain.")
    )
    assert (
        "farther from the truth" in farther
        and farther.endswith("a loss.")
        and "no difference is shown"
        in verdict(0, 0, 0, refined={"spectrum_error_db": [4, 6, 5]})[9]
    )


def test_invented_detail_is_compared_with_the_baselines():
    sentences = verdict(
        0, 0, 0, refined={"null_invented": [0.3, 0.31, 0.29], "null_right": -0.2, "null_added": 0.4}
    )
    assert (
        "added 0.40 of the size" in sentences[10]
        and "-20% of the missing energy was recovered" in sentences[10]
        and "has 0.30 of its size" in sentences[10]
    )
    assert (
        sentences[11].startswith("unsharp_mask invented 0.10; a change of +0.200")
        and sentences[12].startswith("consistency_alone")
        and all(line.endswith("the refiner invented more.") for line in sentences[11:13])
    )
    assert verdict(0, 0, 0, refined={"null_invented": [0.05, 0.04, 0.06]})[11].endswith(
        "the refiner invented less."
    ) and verdict(0, 0, 0, refined={"null_invented": [0.05, 0.15, 0.1]})[11].endswith(
        "no difference is shown."
    )


def test_a_coarse_volume_sharper_than_the_truth_has_a_sentence():
    sharp = verdict(0.1, 0.2, edge_response=1.3, refined={"edge_response": 1.1})
    assert (
        "already sharper than the CTs: their edges are 1.30 times as steep, and 1.10 times after"
        " refinement" in sharp[-1]
        and not any("sharper" in line for line in verdict(0.1, 0.2))
    )


def test_every_column_is_defined_and_shown():
    board = RefinementScoreboard(rows(1.0, 1.1))
    assert set(SHARPNESS_METRICS) <= set(board.metrics) and set(REFINEMENT_MAIN) <= set(
        board.metrics
    )
    sentences = scoreboard_content(board)
    for name, metric in SHARPNESS_METRICS.items():
        assert (
            sentences["definitions"][name]["better"] in ("higher", "lower", "zero")
            and sentences["definitions"][name]["definition"]
            and sentences["predictors"]["coarse"][name] is not None
        )
        assert metric.unit == ("dB" if name.endswith("_db") else "")
    head = board.table().splitlines()[0]
    for words in (
        "edge mismatch ↓",
        "spectrum error, dB ↓",
        "fine correlation ↑",
        "null space, recovered ↑",
        "null space, invented ↓",
    ):
        assert words in head
    gains = board.gains()
    assert set(gains) == set(PREDICTORS) - {"refined"} and {
        "psnr",
        "edge_response",
        "null_right",
        "null_invented",
    } <= set(gains["coarse"])
    assert set(gains["coarse"]["null_invented"]) == {"mean", "low", "high", "patients"} and gains[
        "coarse"
    ]["psnr"]["mean"] == pytest.approx(1.05)
    assert RefinementScoreboard(rows(1.0)).gains()["coarse"]["psnr"] == {
        "mean": 1.0,
        "low": None,
        "high": None,
        "patients": 1,
    }
