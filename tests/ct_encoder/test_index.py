"""The embedding index: its rows, its file, searches as cosines, and refused input."""

import json
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ct_nb, refusal
from ct_files import write_stored, write_table
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.core.regions import REGIONS
from ct_nb.ct_encoder.ct_rate import ct_rate_path
from ct_nb.ct_encoder.index import (
    WHOLE,
    EmbeddingIndex,
    embed_scan,
    embed_scans,
    open_index,
    query_notes,
    run_digest,
    search,
)
from ct_nb.ct_encoder.text_encoders import tower_digest, tower_files
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
        and "labels/cip-ct64.nii.gz" in notes[0]
        and all("set to air" in note for note in notes[1:])
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
    lines = ct_nb("search", "Zebra, \u00f6dem.", "--index", "e.parquet").stdout.splitlines()
    assert [line.partition(":")[2].split(": ")[-1] for line in lines[3:]] == ["\u00f6dem", "Zebra"]
    assert all(line.startswith("note: the text tower") for line in lines[3:])
    refusals = (
        (("embed", folder, "--weights", run.out, "--out", "e.csv"), "e.csv: "),
        (("search", " ", "--index", "e.parquet"), "text: "),
        (("search", "x", "--index", "none.parquet"), "none.parquet: "),
    )
    for command, beginning in refusals:
        assert refusal(*command).startswith(beginning)


# indexes of other programs, and weights that are not those


def unit_vectors(rows=3, width=4):
    vectors = np.random.default_rng(0).normal(size=(rows, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist()


def write_index(path, vectors, kind=None, **columns):
    names = [f"s{n}" for n in range(len(vectors))]
    columns = {"scan": names, "file": names, "about": [WHOLE] * len(names)} | columns
    table = pa.table(columns | {"vector": pa.array(vectors, kind)})
    metadata = {"ct_nb_weights": "/nowhere", "ct_nb_digest": "0"}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def with_vector(row, vector):
    return unit_vectors()[:row] + [vector] + unit_vectors()[row + 1 :]


LISTS = pa.list_(pa.float32(), 4)
NO_NAMES = pa.array([], pa.string())


@pytest.mark.parametrize(
    "vectors, kind, columns",
    [
        (with_vector(1, [float("nan"), 0, 0, 1]), None, {}),
        (with_vector(1, [float("inf"), 0, 0, 1]), None, {}),
        (with_vector(2, [0.0, 0, 0, 0]), None, {}),
        (with_vector(0, [1000.0, 0, 0, 0]), None, {}),
        (with_vector(0, [0.99, 0, 0, 0]), None, {}),
        (with_vector(1, [1.0, 0]), None, {}),
        (with_vector(1, None), None, {}),
        (with_vector(1, None), LISTS, {}),
        (with_vector(1, [None, 0.0, 0.0, 1.0]), None, {}),
        ([[]] * 3, pa.list_(pa.float32()), {}),
        ([[1, 0]] * 3, None, {}),
        ([1.0, 2.0, 3.0], None, {}),
        ([], LISTS, {"scan": NO_NAMES, "file": NO_NAMES, "about": NO_NAMES}),
        (unit_vectors(), None, {"scan": ["a", None, "c"]}),
        (unit_vectors(), None, {"scan": ["a", "", "c"]}),
        (unit_vectors(), None, {"file": [1, 2, 3]}),
        (unit_vectors(), None, {"about": [[WHOLE]] * 3}),
        (unit_vectors(), None, {"file": ["a", "b", "a"]}),  # twice about the same
    ],
)
def test_an_index_that_cannot_be_right_is_refused(tmp_path, vectors, kind, columns):
    with refused(file="e.parquet", kind=FileError):
        EmbeddingIndex.load(write_index(tmp_path / "e.parquet", vectors, kind, **columns))


@pytest.mark.parametrize("kind", [pa.list_(pa.float16()), pa.list_(pa.float64()), LISTS])
def test_an_index_of_another_precision_is_read(tmp_path, kind):
    vectors = np.float16(unit_vectors()) if kind == pa.list_(pa.float16()) else unit_vectors()
    found = EmbeddingIndex.load(write_index(tmp_path / "e.parquet", list(vectors), kind))
    assert found.vectors.dtype == np.float32 and np.allclose(found.vectors, vectors, atol=1e-3)


def test_a_damaged_index_is_named(tmp_path):
    path = write_index(tmp_path / "e.parquet", unit_vectors())
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        place = generator.integers(4, len(content) - 4)
        bit = 1 << generator.integers(8)
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        try:
            EmbeddingIndex.load(path)
        except FileError as error:
            assert str(error.file).endswith("e.parquet")


def test_an_index_moves_with_its_weights(index, run, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copytree(run.out, tmp_path / "a" / "run")
    found = EmbeddingIndex(**vars(index[0]) | {"weights": str(tmp_path / "a" / "run")})
    found.save(tmp_path / "a" / "e.parquet")
    (tmp_path / "a").rename(tmp_path / "b")
    again, _ = open_index(tmp_path / "b" / "e.parquet")
    assert again.weights == str(tmp_path / "b" / "run")
    shutil.rmtree(tmp_path / "b" / "run")
    with refused(file="e.parquet", kind=FileError):
        open_index(tmp_path / "b" / "e.parquet")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_other_weights_or_settings_are_refused_before_a_model_is_made(
    index, run, tmp_path, monkeypatch, file
):
    index[0].save(tmp_path / "e.parquet")
    other = shutil.copytree(run.out, tmp_path / "run")
    if file == "config.json":
        config = json.loads((other / file).read_text())
        config["network"]["text"] = str(tmp_path / "evil")
        (other / file).write_text(json.dumps(config))
    else:
        (other / file).write_bytes((other / file).read_bytes() + b" ")
    monkeypatch.setattr("ct_nb.ct_encoder.index.load_ct_encoder", None)
    with refused(file=other, kind=FileError):
        open_index(tmp_path / "e.parquet", other)
    (other / "model.safetensors").unlink()
    with refused(file=other, kind=FileError):
        open_index(tmp_path / "e.parquet", other)


def test_the_digest_covers_the_folder_of_the_text_tower(run, tmp_path):
    other = shutil.copytree(run.out, tmp_path / "run")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "tokenizer.json").write_text("1")
    config = json.loads((other / "config.json").read_text())
    config["network"]["text"] = str(tmp_path / "bert")
    (other / "config.json").write_text(json.dumps(config))
    first = run_digest(other)
    (tmp_path / "bert" / "tokenizer.json").write_text("2")
    assert len({first, run_digest(other), run_digest(run.out)}) == 3


def test_what_of_a_query_is_not_read_is_said(index, run):
    model = load_ct_encoder(run.out)
    with pytest.warns(UserWarning, match="\u00f6dem"):
        search("Nodule and \u00f6dem.", index[0], model)
    with pytest.warns(UserWarning, match="the text tower reads"):
        search("nodule, " * 100, index[0], model)
    with pytest.warns(UserWarning, match="in pieces: zebra"):
        search("zebra", index[0], model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search("nodule", index[0], model)
    assert query_notes("nodule", model) == []


def test_a_scan_that_is_named_twice_is_embedded_once(index, run):
    file = sorted(index[0].files)[0]
    found, _, _ = embed_scans([file, file], run.out, progress=False)
    assert len(set(found.files)) == 1 and len(set(found.about)) == len(found)


def test_images_of_ct_rate_are_embedded_by_their_table(run, tmp_path):
    volume = phantom(900, 64, 360).volume
    affine = volume.affine
    name = "valid_1_a_1.nii.gz"
    along = (affine[:3, :2] / volume.grid.spacing_mm[:2]).T.ravel().tolist()
    cells = {
        "VolumeName": name,
        "RescaleSlope": "1",
        "RescaleIntercept": "-1024",
        "XYSpacing": volume.grid.spacing_mm[:2].tolist(),
        "ZSpacing": volume.grid.spacing_mm[2],
        "ImageOrientationPatient": along,
        "ImagePositionPatient": affine[:3, 3].tolist(),
    }
    write_table(tmp_path / "dataset/metadata/validation_metadata.csv", cells, cells.values())
    write_stored(tmp_path / ct_rate_path(name, 1), volume.hu + 1024, np.diag([-1.0, -1, 1, 1]))
    write_stored(tmp_path / "scan.nii.gz", volume.hu, affine)
    first, _, notes = embed_scans([tmp_path / "dataset"], run.out, progress=False)
    second, _, _ = embed_scans([tmp_path / "scan.nii.gz"], run.out, progress=False)
    assert np.allclose(first.vectors, second.vectors, atol=1e-4)
    assert any("the table's" in note for note in notes)


def test_a_tower_with_other_files_is_refused_wherever_a_run_is_loaded(run, tmp_path):
    "Its weights are no part of the run's: other ones give other vectors, without a word."
    other = shutil.copytree(run.out, tmp_path / "run")
    tower = tmp_path / "bert"
    tower.mkdir()
    (tower / "model.safetensors").write_bytes(b"1")
    config = json.loads((other / "config.json").read_text())
    assert config["tower"] is None
    config["network"]["text"] = str(tower)
    for digest in (None, "0" * 32, tower_digest(tower)):
        (other / "config.json").write_text(json.dumps(config | {"tower": digest}))
        with refused() as caught:
            load_ct_encoder(other)
        told = "has other files than it was trained with" in caught.value.reason
        assert told == (digest != tower_digest(tower))  # else it is read, and is no tower
    before = tower_digest(tower)
    (tower / "model.safetensors").write_bytes(b"2")
    assert tower_digest(tower) != before and tower_digest("tiny") is None
    (tower / "notes.md").write_text("of no matter")
    assert len(tower_files(tower)) == 1
