"""Archives of DICOM zips: pairs, odd encodings, and what is refused."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ct_files import body, zipped
from ct_files import series_members as series
from refusals import refused

from ct_nb.data.hounsfield import CTReadError
from ct_nb.slices.paired_stacks import (
    StackCase,
    StackSource,
    agreement_hu,
)
from ct_nb.slices.pe_archive import find_series, pe_archive, read_pair
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThinStack,
    average_slices,
)

THIN = body((60, 32, 40))
THICK = THIN.reshape(12, 5, 32, 40).mean(1)


def pair(thick=THICK, thin=THIN, **tags):
    return series(thick, 2.0, 5.0, "1.2.1", "1", **tags) + series(
        thin, 0.0, 1.0, "1.2.2", "2", **tags
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return zipped(tmp_path_factory.mktemp("pe") / "APE" / "0001.zip", pair())


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
    # a slip in a name would put one patient on both sides of the split
    (tmp_path / "patients.csv").write_text("case,patient\nAPE/1.zip,anna\nnon_APE_7,anna\n")
    with refused(file="patients.csv") as caught:
        pe_archive(tmp_path)
    assert "line 3" in caught.value.reason


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


def test_a_header_thickness_is_used_when_it_can_be_true(tmp_path):
    series_of = {}
    for thickness in (7.5, 0.0, 400.0, None):
        path = zipped(
            tmp_path / f"{thickness}.zip",
            series(THICK, 2.0, 5.0, "1.2.1", "1", SliceThickness=thickness)
            + series(THIN, 0.0, 1.0, "1.2.2", "2"),
        )
        series_of[thickness] = next(s for s in find_series(path)[0] if s.slices == 12)
    assert {thickness: s.thickness_mm for thickness, s in series_of.items()} == {
        7.5: 7.5,
        0.0: None,
        400.0: None,
        None: None,
    }
    assert [len(s.notes) for s in series_of.values()] == [0, 1, 1, 0]
    stack = read_pair(tmp_path / "400.0.zip", "a", "a")
    assert stack.profile == SliceProfile(5.0) and any(
        "SliceThickness of 400.0 mm is impossible for slices 5 mm apart" in note
        for note in stack.notes
    )


def test_a_real_zip_with_one_series_is_no_pair(real_ct):
    path = real_ct / "dicom" / "lungdx-A0002.zip"
    if not path.is_file():
        pytest.skip("no DICOM zip among the real CTs here")
    found, left_out = find_series(path)
    assert [(f.slices, round(f.spacing_mm, 3)) for f in found] == [(30, 8.0)] and not left_out
    with pytest.raises(CTReadError, match="holds 30 slices 8 mm apart"):
        read_pair(path, "a", "a")
