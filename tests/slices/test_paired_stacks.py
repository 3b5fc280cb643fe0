"""Archives of thick and thin slices in their published layouts, whole and broken; sides; the evaluator of RPLHR-CT; preparation that resumes, reports and survives."""

import csv
import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from ct_files import body, zipped
from ct_files import series_members as series
from places import PROGRAMS
from refusals import refused

from ct_nb.data.hounsfield import CTReadError
from ct_nb.physics.volume import Volume, Window
from ct_nb.slices.open import open_stacks
from ct_nb.slices.paired_stacks import (
    SIDES,
    StackCase,
    StackSource,
    agreement_hu,
    pair_stack,
    side_counts,
    split_patients,
    split_stacks,
    stack_sides,
)
from ct_nb.slices.pe_archive import find_series, pe_archive, read_pair
from ct_nb.slices.prepare import main
from ct_nb.slices.prepared import prepare_stacks, prepared_stacks, read_stack
from ct_nb.slices.rplhr_ct import rplhr, rplhr_scores, rplhr_ssim
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThinStack,
    average_slices,
    from_unit,
    slice_profile_matrix,
)
from ct_nb.slices.thin_folder import thin_folder

THIN = body((60, 32, 40))
THICK = THIN.reshape(12, 5, 32, 40).mean(1)


def pair(thick=THICK, thin=THIN, **tags):
    return series(thick, 2.0, 5.0, "1.2.1", "1", **tags) + series(
        thin, 0.0, 1.0, "1.2.2", "2", **tags
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return zipped(tmp_path_factory.mktemp("pe") / "APE" / "0001.zip", pair())


# ---------------------------------------------------------------- a patient's zip
def test_both_series_are_found_and_placed(good):
    stack = read_pair(good, "APE_0001", "APE_0001")
    assert (
        stack.thin_axis == SliceAxis(0.0, 1.0, 60)
        and stack.thick_axis == SliceAxis(2.0, 5.0, 12)
        and stack.profile == SliceProfile(5.0)
        and stack.pixel_mm == (2.0, 2.0)
    )
    assert np.array_equal(stack.thin, THIN) and np.array_equal(stack.thick, np.rint(THICK))
    item = StackPairs(StackSource([StackCase("a", "a", lambda: stack)]), count=3, size=8)[0]
    assert (
        item["measured"]
        and (average_slices(item["thin"], item["matrix"]) - item["thick"]).abs().max() <= 0.51
    )
    assert any("differ from the thick ones by 0 HU" in note for note in stack.notes)


def test_agreement_sees_what_does_not_belong_together(good):
    stack = read_pair(good, "a", "a")
    other = ThinStack(
        "a",
        "a",
        stack.thin,
        stack.thin_axis,
        stack.pixel_mm,
        np.roll(stack.thick, 6, axis=2),
        stack.thick_axis,
        stack.profile,
    )
    assert agreement_hu(stack) < 0.6 < 2 < agreement_hu(other)  # other noise, and edges elsewhere
    assert math.isnan(
        agreement_hu(
            ThinStack(
                "a",
                "a",
                stack.thin * 0 - 1000,
                stack.thin_axis,
                stack.pixel_mm,
                stack.thick * 0 - 1000,
                stack.thick_axis,
                stack.profile,
            )
        )
    )


@pytest.mark.parametrize(
    "charset", ["GB18030", "ISO_IR 192", "ISO 2022 IR 58", "ISO 8859-99 nonsense", None]
)
def test_odd_text_encodings_are_survived(tmp_path, charset):
    members = []
    for name, content in pair():
        import io

        import pydicom

        d = pydicom.dcmread(io.BytesIO(content))
        if charset:
            d.SpecificCharacterSet = charset
        for tag, kind in ((0x00100010, "PN"), (0x0008103E, "LO")):
            d.add_new(tag, kind, "肺动脉栓塞 薄层".encode("gb18030"))
        buffer = io.BytesIO()
        d.save_as(buffer, enforce_file_format=True)
        members.append((name.replace("1/", "5毫米/").replace("2/", "1毫米/"), buffer.getvalue()))
    stack = read_pair(zipped(tmp_path / "患者 一.zip", members), "a", "a")
    assert stack.thin_axis.count == 60 and np.array_equal(stack.thick, np.rint(THICK))


def test_file_names_become_ids(tmp_path):
    for name in ("APE/患者 1.zip", "APE/1.zip", "non APE/1.zip", "APE/.hidden.zip"):
        zipped(tmp_path / name, [("a", b"")])
    # GB18030 bytes as a file name
    (tmp_path / "APE" / os.fsdecode(b"\xb2\xa1\xc8\xcb.zip")).write_bytes(b"")
    archive = pe_archive(tmp_path)
    assert (
        {"APE_1", "non_APE_1", "APE_患者_1"} < set(archive.ids)
        and len(archive) == 4
        and archive.patients == archive.ids
    )
    assert all(id.isprintable() and "/" not in id and " " not in id for id in archive.ids) and all(
        id.encode() for id in archive.ids
    )
    (tmp_path / "patients.csv").write_text("case,patient\nAPE/1.zip,anna\nnon_APE_1,anna\n")
    assert Counter(pe_archive(tmp_path).patients)["anna"] == 2


def test_other_series_and_doubles_do_not_disturb(tmp_path):
    scout = [
        (name, content)
        for name, content in series(
            THIN[:1], 0.0, 1.0, "1.2.9", "0", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
        )
    ]
    half = series(THIN[:30], 0.0, 1.0, "1.2.8", "3")  # a second thin series, shorter
    double = [(f"copy/{name}", content) for name, content in pair()[:3]]
    stack = read_pair(
        zipped(tmp_path / "p.zip", pair() + scout + half + double + [("readme.txt", b"hello")]),
        "a",
        "a",
    )
    assert stack.thin_axis.count == 60 and stack.thick_axis.count == 12
    assert any("repeat a slice, dropped" in note for note in stack.notes) and any(
        "1.2.9 has 1 slices" in note for note in stack.notes
    )


def test_gaps_are_found(tmp_path):
    hole = [m for m in pair() if m[0] != "2/IM0030"]
    with pytest.raises(
        CTReadError,
        match=(
            r"p.zip: must hold a thick and a thin CT series, holds 12 slices 5 mm apart \(left out:"
            r" series 1.2.2: 1 of its slices is missing, at .* 30\) mm"
        ),
    ):
        read_pair(zipped(tmp_path / "p.zip", hole), "a", "a")
    # another thin series is whole
    kept = read_pair(
        zipped(tmp_path / "q.zip", hole + series(THIN[:40], 0.0, 1.0, "1.2.3", "3")), "a", "a"
    )
    assert kept.thin_axis.count == 40 and any(
        "1.2.2: 1 of its slices is missing" in note for note in kept.notes
    )


@pytest.mark.parametrize(
    "members, words",
    [
        (
            lambda: series(THIN, 0.0, 1.0, "1.2.2", "2"),
            "holds 60 slices 1 mm apart; complete the zip",
        ),
        (
            lambda: series(THICK, 2.0, 5.0, "1.2.1", "1") + series(THICK, 2.0, 5.0, "1.2.2", "2"),
            "holds 12 slices 5 mm apart, 12 slices 5 mm apart",
        ),
        (lambda: [("a.txt", b"nothing")], "holds none that can be used"),
        (
            lambda: series(THICK, 2.0, 5.0, "1.2.1", "1") + series(THIN, 900.0, 1.0, "1.2.2", "2"),
            "different parts of the patient",
        ),
        (
            lambda: series(
                THICK, 2.0, 5.0, "1.2.1", "1", ImageOrientationPatient=[0.8, 0.6, 0, -0.6, 0.8, 0]
            )
            + series(THIN, 0.0, 1.0, "1.2.2", "2"),
            "turned by 36.9°",
        ),
        (lambda: pair() + [("../../etc/cron.d/x", b"x")], "leads out of the archive"),
        (lambda: pair() + [("bomb.dcm", bytes(80_000_000))], "zip bomb"),
        (lambda: pair(thick=THICK * 0 + 30, thin=THIN * 0 + 30), "is a picture, not a CT"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_reason(tmp_path, members, words):
    path = zipped(tmp_path / "p.zip", members())
    with pytest.raises(CTReadError, match=words) as error:
        read_pair(path, "a", "a")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_claimed_thickness_is_used_when_it_can_be_true(tmp_path):
    found = {}
    for claimed in (7.5, 0.0, 400.0, None):
        path = zipped(
            tmp_path / f"{claimed}.zip",
            series(THICK, 2.0, 5.0, "1.2.1", "1", SliceThickness=claimed)
            + series(THIN, 0.0, 1.0, "1.2.2", "2"),
        )
        found[claimed] = next(f for f in find_series(path)[0] if f.slices == 12)
    assert {claimed: f.thickness_mm for claimed, f in found.items()} == {
        7.5: 7.5,
        0.0: None,
        400.0: None,
        None: None,
    }
    assert [len(f.notes) for f in found.values()] == [0, 1, 1, 0]
    stack = read_pair(tmp_path / "400.0.zip", "a", "a")
    assert stack.profile == SliceProfile(5.0) and any(
        "SliceThickness of 400.0 mm cannot be that of slices 5 mm apart" in note
        for note in stack.notes
    )


# ---------------------------------------------------------------- two grids
def volume(hu, spacing, first, pixel=2.0, origin=(-40.0, -30.0)):
    affine = np.diag([pixel, pixel, spacing, 1.0])
    affine[:3, 3] = (*origin, first)
    return Volume(hu, affine)


def test_thick_slices_from_the_other_end():
    thick = volume(THICK, 5.0, 2.0)
    thin = volume(THIN, 1.0, 0.0)
    turned = Volume(
        THICK[::-1],
        thick.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 11], [0, 0, 0, 1.0]]),
    )
    one = pair_stack("a", "a", thick, thin)
    two = pair_stack("a", "a", turned, thin)
    assert one.thick_axis == two.thick_axis and np.array_equal(one.thick, two.thick)


def test_another_field_of_view_is_brought_onto_the_thin_pixels():
    ramp = lambda shape, pixel, origin: np.broadcast_to(
        (origin[0] + pixel * np.arange(shape[2]))[None, None]
        + 0.3 * (origin[1] + pixel * np.arange(shape[1]))[:, None],
        shape,
    ).astype(np.float32)
    thin = volume(ramp((60, 30, 40), 2.0, (-40, -30)), 1.0, 0.0)
    thick = volume(ramp((12, 36, 32), 1.5, (-26, -24)), 5.0, 2.0, 1.5, (-26, -24))
    stack = pair_stack("a", "a", thick, thin)
    assert (
        stack.thin.shape[1:] == stack.thick.shape[1:]
        and np.allclose(stack.affine[:2, 3], (-26, -24))
        and stack.thin_axis == SliceAxis(0.0, 1.0, 60)
        and stack.thick_axis == SliceAxis(2.0, 5.0, 12)
    )
    # a shift of one pixel would be 2
    assert np.abs(stack.thick - stack.thin[:1])[
        :, 1:-1, 1:-1
    ].max() < 0.3 and "resampled" in " ".join(stack.notes)
    with pytest.raises(ValueError, match="share 11% of the thin ones' area"):
        pair_stack("a", "a", volume(ramp((12, 10, 13), 2.0, (-40, -30)), 5.0, 2.0), thin)


# ---------------------------------------------------------------- sides
def test_sides_of_the_study_and_of_others():
    names = [f"{i:04d}" for i in range(323)]
    sides = split_patients(names)
    assert [list(sides.values()).count(s) for s in SIDES] == [
        243,
        48,
        32,
    ] and sides == split_patients(names[::-1] + names)
    assert sides != split_patients(names, seed=1) and sides != dict(
        zip(names, ["train"] * 243 + ["validation"] * 48 + ["test"] * 32)
    )
    for count in (3, 4, 7, 50, 324, 1000):
        counts = side_counts(count)
        assert (
            sum(counts) == count
            and min(counts) >= 1
            and (
                count < 12
                or all(abs(c - count * s / 323) < 1 for c, s in zip(counts, (243, 48, 32)))
            )
        )
    with pytest.raises(ValueError, match="2 patients do not fill 3 sides"):
        side_counts(2)


def test_a_growing_archive_moves_nobody():
    few = split_patients([f"{i}" for i in range(20)])
    more = split_patients([f"{i}" for i in range(200)], known=few)
    assert all(more[name] == side for name, side in few.items()) and [
        list(more.values()).count(s) for s in SIDES
    ] == list(side_counts(200))


def test_no_patient_on_two_sides():
    source = StackSource(StackCase(f"scan-{i}", f"patient-{i // 2}", dict) for i in range(24))
    parts = split_stacks(source)
    patients = [set(part.patients) for part in parts.values()]
    assert (
        sum(map(len, patients)) == 12
        and not (
            patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2]
        )
        and sum(len(p) for p in parts.values()) == 24
    )
    assert stack_sides(source.subset([0, 1])) == {"patient-0": "train"}
    with pytest.raises(ValueError, match="two scans are named 'a'"):
        StackSource([StackCase("a", "a", dict), StackCase("a", "b", dict)])


# ---------------------------------------------------------------- RPLHR-CT
def nifti(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32).transpose(2, 1, 0), np.eye(4)), path)


@pytest.fixture(scope="module")
def rplhr_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rplhr")
    rng = np.random.default_rng(0)
    for folder in ("train", "val", "test"):
        for case in range(2):
            thin = rng.random((46, 12, 12))
            # thick slice i about thin slice 5i
            thick = np.stack([thin[max(5 * i - 2, 0) : 5 * i + 3].mean(0) for i in range(10)])
            nifti(root / folder / "1mm" / f"{folder}{case}.nii.gz", thin)
            nifti(root / folder / "5mm" / f"{folder}{case}.nii.gz", thick)
    return root


def test_rplhr_folders_and_alignment(rplhr_root):
    window = Window("set", -1000, 1000)
    source = rplhr(rplhr_root, window)
    assert len(source) == 6 and {side: part.ids for side, part in split_stacks(source).items()} == {
        "train": ["train0", "train1"],
        "validation": ["val0", "val1"],
        "test": ["test0", "test1"],
    }
    item = StackPairs(source)[0]
    # the first and last stand over the edge
    assert (
        item["thick"].shape[0] == 8
        and item["thick_axis"].first_mm == 5.0
        and len(item["thin"]) == 40
    )
    # HU; the alignment is that of the files
    assert (average_slices(item["thin"], item["matrix"]) - item["thick"]).abs().max() < 1e-2
    crop = StackPairs(source, count=2)[0]
    # its two inner slices answer a crop of four that begins one slice before
    start = round(crop["thick_axis"].first_mm / 5) - 1
    assert crop["thin_axis"].first_mm == 5 * start + 3 and crop["thin_axis"].count == 10
    beside = slice_profile_matrix(
        SliceAxis(0.0, 1.0, 46), SliceAxis(3.0, 5.0, 8), SliceProfile(5.0)
    )
    # centres at 5i + 3 would be wrong
    assert np.abs(average_slices(source[0].thin, beside) - source[0].thick[:8]).max() > 100
    assert np.allclose(from_unit(np.float32(0.5), window), 0) and "-1000" in source[0].notes[0]


def test_rplhr_by_name(rplhr_root):
    assert open_stacks(f"rplhr:{rplhr_root}").ids == rplhr(rplhr_root).ids


def test_rplhr_refusals(rplhr_root, tmp_path):
    with pytest.raises(ValueError, match="holds no train, val or test"):
        rplhr(tmp_path)
    for name, values, words in (
        ("hu", np.full((46, 12, 12), -900.0), r"from -900 to -900, RPLHR-CT is stored in \[0, 1\]"),
        ("short", np.zeros((30, 12, 12)), "about 46 slices of the same size"),
        ("small", np.zeros((46, 12, 10)), "of the same size"),
    ):
        nifti(tmp_path / name / "train" / "1mm" / "a.nii.gz", values)
        nifti(tmp_path / name / "train" / "5mm" / "a.nii.gz", np.zeros((10, 12, 12)))
        with pytest.raises(CTReadError, match=words):
            rplhr(tmp_path / name)[0]
    (tmp_path / "hu" / "train" / "5mm" / "a.nii.gz").unlink()
    with pytest.raises(ValueError, match="a is in only one of 1mm and 5mm"):
        rplhr(tmp_path / "hu")


def test_rplhr_evaluator_rules():
    rng = np.random.default_rng(1)
    truth = rng.random((31, 24, 20))
    predicted = truth + rng.normal(0, 0.05, truth.shape)
    scores = rplhr_scores(predicted, truth)
    inner = (np.clip(predicted, 0, 1) - truth)[5:-5]
    assert scores["psnr"] == pytest.approx(10 * math.log10(1 / np.mean(inner**2)))
    # all slices; not clamped; peak of the data
    wrong = [
        10 * math.log10(1 / np.mean((np.clip(predicted, 0, 1) - truth) ** 2)),
        10 * math.log10(1 / np.mean((predicted - truth)[5:-5] ** 2)),
        # or averaged over slices
        10 * math.log10(truth[5:-5].max() ** 2 / np.mean(inner**2)),
        np.mean([10 * math.log10(1 / np.mean(s**2)) for s in inner]),
    ]
    assert all(abs(scores["psnr"] - w) > 1e-4 for w in wrong)
    predicted[:5], predicted[-5:] = 9.0, -9.0
    assert rplhr_scores(predicted, truth) == scores
    with pytest.raises(ValueError, match="more than 10 slices"):
        rplhr_scores(truth[:10], truth[:10])
    with pytest.raises(ValueError, match="of one shape"):
        rplhr_scores(truth, truth[:, :5])


def test_rplhr_ssim_is_that_of_scikit_image_away_from_the_border():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(2)
    a = rng.random((2, 48, 48))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    # zeros beyond the border, by hand
    framed = [np.pad(v, ((0, 0), (5, 5), (5, 5))) for v in (a, b)]
    for k in range(2):
        _, full = metrics.structural_similarity(
            framed[0][k],
            framed[1][k],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            truncate=3.4,
            full=True,
        )
        assert rplhr_ssim(torch.from_numpy(a), torch.from_numpy(b))[k].item() == pytest.approx(
            full[5:-5, 5:-5].mean(), abs=1e-9
        )


# ---------------------------------------------------------------- folders, words, real CT
def test_folders_of_thin_ct(tmp_path):
    volume(THIN, 1.0, 0.0).save(tmp_path / "thin.nii.gz")
    volume(THICK, 5.0, 0.0).save(tmp_path / "thick.nii.gz")
    source = thin_folder(tmp_path)
    assert (
        source.ids == ["thick", "thin"]
        and np.array_equal(source[1].thin, THIN)
        and source[1].thick is None
    )
    with pytest.raises(
        CTReadError, match="thick.nii.gz: its slices are 5 mm apart, at most 1.5 mm count as thin"
    ):
        source[0]
    assert (
        thin_folder(tmp_path, 5.0)[0].thin_axis.spacing_mm == 5
        and open_stacks(str(tmp_path)).ids == source.ids
    )
    with pytest.raises(ValueError, match="neither 'phantom:COUNT'"):
        open_stacks(f"pe:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="holds no zip"):
        open_stacks(f"pe:{tmp_path}")
    with pytest.raises(ValueError, match="holds no CT"):
        thin_folder(PROGRAMS)


def test_phantoms_are_stacks():
    source = open_stacks("phantom:1", size=16, side_mm=320.0)
    stack = source[0]
    assert (
        stack.thin.shape == (16, 16, 16)
        and stack.thin_axis.spacing_mm == 20
        and stack.thick is None
        and source.cases[0].content
    )


def test_real_thin_folder(real_ct):
    if not (real_ct / "thin").is_dir():
        pytest.skip("no thin CT among the real CTs here")
    source = thin_folder(real_ct / "thin")
    assert {"lidc-0002", "nsclcrg-R01-001"} <= set(source.ids)


def test_a_real_zip_with_one_series_is_no_pair(real_ct):
    path = real_ct / "dicom" / "lungdx-A0002.zip"
    if not path.is_file():
        pytest.skip("no DICOM zip among the real CTs here")
    found, left_out = find_series(path)
    assert [(f.slices, round(f.spacing_mm, 3)) for f in found] == [(30, 8.0)] and not left_out
    with pytest.raises(CTReadError, match="holds 30 slices 8 mm apart"):
        read_pair(path, "a", "a")


# ---------------------------------------------------------------- preparation
@pytest.fixture
def archive(tmp_path, good) -> Path:
    root = tmp_path / "archive"
    for name in ("APE/0001", "APE/0002", "non APE/0001"):
        (root / f"{name}.zip").parent.mkdir(parents=True, exist_ok=True), (
            root / f"{name}.zip"
        ).write_bytes(good.read_bytes())
    (root / "APE" / "0003.zip").write_bytes(good.read_bytes()[:20_000])
    zipped(root / "non APE" / "0002.zip", [("../x", b"x")])
    return root


def statuses(lines):
    return {line["id"]: line["status"] for line in lines}


def test_preparing_reports_goes_on_and_resumes(archive, tmp_path, good, monkeypatch):
    out, source = tmp_path / "out", pe_archive(archive)
    lines = prepare_stacks(source, out, workers=0)
    assert statuses(lines) == {
        "APE_0001": "prepared",
        "APE_0002": "prepared",
        "APE_0003": "failed",
        "non_APE_0001": "prepared",
        "non_APE_0002": "failed",
    }
    rows = {row["id"]: row for row in csv.DictReader(open(out / "report.csv", encoding="utf-8"))}
    assert (
        "cut short" in rows["APE_0003"]["reason"]
        and "leads out of the archive" in rows["non_APE_0002"]["reason"]
    )
    assert (
        rows["APE_0001"]["thin_slices"],
        rows["APE_0001"]["thick_mm"],
        rows["APE_0001"]["patient"],
        rows["APE_0001"]["rows"],
    ) == ("60", "5.0", "APE_0001", "32") and float(rows["APE_0001"]["agreement_hu"]) < 1
    prepared = prepared_stacks(out)
    first = prepared[0]
    assert (
        prepared.ids == ["APE_0001", "APE_0002", "non_APE_0001"]
        and np.array_equal(first.thin, THIN)
        and isinstance(first.thin, np.memmap)
        and np.array_equal(first.thick, np.rint(THICK))
    )
    assert (
        first.thick_axis == SliceAxis(2.0, 5.0, 12)
        and first.profile == SliceProfile(5.0)
        and first.pixel_mm == (2.0, 2.0)
        and np.allclose(first.affine, source[0].affine)
    )
    assert not [p for p in out.iterdir() if p.name.startswith(".")]

    (archive / "APE" / "0003.zip").write_bytes(good.read_bytes())  # the download is completed
    os.truncate(out / "APE_0002" / "thin.npy", 1000)  # a crash tore a file
    monkeypatch.setattr("ct_nb.slices.paired_stacks.read_ct", read_once := Counting())
    again = statuses(prepare_stacks(pe_archive(archive), out, workers=0))
    assert (
        again
        == {
            "APE_0001": "kept",
            "APE_0002": "prepared",
            "APE_0003": "prepared",
            "non_APE_0001": "kept",
            "non_APE_0002": "failed",
        }
        and read_once.count == 4
    )
    (archive / "APE" / "0001.zip").write_bytes(b"replaced by something broken")
    # nothing old under a line that says failed
    assert (
        statuses(prepare_stacks(pe_archive(archive), out, workers=0))["APE_0001"] == "failed"
        and "APE_0001" not in prepared_stacks(out).ids
    )


class Counting:
    "read_ct that counts."

    count = 0

    def __call__(self, *args):
        from ct_nb.data.read import read_ct

        self.count += 1
        return read_ct(*args)


def test_sides_are_kept_when_an_archive_grows(archive, tmp_path, good):
    out = tmp_path / "out"
    before = {
        line["patient"]: line["side"]
        for line in prepare_stacks(pe_archive(archive), out, workers=0)
    }
    for k in range(10, 22):
        (archive / "APE" / f"{k:04d}.zip").write_bytes(b"not yet here")
    after = {
        line["patient"]: line["side"]
        for line in prepare_stacks(pe_archive(archive), out, workers=0)
    }
    assert (
        set(before.values()) == set(SIDES)
        and all(after[p] == side for p, side in before.items())
        and len(after) == 17
    )
    assert {case.patient: case.side for case in prepared_stacks(out).cases} == {
        p: after[p] for p in ("APE_0001", "APE_0002", "non_APE_0001")
    }
    assert {side: len(part) for side, part in split_stacks(prepared_stacks(out)).items()} == {
        side: sum(after[p] == side for p in ("APE_0001", "APE_0002", "non_APE_0001"))
        for side in SIDES
    }


def test_where_nothing_may_be_written(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    source = StackSource([StackCase("a", "a", tiny)])
    with pytest.raises(ValueError, match="exists already and is no prepared folder"):
        prepare_stacks(source, tmp_path / "mine", workers=0)
    with refused("workers"):
        prepare_stacks(source, tmp_path / "x", workers=-1)
    with pytest.raises(ValueError, match="is no prepared folder"):
        prepared_stacks(tmp_path)
    with pytest.raises(ValueError, match="is no prepared scan or was cut short"):
        read_stack(tmp_path)
    assert statuses(
        prepare_stacks(
            StackSource([StackCase("a", "a", functools.partial(tiny, MemoryError("no room")))]),
            tmp_path / "y",
            workers=0,
        )
    ) == {"a": "failed"}
    with pytest.raises(ValueError, match="none of its scans could be prepared"):
        prepared_stacks(tmp_path / "y")


def tiny(error=None) -> ThinStack:
    if error:
        raise error
    return ThinStack("a", "a", np.zeros((4, 3, 3), np.float32), SliceAxis(0.0, 1.0, 4), (1.0, 1.0))


def test_processes_of_dask_and_one_that_dies(archive, tmp_path):
    pytest.importorskip("distributed")
    good = pe_archive(archive).cases[:2]
    deadly = StackCase("deadly", "deadly", functools.partial(os._exit, 3))
    lines = prepare_stacks(StackSource([*good, deadly]), tmp_path / "out", workers=1)
    found = statuses(lines)
    assert (
        len(lines) == 3
        and found.pop("deadly") == "failed"
        and "process died" in next(line["reason"] for line in lines if line["id"] == "deadly")
    )
    # those in line behind it are not lost
    assert set(found.values()) <= {"prepared", "kept"} and np.array_equal(
        prepared_stacks(tmp_path / "out")[1].thin, THIN
    )


def test_a_scheduler_whose_worker_is_another_process(archive, tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        address = cluster.scheduler_address
        with distributed.Client(address, set_as_default=False) as client:
            elsewhere = client.run(os.getpid)
        # one that is whole, one that is not
        lines = prepare_stacks(
            StackSource(pe_archive(archive).cases[::2]), tmp_path / "out", scheduler=address
        )
    assert address.startswith("tcp://") and os.getpid() not in elsewhere.values()
    assert statuses(lines) == {
        "APE_0001": "prepared",
        "APE_0003": "failed",
        "non_APE_0002": "failed",
    } and np.array_equal(prepared_stacks(tmp_path / "out")[0].thin, THIN)


def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    distributed = pytest.importorskip("dask.distributed")
    real = distributed.Client
    monkeypatch.setattr(
        distributed, "Client", lambda address, timeout, **more: real(address, timeout=1, **more)
    )
    with pytest.raises(OSError, match="scheduler: tcp://127.0.0.1:9 cannot be reached"):
        prepare_stacks(
            StackSource([StackCase("a", "a", tiny)]),
            tmp_path / "out",
            scheduler="tcp://127.0.0.1:9",
        )


def test_without_dask_a_sentence(tmp_path, monkeypatch):
    for name in ("dask.distributed", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install dask distributed"):
        prepare_stacks(StackSource([StackCase("a", "a", tiny)]), tmp_path / "out", workers=2)


def test_from_the_shell(archive, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ct_nb.slices.prepare",
            f"pe:{archive}",
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "0",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 prepared, 0 kept, 2 failed; see" in done.stdout, done.stderr
    assert (
        open_stacks(str(tmp_path / "out")).ids == ["APE_0001", "APE_0002", "non_APE_0001"]
        and json.loads((tmp_path / "out" / "slabs.json").read_text())["seed"] == 0
    )
    with pytest.raises(SystemExit, match="holds no zip"):
        main(f"pe:{tmp_path / 'out'}", out=str(tmp_path / "two"))
