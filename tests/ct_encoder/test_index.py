"""The embedding index: its rows, its file, searches as cosines, and refused input."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import ct_nb, refusal
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.core.regions import REGIONS
from ct_nb.ct_encoder.index import (
    WHOLE,
    EmbeddingIndex,
    embed_scan,
    embed_scans,
    open_index,
    search,
)
from ct_nb.ct_encoder.train import CTEncoderRun, load_ct_encoder
from ct_nb.phantom.chest import phantom


@pytest.fixture(scope="module")
def run(trained, trained_cache):
    return CTEncoderRun.load(trained("ct_encoder", "smoke"))


@pytest.fixture(scope="module")
def index(run, tmp_path_factory):
    "Three phantoms as NIfTI, one of them with a label map."
    folder = tmp_path_factory.mktemp("scans")
    (folder / "labels").mkdir()
    for seed in (900, 901, 902):
        chest = phantom(seed, 64, 360)
        chest.volume.save(folder / f"scan-{seed}.nii.gz")
        if seed == 900:
            # TotalSegmentator's numbers
            chest.volume.__class__(
                np.isin(chest.regions, (1, 2)) * 10 + (chest.regions == 7) * 51, chest.volume.affine
            ).save(folder / "labels" / "scan-900.nii.gz")
    (folder / "empty.nii.gz").write_bytes(b"")
    return embed_scans([folder], run.out, progress=False)


def test_rows_are_scans_and_their_regions(index, run):
    found, skipped, notes = index
    assert {scan for scan, about in zip(found.scans, found.about) if about == WHOLE} == {
        "scan-900",
        "scan-901",
        "scan-902",
    }
    assert {about for scan, about in zip(found.scans, found.about) if scan == "scan-900"} == {
        WHOLE,
        REGIONS[1][0],
        REGIONS[7][0],
    }
    assert np.allclose(
        np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5
    ) and found.vectors.shape == (5, run.model.config.encoder.shared_dim)
    assert (
        len(skipped) == 1
        and "empty.nii.gz" in skipped[0][0]
        and "empty.nii.gz" in skipped[0][1]
        and notes == []
    )


def test_a_row_is_the_encoders_own_answer(run):
    model, item = load_ct_encoder(run.out), run.validation[0]
    vectors = embed_scan(model, item["hu"], item["regions"].numpy())
    with torch.no_grad():
        seen = model.encoder(item["hu"][None], item["regions"][None])
    assert np.allclose(
        vectors[WHOLE], torch.nn.functional.normalize(seen.global_embedding[0], dim=0), atol=1e-6
    )
    for n, (name, _) in REGIONS.items():
        assert (name in vectors) == bool(seen.present[0, n - 1])
    assert np.allclose(
        vectors["heart"],
        torch.nn.functional.normalize(seen.region_embeddings[0, 6], dim=0),
        atol=1e-6,
    ) and not np.allclose(vectors["heart"], vectors["aorta"], atol=1e-3)


def test_the_file_keeps_everything_and_knows_its_weights(index, run, tmp_path):
    found = index[0]
    found.save(tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["scan", "file", "about", "vector"] and table.num_rows == len(
        found
    )
    again, model = open_index(tmp_path / "e.parquet")
    assert np.array_equal(again.vectors, found.vectors) and (
        again.scans,
        again.files,
        again.about,
        again.digest,
    ) == (found.scans, found.files, found.about, found.digest)
    assert (again.weights, again.digest) == (str(run.out.resolve()), found.digest)
    other = tmp_path / "other"
    CTEncoderRun("micro", out=other, seed=1, steps=1).open(progress=False).fit(progress=False)
    with refused(file="other", kind=FileError):
        open_index(tmp_path / "e.parquet", other)


def test_a_search_is_a_cosine_with_the_place_that_is_named(index, run):
    found, model = index[0], load_ct_encoder(run.out)
    with torch.no_grad():
        whole, part = (
            model.embed_texts(["Cardiomegaly."], level)[0].numpy() for level in ("global", "region")
        )
    hits = search("Cardiomegaly.", found, model, about=WHOLE)
    expected = {
        scan: float(v @ whole)
        for scan, about, v in zip(found.scans, found.about, found.vectors)
        if about == WHOLE
    }
    assert [h.scan for h in hits] == sorted(expected, key=expected.get, reverse=True) and hits[
        0
    ].score == pytest.approx(max(expected.values()), abs=1e-5)
    assert len(search("Cardiomegaly.", found, model, 2, WHOLE)) == 2
    heart = search("Cardiomegaly.", found, model, about="heart")
    assert [(h.scan, h.about) for h in heart] == [("scan-900", "heart")]
    row = next(v for v, about in zip(found.vectors, found.about) if about == "heart")
    assert heart[0].score == pytest.approx(float(row @ part), abs=1e-5)
    named = search("Consolidation in the left upper lobe.", found, model)
    assert {h.about for h in named} == {REGIONS[1][0]}
    # no scan has it on its map
    assert {h.about for h in search("Nodule in the thyroid.", found, model)} == {WHOLE}
    assert {h.about for h in search("A normal scan.", found, model)} == {WHOLE}


def test_bad_input_gets_a_sentence(index, run, tmp_path):
    found, model = index[0], load_ct_encoder(run.out)
    for text, options, argument in (
        ("  ", {}, "text"),
        ("x", {"top": 0}, "top"),
        ("x", {"about": "toe"}, "about"),
    ):
        with refused(argument):
            search(text, found, model, **options)
    with refused(file="e.csv", kind=FileError):
        found.save(tmp_path / "e.csv")
    with refused(file="none.parquet", kind=FileError):
        EmbeddingIndex.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"bad")
    with refused(file="bad.parquet", kind=FileError):
        EmbeddingIndex.load(tmp_path / "bad.parquet")
    import pyarrow as pa

    pq.write_table(pa.table({"scan": ["a"]}), tmp_path / "other.parquet")
    with refused(file="other.parquet", kind=FileError):
        EmbeddingIndex.load(tmp_path / "other.parquet")
    with refused(file="nowhere", kind=FileError):
        embed_scans([tmp_path / "nowhere"], run.out, False)
    (tmp_path / "nothing").mkdir()
    with refused(file="nothing", kind=FileError):
        embed_scans([tmp_path / "nothing"], run.out, False)
    (tmp_path / "nothing" / "a.nii.gz").write_bytes(b"")
    with refused(file="a.nii.gz", kind=FileError):
        embed_scans([tmp_path / "nothing"], run.out, False)


def test_real_scans_pass_through_and_labels_become_rows(run, real_ct):
    found, skipped, notes = embed_scans(
        [real_ct / "cip-ct64.nii.gz", real_ct / "ctfm-s0335.nii.gz", real_ct / "ts-example.nii.gz"],
        run.out,
        progress=False,
    )
    assert {"cip-ct64", "ctfm-s0335", "ts-example"} == set(found.scans) | {
        name for name, _ in skipped
    } and not skipped
    about = {about for scan, about in zip(found.scans, found.about) if scan == "ts-example"}
    assert {WHOLE, "spine"} <= about  # TotalSegmentator's numbers lie beside it
    # both lungs are 1 there, no spleen
    assert (
        [about for scan, about in zip(found.scans, found.about) if scan == "cip-ct64"] == [WHOLE]
        and len(notes) == 1
        and "labels/cip-ct64.nii.gz" in notes[0]
    )


def test_the_commands_from_scans_to_hits(index, run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.out.parent)
    folder = str(next(iter(index[0].files)).rsplit("/", 1)[0])
    # by a path that holds here alone
    text = ct_nb("embed", folder, "--weights", run.out.name, "--out", tmp_path / "e.parquet").stdout
    monkeypatch.chdir(tmp_path)
    assert "3 scans, 5 vectors" in text and "skipped:" in text and "empty.nii.gz" in text
    words = ("search", "Consolidation in the left upper lobe.", "--index", "e.parquet")
    lines = ct_nb(*words, "--top-k", 2).stdout.splitlines()
    assert len(lines) == 2 and "(left upper lobe)" in lines[0] and "scan-900" in lines[0]
    assert lines[1].startswith("note: 2 of 3 scans have no vector of left upper lobe")
    assert len(ct_nb(*words, "--region", WHOLE).stdout.splitlines()) == 3
    refusals = (
        (("embed", folder, "--weights", run.out, "--out", "e.csv"), "e.csv: "),
        (("search", " ", "--index", "e.parquet"), "text: "),
        (("search", "x", "--index", "none.parquet"), "none.parquet: "),
    )
    for command, beginning in refusals:
        assert refusal(*command).startswith(beginning)
