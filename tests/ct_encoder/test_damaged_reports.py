"""Mutants of tables, JSON and indexes: read, or refused with the file's name; seeded."""

import copy
import csv
import io
import json
import random
import warnings

import numpy as np
import pytest

from ct_nb.core.errors import InputError, printable
from ct_nb.ct_encoder.ct_rate import GEOMETRY_COLUMNS, read_metadata_table
from ct_nb.ct_encoder.dataset import read_reports
from ct_nb.ct_encoder.index import WHOLE, EmbeddingIndex
from ct_nb.ct_encoder.report_readers import (
    conversations,
    ct_rate_labels,
    omniabnorm_reports,
    radgenome_reports,
)
from ct_nb.ct_encoder.reports import CT_RATE_LABELS

NAME = "valid_1_a_1.nii.gz"


def table(*rows) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


REPORTS = table(
    ("VolumeName", "Findings_EN", "Impressions_EN"),
    (NAME, 'Nodule in the "left" lung.\nNo effusion, none', "x"),
    ("valid_2_a_1.nii.gz", "a", "b"),
)
METADATA = table(
    ("VolumeName", "RescaleSlope", "RescaleIntercept", *GEOMETRY_COLUMNS),
    (NAME, "1", "-1024", "[0.7, 0.7]", "1.5", "[1, 0, 0, 0, 1, 0]", "[0, 0, 0]"),
)
LABELS = table(("VolumeName", *CT_RATE_LABELS), (NAME, *["0"] * 18))
SENTENCES = table(
    ("Volumename", "Anatomy", "Sentence"),
    (NAME, "lung", "Nodule in the left lower lobe."),
    (NAME, "", "x"),
)
QUESTIONS = [
    {
        "image": NAME,
        "conversations": [
            {"from": "human", "value": "<image>\nq"},
            {"from": "gpt", "value": "a"},
        ],
    }
]
CASES = [
    {
        "case_id": "c",
        "region": "liver",
        "category": "Cyst",
        "cot_reasoning": [
            {"text": "dark", "anatomical_entities": ["liver"], "mask_region": "liver"}
        ],
    },
    {
        "image_id": "i",
        "findings": [{"disease": "Cyst", "present": True, "location": "liver"}],
        "reasoning": "a. B",
        "summary": "s",
    },
    {"volumename": "v", "question": "q", "answer": "a"},
]
VALUES = [None, 1, -1.5, True, "", "a/b", "\x1b[2J", [], {}, [None], [1], {"a": 1}, 10**400]
PIECES = [
    b'"',
    b",",
    b"\n",
    b"\r",
    b";",
    b"\0",
    b"\xff",
    b"\xe2\x80\xa8",
    b"[",
    b"{",
    b"../",
    b'""',
]


def places(value, path=()):
    "The paths of all values inside a JSON value, and its own."
    yield path
    items = ()
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from places(inner, (*path, key))


def other_value(value, chance: random.Random) -> bytes:
    "JSON or JSON lines with one value inside replaced or removed."
    path = chance.choice(list(places(value)))
    new = copy.deepcopy(value)
    if not path:
        return json.dumps(chance.choice(VALUES)).encode()
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if chance.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = chance.choice(VALUES)
    if chance.random() < 0.5:
        return json.dumps(new).encode()
    return "\n".join(json.dumps(one) for one in new).encode()


def mutant(content: bytes, chance: random.Random) -> bytes:
    "The content with a few bytes flipped, put in, taken out, cut off, or in another encoding."
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(content) + 1)
        kind = chance.randrange(5)
        if kind == 0 and content:
            content[place % len(content)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place:place] = chance.choice(PIECES)
        elif kind == 2:
            del content[place : place + chance.randrange(1, 20)]
        elif kind == 3:
            del content[place:]
        else:
            text = content.decode("utf-8", "replace")
            encoding = chance.choice(("utf-16", "latin-1", "cp1254", "utf-8-sig", "utf-32"))
            content = bytearray(text.encode(encoding, "replace"))
    return bytes(content)


def index_bytes(folder) -> bytes:
    names = list("abcd")
    vectors = np.eye(4, dtype=np.float32)
    EmbeddingIndex(names, names, [WHOLE] * 4, vectors, "/w", "0").save(folder / "good.parquet")
    return (folder / "good.parquet").read_bytes()


@pytest.mark.parametrize(
    "file, good, read",
    [
        ("reports.csv", REPORTS, read_reports),
        ("metadata.csv", METADATA, read_metadata_table),
        ("labels.csv", LABELS, ct_rate_labels),
        ("sentences.csv", SENTENCES, radgenome_reports),
        ("questions.json", QUESTIONS, conversations),
        ("cases.jsonl", CASES, omniabnorm_reports),
        ("index.parquet", None, EmbeddingIndex.load),
    ],
)
def test_a_mutant_is_read_or_refused_with_its_file(tmp_path, file, good, read):
    chance = random.Random(file)
    good = index_bytes(tmp_path) if good is None else good
    refused = 0
    for _ in range(150):
        content = good
        if isinstance(good, list):
            content = other_value(good, chance)
        if content is good or chance.random() < 0.3:
            content = mutant(content, chance)
        (tmp_path / file).write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(tmp_path / file)
        except InputError as error:
            refused += 1
            assert str(error.file).endswith(file), (error, content)
            assert printable(error) == str(error), (error, content)
    assert 20 < refused < 150
