"""The report decoder and the segmentation head: causality, cache, decoding, refused input."""

import math

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from ct_nb.ct_encoder import report_decoder as cot
from ct_nb.ct_encoder.region_attention import patch_overlaps
from ct_nb.ct_encoder.report_decoder import (
    Memory,
    RegionSegmentation,
    ReportDecoder,
    generate,
    label_shares,
    region_dice,
    segmentation_loss,
    stated_findings,
)
from ct_nb.ct_encoder.text_encoders import WordTokenizer

TEXTS = [
    "Observation: right middle lobe: a large lesion.",
    "Measurement: 56 mm; 70 mm right of, 6.5 mm above the centre of T7.",
    "No mass (left 6th rib), ground-glass of 12%.",
]


@pytest.fixture
def writer():
    torch.manual_seed(0)
    return ReportDecoder(WordTokenizer.fit(2 * TEXTS), 8, width=16, depth=2, heads=2, max_length=48)


def test_the_way_back_from_numbers(writer):
    tokenizer = writer.tokenizer
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == [
        text.lower() for text in TEXTS
    ]
    assert (
        tokenizer.decode([0, 1, writer.stop, 10_000]) == ""
        and tokenizer.decode(tokenizer.encode("€ 5")) == "□ 5"
    )


def test_no_word_sees_what_follows(writer):
    numbers = writer.encode(TEXTS)
    patches = torch.randn(3, 5, 8)
    changed = numbers.clone()
    changed[:, 6:] = 7
    with torch.no_grad():
        a, b = writer(numbers, patches), writer(changed, patches)
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-6) and not torch.allclose(
        a[:, 6:], b[:, 6:], atol=1e-3
    )


def test_causality_can_fail(writer, monkeypatch):
    "Attention to all words must be caught by the test above."
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        cot.F, "scaled_dot_product_attention", lambda q, k, v, is_causal=False: plain(q, k, v)
    )
    with pytest.raises(AssertionError):
        test_no_word_sees_what_follows(writer)


def test_remembered_keys_change_nothing(writer):
    numbers = writer.encode(TEXTS)
    patches = torch.randn(3, 5, 8)
    memories = [Memory() for _ in writer.blocks]
    with torch.no_grad():
        whole = writer(numbers, patches)
        steps = torch.cat(
            [
                writer._step(numbers[:, i : i + 1], writer.memory(patches), i, memories)
                for i in range(numbers.shape[1])
            ],
            1,
        )
    assert torch.allclose(whole, steps, atol=1e-5)


def test_a_prompt_of_several_words_is_remembered(writer):
    patches = torch.randn(2, 5, 8)
    for text in generate(writer, patches, begin="Observation: right"):
        assert text.startswith("observation: right")
    numbers = torch.tensor([writer.tokenizer.encode("Observation: right")] * 2)
    for _ in range(5):  # plainly, the whole text anew for each word
        with torch.no_grad():
            logits = writer(numbers, patches)[:, -1]
        logits[:, :2] = -torch.inf
        numbers = torch.cat([numbers, logits.argmax(-1, keepdim=True)], 1)
    plain = [writer.tokenizer.decode(row) for row in numbers]
    assert (
        generate(writer, patches, begin="Observation: right", max_length=numbers.shape[1]) == plain
        or writer.stop in numbers
    )


def test_loss_is_the_mean_over_tokens(writer):
    patches = torch.randn(3, 5, 8)
    each = [writer.loss([text], patches[i : i + 1]).item() for i, text in enumerate(TEXTS)]
    # as many tokens are predicted: all but the first, and the stop
    lengths = [len(writer.tokenizer.encode(text)) for text in TEXTS]
    wanted = sum(loss * n for loss, n in zip(each, lengths)) / sum(lengths)
    assert math.isclose(writer.loss(TEXTS, patches).item(), wanted, rel_tol=1e-5)
    assert not math.isclose(sum(each) / 3, wanted, rel_tol=1e-5)


def test_texts_are_bounded_and_stop(writer):
    long = writer.encode([" ".join(TEXTS * 5)])
    assert (
        long.shape == (1, 48)
        and writer.stop not in long
        and (writer.encode(TEXTS) == writer.stop).sum(1).tolist() == [1, 1, 1]
    )
    texts = generate(writer, torch.randn(2, 5, 8), max_length=7)
    assert all(len(writer.tokenizer.encode(text)) <= 7 for text in texts)
    with torch.no_grad():
        writer.out.bias[writer.stop] = 1e4
    assert generate(writer, torch.randn(2, 5, 8)) == ["", ""]


def test_sampling_can_be_drawn_again(writer):
    patches = torch.randn(2, 5, 8)

    def draw(seed, t=1.5):
        return generate(
            writer.train(), patches, temperature=t, generator=torch.Generator().manual_seed(seed)
        )

    assert draw(0) == draw(0) != draw(1) and writer.training
    assert draw(0, 1e-4) == generate(writer, patches)


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda w: w.encode([]), "texts"),
        (lambda w: w.encode(["a", " "]), "texts"),
        (lambda w: w.encode("a"), "texts"),
        (lambda w: w.loss(["a"], torch.zeros(2, 5, 8)), "texts"),
        (lambda w: generate(w, torch.zeros(1, 5, 8), max_length=99), "max_length"),
        (lambda w: generate(w, torch.zeros(1, 5, 8), temperature=-1), "temperature"),
        (lambda w: generate(w, torch.zeros(1, 5, 8), temperature=1), "generator"),
        (lambda w: generate(w, torch.zeros(1, 5, 8), begin="56 mm " * 20), "begin"),
        (lambda w: ReportDecoder(w.tokenizer, 8, width=10, heads=4), "heads"),
        (lambda w: ReportDecoder(w.tokenizer, 8, max_length=2), "max_length"),
    ],
)
def test_refused_arguments(writer, call, argument):
    with refused(argument):
        call(writer)


def test_claims():
    names = ["mass", "pleural effusion", "Lung nodule"]
    assert stated_findings("There is a mass. No pleural effusion, no nodule.", names) == {
        "mass": True,
        "pleural effusion": False,
        "Lung nodule": False,
    }
    assert stated_findings("A nodule of 6 mm; pleural effusion is not seen.", names) == {
        "mass": False,
        "pleural effusion": False,
        "Lung nodule": True,
    }
    assert not any(stated_findings("", names).values())


def test_pieces_lie_where_they_belong():
    head = RegionSegmentation(1, 8, (2, 2, 2))
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.copy_(torch.eye(8).flatten())
    labels = head(torch.zeros(1, 1, 2, 3, 4)).argmax(1)[0]
    assert (
        labels.shape == (4, 6, 8)
        and torch.equal(labels[:2, :2, :2].flatten(), torch.arange(8))
        and torch.equal(labels[2:, 4:, 6:], labels[:2, :2, :2])
    )


def test_shares_and_loss():
    labels = torch.randint(0, 5, (2, 8, 16, 16), generator=torch.Generator().manual_seed(0))
    shares = label_shares(labels, (4, 8, 8), (2, 2, 1), 5)
    assert shares.shape == (2, 5, 4, 4, 2) and torch.allclose(
        shares[1, :, 3, 2, 1], patch_overlaps(labels[1:, 6:8, 8:12, 8:16], (2, 4, 8), 5)[0, 0]
    )
    crisp = F.one_hot(shares.argmax(1), 5).permute(0, 4, 1, 2, 3).float()
    assert (
        segmentation_loss(50 * crisp, crisp)
        < 1e-4
        < segmentation_loss(0 * crisp, crisp)
        < segmentation_loss(-50 * crisp, crisp)
    )
    with refused("shares"):
        segmentation_loss(crisp, crisp[:, :4])
    with refused("refine"):
        label_shares(labels, (4, 8, 8), (3, 1, 1), 5)


def test_dice():
    a = torch.tensor([0, 1, 1, 2, 3])
    b = torch.tensor([0, 1, 2, 2, 0])
    assert region_dice(a, b, 5) == pytest.approx({1: 2 / 3, 2: 2 / 3, 3: 0.0})
    with refused("predicted"):
        region_dice(a, b[:2], 5)
