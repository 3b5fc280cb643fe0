"Stored pixels of DICOM: faults and odd tags; sign and unused bits are in the chapter."

import io

import numpy as np
import pydicom
import pytest
from ct_files import dicom_slice
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.data.dicom_pixels import is_dicom, number_tag, read_image, read_pixel_tags


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
    names = [path.name for path in sorted(tmp_path.iterdir()) if is_dicom(path)]
    assert names == ["a", "c.IMA"] and not is_dicom(tmp_path)
