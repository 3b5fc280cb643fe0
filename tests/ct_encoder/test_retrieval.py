"""Retrieval and zero-shot metrics against closed forms and reference code."""

import math
import sys

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.ct_encoder.retrieval import (
    auroc,
    bootstrap_ci,
    chance_recall,
    crg_score,
    label_scores,
    linear_probe,
    negation_accuracy,
    prompt_pairs,
    prompt_scores,
    proportion_ci,
    ranks,
    retrieval,
    text_overlap,
)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_by_hand():
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.5, 0.5, 0.5]])
    assert ranks(scores, np.eye(3, dtype=bool)).tolist() == [1, 2, 3]
    assert ranks(scores, np.array([[0, 1, 1], [1, 0, 0], [1, 1, 0]], bool)).tolist() == [2, 1, 2]
    optimistic = 1 + (scores > scores[np.arange(3), np.arange(3)][:, None]).sum(1)
    assert optimistic.tolist() != [1, 2, 3]  # a strict comparison lets the tie win


def test_constant_features_find_nothing():
    flat = torch.ones(50, 4)
    assert all(r.recall.mean == 0 for r in retrieval(flat, flat))


@pytest.mark.parametrize("right, k", [(1, 1), (1, 5), (3, 5), (8, 5)])
def test_chance_is_what_random_orders_give(right, k):
    positive = np.zeros((1, 12), bool)
    positive[0, :right] = True
    rng = np.random.default_rng(0)
    drawn = np.mean([positive[0, rng.permutation(12)[:k]].any() for _ in range(4000)])
    assert (
        chance_recall(positive, k) == pytest.approx(drawn, abs=0.025)
        and chance_recall(positive, k) >= k / 12 - 1e-12
    )
    if right > 1:
        assert abs(k / 12 - drawn) > 0.025  # k / N would be wrong


def test_recall_both_ways_and_by_scan():
    text = torch.eye(6)
    image = text[[0, 1, 2, 3, 5, 4]]  # the last two are exchanged
    alone = {(r.direction, r.k): r for r in retrieval(image, text, ks=(1, 2, 6, 50))}
    # k of N and above say nothing
    assert set(alone) == {(d, k) for d in ("image to text", "text to image") for k in (1, 2)}
    assert (
        alone["image to text", 1].recall.mean == pytest.approx(4 / 6)
        and alone["image to text", 1].hits.tolist() == [True] * 4 + [False] * 2
    )
    scans = np.array([0, 1, 2, 3, 4, 4])
    assert retrieval(image, text, scans[:, None] == scans, ks=(1,))[0].recall.mean == 1
    lopsided = retrieval(
        torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]]),
        torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]]),
        ks=(1,),
    )
    assert lopsided[0].recall.mean == pytest.approx(2 / 3) and lopsided[1].recall.mean == 1
    line = str(alone["image to text", 1])
    assert "N = 6" in line and "chance 16.7%" in line and "6 patients" in line


def test_intervals_hold_their_word():
    rng, inside = np.random.default_rng(0), []
    for _ in range(300):
        found = proportion_ci(rng.random(60) < 0.3, range(60))
        inside.append(found.low <= 0.3 <= found.high)
    assert 0.91 < np.mean(inside) < 0.98
    nothing = proportion_ci([0.0] * 64, range(64))
    assert nothing.low == 0 and nothing.high == pytest.approx(1 - 0.025 ** (1 / 64))
    once = proportion_ci([1.0, 0.0], ["a", "a"])
    assert (
        once.patients == 1 and math.isnan(once.low) and math.isnan(once.high) and once.mean == 0.5
    )
    repeated = proportion_ci([0, 1] * 20, [i // 10 for i in range(40)])
    assert repeated.patients == 4  # ten queries of a patient are one


def test_auroc_counts_pairs():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 5, 40).astype(float)
    labels = rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs)) and auroc(
        -scores, labels
    ) == pytest.approx(1 - np.mean(pairs))
    # ties matter
    assert np.mean([a > b for a in scores[labels] for b in scores[~labels]]) != pytest.approx(
        np.mean(pairs)
    )
    assert math.isnan(auroc(scores, np.ones(40, bool)))


def test_label_scores():
    scores = np.array([[0.0, 1, 0], [1, 0, 0], [2, 2, 0], [3, 3, 0]])
    labels = np.array([[0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]], bool)
    found = label_scores(scores, labels, ["a", "b", "none"], draws=50)
    assert (
        found.per_label["a"] == found.per_label["b"] == 1
        and math.isnan(found.per_label["none"])
        and found.evaluated == 2
        and "2 of 3 labels" in str(found)
    )
    unjudged = label_scores(scores, 0 * labels, ["a", "b", "c"], draws=5)
    assert unjudged.evaluated == 0 and math.isnan(unjudged.macro.mean)
    with refused("labels"):
        label_scores(scores, labels[:, :2], ["a", "b"])


def test_prompt_scores_order_as_the_softmax_of_everybody():
    image = random(0, 9, 5)
    present = random(1, 3, 5)
    absent = random(2, 3, 5)

    def unit(t):
        return t / t.norm(dim=-1, keepdim=True)

    both = torch.stack([unit(image) @ unit(present).T, unit(image) @ unit(absent).T])
    probability = (both.double() * 20).softmax(0)[0].numpy()
    scores = prompt_scores(image, present, absent)
    assert (np.argsort(scores, 0) == np.argsort(probability, 0)).all() and (
        (scores > 0) == (probability > 0.5)
    ).all()
    assert prompt_pairs(["Lung nodule"]) == (
        ["Lung nodule is present."],
        ["Lung nodule is not present."],
    )
    with refused("prompts"):
        prompt_scores(image, present, random(0, 3, 4))


def test_polarity_by_hand():
    labels = np.array([[1, 0], [1, 0], [0, 0]], bool)
    found = negation_accuracy(np.array([[1.0, -1], [-1, -1], [2, 0]]), labels, draws=50)
    assert (
        found.present == 0.5
        and found.absent == pytest.approx((1 + 1 + 0 + 0.5) / 4)
        and found.balanced.mean == pytest.approx((0.5 + 0.625) / 2)
    )
    assert (
        negation_accuracy(np.ones((3, 2)), labels, draws=5).balanced.mean
        == negation_accuracy(np.zeros((3, 2)), labels, draws=5).balanced.mean
        == 0.5
    )
    # plain accuracy would depend on how rare findings are
    assert ((np.ones((3, 2)) > 0) == labels).mean() != 0.5
    with refused("labels"):
        negation_accuracy(np.ones((3, 2)), np.ones((3, 2), bool))
    with refused("labels"):
        negation_accuracy(np.ones((3, 2)), labels[:2])


def test_bootstrap_draws_patients():
    values = np.repeat(np.random.default_rng(2).normal(size=20), 10)

    def mean(rows):
        return values[rows].mean()

    by_patient = bootstrap_ci(mean, np.repeat(np.arange(20), 10), 200)
    by_row = bootstrap_ci(mean, range(200), 200)
    assert by_patient.high - by_patient.low > 2 * (
        by_row.high - by_row.low
    ) and by_patient.mean == pytest.approx(values.mean())
    assert bootstrap_ci(mean, np.repeat(np.arange(20), 10), 200) == by_patient  # seeded


def test_probe_is_logistic_regression():
    x, direction = random(3, 120, 6), random(4, 6)
    labels = ((x @ direction + 0.5 * random(5, 120)) > 0).float()[:, None]
    logits = linear_probe(x[:80], labels[:80], x[80:], ridge=0.1)
    assert auroc(logits[:, 0], labels[80:, 0]) > 0.9
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    mean, sd = x[:80].double().mean(0), x[:80].double().std(0)
    for _ in range(1500):  # plain gradient descent comes to the same
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(
                (x[:80].double() - mean) / sd @ weight + bias, labels[:80, 0].double()
            )
            + 0.05 * weight.square().sum()
        )
        gradient = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            for p, g in zip((weight, bias), gradient):
                p -= 0.5 * g
    assert np.allclose(
        logits[:, 0], ((x[80:].double() - mean) / sd @ weight + bias).detach().numpy(), atol=1e-4
    )
    # a label that everybody has
    assert np.isfinite(linear_probe(x[:80], torch.ones(80, 1), x[80:])).all()
    with refused("labels"):
        linear_probe(x, labels[:5], x)


def test_crg():
    labels = np.zeros((10, 4), bool)
    labels[:3, 0] = labels[5, 2] = True
    assert crg_score(labels, labels) == 1 and crg_score(labels & False, labels) == pytest.approx(
        1 / 3
    )
    some = labels.copy()
    # one missed, one too many: X = 40, A = 4, r = 4.5, U = 18, s = 13.5 - 4.5 - 1 = 8
    some[0, 0], some[9, 3] = False, True
    assert crg_score(some, labels) == pytest.approx(18 / 28)
    with refused("labels"):
        crg_score(labels, labels & False)
    with refused("predicted"):
        crg_score(labels[:2], labels)


def test_text_overlap():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    same = text_overlap(
        ["No pleural effusion is seen today."], ["No pleural effusion is seen today."]
    )
    assert all(v == pytest.approx(1) for v in same.values()) and set(same) == {
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "rouge_l",
    }
    part = text_overlap(["no effusion seen"], ["No mass seen"])
    assert (
        part["bleu_1"] == pytest.approx(2 / 3)
        and part["bleu_2"] == 0
        and part["rouge_l"] == pytest.approx(2 / 3)
    )
    with refused("references"):
        text_overlap(["a"], [])


def test_text_overlap_says_what_to_install(monkeypatch):
    for name in ("sacrebleu", "sacrebleu.metrics", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="sacrebleu==2.6.0 rouge-score==0.1.2"):
        text_overlap(["a"], ["a"])


def test_bad_features():
    with refused("text"):
        retrieval(random(0, 4, 3), random(0, 5, 3))
    with refused("image"):
        retrieval(random(0, 1, 3), random(0, 1, 3))
    with refused("scores"):
        retrieval(random(0, 4, 3) * math.nan, random(0, 4, 3))
    with refused("positive"):
        ranks(np.eye(2), np.array([[1, 0], [0, 0]], bool))
