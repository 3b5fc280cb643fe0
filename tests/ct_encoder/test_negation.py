"""Which findings a sentence denies: kinds of sentences, the error on two lists, and odd texts."""

import time

import pytest

from ct_nb.ct_encoder.contrastive import equivalence_keys, is_positive_pair
from ct_nb.ct_encoder.negation import denied_spans, find_cues, sentences, statements
from ct_nb.ct_encoder.negation_sentences import (
    FIRST_SENTENCES,
    SECOND_SENTENCES,
    HardSentence,
    reading_errors,
    text_states,
)
from ct_nb.ct_encoder.reports import FINDINGS, clauses, is_denial, is_normal, region_texts

KINDS = """
growth
No short-interval change of the nodule. | lung nodule
No new growth of the nodule. | lung nodule
No change was observed in the number and size of the nodules. | lung nodule
No increase or decrease in the pleural effusion. | pleural effusion
No significant interval change of the mass, and no nodule. | mass, no lung nodule
No pathological thickness increase was observed. | no other thickening
resolution
Pleural effusion has completely resolved. | no pleural effusion
The consolidations have regressed completely. | no consolidation
Consolidation regressed. | consolidation
No longer seen is the pleural effusion. | no pleural effusion
The catheter has been removed. | no medical material
Atelectasis has partially resolved. | atelectasis
The effusion is almost completely resolved. | other effusion
Clearing of the opacities with residual consolidation. | no lung opacity, consolidation
headers
Effusion: None seen. | no other effusion
Pneumothorax: not present. | no pneumothorax
Pneumothorax = no | no pneumothorax
Pleural effusion (absent) | no pleural effusion
Consolidation: no; atelectasis: yes | no consolidation, atelectasis
Effusion (none), nodule (5 mm) | no other effusion, lung nodule
statements
No mass but nodules are seen. | no mass, lung nodule
No pneumothorax and a small effusion. | no pneumothorax, other effusion
No pneumothorax, small effusion. | no pneumothorax, other effusion
No effusion: there is emphysema. | no other effusion, emphysema
No effusion – mild emphysema. | no other effusion, emphysema
Pneumothorax is not seen, a nodule is. | no pneumothorax, lung nodule
Neither lung shows consolidation. | no consolidation
No lobe contains a nodule. | no lung nodule
Mass, nodule, or infiltration not detected. | no mass, no lung nodule, no lung opacity
Nodules were observed, mass was not detected. | lung nodule, no mass
doubt
A mass cannot be ruled out with certainty. | mass
Embolism was ruled out. | no embolism
There is no doubt about the presence of a mass. | mass
Mass is improbable. | no mass
Questionable nodule. | lung nodule
qualities
Non-calcified nodule. | lung nodule, no other calcification
The nodule contains no calcification. | lung nodule, no other calcification
Mass not invading the chest wall. | mass
comparison
Nodule not seen in 2019. | lung nodule
Pleural effusion is not seen as before. | no pleural effusion
In contrast to the prior CT, no effusion is seen. | no other effusion
The effusion, absent on the previous CT, is new. | other effusion
exceptions
No nodule but for a 3 mm one in the left lobe. | lung nodule
Apart from mild emphysema, no abnormality is seen. | emphysema, no other lesion
No nodules other than the one described. | lung nodule
protocol
No contrast medium was given; a mass is seen. | mass
No comparison is available, a nodule is seen. | lung nodule
"""


@pytest.mark.parametrize("row", [row for row in KINDS.splitlines() if "|" in row])
def test_kinds_of_sentences(row):
    text, truth = row.split(" | ")
    wanted = {f.removeprefix("no "): not f.startswith("no ") for f in truth.split(", ")}
    assert set(wanted) <= set(FINDINGS)
    found = text_states(text)
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("sentences", (FIRST_SENTENCES, SECOND_SENTENCES), ids=("first", "second"))
def test_error_on_both_lists(sentences):
    wrong = [s.text for s in sentences if reading_errors(s)]
    assert len(wrong) <= 0.05 * len(sentences), wrong
    assert all(set(s.states) <= set(FINDINGS) for s in sentences)


def test_errors_are_seen():
    sentence = HardSentence("", "No nodule.", {"lung nodule": True, "mass": False}, False, (1,))
    assert reading_errors(sentence) == {
        "lung nodule": (True, False),
        "mass": (False, None),
        "normal": (False, True),
        "regions": ((1,), ()),
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("No effusion\nNodule", ["No effusion", "Nodule"]),
        ("No effusion\r\n\r\n  Nodule  ", ["No effusion", "Nodule"]),
        ("No effusion\u2028Nodule\x85Mass", ["No effusion", "Nodule", "Mass"]),
        ("- No effusion\n• Nodule\n(3) Mass\n4. Cyst", ["No effusion", "Nodule", "Mass", "Cyst"]),
        ("Neg. for mass. Nodule of 2.5 mm.", ["Neg. for mass.", "Nodule of 2.5 mm."]),
        ("No evidence of\npleural effusion\nMass", ["No evidence of pleural effusion", "Mass"]),
        ("Effusion: no\nnodule: yes", ["Effusion: no", "nodule: yes"]),
        (" \n12.\n", []),
        ("", []),
    ],
)
def test_lines_are_sentences(text, expected):
    assert sentences(text) == expected


def test_cues_and_statements_lie_in_their_text():
    for sentence in (*FIRST_SENTENCES, *SECOND_SENTENCES):
        for line in sentences(sentence.text):
            parts = statements(line)
            cues = [cue for part in parts for cue in part.cues]
            assert all(a.end <= b.start for a, b in zip(parts, parts[1:]))
            assert set(cues) <= set(find_cues(line))
            assert all(0 <= c.start < c.end <= len(line) for c in find_cues(line))
    assert statements("") == [] and find_cues("") == () and denied_spans("", []) == set()


def test_no_growth_is_no_normal_chest():
    texts = [
        "No increase in the size of the nodule in the left lower lobe.",
        "A 9 mm nodule, not present on the prior CT.",
        "Normal chest CT.",
        "No nodule.",
    ]
    assert [is_normal(t) for t in texts] == [False, False, True, True]
    keys = equivalence_keys(texts, ["the chest"] * 4)
    same = is_positive_pair(keys, keys).tolist()
    assert [row.count(True) for row in same] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "text", ["The spleen is absent.", "Gallbladder was not observed.", "Status post lobectomy."]
)
def test_a_missing_organ_is_not_normal(text):
    assert not is_normal(text)


def test_a_part_without_its_denial_goes_to_its_region():
    text = "Emphysema in the left upper lobe without pleural effusion."
    assert clauses(text) == ["Emphysema in the left upper lobe", "without pleural effusion."]
    assert [n for n, t in region_texts(text) if not is_normal(t)] == [1]
    assert clauses("No effusion, no nodule and no mass.") == ["No effusion, no nodule and no mass."]
    assert is_denial("No effusion, no nodule and no mass.")


@pytest.mark.parametrize(
    "text",
    [" " * 20000, "no " * 7000, "a, " * 7000, "not seen and " * 700, "İ no ı" * 3000, "(" * 9999],
)
def test_odd_texts_take_no_time(text):
    start = time.process_time()
    region_texts(text)
    is_normal(text)
    assert time.process_time() - start < 2
