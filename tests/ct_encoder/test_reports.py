"""Reports and their readers: regions, findings, negation, layouts, and damaged files."""

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
from ct_files import write_stored
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.ct_encoder import reports as vocabulary
from ct_nb.ct_encoder.report_readers import (
    ct_rate_hu,
    ct_rate_name,
    ct_rate_path,
    ct_rate_reports,
    ct_rate_rescale,
    ct_rate_root,
    is_conversations,
    make_step,
    omniabnorm_reports,
    phantom_report,
    radgenome_reports,
    read_ct_rate,
    read_records,
    split_steps,
    tidy_text,
)
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
from ct_nb.data.hounsfield import CTReadError
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
    wrong = []
    for seed in range(6):
        chest = phantom(seed, 16)
        sick = {lesion.region for lesion in chest.lesions}
        for number, text in chest.report.findings.items():
            for clause in clauses(text):
                mine = [m.negated for m in find_mentions(clause) if m.region == number]
                denies = (
                    clause.startswith(("No ", "There is no "))
                    or " has no " in clause
                    or " not " in clause
                )
                if mine[:1] != [denies]:
                    wrong.append(clause)
            if clauses(text) and is_normal(text) == (number in sick):
                wrong.append(text)
    assert wrong == []


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


def test_ct_rate_names():
    assert ct_rate_path("train_7_c_2") == "dataset/train_fixed/train_7/train_7_c/train_7_c_2.nii.gz"
    # the part of the name counts, not of the folder
    assert (
        ct_rate_path("x/y/valid_7_c_2.nii.gz", 1)
        == "dataset/valid/valid_7/valid_7_c/valid_7_c_2.nii.gz"
    )
    with refused("volume"):
        ct_rate_name("scan.nii.gz")
    with refused("version"):
        ct_rate_path("train_7_c_2", 3)


def test_ct_rate_hu(tmp_path):
    name = "train_1_a_1.nii.gz"
    hu = phantom(2, 24).volume.hu.astype(np.float32)
    table = ct_rate_rescale(
        write(
            tmp_path / "m.csv",
            ("VolumeName", "XYSpacing", "RescaleIntercept", "RescaleSlope"),
            (name, "[0.34, 0.34]", "-1024", "1"),
            ("train_2_a_1.nii.gz", "", "-8192", "2"),
        )
    )
    assert table == {name: (1.0, -1024.0), "train_2_a_1.nii.gz": (2.0, -8192.0)}
    assert np.allclose(ct_rate_hu((hu + 8192) / 2, "train_2_a_1", 1, table), hu, atol=0.01)
    assert np.allclose(ct_rate_hu(hu, name), hu, atol=0.01)
    padded = hu.copy()
    padded[0] = -8192
    assert ct_rate_hu(padded, name).min() >= -1024
    with pytest.raises(CTReadError, match="rescaled twice"):
        ct_rate_hu(hu, name, 1, table)
    with pytest.raises(CTReadError, match="not in HU"):
        ct_rate_hu(hu + 1024, name)
    with refused("rescale"):
        ct_rate_hu(hu, name, 2, table)
    with refused("rescale"):
        ct_rate_hu(hu, "train_9_a_1", 1, table)
    with refused(file="bad.csv", kind=FileError):
        ct_rate_rescale(
            write(
                tmp_path / "bad.csv",
                ("VolumeName", "RescaleIntercept", "RescaleSlope"),
                (name, "", "1"),
            )
        )


def test_version_1_goes_by_its_table_and_not_by_its_header(tmp_path):
    scan = phantom(2, 24).volume
    table = {
        f"train_{n}_a_1.nii.gz": numbers
        for n, numbers in ((1, (1.0, -1024.0)), (2, (2.0, -8192.0)), (3, (1.0, -1024.0)))
    }
    # the last header says what it should not
    for name, header in zip(table, ((1, 0), (1, 0), (1, -1024))):
        slope, intercept = table[name]
        write_stored(tmp_path / name, (scan.hu - intercept) / slope, scan.affine, *header)
        found = read_ct_rate(tmp_path / name, table)
        assert (
            np.abs(found.hu - scan.hu).max() <= slope
            and np.allclose(found.affine, scan.affine)
            and "metadata table" in found.notes[-1]
        )
    with pytest.raises(
        CTReadError,
        match="train_1_a_1.nii.gz: rescale: version 1 of train_1_a_1.nii.gz needs its slope",
    ):
        read_ct_rate(tmp_path / "train_1_a_1.nii.gz", {})
    with pytest.raises(CTReadError, match="train_1_a_1.nii.gz"):
        read_ct_rate(tmp_path / "train_1_a_1.nii.gz", {"train_1_a_1.nii.gz": (1.0, -3000.0)})


def test_the_published_folder_is_found_from_itself_and_from_dataset(tmp_path):
    assert ct_rate_root(tmp_path) is None
    (tmp_path / "dataset" / "radiology_text_reports").mkdir(parents=True)
    assert (
        ct_rate_root(tmp_path) == ct_rate_root(tmp_path / "dataset") == tmp_path
        and ct_rate_root(tmp_path / "dataset" / "radiology_text_reports") is None
    )
    (tmp_path / "q.json").write_text(json.dumps([{"id": "0", "image": "x", "conversations": []}]))
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "x", "thinking": "a"}))
    assert is_conversations(tmp_path / "q.json") and not is_conversations(tmp_path / "r.jsonl")


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

    def labels(cell):
        return write(
            tmp_path / "l.csv",
            ("VolumeName", *CT_RATE_LABELS),
            (
                "train_1_a_1.nii.gz",
                *[cell if label == "Emphysema" else 0 for label in CT_RATE_LABELS],
            ),
        )

    for cell in ("", "nan", "x"):
        with refused(file="l.csv", kind=FileError):
            ct_rate_reports(ct_rate(tmp_path), labels(cell))
    with refused(file="n.csv", kind=FileError):
        ct_rate_reports(write(tmp_path / "n.csv", REPORT_COLUMNS, ("scan7", "", "", "x", "y")))

    def omni(*records):
        return omniabnorm_reports(
            (tmp_path / "o.json", (tmp_path / "o.json").write_text(json.dumps(records)))[0]
        )

    good = {"case_id": "a", "cot_reasoning": [{"text": "One."}]}
    for part in ({"step": 2}, {"text": ""}, {"text": None}, "two"):
        with refused("o.json: entry 1"):
            omni(good, {"case_id": "b", "cot_reasoning": [{"text": "One."}, part]})
    with refused("o.json: entry 0"):
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
    with refused("Anatomy"):
        radgenome_reports(table(("valid_1_a_1.nii.gz", "tail", "x")))


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
    assert [r["a"] for r in read_records(tmp_path / "a.jsonl", ("a",))] == [1, 2]
