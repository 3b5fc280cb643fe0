"""The CT encoder: the cases, the loss, a smoke run with its scores and weights, and what is refused. That a killed run resumes is in tests/training/test_resume.py."""

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ct_files import write_stored, write_table
from places import FULL, ROOT
from refusals import refused
from train_line_runs import FSDP2, NEEDS_DEEPSPEED, ZERO3

from ct_nb.core.errors import FileError
from ct_nb.core.regions import REGIONS
from ct_nb.core.seeding import seeded_generator
from ct_nb.ct_encoder import dataset as scan_reports
from ct_nb.ct_encoder.contrastive import equivalence_keys, is_positive_pair
from ct_nb.ct_encoder.dataset import (
    ScanReports,
    collate_scans,
    folder_cases,
    open_scans,
    phantom_cases,
    read_reports,
    shift_scan,
)
from ct_nb.ct_encoder.encoder import CTEncoderConfig
from ct_nb.ct_encoder.model import (
    ScanLanguage,
    ScanLanguageConfig,
    all_texts,
    draw_regions,
    equivalence_scope,
    label_regions,
    negation_loss,
    region_finding_states,
    scan_finding_states,
    sentences_by_region,
    target_text,
)
from ct_nb.ct_encoder.report_decoder import stated_findings
from ct_nb.ct_encoder.reports import CT_RATE_LABELS, RadiologyReport, ReasoningStep
from ct_nb.ct_encoder.slice_attention import slice_attention, slice_biases
from ct_nb.ct_encoder.text_encoders import WordTokenizer
from ct_nb.ct_encoder.train import (
    CT_ENCODER_PRESETS,
    CTEncoderRun,
    load_ct_encoder,
)
from ct_nb.data.cache import DiskCache
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Volume
from ct_nb.training.checkpoints import WeightsError
from ct_nb.training.gradient_cache import CachedLoss, cached_backward
from ct_nb.training.trainer import Trainer, TrainerConfig, cut_batch, read_history

CONFIG = CTEncoderConfig.preset("smoke")


@pytest.fixture(scope="module")
def data():
    return ScanReports(phantom_cases(6, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    words = WordTokenizer.fit(
        2 * all_texts(data.facts(i)["report"] for i in range(len(data)))
    ).words
    return ScanLanguage(
        ScanLanguageConfig(
            CONFIG,
            tuple(words),
            text_width=32,
            text_depth=1,
            writer_width=32,
            writer_depth=1,
            writer_length=64,
        )
    )


@pytest.fixture(scope="module")
def evaluated(trained, trained_cache, tmp_path_factory):
    "A smoke run with its scores."
    folder = tmp_path_factory.mktemp("run") / "ct_encoder"
    shutil.copytree(trained("ct_encoder", "smoke"), folder)
    run = CTEncoderRun.load(folder)
    return run, run.evaluate()


def test_a_phantoms_findings_are_the_steps_of_its_report(data):
    for i in range(6):
        item, chest = data[i], phantom(i, 32)
        assert [f.kind for f in item["findings"]] == [l.kind for l in chest.lesions] and item[
            "report"
        ].volume == item["id"]
        steps = {step.text: step.regions for step in item["report"].steps}
        assert all(
            f.text.startswith("Observation") and steps[f.text] == (f.region,)
            for f in item["findings"]
        )
        assert (
            item["hu"].shape == item["regions"].shape == CONFIG.size and item["regions"].max() <= 20
        )
    cube = ScanReports(phantom_cases(2, replace(CONFIG, size=(32, 32, 32))), CONFIG)[1]
    # on its own grid nothing is resampled
    assert torch.equal(
        cube["hu"],
        torch.from_numpy(np.clip(np.rint(phantom(1, 32).volume.hu), -32768, 32767)).float(),
    )
    assert torch.equal(cube["regions"], torch.from_numpy(phantom(1, 32).regions))


def test_claims_are_what_the_report_says(data):
    seen = set()
    for i in range(6):
        report = data.facts(i)["report"]
        asked = region_finding_states(report)
        texts = dict(report.regions)
        assert (
            len(set(asked))
            == len(asked)
            == sum(region in label_regions(name) for region in texts for name in report.labels)
        )
        for region, name, there in asked:
            assert (
                region in label_regions(name)
                and there == stated_findings(texts[region], [name])[name]
            )
        anywhere = dict(scan_finding_states(asked))
        assert anywhere == {name: any(t for _, n, t in asked if n == name) for _, name, _ in asked}
        seen |= {there for *_, there in asked}
        for kind, there in anywhere.items():
            assert there == report.labels[kind]
    assert seen == {True, False}
    # a finding that nobody names as a label is not asked for
    assert region_finding_states(RadiologyReport("a", regions=((7, "Cardiomegaly."),))) == []


def test_the_claim_loss_is_of_the_sentence_that_is_true():
    image = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
    logit = 5 * (unit(image)[:, None] * unit(text)).sum(-1)
    yes, no = (-logit.log_softmax(1)).unbind(1)  # two sentences, one of which is true
    # there and not there count alike, however many
    assert negation_loss(
        image, text, torch.tensor([True, False, False]), 5.0
    ).item() == pytest.approx((yes[0] + (no[1] + no[2]) / 2).item() / 2, rel=1e-5)
    assert negation_loss(
        image, text, torch.tensor([True, True, True]), 5.0
    ).item() == pytest.approx(yes.mean().item() / 2, rel=1e-5)
    assert negation_loss(image[:0], text[:0], torch.zeros(0, dtype=torch.bool), 5.0) == 0


def test_no_mass_beside_a_nodule_is_no_normal_chest():
    ill = RadiologyReport("a", impression="Nodule of 6 mm in the right upper lobe. No mass.")
    well = RadiologyReport("b", impression="No acute abnormality of the chest.")
    without = ReasoningStep("Observation: no mass, no consolidation.")
    liver = ReasoningStep("The liver is normal.", regions=(16,))
    heart = ReasoningStep("The heart is normal.", regions=(7,))
    same_as = lambda *pairs: (lambda keys: is_positive_pair(keys, keys)[0, 1].item())(
        equivalence_keys(
            [step.text for step, _, _ in pairs], [equivalence_scope(*pair) for pair in pairs]
        )
    )
    conclusion = ReasoningStep("Conclusion: No acute abnormality of the chest.")
    assert same_as((without, well, "b"), (conclusion, well, "c"))
    assert not same_as((without, ill, "a"), (conclusion, well, "c")) and not same_as(
        (liver, well, "b"), (heart, well, "b")
    )
    assert same_as((liver, ill, "a"), (ReasoningStep("Normal liver.", regions=(16,)), well, "b"))


def test_moving_moves_scan_map_and_lesions_alike(data):
    item, moved = data[1], data.at(3, 1)
    body = item["hu"] > -300
    best = max(
        (int((torch.equal(shift_scan(item["regions"], (a, b, c), 0), moved["regions"]))), (a, b, c))
        for a in range(-2, 3)
        for b in range(-2, 3)
        for c in range(-2, 3)
    )
    assert best[0] == 1
    blank = {**item, "regions": torch.full_like(item["regions"], CONFIG.body)}
    # a scan without a map still has none when it is moved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanReports, "__getitem__", lambda self, index: dict(blank))
        assert (data.at(3, 1)["regions"] == CONFIG.body).all()
    assert (
        torch.equal(shift_scan(item["lesions"], best[1], 0), moved["lesions"])
        and (shift_scan(item["hu"], best[1], -1000.0) - moved["hu"]).abs().mean() < 20
        and body.any()
    )


def test_the_loss_is_the_same_again_and_reaches_every_part(data, model):
    batch = collate_scans([data[i] for i in range(6)])
    loss, parts = model(batch, 1)
    assert model(batch, 1)[0] == loss and set(parts) == {
        "global",
        "region",
        "steps",
        "anchor",
        "claim",
        "claim of scan",
        "map",
        "words",
    }
    model.zero_grad()
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {
        n for n in without if not n.startswith(("encoder.table", "encoder.pooling"))
    }, without


def gradients(model):
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


def test_a_batch_in_pieces_is_the_batch(data, model, tmp_path):
    """Pieces of a batch, joined before the loss, by hand and by the trainer; pieces by themselves
    are another loss.
    """
    batch = collate_scans([data[i] for i in range(6)])
    found = {}
    for name in ("whole", "cached", "alone"):
        model.zero_grad()
        if name == "cached":
            value = cached_backward(
                lambda part: model.encode(part, 1),
                cut_batch(batch, 3),
                lambda rows: model.loss(rows)[0],
            )
        else:
            value = (
                model(batch, 1)[0]
                if name == "whole"
                else sum(
                    model(part, 1)[0]
                    for part in cut_batch(
                        collate_scans([data[i] for i in range(6)])
                        | {"number": torch.tensor([0, 1, 0, 1, 0, 1])},
                        3,
                    )
                )
                / 3
            )
            value.backward()
        found[name] = value.item(), gradients(model)
    assert (
        found["cached"][0] == pytest.approx(found["whole"][0], rel=1e-5)
        and (found["cached"][1] - found["whole"][1]).abs().max() < 1e-5
    )
    assert (found["alone"][1] - found["whole"][1]).abs().max() > 1e-2
    ends = []
    for pieces in (1, 2):
        torch.manual_seed(0)
        again = ScanLanguage(model.config)
        step = lambda m, b, n: m(b, n)
        cached = CachedLoss(
            lambda m, b, n: m.encode(b, n),
            lambda m, rows, n: m.loss(rows),
        )
        rows = (
            Trainer(
                again,
                step,
                data,
                TrainerConfig(
                    steps=1, batch_size=4, accumulation=pieces, learning_rate=1e-3, log_every=1
                ),
                tmp_path / str(pieces),
                collate_scans,
                cached=cached,
            )
            .fit(progress=False)
            .rows
        )
        ends.append(rows[-1])
    assert (
        ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-4)
        and ends[0]["gradient_norm"] == pytest.approx(ends[1]["gradient_norm"], rel=1e-3)
        and ends[0]["words"] == pytest.approx(ends[1]["words"], rel=1e-4)
    )


def _half(rank, address, queue, model, batch):
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{address}", rank=rank, world_size=2
        )
        mine = slice(0, 4) if rank == 0 else slice(4, 6)
        part = {name: value[mine] for name, value in batch.items()} | {
            "number": torch.arange(4 - 2 * rank)
        }
        model.zero_grad()
        loss, parts = model(part, 1)
        loss.backward()
        gradient = gradients(model)
        torch.distributed.all_reduce(gradient)  # what DDP does
        queue.put((parts, (gradient / 2).tolist()))
        torch.distributed.destroy_process_group()
    except Exception as problem:
        queue.put((repr(problem), None))


def test_two_processes_are_one(data, model, tmp_path):
    batch = collate_scans([data[i] for i in range(6)])
    model.zero_grad()
    loss, parts = model(batch, 1)
    loss.backward()
    expected = gradients(model)
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=_half, args=(rank, tmp_path / "meet", queue, model, batch))
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    for theirs, gradient in found:
        assert gradient is not None, theirs
        assert (
            theirs == pytest.approx(parts, rel=1e-4, abs=1e-5)
            and (torch.tensor(gradient) - expected).abs().max() < 1e-4
        )


def test_hidden_maps_are_hidden(data, model):
    "What the encoder is given decides the map's loss; a map that is shown must not be asked for."
    batch = collate_scans([data[i] for i in range(4)])
    shown, given = [], model.encoder.forward
    try:
        model.encoder.forward = lambda hu, regions: (shown.append(regions), given(hu, regions))[1]
        for share, part in ((1.0, True), (0.0, False)):
            model.config = replace(model.config, hidden_maps=share)
            parts = model(batch, 0)[1]
            assert (
                (parts["map"] > 0) == part
                and (shown[-1] == CONFIG.body).all() == part
                and (parts["region"] == 0) == part
            )
    finally:
        del model.encoder.forward
        model.config = replace(model.config, hidden_maps=0.25)


def test_maps_that_are_told_are_a_little_off(data, model):
    """By whole voxels within the error, two of three, and by themselves: neither the scan nor the
    map that is to be drawn moves.
    """
    regions = torch.stack([data[i]["regions"] for i in range(6)])
    regions[5] = CONFIG.body
    kept = regions.clone()
    config = model.config
    seen = []
    try:
        model.config = replace(config, hidden_maps=0.0, map_error_mm=20.0)
        assert [round(20 / s) for s in CONFIG.spacing_mm] == [1, 2, 2]
        for seed in range(40):
            told, hidden = model.augmented_maps(
                regions, [seeded_generator(seed, i) for i in range(6)]
            )
            assert not hidden.any() and (told[5] == CONFIG.body).all()
            for one, exact in zip(told[:5], regions):
                fits = [
                    (z, y, x)
                    for z in range(-1, 2)
                    for y in range(-2, 3)
                    for x in range(-2, 3)
                    if torch.equal(one, shift_scan(exact, (z, y, x), 0))
                ]
                assert len(fits) == 1
                seen += fits
        assert {axis: {move[axis] for move in seen} for axis in range(3)} == {
            0: {-1, 0, 1},
            1: {-2, -1, 0, 1, 2},
            2: {-2, -1, 0, 1, 2},
        }
        assert 0.25 < np.mean([move == (0, 0, 0) for move in seen]) < 0.45 and torch.equal(
            regions, kept
        )
        model.config = replace(config, hidden_maps=1.0, map_error_mm=20.0)
        told, hidden = model.augmented_maps(regions, [seeded_generator(0, i) for i in range(6)])
        assert hidden.all() and (told == CONFIG.body).all()
        model.config = replace(config, hidden_maps=0.0, map_error_mm=0.0)
        assert torch.equal(
            model.augmented_maps(regions, [seeded_generator(0, i) for i in range(6)])[0], regions
        )
    finally:
        model.config = config
    with refused("map_error_mm"):
        ScanLanguageConfig(map_error_mm=-1.0)


def test_noise_is_between_none_and_the_most(data):
    "A network that has seen one noise only knows openings by it."
    found = []
    for epoch in range(30):
        moved = data.at(epoch, 0)
        move = next(
            (z, y, x)
            for z in range(-2, 3)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.equal(shift_scan(data[0]["regions"], (z, y, x), 0), moved["regions"])
        )
        still = shift_scan(data[0]["hu"], move, -1000.0)
        found.append(float((moved["hu"] - still).std()))
    assert max(found) < 15.5 and min(found) < 4 and max(found) > 11


def test_scans_without_map_or_without_some_texts(data, model):
    batch = collate_scans([data[i] for i in range(3)])
    batch["regions"] = torch.full_like(batch["regions"], CONFIG.body)
    parts = model(batch, 0)[1]
    assert (
        parts["region"] == 0 and parts["anchor"] == 0 and parts["map"] == 0 and parts["global"] > 0
    )
    batch["report"] = [
        RadiologyReport("a", impression="Nodule."),
        RadiologyReport("b", impression="No finding."),
        RadiologyReport("c"),
    ]
    assert model(batch, 0)[0].isfinite()
    batch["report"] = [RadiologyReport("a"), RadiologyReport("b"), RadiologyReport("c")]
    with pytest.raises(ValueError, match="none of .* has a text"):
        model(batch, 0)


def test_what_is_said_of_regions():
    report = RadiologyReport(
        "a",
        regions=(
            (3, "Nodule of 6 mm in the right upper lobe. No emphysema in the right upper lobe."),
            (7, "No cardiomegaly."),
            (14, "No rib fracture. Normal sternum."),
        ),
        steps=(ReasoningStep("Task: read."), ReasoningStep("Conclusion: nodule.")),
    )
    said = {s.region: s for s in sentences_by_region(report)}
    assert (
        said[3].sentences == ("Nodule of 6 mm in the right upper lobe.",)
        and not said[3].normal
        and said[14].normal
        and len(said[14].sentences) == 2
    )
    assert (
        target_text(report) == "Conclusion: nodule."
        and target_text(RadiologyReport("b", findings="F.", impression="I.")) == "F."
    )
    everywhere = torch.ones(21, dtype=torch.bool)
    nowhere = torch.zeros(21, dtype=torch.bool)
    for seed in range(8):
        drawn = draw_regions(report, everywhere, 2, torch.Generator().manual_seed(seed))
        assert drawn[0][0] == 3 and len(drawn) == 2
    assert draw_regions(report, nowhere, 2, torch.Generator()) == []


def test_smoke_run_leaves_its_record(evaluated):
    run, scores = evaluated
    assert {
        "metrics.json",
        "retrieval.csv",
        "lesions.csv",
        "config.json",
        "model.safetensors",
        "history.jsonl",
    } <= {p.name for p in run.out.iterdir()}
    config, metrics = (
        json.loads((run.out / name).read_text()) for name in ("config.json", "metrics.json")
    )
    assert (
        config["system"] == "ct_encoder"
        and config["versions"]["torch"]
        and config["training"]["fingerprint"] != config["validation"]["fingerprint"]
    )
    assert not set(config["training"]["cases"]) & set(config["validation"]["cases"])
    assert {
        "sentence_place",
        "steps",
        "zero_shot",
        "polarity",
        "map",
        "writing",
        "preprocessing",
        "lesions with map",
        "lesions without map",
    } <= metrics.keys()
    with open(run.out / "retrieval.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["direction"] for row in rows} == {"image to text", "text to image"} and all(
        0 < float(row["chance"]) < 1 and int(row["candidates"]) > 1 for row in rows
    )
    assert (
        metrics["preprocessing"]["right"]["refused"] == 0
        and metrics["preprocessing"]["rescaled twice"]["refused"]
        == metrics["preprocessing"]["rescaled twice"]["of"]
    )
    assert "chance" in scores.table() and "rescaled twice 4/4" in scores.table()
    assert (
        "another scan" in metrics["writing"]
        and len(metrics["writing"]["the model"]["examples"]) == 2
    )
    assert len(run.history) == 2 and run.history[-1]["step"] == 8


def test_weights_come_back(evaluated, tmp_path):
    run, _ = evaluated
    again = load_ct_encoder(run.out)
    item = run.validation[0]
    with torch.no_grad():
        a, b = (m.encoder(item["hu"][None], item["regions"][None]) for m in (run.model, again))
        assert torch.equal(a.global_embedding, b.global_embedding) and torch.equal(
            run.model.embed_texts(["Nodule."], "region"), again.embed_texts(["Nodule."], "region")
        )
        assert (
            run.model.write(a, max_length=12) == again.write(b, max_length=12)
            and not again.training
        )
    with pytest.raises(WeightsError, match="no such file"):
        load_ct_encoder(tmp_path)
    config = json.loads((run.out / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"system": "drr2ct"}))
    with pytest.raises(WeightsError, match="drr2ct"):
        load_ct_encoder(tmp_path)


def test_a_folder_of_scans_with_reports(tmp_path):
    for number in range(2):
        phantom(number, 32).volume.save(tmp_path / f"valid_{number}_a_1.nii.gz")
    broken = phantom(2, 32).volume
    broken.hu -= 1024
    broken.save(tmp_path / "valid_2_a_1.nii.gz")
    with open(tmp_path / "validation_reports.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["VolumeName", "Findings_EN", "Impressions_EN"])
        for number in range(4):
            rows.writerow(
                [
                    f"valid_{number}_a_1.nii.gz",
                    "Nodule in the right upper lobe. No pleural effusion.",
                    "Nodule.",
                ]
            )
    opened, facts = open_scans(str(tmp_path), CONFIG, DiskCache(tmp_path / "cache"), progress=False)
    assert (
        opened.ids == ["valid_0_a_1", "valid_1_a_1"]
        and "rescaled twice" in opened.skipped[0][1]
        and opened.patients == ["valid_0", "valid_1"]
    )
    assert (
        (opened[0]["regions"] == CONFIG.body).all()
        and facts[0]["report"].impression == "Nodule."
        and opened.at(0, 0)["report"].labels == {}
    )
    (tmp_path / "second.csv").write_text("VolumeName,Findings_EN,Impressions_EN\n")
    with pytest.raises(ValueError, match="2 tables of reports"):
        read_reports(tmp_path)
    with pytest.raises(ValueError, match="Impressions_EN"):
        (tmp_path / "third.csv").write_text("VolumeName,Findings_EN\n")
        read_reports(tmp_path / "third.csv")
    with pytest.raises(ValueError, match="no scan of"):
        open_scans(str(tmp_path), CONFIG, reports=str(tmp_path / "second.csv"), progress=False)


REPORT_COLUMNS = (
    "VolumeName",
    "ClinicalInformation_EN",
    "Technique_EN",
    "Findings_EN",
    "Impressions_EN",
)
NODULE = ("", "", "Nodule in the right upper lobe. No pleural effusion.", "Nodule.")


def test_maps_that_nobody_understands_do_not_end_a_run(tmp_path):
    """Each is named with its file: those in unknown numbers leave a scan without a map, those that
    cannot be read leave the scan out.
    """
    chest = phantom(1, 32)
    numbers = {
        "0": chest.regions > 0,
        "1": np.isin(chest.regions, range(1, 6)),
        "2": 200 * (chest.regions == 16),
        "3": np.where(chest.regions, 21 - chest.regions, 0.0),
        "4": chest.regions,
        "5": chest.regions + 0.5,
    }
    for number, labels in numbers.items():
        chest.volume.save(tmp_path / f"valid_{number}_a_1.nii.gz")
        Volume(labels.astype(np.float32), chest.volume.affine).save(
            tmp_path / "labels" / f"valid_{number}_a_1.nii.gz"
        )
    (tmp_path / "labels" / "valid_3_a_1.json").write_text(
        json.dumps({21 - n: name for n, (name, _) in REGIONS.items()})
    )
    (tmp_path / "labels" / "valid_4_a_1.json").write_text("{")
    write_table(
        tmp_path / "validation_reports.csv",
        REPORT_COLUMNS,
        *[(f"valid_{number}_a_1.nii.gz", *NODULE) for number in numbers],
    )
    with pytest.warns(UserWarning, match="notes on 3 of 6 scans") as said:
        opened, facts = open_scans(
            str(tmp_path), CONFIG, DiskCache(tmp_path / "cache"), progress=False
        )
    assert opened.ids == [f"valid_{number}_a_1" for number in "0123"] and [
        name for name, _ in opened.skipped
    ] == ["valid_4_a_1", "valid_5_a_1"]
    assert (
        "labels/valid_4_a_1.json: is not JSON" in opened.skipped[0][1]
        and "labels/valid_5_a_1.nii.gz: holds values" in opened.skipped[1][1]
    )
    text = next(str(w.message) for w in said if "notes on" in str(w.message))
    assert (
        all(f"valid_{number}_a_1" in text for number in "012")
        and text.count("nobody says") == 2
        and "valid_3" not in text
        and "the value 200" in text
    )
    assert [bool((opened[i]["regions"] == CONFIG.body).all()) for i in range(4)] == [
        True,
        True,
        True,
        False,
    ] and opened[3]["regions"].max() <= 20


def test_the_name_of_what_was_prepared_knows_all_that_decided_it(tmp_path, monkeypatch):
    chest = phantom(1, 32)
    chest.volume.save(tmp_path / "valid_1_a_1.nii.gz")
    write_table(
        tmp_path / "validation_reports.csv", REPORT_COLUMNS, ("valid_1_a_1.nii.gz", *NODULE)
    )
    digest = lambda: folder_cases(tmp_path, CONFIG)[0][0].digest
    seen = [digest()]
    Volume((chest.regions == 7).astype(np.float32), chest.volume.affine).save(
        tmp_path / "labels" / "valid_1_a_1.nii.gz"
    )
    seen.append(digest())
    for name, names in (
        ("labels.json", {"1": "heart"}),
        ("labels.json", {"1": "aorta"}),
        ("valid_1_a_1.json", {"1": "heart"}),
    ):
        (tmp_path / "labels" / name).write_text(json.dumps(names))
        seen.append(digest())
    assert len(set(seen)) == 5 and digest() == seen[-1]
    asked, code_digest = [], scan_reports.code_digest
    monkeypatch.setattr(
        scan_reports,
        "code_digest",
        lambda *patterns: (asked.extend(patterns), code_digest(*patterns))[1],
    )
    digest()
    package = scan_reports.ct_nb.__path__[0]
    files = {str(path) for pattern in asked for path in Path(package).glob(pattern)}
    for module in (
        scan_reports,
        *map(
            lambda name: sys.modules[f"ct_nb.{name}"],
            (
                "data.folders",
                "ct_encoder.label_maps",
                "ct_encoder.reports",
                "ct_encoder.ct_rate",
                "ct_encoder.report_readers",
                "ct_encoder.encoder",
                "ct_encoder.region_attention",
                "data.readers",
                "physics.volume",
            ),
        ),
    ):
        assert module.__file__ in files, module.__name__


@pytest.fixture
def published(tmp_path):
    "CT-RATE as it is published, in small: (its folder, the scans' HU by name)."
    root = tmp_path / "ct_rate"
    scans = {}
    chest = phantom(1, 24).volume
    volumes = {
        "train_1_a_1": "fixed raw",
        "train_1_a_2": "fixed",
        "train_2_a_1": "raw",
        "train_3_b_1": "fixed",
        "valid_1_a_1": "fixed",
        "valid_2_a_1": "raw",
        "valid_3_a_1": "raw",
    }
    rows = {"train": [], "valid": []}
    for seed, (name, kinds) in enumerate(volumes.items()):
        # each a little denser than the last
        scan = Volume(np.where(chest.hu > -200, chest.hu + 10 * seed, chest.hu), chest.affine)
        split = name.split("_")[0]
        patient = name.rsplit("_", 2)[0]
        study = name.rsplit("_", 1)[0]
        slope, intercept = (2.0, -8192.0) if name == "train_2_a_1" else (1.0, -1024.0)
        if "fixed" in kinds:
            write_stored(
                root / f"dataset/{split}_fixed/{patient}/{study}/{name}.nii.gz",
                scan.hu,
                scan.affine,
            )
        if "raw" in kinds:
            write_stored(
                root / f"dataset/{split}/{patient}/{study}/{name}.nii.gz",
                (scan.hu - intercept) / slope,
                scan.affine,
            )
        scans[name] = scan
        if name != "valid_3_a_1":
            rows[split].append((f"{name}.nii.gz", "GE", "[0.7, 0.7]", intercept, slope))
    for split, spelled in (("train", "train"), ("valid", "validation")):
        names = [f"{name}.nii.gz" for name in volumes if name.startswith(split)]
        write_table(
            root / f"dataset/radiology_text_reports/{spelled}_reports.csv",
            REPORT_COLUMNS,
            *[
                (
                    name,
                    "Not given.",
                    "CT.",
                    f"Nodule in the left upper lobe of {name[:-12]}.",
                    "Not given." if name == "train_3_b_1.nii.gz" else f"Nodule {name[:-9]}.",
                )
                for name in names
            ],
        )
        write_table(
            root / f"dataset/multi_abnormality_labels/{split}_predicted_labels.csv",
            ("VolumeName", *CT_RATE_LABELS),
            *[(name, *[int(label == "Lung nodule") for label in CT_RATE_LABELS]) for name in names],
        )
        write_table(
            root / f"dataset/metadata/{spelled}_metadata.csv",
            ("VolumeName", "Manufacturer", "XYSpacing", "RescaleIntercept", "RescaleSlope"),
            *rows[split],
        )
    (root / "dataset" / "vqa").mkdir()
    ask = lambda name, question: {
        "id": name,
        "image": f"{name}.nii.gz",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (root / "dataset" / "vqa" / "valid_vqa.json").write_text(
        json.dumps([ask("valid_1_a_1", "Is there a nodule?")])
    )
    (root / "thinking.jsonl").write_text(
        json.dumps(
            {
                "image": "dataset/train/valid_2_a_1.nii.gz",
                "question": "?",
                "answer": "Nodule.",
                "thinking": "The heart is normal.\nThe nodule is on the left.",
            }
        )
    )
    return root, scans


def test_ct_rate_as_it_is_published(published, tmp_path):
    root, scans = published
    opened, facts = open_scans(str(root), CONFIG, DiskCache(tmp_path / "cache"), progress=False)
    # a scan once, by its first reconstruction
    assert opened.ids == ["train_1_a_1", "train_2_a_1", "train_3_b_1", "valid_1_a_1", "valid_2_a_1"]
    assert [(name.rsplit("/")[-1], why) for name, why in opened.skipped[:1]] == [
        (
            "train_1_a_2.nii.gz",
            (
                "it is another reconstruction of train_1_a, of which"
                " dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz is taken"
            ),
        )
    ]
    assert (
        opened.skipped[1][0] == "valid_3_a_1"
        and "no row of it" in opened.skipped[1][1]
        and len(opened.skipped) == 2
    )
    for i, name in enumerate(opened.ids):
        expected = scan_reports.prepare_scan(scans[name], CONFIG)[0]
        # as if it had been HU all along
        assert (opened[i]["hu"] - expected).abs().max() <= (
            2.5 if name == "train_2_a_1" else 1.5
        ), name
    reports = {fact["id"]: fact["report"] for fact in facts}
    assert (
        reports["valid_1_a_1"].questions == (("Is there a nodule?", "Yes."),)
        and reports["valid_1_a_1"].steps == ()
        and reports["train_1_a_1"].questions == ()
    )
    assert (
        [step.regions for step in reports["valid_2_a_1"].steps] == [(7,), ()]
        and reports["train_3_b_1"].impression == ""
        and reports["train_1_a_1"].labels["Lung nodule"]
    )
    for share, seed in ((0.25, 0), (0.9, 7)):  # the official parts, whatever share is asked for
        training, validation = opened.split(share, seed)
        assert training.ids == opened.ids[:3] and validation.ids == opened.ids[3:]
    mixed = opened.subset(range(3)).split(0.34, 0)
    # one part alone is split by patient
    assert len(mixed[0]) + len(mixed[1]) == 3 and len(mixed[1]) >= 1
    again, _ = folder_cases(root / "dataset", CONFIG)
    assert [case.id for case in again] == [*opened.ids, "valid_3_a_1"] and [
        case.part for case in again
    ] == ["train"] * 3 + ["valid"] * 3


def test_a_flat_folder_tells_questions_from_reasoning(published, tmp_path):
    root, _ = published
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (
        *root.glob("dataset/*/validation_reports.csv"),
        *root.glob("dataset/*/valid_predicted_labels.csv"),
        *root.glob("dataset/vqa/*.json"),
        root / "thinking.jsonl",
    ):
        shutil.copy(file, flat)
    first, second, _ = read_reports(flat)
    assert (
        first.questions == (("Is there a nodule?", "Yes."),)
        and first.steps == ()
        and second.questions == ()
        and len(second.steps) == 2
        and first.labels
    )
    shutil.copy(flat / "thinking.jsonl", flat / "more.jsonl")
    with pytest.raises(
        ValueError, match="2 files of reasoning \\(more.jsonl, thinking.jsonl\\); leave one"
    ):
        read_reports(flat)
    shutil.rmtree(root / "dataset" / "radiology_text_reports")
    (root / "dataset" / "radiology_text_reports").mkdir()
    with pytest.raises(ValueError, match="neither train_reports.csv nor validation_reports.csv"):
        read_reports(root)


def test_real_scans_from_a_folder_to_the_figures(real_ct, tmp_path, monkeypatch):
    """Real CT with made-up reports: read, trained on, judged.

    What is found means nothing; that every scan comes through does.
    """
    names = {
        "cip-ct64": "emphysema",
        "ts-example": "cyst",
        "lungdx-A0002": "nodule",
        "ctfm-s0335": "effusion",
    }
    for number, name in enumerate(names):
        (tmp_path / f"valid_{number}_a_1.nii.gz").symlink_to(real_ct / f"{name}.nii.gz")
        if (real_ct / "labels" / f"{name}.nii.gz").is_file():
            (tmp_path / "labels").mkdir(exist_ok=True)
            (tmp_path / "labels" / f"valid_{number}_a_1.nii.gz").symlink_to(
                real_ct / "labels" / f"{name}.nii.gz"
            )
    write_table(
        tmp_path / "validation_reports.csv",
        REPORT_COLUMNS,
        *[
            (
                f"valid_{i}_a_1.nii.gz",
                "",
                "",
                (
                    f"There is a {what} in the left lower lobe. The liver is normal. Invented for"
                    f" scan {i}."
                ),
                f"{what.capitalize()} {i}.",
            )
            for i, what in enumerate(names.values())
        ],
    )
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = CTEncoderRun("smoke", data=str(tmp_path), out=tmp_path / "run", steps=4, seed=2).open(
            progress=False
        )
    assert (
        sorted(run.training.ids + run.validation.ids) == [f"valid_{i}_a_1" for i in range(4)]
        and not run.training.skipped
    )
    # both lungs are 1 there
    assert any("labels/valid_0_a_1.nii.gz: nobody says" in str(w.message) for w in said)
    items = {
        item["id"]: item
        for data in (run.training, run.validation)
        for item in (data[i] for i in range(len(data)))
    }
    maps = {id: tuple(torch.unique(item["regions"]).tolist()) for id, item in items.items()}
    assert {0, 13, 16, 17, 18} <= set(maps.pop("valid_1_a_1")) and set(maps.values()) == {
        (CONFIG.body,)
    }
    assert all(
        -1001 < item["hu"].min() < -900 and item["hu"].max() > 100 for item in items.values()
    )
    assert all(np.isfinite(row["loss"]) for row in run.fit(progress=False))
    run.evaluate()
    metrics = json.loads((run.out / "metrics.json").read_text())
    assert (
        metrics["cases"] == len(run.validation)
        and metrics["preprocessing"]["right"]["refused"] == 0
        and metrics["writing"]["the model"]["examples"]
    )


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text"):
        CTEncoderRun("smoke", text=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="neither 'phantom'"):
        open_scans(str(tmp_path / "nothing"), CONFIG)
    with pytest.raises(ValueError, match="at least two patients"):
        open_scans("phantom:1", CONFIG)
    with pytest.raises(ValueError, match="hidden_maps"):
        ScanLanguageConfig(hidden_maps=2)


def test_a_frozen_tower_is_no_part_of_the_weights(data, model, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "nodule", "."])
    )
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(tmp_path)
    frozen = ScanLanguage(replace(model.config, text=str(tmp_path)))
    assert not any("tower" in name or "bert" in name for name in frozen.state_dict()) and any(
        "tower" in name for name in model.state_dict()
    )
    loss, _ = frozen(collate_scans([data[i] for i in range(3)]), 0)
    loss.backward()
    assert (
        loss.isfinite()
        and frozen.alignment.text_heads["global"].weight.grad.any()
        and frozen.embed_texts(["no nodule."]).shape == (1, CONFIG.shared_dim)
    )
    torch.manual_seed(0)
    learns = ScanLanguage(
        replace(model.config, text=str(tmp_path), text_trained=True, text_pooling="first")
    )
    learns(collate_scans([data[i] for i in range(3)]), 0)[0].backward()
    tower = [p for name, p in learns.named_parameters() if name.startswith("tower.")]
    assert (
        tower
        and sum(p.grad.abs().sum() for p in tower if p.grad is not None) > 0
        and any("tower" in name for name in learns.state_dict())
    )
    # pooled by the first token
    assert not torch.allclose(
        learns.read(["no nodule."]),
        ScanLanguage(replace(model.config, text=str(tmp_path), text_trained=True)).read(
            ["no nodule."]
        ),
    )
    with refused("text_trained"):
        CTEncoderRun("smoke", text="minilm", text_trained=True)


@FULL
def test_the_bench_measures_the_networks_that_are_trained(tmp_path, monkeypatch):
    import nbformat

    from ct_nb.ct_encoder import encoder as ct_encoder

    preset = CT_ENCODER_PRESETS["smoke"]
    embedded = []
    real = ct_encoder.patch_embedding
    # so that a network of its own, or a patch in one step, would show
    network = replace(
        preset.network, encoder=replace(preset.network.encoder, stem=6, size=(16, 32, 48))
    )
    monkeypatch.setitem(CT_ENCODER_PRESETS, "smoke", replace(preset, network=network))
    monkeypatch.setattr(
        ct_encoder,
        "patch_embedding",
        lambda *arguments: (embedded.append(arguments), real(*arguments))[1],
    )
    cells = [
        cell.source
        for cell in nbformat.read(ROOT / "nbs" / "bench_ct_encoder.ipynb", as_version=4).cells
        if cell.cell_type == "code" and not cell.source.startswith("%")
    ]
    space = {"In": cells[:1]}
    for number, source in enumerate(cells):
        exec(source, space)
        if number == 0:
            space |= {"preset": "smoke", "out": str(tmp_path), "naive_gb": 1.5e-4, "kept": True}
    # two to warm up, the part by itself, three whole networks
    assert space["config"] == network.encoder and embedded == [((4, 8, 8), 32, 6)] * 6
    found = json.loads((tmp_path / "bench_ct_encoder.json").read_text())
    assert (
        found["patches"] == 96
        and {"patch embedding", "slice attention, a block", "a whole block, forward and backward"}
        <= set(found["parts"])
        and len(found["whole"]) == 3
    )
    # room for one head of two, and for none
    assert (
        found["attention"]["forward"]["naive"]["heads_measured"] == 1
        and found["attention"]["forward and backward"]["naive"]["seconds"] is None
    )
    assert (
        all(row["seconds"] > 0 for row in (*found["parts"].values(), *found["whole"].values()))
        and (tmp_path / "bench_ct_encoder.png").is_file()
    )
    q, k, v = (torch.randn(2, 2, 24, 8, dtype=torch.float64) for _ in range(3))
    bias = slice_biases(torch.randn(2, 8, dtype=torch.float64), 4)
    # what stands on the other side computes the same
    assert torch.allclose(space["naive"](q, k, v, bias), slice_attention(q, k, v, bias), atol=1e-12)


def test_presets_can_be_made_and_stored():
    for preset in CT_ENCODER_PRESETS.values():
        with torch.device("meta"):
            ScanLanguage(preset.network)
        assert (
            ScanLanguageConfig.from_dict(json.loads(json.dumps(preset.network.to_dict())))
            == preset.network
        )


def test_texts_that_the_towers_do_not_read_are_counted(tmp_path, monkeypatch):
    "Said when the network is built: how many texts are cut, and how many have unknown words."
    monkeypatch.setenv("CT_NB_CACHE", str(tmp_path / "cache"))
    texts = ("Nodule in the left lung. " * 60, "A nodule of \u2265 5 mm.", "Nodule.")
    rows = []
    for number, text in enumerate(texts):
        phantom(number, 24).volume.save(tmp_path / f"valid_{number}_a_1.nii.gz")
        rows.append((f"valid_{number}_a_1.nii.gz", "", "", text, text))
    write_table(tmp_path / "validation_reports.csv", REPORT_COLUMNS, *rows)
    run = CTEncoderRun("micro", data=str(tmp_path), out=tmp_path / "run").open(progress=False)
    run.training.cases = [*run.training.cases, *run.validation.cases]
    with pytest.warns(UserWarning) as said:
        run.build(progress=False)
    notes = [str(warning.message) for warning in said]
    assert any("longer than the 160 tokens of the text tower" in note for note in notes)
    assert any("does not know, such as \u2265" in note for note in notes)
    assert any("tokens of the report decoder" in note for note in notes)


def test_reports_in_another_language_are_said(tmp_path):
    rows = []
    for number in range(2):
        phantom(number, 24).volume.save(tmp_path / f"valid_{number}_a_1.nii.gz")
        text = "Sol akci\u011fer alt lobda nod\u00fcl izlendi."
        rows.append((f"valid_{number}_a_1.nii.gz", "", "", text, "Nod\u00fcl"))
    write_table(tmp_path / "validation_reports.csv", REPORT_COLUMNS, *rows)
    (tmp_path / "._validation_reports.csv").write_bytes(b"\x00\x05\x16\x07")  # macOS writes these
    with pytest.warns(UserWarning, match="2 of 2 reports have findings but name none"):
        open_scans(str(tmp_path), CONFIG, progress=False)
    write_table(tmp_path / "other.csv", ("name", "age"), ("a", "3"))
    with refused(file="other.csv", kind=FileError):
        read_reports(tmp_path / "other.csv")


def run_as_two(out, sharing):
    words = (
        *"-m torch.distributed.run --standalone --nproc_per_node 2 -m ct_nb.ct_encoder.train".split(),
        *f"--preset micro --out {out}".split(),
    )
    environment = {**sharing, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@FULL
def test_two_processes_that_share_the_network_give_the_single_process_losses(trained, tmp_path):
    """All terms by the history. In a step some terms have cases in one process alone, so each
    reaches weights that the other does not.
    """
    done = run_as_two(tmp_path, FSDP2)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = read_history(trained("ct_encoder"))
    for one, two in zip(alone, read_history(tmp_path), strict=True):
        names = one.keys() - {"seconds_per_step"}
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, abs=1e-4)
    factor = load_ct_encoder(tmp_path).alignment.temperatures["global"].log_factor
    assert factor.shape == (1,)


@FULL
@NEEDS_DEEPSPEED
def test_deepspeed_is_refused_as_processes_reach_different_weights(tmp_path):
    done = run_as_two(tmp_path, ZERO3)
    assert done.returncode == 1 and "launch/fsdp.yaml" in " ".join(done.stderr.split())
