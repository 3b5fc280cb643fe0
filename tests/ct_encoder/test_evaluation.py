"""The evaluation of an oracle with known answers, and of the same oracle on permuted scans."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ct_nb.core.regions import REGIONS
from ct_nb.ct_encoder import evaluation as language_scores
from ct_nb.ct_encoder.dataset import ScanCase, ScanReports
from ct_nb.ct_encoder.encoder import CTEncoderConfig, Encoding
from ct_nb.ct_encoder.evaluation import encode_scans, evaluate_language, label_names
from ct_nb.ct_encoder.model import label_regions, region_prompts, target_text
from ct_nb.ct_encoder.region_attention import patch_overlaps
from ct_nb.ct_encoder.report_decoder import label_shares
from ct_nb.ct_encoder.reports import RadiologyReport, ReasoningStep
from ct_nb.ct_encoder.text_encoders import WordTokenizer
from ct_nb.phantom.chest import phantom

# three batches of eight; regions on every map
CONFIG = CTEncoderConfig.preset("smoke")
SCANS = 24
KNOWN = (1, 2, 3, 4, 5)
LABELS = ("lung nodule", "pleural effusion")  # in region 1 and in region 2
REFINE = (1, 2, 2)


def signs(i):
    return (bool(i % 2), bool(i // 2 % 2))


def make_report(i):
    nodule, effusion = signs(i)
    say = {
        1: f"{'' if nodule else 'No '}lung nodule in the left upper lobe. Slice {i}.",
        2: f"{'' if effusion else 'No '}pleural effusion in the left lower lobe. Slice {i}.",
    } | {n: f"Fissure {i} of the {REGIONS[n][0]} runs as drawn." for n in (3, 4, 5)}
    steps = (
        *[
            ReasoningStep(f"Looking at the {REGIONS[n][0]}.", (REGIONS[n][0],), (n,))
            for n in (1, 3, 5)
        ],
        ReasoningStep(
            f"Conclusion: {'a' if nodule else 'no'} lung nodule. There is"
            f" {'a' if effusion else 'no'} pleural effusion. Case {i}."
        ),
    )
    return RadiologyReport(
        f"s{i}",
        f"Impression of case {i} as dictated.",
        tuple(say.items()),
        steps,
        labels=dict(zip(LABELS, signs(i))),
    )


def make_scan(i, hu):
    """Every patch is one region, in an order of the scan's own; a lesion of two patches; the scan's
    number in its first voxel.
    """
    draw = np.random.default_rng(i)
    patches = draw.permuted(np.resize(KNOWN, 64)).reshape(4, 4, 4).astype(np.uint8)
    lesion = np.zeros(64, np.uint8)
    lesion[draw.permutation(np.flatnonzero(patches.ravel() == 1))[:2]] = 1

    def enlarge(a):
        return np.kron(a.reshape(4, 4, 4), np.ones(CONFIG.patch, np.uint8))

    hu = hu.round()
    hu[0, 0, 0] = -1000 + i
    finding = {"kind": "lung nodule", "region": 1, "mask_id": 1, "text": "The lesion."}
    return {
        "hu": hu.astype(np.int16),
        "labels": enlarge(patches),
        "lesions": enlarge(lesion),
        "about": np.array(json.dumps({"findings": [finding]})),
    }


@pytest.fixture(scope="module")
def scans():
    hu = phantom(3, 32).volume.hu[::2]
    return [make_scan(i, hu) for i in range(SCANS)]


def case_set(scans, order=None, first=0):
    """Reports in their order, each with the scan `order` gives it; `first` moves the names, for a
    second set of patients.
    """
    order = range(SCANS) if order is None else order
    return ScanReports(
        [
            ScanCase(
                f"s{i}", f"p{first + i}", f"{first}-{i}-{k}", lambda k=k: scans[k], make_report(i)
            )
            for i, k in enumerate(order)
        ],
        CONFIG,
    )


class Oracle:
    """What a perfect network answers: it knows a scan by the number in its first voxel, and what
    was said of it.
    """

    device = torch.device("cpu")
    width = 64 + 20 + 2 * len(LABELS)
    # of the scans; wrong ones are alike by chance
    codes = F.normalize(torch.randn(SCANS, 64, generator=torch.Generator().manual_seed(0)), dim=-1)

    def __init__(self, scans, shift=0):
        self.config = SimpleNamespace(encoder=CONFIG, refine=REFINE)
        self.shift = shift
        self.labels, self.lesions = (
            torch.from_numpy(np.stack([s[key] for s in scans])) for key in ("labels", "lesions")
        )
        self.reports = [make_report(i) for i in range(len(scans))]
        self.writer = SimpleNamespace(
            tokenizer=WordTokenizer.fit(2 * [target_text(r) for r in self.reports])
        )
        self.texts = {r.impression: self.unit(scan=i) for i, r in enumerate(self.reports)}
        for i, r in enumerate(self.reports):
            self.texts |= {text: self.unit(scan=i, region=n) for n, text in r.regions}
        for k, name in enumerate(LABELS):
            for prompts in (
                (f"{name.capitalize()}.", f"No {name}."),
                (f"{name.capitalize()} is present.", f"{name.capitalize()} is not present."),
            ):
                self.texts |= {text: self.unit(sign={k: s}) for text, s in zip(prompts, (1, -1))}
            for n in label_regions(name):
                self.texts |= {
                    text: self.unit(local={k: s})
                    for text, s in zip(region_prompts(name, n), (1, -1))
                }

    def unit(self, scan=None, region=None, sign=None, local=None):
        if local is None:
            local = {}
        if sign is None:
            sign = {}
        v = torch.zeros(self.width)
        if scan is not None:
            v[:64] = self.codes[scan]
        if region is not None:
            v[64 + region - 1] = 1
        for k, s in sign.items():
            v[64 + 20 + k] = 0.5 * s
        for k, s in local.items():
            v[64 + 20 + len(LABELS) + k] = 0.5 * s
        return v

    def eval(self):
        return self

    def embed_texts(self, texts, level="global"):
        return F.normalize(torch.stack([self.texts[t] for t in texts]), dim=-1)

    def encoder(self, hu, maps):
        numbers = (hu[:, 0, 0, 0] + 1000).long()
        overlaps = patch_overlaps(maps, CONFIG.patch, 22)

        def plus(i):
            return {k: 1 if s else -1 for k, s in enumerate(signs(i))}

        whole = torch.stack([self.unit(scan=i, sign=plus(i)) for i in numbers.tolist()])
        regions = torch.stack(
            [
                torch.stack(
                    [
                        self.unit(
                            scan=i,
                            region=n,
                            local={k: s if n == k + 1 else -1 for k, s in plus(i).items()},
                        )
                        for n in range(1, 21)
                    ]
                    + [self.unit()]
                )
                for i in numbers.tolist()
            ]
        )
        return Encoding(
            numbers[:, None, None].float(),
            whole,
            regions,
            overlaps[..., 1:].sum(1) > 0,
            overlaps,
            [],
            whole,
            regions,
            numbers[:, None, None].float(),
            (4, 4, 4),
        )

    def text_attention(self, texts, seen, case):
        numbers = seen.tokens[(case + self.shift) % len(seen.tokens), 0, 0].long()
        region = {f"Looking at the {REGIONS[n][0]}.": n for n in KNOWN}
        rows = [
            patch_overlaps(
                (
                    self.lesions[i : i + 1]
                    if text == "The lesion."
                    else self.labels[i : i + 1] == region.get(text, 9)
                ).to(torch.uint8),
                CONFIG.patch,
                2,
            )[0, :, 1]
            for text, i in zip(texts, numbers.tolist())
        ]
        return torch.stack(
            [row / row.sum() if row.any() else torch.full((64,), 1 / 64) for row in rows]
        )

    def predict_regions(self, seen):
        return label_shares(
            self.labels[seen.tokens[:, 0, 0].long()], CONFIG.patch, REFINE, 21
        ).argmax(1)

    def write(self, seen):
        return [
            self.writer.tokenizer.decode(self.writer.tokenizer.encode(target_text(self.reports[i])))
            for i in seen.tokens[:, 0, 0].long().tolist()
        ]


def test_of_an_oracle_every_figure_is_perfect(scans):
    data = case_set(scans)
    found = evaluate_language(
        Oracle(scans), data, case_set(scans, first=100), "no lung nodule.", writes=SCANS
    )
    m = found.metrics
    assert m["cases"] == m["patients"] == SCANS and set(found.recalls) == {
        "impression",
        "abnormal",
        "regions",
        "impression, no map",
        "abnormal, no map",
    }
    for name, recalls in found.recalls.items():
        assert recalls and all(
            r.recall.mean == 1
            and r.candidates == r.queries == r.recall.patients == SCANS
            and r.chance == pytest.approx(r.k / SCANS)
            for r in recalls
        ), name
    for name in ("sentence_place", "sentence_patient"):
        assert (
            m[name]["share"]["mean"] == 1
            and m[name]["questions"] == 5 * SCANS
            and m[name]["share"]["patients"] == SCANS
        )
    assert (
        m["sentence_place"]["chance"] == pytest.approx(1 / 5)
        and m["sentence_patient"]["chance"] == pytest.approx(1 / SCANS)
        and m["confused"] == []
    )
    for name in (
        "zero_shot",
        "zero_shot_usual",
        "zero_shot_places",
        "probe",
        "zero_shot_without_map",
    ):
        assert m[name]["macro"].mean == 1 and m[name]["judged"] == 2, name
    for name in ("polarity", "polarity_scan", "polarity_scan_without_map"):
        assert m[name]["present"] == m[name]["absent"] == 1, name
    for name in ("steps", "steps_without_map"):
        assert (
            m[name]["correlation"]["mean"] == pytest.approx(1, abs=1e-6)
            and m[name]["inside"]["mean"] == pytest.approx(1, abs=1e-6)
            and m[name]["steps"] == 3 * SCANS
            and m[name]["correlation"]["patients"] == SCANS
        )
        assert m[name]["elsewhere"]["mean"] < 0  # regions of one scan exclude each other
    for name in ("with map", "without map"):
        lesions = found.lesions[name]
        assert (
            lesions.lesions == SCANS
            and all(
                lesions.scores["attention"][figure].mean == 1
                for figure in ("dice", "iou", "voxel_dice", "hit")
            )
            and lesions.gain["region"].low > 0
            and lesions.gain["random"].patients == SCANS
        )
    assert m["map"]["mean"] == 1 and len(m["map"]["regions"]) == 5
    written = m["writing"]["the model"]
    assert (
        all(written[name] == pytest.approx(1) for name in ("bleu_1", "bleu_4", "rouge_l", "crg"))
        and m["writing"]["another scan"]["bleu_4"] < 1
        and len(written["examples"]) == 6
    )
    assert m["preprocessing"]["right"]["refused"] == 0 and all(
        row["refused"] == row["of"] for name, row in m["preprocessing"].items() if name != "right"
    )
    assert not any("not significant" in line or "below" in line for line in found.verdict())


def test_on_exchanged_scans_the_oracle_is_at_chance(scans):
    """The same answers, but each report has another scan: whatever is about the scan falls to its
    floor, and only what the report itself names stays.
    """
    order = np.random.default_rng(7).permutation(SCANS)
    found = evaluate_language(
        Oracle(scans), case_set(scans, order), case_set(scans, first=100), writes=SCANS
    )
    m = found.metrics
    for name, recalls in found.recalls.items():
        for r in recalls:
            assert r.recall.low <= r.chance <= r.recall.high, f"{name}: {r}"
    assert (
        m["sentence_place"]["share"]["mean"] == 1
        and m["sentence_patient"]["share"]["low"]
        <= m["sentence_patient"]["chance"]
        <= m["sentence_patient"]["share"]["high"] + 0.01
    )
    for name in ("zero_shot", "zero_shot_usual", "zero_shot_places", "probe"):
        assert m[name]["macro"].low <= 0.5 <= m[name]["macro"].high, name
    # that nothing is in the right lung every report says, whoever's
    assert (
        m["polarity_scan"]["balanced"]["low"] <= 0.5 <= m["polarity_scan"]["balanced"]["high"]
        and 0.2 < m["polarity"]["present"] < 0.8
    )
    assert (
        m["writing"]["the model"]["bleu_4"] < 0.95
        and abs(m["writing"]["the model"]["crg"] - m["writing"]["another scan"]["crg"]) < 0.35
    )


def test_scrambled_case_numbers_are_seen(scans, monkeypatch):
    """Attention taken from the next scan of the batch, or scans named wrongly afterwards: both must
    show.
    """
    data = case_set(scans)
    wrong = encode_scans(Oracle(scans, shift=1), data)
    m, _ = language_scores.embedding_metrics(
        Oracle(scans), wrong, [make_report(i) for i in range(SCANS)], data.patients
    )
    assert abs(m["steps"]["correlation"]["mean"]) < 0.15
    right = encode_scans(Oracle(scans), data, writes=20)
    assert (
        torch.equal(right.step_case, torch.arange(SCANS).repeat_interleave(4))
        and torch.equal(right.lesion_case, torch.arange(SCANS))
        and torch.equal(right.scan_features[:, :64], Oracle.codes)
        and right.generated
        == Oracle(scans).write(SimpleNamespace(tokens=torch.arange(20.0)[:, None, None]))
    )
    rolled = right.__class__(
        **{
            **vars(right),
            "region_embeddings": right.region_embeddings.roll(1, 0),
            "scan_embeddings": right.scan_embeddings.roll(1, 0),
        }
    )
    m, recalls = language_scores.embedding_metrics(
        Oracle(scans), rolled, [make_report(i) for i in range(SCANS)], data.patients
    )
    assert (
        m["sentence_patient"]["share"]["mean"] == 0
        and all(r.recall.mean == 0 for found in recalls.values() for r in found if r.k == 1)
        and m["polarity"]["present"] < 0.7
    )


def test_labels_are_those_of_all_reports(scans):
    "Labels that only later reports carry are asked for too."
    reports = [
        RadiologyReport(
            f"s{i}",
            make_report(i).impression,
            make_report(i).regions,
            labels=(
                {}
                if i == 0
                else {LABELS[i % 2]: True, "rare": False} if i == 1 else dict(zip(LABELS, signs(i)))
            ),
        )
        for i in range(SCANS)
    ]
    assert label_names(reports) == [LABELS[1], "rare", LABELS[0]]
    oracle = Oracle(scans)
    for text in ("Rare.", "No rare.", "Rare is present.", "Rare is not present."):
        oracle.texts[text] = torch.ones(oracle.width)
    data = case_set(scans)
    data.cases = [
        ScanCase(c.id, c.patient, c.digest, c.load, r) for c, r in zip(data.cases, reports)
    ]
    m = evaluate_language(oracle, data, case_set(scans, first=100)).metrics
    assert (
        set(m["zero_shot"]["labels"]) == {*LABELS, "rare"}
        and m["zero_shot"]["judged"] == 2
        and "probe" in m
        and "polarity" in m
    )
