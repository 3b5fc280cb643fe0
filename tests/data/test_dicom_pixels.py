"Stored pixels of DICOM: faults and odd tags; sign and unused bits are in the chapter."

import io

import numpy as np
import pydicom
import pytest
from ct_files import dicom_slice
from radiograph_files import NAMES, modality_table
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.data.dicom_pixels import (
    MAX_SIDE,
    blocked_mask,
    is_dicom,
    number_tag,
    read_image,
    read_pixel_tags,
)


def header(**tags) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.update(tags)
    return dataset


def tags_of(**tags):
    return read_pixel_tags(header(**tags), "slice.dcm", FileError)


def test_defaults_of_an_empty_header():
    tags = tags_of()
    assert (tags.bits_allocated, tags.bits_stored, tags.signed) == (16, 16, False)
    assert tags.rescale is None and tags.padding is None and tags.photometric == "MONOCHROME2"
    assert tags.values(np.array([3])) == 3


@pytest.mark.parametrize(
    "tags",
    [
        dict(BitsStored=17),
        dict(BitsStored=0),
        dict(RescaleSlope=0),
        dict(BitsStored=12, HighBit=10),
        dict(BitsStored=12, HighBit=16),
    ],
)
def test_tags_that_make_no_sense(tags):
    with refused(file="slice.dcm", kind=FileError):
        tags_of(**tags)


def test_text_where_a_number_belongs():
    dataset = header(SeriesDescription="thin", StudyDescription="")
    with refused(file="slice.dcm", kind=FileError):
        number_tag(dataset, "SeriesDescription", 0, "slice.dcm", FileError)
    assert number_tag(dataset, "StudyDescription", 7, "slice.dcm", FileError) == 7


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_inversion_turns_the_range_over(signed, bits):
    tags = tags_of(BitsStored=bits, PixelRepresentation=int(signed))
    assert tags.highest - tags.lowest == 2**bits - 1
    ends = np.array([tags.lowest, tags.highest])
    assert tags.inverted(ends).tolist() == [tags.highest, tags.lowest]


@pytest.mark.parametrize(
    "signed, value, limit, expected",
    [
        (False, 0, None, (0, 0)),
        (False, -2000, None, (63536, 63536)),
        (True, 63536, None, (-2000, -2000)),
        (True, -2000, -1990, (-2000, -1990)),
        (True, -1990, -2000, (-2000, -1990)),
    ],
)
def test_padding_in_the_representation_of_the_pixels(signed, value, limit, expected):
    tags = {"PixelRepresentation": int(signed), "PixelPaddingValue": value}
    tags |= {} if limit is None else {"PixelPaddingRangeLimit": limit}
    padding = tags_of(**tags)
    assert padding.padding == expected
    stored = np.array([expected[0] - 1, *expected, expected[1] + 1])
    assert padding.padding_mask(stored).tolist() == [False, True, True, False]


def test_pixels_that_cannot_be_decoded():
    dataset = dicom_slice(np.zeros((4, 5)), (0, 0, 0))
    dataset.PixelData = b"\0" * 10
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    for content in (file.getvalue(), file.getvalue()[:150], b"", b"text"):
        with refused(file="slice.dcm", kind=FileError):
            read_image(lambda content=content: io.BytesIO(content), "slice.dcm", FileError)


def test_which_files_are_dicom(tmp_path):
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "b").write_bytes(bytes(132))
    (tmp_path / "c.IMA").write_bytes(b"")
    (tmp_path / "d").write_bytes(b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100")  # no preamble
    names = [path.name for path in sorted(tmp_path.iterdir()) if is_dicom(path)]
    assert names == ["a", "c.IMA", "d"] and not is_dicom(tmp_path)


# ---------------------------------------------------------------- tables
def table_of(item, **tags):
    return tags_of(ModalityLUTSequence=[item], **tags)


@pytest.mark.parametrize(
    "entries, bits",
    [
        (np.arange(256, dtype="<u2") ** 2, 16),
        (np.arange(256, dtype="u1")[::-1], 8),  # two entries in a word
        (np.arange(256, dtype="<u2")[::-1], 8),  # one entry in a word
    ],
)
def test_a_table_gives_its_entries_and_its_ends_beyond(entries, bits):
    tags = table_of(modality_table(entries, first=-100, bits=bits), PixelRepresentation=1)
    assert tags.rescale is None and tags.largest == 2**bits - 1
    stored = np.array([-2000, -100, -99, 0, 155, 156, 2000])
    expected = entries.astype(int)[[0, 0, 1, 100, 255, 255, 255]]
    assert tags.values(stored).tolist() == expected.tolist()


def test_a_table_of_65536_entries_has_the_length_zero():
    tags = table_of(modality_table(np.arange(65536, dtype="<u2")[::-1]))
    assert tags.values(np.array([0, 65535])).tolist() == [65535, 0]


def test_tables_that_make_no_sense():
    short = modality_table(np.arange(10, dtype="<u2"))
    short.LUTDescriptor = [16, 0, 16]
    large = modality_table(np.full(16, 300, dtype="<u2"), bits=8)
    for item in (short, large, pydicom.Dataset()):
        with refused(file="slice.dcm", kind=FileError):
            table_of(item)
    whole = modality_table(np.arange(16, dtype="<u2"))
    with refused(file="slice.dcm", kind=FileError):
        table_of(whole, RescaleSlope=2, RescaleIntercept=0)
    assert table_of(whole, RescaleSlope=1, RescaleIntercept=0).values(3) == 3


def test_the_largest_value_of_a_falling_rescale():
    assert tags_of(RescaleSlope=-1, RescaleIntercept=65535).largest == 65535


# ---------------------------------------------------------------- blades
def blocked(shape=(20, 30), **tags):
    return blocked_mask(header(**tags), shape, "slice.dcm", FileError)


@pytest.mark.parametrize("kind", ["Collimator", "Shutter"])
def test_shapes_count_from_one_and_hide_their_edges(kind):
    edges = {f"{kind}{name}": edge for name, edge in zip(NAMES, (3, 28, 2, 18))}
    rectangle = ~blocked(**{f"{kind}Shape": "RECTANGULAR"}, **edges)
    assert rectangle.sum() == 15 * 24 and rectangle[2:17, 3:27].all()
    circle = {f"CenterOfCircular{kind}": [10, 15], f"RadiusOfCircular{kind}": 4}
    disc = ~blocked(**{f"{kind}Shape": "CIRCULAR"}, **circle)
    assert disc[9, 14] and disc[9, 17] and not disc[9, 18] and abs(disc.sum() - np.pi * 16) < 8
    vertices = {f"VerticesOfThePolygonal{kind}": [2, 3, 2, 28, 18, 28, 18, 3]}
    polygon = ~blocked(**{f"{kind}Shape": "POLYGONAL"}, **vertices)
    assert polygon[4:15, 5:25].all() and not polygon[:1].any() and not polygon[:, 28:].any()
    both = ~blocked(**{f"{kind}Shape": ["RECTANGULAR", "CIRCULAR"]}, **edges, **circle)
    assert np.array_equal(both, rectangle & disc)
    assert not blocked().any()


@pytest.mark.parametrize(
    "tags",
    [
        dict(ShutterShape="RECTANGULAR"),
        dict(ShutterShape="RECTANGULAR", **{f"Shutter{name}": 5 for name in NAMES}),
        dict(ShutterShape="CIRCULAR", CenterOfCircularShutter=[4, 4]),
        dict(ShutterShape="POLYGONAL", VerticesOfThePolygonalShutter=[1, 2, 3]),
    ],
)
def test_shapes_without_their_numbers_or_without_an_opening(tags):
    with refused(file="slice.dcm", kind=FileError):
        blocked(**tags)


# ---------------------------------------------------------------- bits and sizes
def image_of(dataset):
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return read_image(lambda: io.BytesIO(file.getvalue()), "slice.dcm", FileError)[1]


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_do_not_lie_at_the_bottom(signed):
    low = -2048 if signed else 0
    values = np.arange(low, low + 4096, 5).reshape(20, 41)[:, :40]
    dataset = dicom_slice(np.zeros(values.shape), (0, 0, 0))
    dataset.PixelRepresentation = int(signed)
    dataset.BitsStored = 12
    dataset.HighBit = 15
    dataset.PixelData = ((values << 4) | 5).astype(np.int32).astype("<u2").tobytes()
    assert np.array_equal(image_of(dataset), values)
    dataset.PixelData = (values & 0x0FFF).astype("<u2").tobytes()  # at the bottom after all
    with refused(file="slice.dcm", kind=FileError):
        image_of(dataset)


@pytest.mark.parametrize(
    "tags", [dict(Rows=MAX_SIDE + 1), dict(Columns=0), dict(NumberOfFrames=-1), dict(Rows=2)]
)
def test_claims_that_do_not_fit(tags):
    dataset = dicom_slice(np.zeros((4, 5)), (0, 0, 0))
    dataset.update(tags)
    with refused(file="slice.dcm", kind=FileError):
        image_of(dataset)


def test_a_file_without_pixels_is_not_called_damaged():
    dataset = dicom_slice(np.zeros((4, 5)), (0, 0, 0))
    del dataset.PixelData
    with refused(file="slice.dcm", kind=FileError) as caught:
        image_of(dataset)
    assert "damaged" not in caught.value.reason


def test_files_that_inflate_too_far():
    import zlib

    dataset = dicom_slice(np.zeros((4, 5)), (0, 0, 0))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    assert np.array_equal(image_of(dataset), np.zeros((4, 5)))
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    start = file.getvalue()[: 144 + int.from_bytes(file.getvalue()[140:144], "little")]
    packer = zlib.compressobj(wbits=-15)
    bomb = start + packer.compress(bytes(2**27)) + packer.flush()
    with refused(file="slice.dcm", kind=FileError) as caught:
        read_image(lambda: io.BytesIO(bomb), "slice.dcm", FileError)
    assert "inflates" in caught.value.reason


def test_compressed_pixels_that_claim_too_much():
    dataset = dicom_slice(np.zeros((4, 5)), (0, 0, 0))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(100)])
    dataset["PixelData"].is_undefined_length = True
    dataset.Rows = dataset.Columns = 20_000
    with refused(file="slice.dcm", kind=FileError) as caught:
        image_of(dataset)
    assert "claims" in caught.value.reason


def test_the_kind_of_an_object_can_be_printed():
    "It stands in notes and messages, and a damaged file can have any bytes there."
    from pydicom.dataset import Dataset

    from ct_nb.data.dicom_files import object_kind

    assert object_kind({"SOPClassUID": "1.2.3\x1b[2J", "Modality": "CT"}).isprintable()
    header = Dataset()
    header.Modality = "OT"
    assert object_kind(header) == "OT"
