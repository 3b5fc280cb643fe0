"""Reports and their readers: regions, findings, negation, layouts, and damaged files."""

import csv
import json
import re
from dataclasses import asdict

import pytest
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.ct_encoder import reports as vocabulary
from ct_nb.ct_encoder.report_readers import (
    conversations,
    ct_rate_labels,
    ct_rate_reports,
    is_conversations,
    make_step,
    omniabnorm_reports,
    phantom_report,
    radgenome_reports,
    plain_name,
    read_records,
    split_steps,
    tidy_text,
)
from ct_nb.ct_encoder.report_variety import planned_reports
from ct_nb.ct_encoder.reports import (
    CT_RATE_LABELS,
    FINDINGS,
    RadiologyReport,
    clauses,
    find_mentions,
    finding_states,
    is_normal,
    region_texts,
)
from ct_nb.phantom.chest import phantom

PAGE = {  # a clause of free text: (region, negated) of each mention
    "Trachea and both main bronchi are open.": {(6, False)},
    "No occlusive pathology was observed in the trachea and both main bronchi.": {(6, True)},
    "The mediastinum could not be evaluated optimally in the non-contrast examination.": set(),
    "Calibration of mediastinal major vascular structures is natural.": {(10, False)},
    "Calcific atheroma plaques are observed in the aortic arch and coronary arteries.": {
        (8, False),
        (7, False),
    },
    "Pericardial effusion-thickening was not observed.": {(7, True)},
    "Sliding type hiatal hernia is observed at the lower end of the esophagus.": {(11, False)},
    "No lymphadenopathy was detected in the mediastinum and both axillae.": {
        (10, True),
        (15, True),
    },
    "A 4 mm nodule is observed in the posterobasal segment of the right lung lower lobe.": {
        (5, False)
    },
    "Linear atelectasis was observed in the lingular segment of the left lung and in the middle lobe of the right lung.": {
        (1, False),
        (4, False),
    },
    "No mass lesion was detected in both lungs.": {(n, True) for n in range(1, 6)},
    "There is no pleural effusion, but pleural thickening is seen on the left.": {
        (2, True),
        (5, True),
        (2, False),
    },
    "No lytic-destructive lesions were detected in bone structures.": {
        (13, True),
        (14, True),
        (15, True),
    },
    "Mild scoliosis without fracture.": {(13, False)},
    "The nodule in the left upper lobe has not changed.": {(1, False)},
    "Pleural effusion on the right cannot be excluded.": {(5, False)},
    "Liver, gall bladder and spleen are natural.": {(16, False), (17, False)},
    "Pulmonary trunk calibration is 31 mm.": {(9, False)},
}


@pytest.mark.parametrize("text", PAGE)
def test_free_text(text):
    assert {(m.region, m.negated) for m in find_mentions(text)} == PAGE[text]


def test_page_fails_without_negation_or_order_of_the_table(monkeypatch):
    def score():
        return sum(
            {(m.region, m.negated) for m in find_mentions(text)} == wanted
            for text, wanted in PAGE.items()
        )

    assert score() == len(PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "is_denial", lambda clause: False)
        assert score() <= len(PAGE) - 6
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "_PLACES", vocabulary._PLACES[::-1])
        assert score() < len(PAGE)


@pytest.mark.parametrize(
    "clause, wanted",
    [
        ("No change in the pleural effusion", {"pleural effusion": True}),
        ("Emphysema without bulla", {"emphysema": True, "bulla": False}),
        ("Neither consolidation nor mass", {"consolidation": False, "mass": False}),
        (
            "Nodule, consolidation and mass are absent",
            {"lung nodule": False, "consolidation": False, "mass": False},
        ),
        ("Cardiomegaly is ruled out", {"cardiomegaly": False}),
        ("Fracture cannot be ruled out", {"fracture": True}),
        ("No contrast was given, aneurysm of the aorta", {"aneurysm": True}),
    ],
)
def test_findings_are_asserted_or_denied(clause, wanted):
    assert finding_states(clause) == wanted


def test_phantom_sentences_find_their_region_and_polarity():
    "Every clause that names its region; below a heading the region is named once."
    wrong = []
    total = 0
    for report in planned_reports(40):
        for number, text in report.regions:
            for clause in clauses(text):
                mine = [m.negated for m in find_mentions(clause) if m.region == number]
                denies = re.search(r"\b(no|not|without|neither|(free|clear) of)\b", clause, re.I)
                total += bool(mine)
                if mine and mine[0] != bool(denies):
                    wrong.append(clause)
    assert wrong == [] and total > 800


def test_normal_is_conservative():
    assert (
        not is_normal("")
        and not is_normal("Findings as described.")
        and not is_normal("No nodule. Mild emphysema.")
        and is_normal("Heart is natural. No effusion was observed.")
    )


def test_labels_and_regions():
    assert tuple(FINDINGS)[:18] == tuple(label.lower() for label in CT_RATE_LABELS)
    assert region_texts("Normal spleen. No liver cyst. The liver is normal.") == (
        (16, "No liver cyst. The liver is normal."),
        (17, "Normal spleen."),
    )
    with refused("regions"):
        RadiologyReport("v", regions=((0, "x"),))
    with refused("volume"):
        RadiologyReport("")


# CT-RATE

REPORT_COLUMNS = (
    "VolumeName",
    "ClinicalInformation_EN",
    "Technique_EN",
    "Findings_EN",
    "Impressions_EN",
)


def write(path, header, *rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as f:
        csv.writer(f).writerows([header, *rows])
    return path


def ct_rate(folder):
    return write(
        folder / "train_reports.csv",
        REPORT_COLUMNS,
        ("train_1_a_1.nii.gz", "Not given.", "Thorax CT", "Not given.", "Not given."),
        (
            "train_1_a_2.nii.gz",
            "Cough",
            "Thorax CT",
            "The heart is enlarged,\nno pericardial effusion.",
            "Cardiomegaly.",
        ),
        ("train_20_b_1.nii.gz", "Cough", "Thorax CT", "Right pleural effusion.", "Not Given."),
        encoding="utf-8-sig",
    )


def test_ct_rate_layout(tmp_path):
    labels = write(
        tmp_path / "train_predicted_labels.csv",
        ("VolumeName", *CT_RATE_LABELS),
        *[
            (v, *[int(n == k) for n in range(18)])
            for v, k in (
                ("train_1_a_1.nii.gz", 5),
                ("train_1_a_2.nii.gz", 2),
                ("train_20_b_1.nii.gz", 12),
            )
        ],
    )
    vqa = tmp_path / "train_vqa.json"
    vqa.write_text(
        json.dumps(
            [
                {
                    "id": "0",
                    "image": "train_1_a_2.nii.gz",
                    "conversations": [
                        {
                            "from": "human",
                            "value": "<image>\nIs the heart large?<short_answer>",
                            "type": "short_answer",
                        },
                        {"from": "gpt", "value": "Yes."},
                    ],
                },
                {
                    "id": "1",
                    "image": "train_1_a_2.nii.gz",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWrite the report.<report_generation>"},
                        {"from": "gpt", "value": "All of it."},
                    ],
                },
                {
                    "id": "2",
                    "conversations": [
                        {"from": "human", "value": "What is CT?"},
                        {"from": "gpt", "value": "A scanner."},
                    ],
                },
            ]
        )
    )
    cot = tmp_path / "cot.jsonl"
    cot.write_text(
        "\n".join(
            json.dumps(r)
            for r in (
                {
                    "volumename": "train_1_a_2.nii.gz",
                    "question": "?",
                    "answer": "1. The heart is wide.\n2. So it is enlarged.",
                },
                {
                    "image": "dataset/train/train_20_b_1.nii.gz",
                    "question": "?",
                    "answer": "Effusion.",
                    "thinking": (
                        "<think>Fluid lies in the right pleural space. The liver is normal.</think>"
                    ),
                },
            )
        )
    )
    first, second, third = ct_rate_reports(ct_rate(tmp_path), labels, vqa, cot)
    assert (first.impression, first.findings, first.regions, first.steps) == ("", "", (), ())
    assert (
        first.scan == second.scan == "train_1_a"
        and first.patient == second.patient == "train_1" != third.patient
    )
    assert [s for s, on in second.labels.items() if on] == [
        "Cardiomegaly"
    ] and second.questions == (("Is the heart large?", "Yes."),)
    assert [(s.text, s.regions) for s in second.steps] == [
        ("The heart is wide.", (7,)),
        ("So it is enlarged.", ()),
    ]
    assert (
        third.impression == ""
        and [s.regions for s in third.steps] == [(5,), (16,)]
        and dict(third.regions) == {5: "Right pleural effusion."}
    )


def test_questions_are_told_from_reasoning(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "q.json").write_text(
            json.dumps([{"id": "0", "image": "x", "conversations": []}]), encoding
        )
        assert is_conversations(tmp_path / "q.json")
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "x", "thinking": "a"}))
    assert not is_conversations(tmp_path / "r.jsonl")
    with refused(file="none.json", kind=FileError):
        is_conversations(tmp_path / "none.json")


def test_damaged_files_are_named(tmp_path):
    with refused(file="r.csv", kind=FileError):
        ct_rate_reports(
            write(tmp_path / "r.csv", ("VolumeName", "Findings_EN"), ("train_1_a_1.nii.gz", "x"))
        )
    with refused(file="l.csv", kind=FileError):
        ct_rate_reports(
            ct_rate(tmp_path),
            write(
                tmp_path / "l.csv",
                ("VolumeName", *[l for l in CT_RATE_LABELS if l != "Hiatal hernia"]),
            ),
        )
    with refused(file="d.csv", kind=FileError):
        ct_rate_reports(
            write(
                tmp_path / "d.csv", REPORT_COLUMNS, *[("train_1_a_1.nii.gz", "", "", "x", "y")] * 2
            )
        )
    with refused(file="none.csv", kind=FileError):
        radgenome_reports(tmp_path / "none.csv")

    with refused(file="n.csv", kind=FileError):
        ct_rate_reports(write(tmp_path / "n.csv", REPORT_COLUMNS, ("scan7", "", "", "x", "y")))

    def omni(*records):
        return omniabnorm_reports(
            (tmp_path / "o.json", (tmp_path / "o.json").write_text(json.dumps(records)))[0]
        )

    good = {"case_id": "a", "cot_reasoning": [{"text": "One."}]}
    for part in ({"step": 2}, {"text": ""}, {"text": None}, "two"):
        with refused(file="o.json", kind=FileError):
            omni(good, {"case_id": "b", "cot_reasoning": [{"text": "One."}, part]})
    with refused(file="o.json", kind=FileError):
        omni({"image_id": "b", "findings": [{"present": True}], "summary": "x"})
    assert (
        omni(
            good,
            {"case_id": "b", "cot_reasoning": None},
            {"image_id": "c", "findings": None, "summary": "Well."},
        )[2].impression
        == "Well."
    )
    (tmp_path / "bad.json").write_text("[{,]")
    with refused(file="bad.json", kind=FileError):
        omniabnorm_reports(tmp_path / "bad.json")
    (tmp_path / "odd.json").write_text('[{"name": 1}]')
    with refused(file="odd.json", kind=FileError):
        omniabnorm_reports(tmp_path / "odd.json")
    with refused(file="e.csv", kind=FileError):
        radgenome_reports(write(tmp_path / "e.csv", ()))


# the others


def test_omniabnorm_joins_the_entries_of_a_case(tmp_path):
    def step(n, text, named, mask):
        return {
            "step": n,
            "text": text,
            "anatomical_entities": named,
            "mask_region": mask,
        }

    def case(category, steps):
        return {
            "case_id": "973_1_0_177",
            "image_path": "i.jpg",
            "mask_path": "m.jpg",
            "region": "left kidney",
            "category": category,
            "cot_reasoning": steps,
        }

    (tmp_path / "o.json").write_text(
        json.dumps(
            [
                case(
                    "Cyst",
                    [
                        step(1, "It is dark.", ["left kidney"], "left kidney"),
                        step(2, "Nothing in the liver.", [], None),
                    ],
                ),
                case("Stone", [step(1, "It is bright.", ["ureter"], None)]),
            ]
        )
    )
    (report,) = omniabnorm_reports(tmp_path / "o.json")
    assert (
        report.impression == "Cyst in the left kidney. Stone in the left kidney."
        and report.labels == {"Cyst": True, "Stone": True}
    )
    assert [(s.entities, s.regions) for s in report.steps] == [
        (("left kidney",), (18,)),
        (("liver",), (16,)),
        (("ureter",), ()),
    ]


def test_radgenome(tmp_path):
    def table(*rows):
        return write(tmp_path / "v.csv", ("Volumename", "Anatomy", "Sentence"), *rows)

    (report,) = radgenome_reports(
        table(
            ("valid_1_a_1.nii.gz", "lung", "Nodule in the left lower lobe."),
            ("valid_1_a_1.nii.gz", "abdomen", "Sections are natural."),
            ("valid_1_a_1.nii.gz", "nan", "One nodule."),
        )
    )
    assert (
        [n for n, _ in report.regions] == [2, 16, 17, 18, 19]
        and report.impression == "One nodule."
        and report.patient == "valid_1"
    )
    for row in (("valid_1_a_1.nii.gz", "tail", "x"), ("scan7", "lung", "x")):
        with refused(file="v.csv", kind=FileError) as error:
            radgenome_reports(table(("valid_1_a_1.nii.gz", "lung", "One."), row))
        assert error.value.reason.startswith("line 3")


def test_phantom_record_is_the_same_from_object_dict_and_json():
    report = phantom(5, 16).report
    record = phantom_report(report, "p")
    assert (
        record
        == phantom_report(asdict(report), "p")
        == phantom_report(json.loads(json.dumps(asdict(report))), "p")
    )
    assert not any("field of view" in text for _, text in record.regions) and len(
        record.steps
    ) == len(report.cot_steps)
    assert dict(record.regions)[13].startswith(report.findings[13][:10]) and all(
        s.regions == tuple(r) for s, r in zip(record.steps, report.step_regions)
    )


def test_steps_and_blanks(tmp_path):
    assert [s.text for s in split_steps("Step 1: Look. Step 2: Think.")] == [
        "Look.",
        "Think.",
    ] and [s.text for s in split_steps("One thing. Another 2.5 mm.")] == [
        "One thing.",
        "Another 2.5 mm.",
    ]
    assert (
        make_step("x", (), "").regions == ()
        and tidy_text("NaN") == tidy_text("Not given.") == ""
        and tidy_text("None seen") == "None seen"
    )
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [r.fields["a"] for r in read_records(tmp_path / "a.jsonl", ("a",))] == [1, 2]


# as they are in the wild: from Excel, pandas, datasets and language models

COLUMNS = ("VolumeName", "Findings_EN", "Impressions_EN")
VOLUME = "valid_1_a_1.nii.gz"


def test_a_line_break_in_a_cell_ends_a_clause(tmp_path):
    text = "No pleural effusion\r\nNodule in the left lower lobe\u2028No pneumothorax"
    (report,) = ct_rate_reports(write(tmp_path / "r.csv", COLUMNS, (VOLUME, text, "Nodule")))
    assert report.findings.split("\n") == [
        "No pleural effusion",
        "Nodule in the left lower lobe",
        "No pneumothorax",
    ]
    assert finding_states(clauses(report.findings)[1]) == {"lung nodule": True}
    (tmp_path / "o.json").write_text(
        json.dumps([{"volumename": "c1", "question": "q", "answer": text}])
    )
    (case,) = omniabnorm_reports(tmp_path / "o.json")
    assert dict(case.regions)[2] == dict(report.regions)[2] and len(case.steps) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_a_table_of_any_program(tmp_path, encoding, delimiter, end):
    with open(tmp_path / "r.csv", "w", newline="", encoding=encoding) as file:
        rows = csv.writer(file, delimiter=delimiter, lineterminator=end)
        # pandas writes the numbers of rows, twice where it is asked twice
        rows.writerow(("", "Unnamed: 0", " VolumeName", "Findings_EN ", "Impressions_EN"))
        rows.writerow((0, 0, VOLUME, "Nodule, 5 mm;\nno effusion\tor mass", "Akci\u011fer"))
    (report,) = ct_rate_reports(tmp_path / "r.csv")
    assert (report.volume, report.findings, report.impression) == (
        VOLUME,
        "Nodule, 5 mm;\nno effusion or mass",
        "Akci\u011fer",
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (f"{VOLUME},Nodule, 5 mm,Nodule\n", "line 2 has 4 cells"),
        (f'{VOLUME},"unclosed,b\nvalid_2_a_1.nii.gz,a,b\n', "line 2 has a quote"),
        (f"{VOLUME}\n", "line 2 has 1 cells"),
        (f"{VOLUME},a,b\nvalid_2_a_1.nii.gz,a,b\n{VOLUME},no a,b\n", "lines 2 and 4"),
        (f"{VOLUME},Akci\u011fer,b\n".encode("cp1254"), "line 2"),
        (f"{VOLUME},a\0b,c\n", "NUL"),
        (f"../../{VOLUME},a,b\n", "line 2"),
        (f"/data/{VOLUME},a,b\n", "line 2"),
        (f"C:\\data\\{VOLUME},a,b\n", "line 2"),
        (",a,b\n", "line 2"),
    ],
)
def test_a_row_that_cannot_be_right_is_named(tmp_path, content, words):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "r.csv").write_bytes(",".join(COLUMNS).encode() + b"\n" + content)
    with refused(file="r.csv", kind=FileError) as error:
        ct_rate_reports(tmp_path / "r.csv")
    assert words in error.value.reason


def test_empty_cells_and_long_cells(tmp_path):
    rows = [(VOLUME, "", ""), ("valid_2_a_1.nii.gz", "Not given.", "nan")]
    rows += [("valid_3_a_1.nii.gz", "a" * 1_000_000, "b")]
    reports = ct_rate_reports(write(tmp_path / "e.csv", COLUMNS, *rows))
    assert [len(report.findings) for report in reports] == [0, 0, 1_000_000]


def test_labels_of_a_row_that_is_damaged_are_left_out_with_a_warning(tmp_path):
    table = write(
        tmp_path / "l.csv",
        ("VolumeName", *CT_RATE_LABELS),
        (VOLUME, *["True"] * 9, *["0.0"] * 9),
        *[(f"valid_{n}_a_1", *["1"] * 17, cell) for n, cell in enumerate(("", "nan", "2"), 2)],
    )
    with pytest.warns(UserWarning, match="3 rows are left out.*l.csv: line 3, valid_2_a_1"):
        labels = ct_rate_labels(table)
    assert list(labels) == [VOLUME] and sum(labels[VOLUME].values()) == 9
    both = [(VOLUME, *[state] * 18) for state in "01"]
    with refused(file="l.csv", kind=FileError):
        ct_rate_labels(write(tmp_path / "l.csv", ("VolumeName", *CT_RATE_LABELS), *both))


@pytest.mark.parametrize(
    "turns",
    [
        [None, None],
        "text",
        5,
        [["human", "q"]],
        [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}],
        [{"from": ["human"], "value": "q"}],
    ],
)
def test_questions_of_another_type_are_refused_with_their_record(tmp_path, turns):
    good = {"image": VOLUME, "conversations": []}
    (tmp_path / "q.json").write_text(json.dumps([good, {"image": VOLUME, "conversations": turns}]))
    with refused(file="q.json", kind=FileError) as error:
        conversations(tmp_path / "q.json")
    assert error.value.reason.startswith("record 1")


def test_a_question_without_an_answer_is_left_out(tmp_path):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": None},
        {"from": "human", "value": "Any fluid?"},
        {"from": "gpt", "value": "None."},
    ]
    (tmp_path / "q.json").write_text(json.dumps([{"image": VOLUME, "conversations": turns}]))
    assert conversations(tmp_path / "q.json") == {VOLUME: [("Any fluid?", "None.")]}


@pytest.mark.parametrize(
    "record",
    [
        {"case_id": "c", "cot_reasoning": {"text": ["a", "b"], "step": [1, 2]}},
        {"case_id": "c", "cot_reasoning": [{"text": 1}]},
        {"case_id": "c", "cot_reasoning": [{"text": "a", "anatomical_entities": "liver"}]},
        {"case_id": "c", "cot_reasoning": [], "category": ["Cyst"]},
        {"case_id": ["c"], "cot_reasoning": []},
        {"case_id": None, "cot_reasoning": []},
        {"case_id": "../c", "cot_reasoning": []},
        {"image_id": "i", "findings": [{"disease": "Cyst", "present": "false"}]},
        {"image_id": "i", "findings": [{"disease": "Cyst", "present": None}]},
        {"image_id": "i", "findings": [], "reasoning": [1]},
        {"image_id": "/tmp/i", "findings": []},
        {"volumename": "v", "question": 1, "answer": "a"},
        {"rows": []},
        [],
        None,
    ],
)
def test_records_of_another_type_are_refused_with_their_place(tmp_path, record):
    with open(tmp_path / "o.jsonl", "w", newline="") as file:
        file.write(json.dumps({"case_id": 7, "cot_reasoning": None}) + "\r\n" + json.dumps(record))
    with refused(file="o.jsonl", kind=FileError) as error:
        omniabnorm_reports(tmp_path / "o.jsonl")
    assert error.value.reason.startswith("record 1")


def test_lines_of_json_end_at_line_feeds(tmp_path):
    step = {"text": "line one\u2028line\u0085two"}
    lines = [json.dumps({"case_id": c, "cot_reasoning": [step]}, ensure_ascii=False) for c in "ab"]
    (tmp_path / "o.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [report.volume for report in omniabnorm_reports(tmp_path / "o.jsonl")] == ["a", "b"]
    one = json.dumps({"case_id": "a", "cot_reasoning": [step]}, indent=1)
    (tmp_path / "one.json").write_text(one)
    assert [report.volume for report in omniabnorm_reports(tmp_path / "one.json")] == ["a"]
    (tmp_path / "o.jsonl").write_text(lines[0] + "\n\n{,}\n", encoding="utf-8")
    with refused(file="o.jsonl", kind=FileError) as error:
        omniabnorm_reports(tmp_path / "o.jsonl")
    assert "line 3" in error.value.reason
    (tmp_path / "o.jsonl").write_bytes(
        lines[0].replace("line", "n\xf6dule").encode("latin-1", "replace")
    )
    with refused(file="o.jsonl", kind=FileError):
        omniabnorm_reports(tmp_path / "o.jsonl")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/a", "a\\b", "C:a", "a\nb", "../a"])
def test_a_name_is_no_path(name):
    with refused("volume"):
        plain_name(name)
