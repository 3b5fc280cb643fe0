"""Grounding metrics: exact baselines against simulated ones, ties, and refused input."""

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.ct_encoder.contrastive import equivalence_keys
from ct_nb.ct_encoder.encoder import CTEncoderConfig
from ct_nb.ct_encoder.grounding import (
    centre_prior,
    correlations,
    grounding_scores,
    localization_scores,
    preprocessing_check,
    random_localization_scores,
    region_text_accuracy,
    step_patch_correlation,
    top_patches,
)
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Volume


@pytest.fixture
def people():
    "Vectors (5 scans, 4 regions, 16) with the sentences that are the same vectors."
    draw = torch.Generator().manual_seed(0)
    regions = torch.randn(4, 16, generator=draw) + torch.randn(5, 4, 16, generator=draw)
    case, region = (
        t.flatten() for t in torch.meshgrid(torch.arange(5), torch.arange(1, 5), indexing="ij")
    )
    return regions, torch.ones(5, 4, dtype=torch.bool), regions.flatten(0, 1), case, region


def test_perfect_vectors_are_right(people):
    found = region_text_accuracy(*people)
    assert (
        found["region"].share.mean == found["scan"].share.mean == 1
        and found["region"].chance == 0.25
        and found["scan"].chance == pytest.approx(0.2)
    )
    assert found["region"].questions == found["scan"].questions == 20 and "chance 25.0%" in str(
        found["region"]
    )


def test_ties_are_no_answer(people):
    regions, present, text, case, region = people
    found = region_text_accuracy(torch.ones_like(regions), present, text, case, region)
    assert found["region"].share.mean == found["scan"].share.mean == 0


def test_regions_that_are_missing_are_no_candidates(people):
    regions, present, text, case, region = people
    present = present.clone()
    present[0, 1] = False
    with refused("region"):
        region_text_accuracy(regions, present, text, case, region)
    kept = ~((case == 0) & (region == 2))
    found = region_text_accuracy(regions, present, text[kept], case[kept], region[kept])
    assert found["region"].chance == pytest.approx((3 * (1 / 3) + 16 * 0.25) / 19) and found[
        "scan"
    ].chance == pytest.approx((15 * 0.2 + 4 * 0.25) / 19)


def test_sentences_that_say_the_same_are_right_for_each_other(people):
    regions, present, text, case, region = people
    # scans 0 and 1 say the same
    keys = equivalence_keys([f"nodule {0 if c < 2 else c}" for c in case.tolist()], region.tolist())
    exchanged = torch.where(case == 0, 1, torch.where(case == 1, 0, case))
    swapped = regions[exchanged, region - 1]
    assert (
        region_text_accuracy(regions, present, swapped, case, region, keys)["scan"].share.mean == 1
    )
    assert region_text_accuracy(regions, present, swapped, case, region)[
        "scan"
    ].share.mean == pytest.approx(0.6)
    nobody = equivalence_keys(["normal"] * 20, region.tolist())
    assert "scan" not in region_text_accuracy(regions, present, text, case, region, nobody)
    with refused("case"):
        region_text_accuracy(regions, present, text, case[:3], region)


def test_correlation_is_numpys():
    a, b = torch.rand(6, 40), torch.rand(6, 40)
    assert (
        np.allclose(correlations(a, b), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
        and correlations(torch.ones(1, 9), b[:1, :9]).item() == 0
    )


def test_steps_that_listen_and_steps_that_do_not():
    inside = torch.zeros(4, 30)
    for i in range(4):
        inside[i, 5 * i : 5 * i + 5] = 1
    case = torch.tensor([0, 0, 1, 1])
    listens = step_patch_correlation(inside / 5, inside, case)
    assert (
        listens.correlation.mean == pytest.approx(1)
        and listens.elsewhere.mean < 0
        and listens.inside.mean == pytest.approx(1)
        and listens.uniform == pytest.approx(1 / 6)
    )
    deaf = step_patch_correlation((inside.sum(0) / 20).expand(4, -1), inside, case)
    assert (
        deaf.gain.mean == pytest.approx(0, abs=1e-12)
        and deaf.correlation.mean > 0.1
        and deaf.correlation.patients == 2
    )
    alone = step_patch_correlation(inside[:1] / 5, inside[:1], case[:1])
    assert alone.steps == 1 and np.isnan(alone.elsewhere.mean)
    with refused("inside"):
        step_patch_correlation(inside, 0 * inside, case)
    with refused("inside"):
        step_patch_correlation(inside, inside[:, :9], case)


def test_places_and_floors():
    share = torch.zeros(60)
    share[[3, 4, 17]] = torch.tensor([1.0, 0.5, 0.01])
    assert localization_scores(share, share) == {
        "dice": 1.0,
        "iou": 1.0,
        "voxel_dice": pytest.approx(2 * 1.51 / 4.51),
        "hit": 1.0,
    }
    half = torch.zeros(60)
    half[[3, 50, 51]] = torch.tensor([0.2, 0.9, 0.8])
    assert localization_scores(half, share) == {
        "dice": pytest.approx(1 / 3),
        "iou": pytest.approx(0.2),
        "voxel_dice": pytest.approx(2 / 4.51),
        "hit": 0.0,
    }
    drawn = [
        localization_scores(torch.rand(60, generator=torch.Generator().manual_seed(i)), share)
        for i in range(800)
    ]
    for name in ("dice", "voxel_dice", "hit"):
        assert np.mean([d[name] for d in drawn]) == pytest.approx(
            random_localization_scores(share)[name], abs=0.012
        )
    assert (
        top_patches(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
        and centre_prior((3, 3, 3)).argmax() == 13
    )
    with refused("share"):
        localization_scores(share, 0 * share)
    with refused("share"):
        localization_scores(share, share[:9])


def test_localisation_stands_beside_its_floors():
    grid, draw = (4, 4, 4), torch.Generator().manual_seed(0)
    inside = torch.zeros(6, 64)
    for i in range(6):
        inside[i, torch.randperm(64, generator=draw)[:12]] = 1
    lesion = inside * (torch.rand(6, 64, generator=draw) < 0.3)
    lesion[5] = 0  # is in no patch
    found = grounding_scores(lesion, lesion, inside, grid, [0, 0, 1, 1, 2, 2], list("aabbcc"))
    assert (
        found.lesions == 5
        and found.scores["attention"]["dice"].mean == 1
        and found.gain["region"].mean > 0.3
    )
    assert (
        found.scores["region"]["dice"].mean > found.scores["random"]["dice"].mean
        and found.gain["random"].patients == 3
    )
    assert {"random dice", "attention hit", "centre iou", "kind"} <= found.rows[
        0
    ].keys() and "5 lesions of 3 patients" in str(found)
    with refused("lesion"):
        grounding_scores(lesion, 0 * lesion, inside, grid, range(6))
    with refused("grid"):
        grounding_scores(lesion, lesion, inside, (4, 4, 2), range(6))
    with refused("lesion"):
        grounding_scores(lesion, lesion[:2], inside, grid, range(6))


def test_scans_that_are_not_hu_are_refused():
    config = CTEncoderConfig.preset("smoke")
    scans = [phantom(seed, 24).volume for seed in range(2)]
    found = preprocessing_check(scans, config)
    assert found["right"] == {"refused": 0, "of": 2, "sentence": ""}
    assert all(
        row["refused"] == 2 and row["sentence"] for name, row in found.items() if name != "right"
    )
    assert (
        "rescaled twice" in found["rescaled twice"]["sentence"]
        and "mm" in found["in metres"]["sentence"]
    )
    # the judge itself must notice a scan that is wrong
    wrong = preprocessing_check([Volume(scans[0].hu - 1024, scans[0].affine)], config)
    assert wrong["right"]["refused"] == 1
    with refused("volumes"):
        preprocessing_check([], config)
