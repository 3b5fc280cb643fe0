"Bad CT files: `CTReadError` with the file, and a reason that says what is wrong and what to do."

import io
import re
import stat
import struct
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
import refusals
import SimpleITK
from ct_files import affine_of, body, change, dicom_slice, write_series

from ct_nb.data import zip_archives
from ct_nb.data.dicom_files import dicom_slices
from ct_nb.data.hounsfield import MAX_VOXELS, CTReadError, check_hounsfield
from ct_nb.data.read import read_ct
from ct_nb.physics.volume import Volume


def refused(path, words, name=None, **kwargs) -> str:
    """`read_ct(path)` raises `CTReadError` about `name` (default: the path), for a reason that
    matches `words`, a regular expression; gives the whole sentence.
    """
    with pytest.raises(CTReadError) as caught:
        read_ct(path, **kwargs)
    error = caught.value
    assert error.file.startswith(str(path if name is None else name)), error
    assert re.search(words, error.reason), error
    # one sentence, the last part of it says what to do
    assert "\n" not in error.reason and ";" in error.reason and len(str(error)) < 900, error
    # no traceback of another library beneath
    assert error.__suppress_context__ or error.__context__ is None
    return str(error)


def nifti(path, hu=None, affine=None, kind=nibabel.Nifti1Image, **header):
    hu = body().astype(np.int16) if hu is None else hu
    image = kind(
        hu.transpose(2, 1, 0) if hu.ndim == 3 else hu, np.eye(4) if affine is None else affine
    )
    nibabel.save(image, path)
    if header:  # straight into the bytes: nibabel would mend it
        raw = bytearray(path.read_bytes())
        block = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
        for name, value in header.items():
            block[name] = value
        raw[:348] = block.binaryblock
        path.write_bytes(raw)
    return path


# ---------------------------------------------------------------- any file
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".npz", ".zip"])
def test_text_empty_missing_and_random_files(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    refused(path, "no such file or folder")
    path.write_bytes(b"")
    refused(path, "is empty")
    for content in (
        b"this is a text file\n" * 50,
        b"x",
        b"\x00" * 4000,
        np.random.default_rng(0).bytes(4000),
    ):
        path.write_bytes(content)
        refused(path, "not (a NIfTI|a NRRD|a MetaImage|an npz)|no zip")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".npz"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_cut_short(tmp_path, suffix, share):
    path = tmp_path / f"scan{suffix}"
    Volume(body(), affine_of()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "cut short")


def test_unknown_ending(tmp_path):
    for name in ("scan.png", "scan", "scan.gz", "scan.hdr"):
        (tmp_path / name).write_bytes(b"x" * 100)
        refused(tmp_path / name, "unknown kind of file.*nii.gz.*DICOM")


def test_one_dicom_slice_and_series_of_a_nifti(tmp_path):
    files = write_series(tmp_path, body())
    refused(files[0], "one DICOM slice.*give the folder")
    refused(nifti(tmp_path / "scan.nii"), "only DICOM has series", series="1.2.3")


@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".nrrd", ".mha", ".npz", ".zip", "folder"])
def test_flipped_bytes_give_a_volume_or_a_sentence(tmp_path, kind):
    "A few bytes of the file changed, mostly in its header: never any other error than ours."
    rng = np.random.default_rng(sum(map(ord, kind)))
    path = target = tmp_path / f"scan{kind}"
    if kind in (".zip", "folder"):
        files = write_series(tmp_path / "series", body((4, 12, 16)))
        if kind == ".zip":
            zipped(path, [(f.name, f.read_bytes()) for f in files])
        else:
            path, target = files[0].parent, files[1]
    else:
        Volume(body((4, 12, 16)), affine_of()).save(path)
    intact = target.read_bytes()
    outcomes = set()
    for _ in range(60):
        content = bytearray(intact)
        for at in rng.integers(0, min(len(intact), 900), rng.integers(1, 6)):
            content[-1 - at if kind == ".zip" and rng.random() < 0.5 else at] = rng.integers(256)
        target.write_bytes(content)
        try:
            outcomes.add(type(read_ct(path)))
        except CTReadError as error:
            outcomes.add(type(error))
            assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert CTReadError in outcomes


# ---------------------------------------------------------------- numbers and shapes
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", ".npz"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_voxels(tmp_path, suffix, value):
    hu = body()
    hu[3, 4, 5:8] = value
    path = tmp_path / f"scan{suffix}"  # written by others: `Volume.save` refuses it
    if suffix == ".nii.gz":
        nibabel.save(nibabel.Nifti1Image(hu.T, affine_of()), path)
    elif suffix == ".npz":
        np.savez(path, hu=hu, affine=affine_of())
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(hu), str(path))
    refused(path, "3 voxels are NaN or infinite")


def test_four_dimensions(tmp_path):
    refused(
        nifti(tmp_path / "movie.nii.gz", np.zeros((8, 8, 8, 5), np.int16)),
        r"has 4 dimensions \(8, 8, 8, 5\).*one volume",
    )
    movie = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(body().astype(np.int16))] * 3)
    for name in ("movie.nrrd", "movie.mha"):
        SimpleITK.WriteImage(movie, str(tmp_path / name))
        refused(tmp_path / name, "has 4 dimensions")
    np.savez(tmp_path / "movie.npz", hu=np.zeros((3, 8, 8, 8)), affine=np.eye(4))
    refused(tmp_path / "movie.npz", "has 4 dimensions")


def test_single_slices_and_pictures(tmp_path):
    refused(
        nifti(tmp_path / "slice.nii.gz", body((1, 30, 30)).astype(np.int16)),
        "30 × 30 × 1 voxels.*at least two",
    )
    refused(nifti(tmp_path / "flat.nii.gz", np.zeros((30, 30), np.int16)), "has 2 dimensions")
    picture = SimpleITK.GetImageFromArray(np.zeros((30, 30), np.int16))
    SimpleITK.WriteImage(picture, str(tmp_path / "flat.nrrd"))
    refused(tmp_path / "flat.nrrd", "has 2 dimensions")


def test_colours_and_complex_numbers(tmp_path):
    colours = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "colours.nii.gz")
    refused(tmp_path / "colours.nii.gz", "one real number per voxel")
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((8, 8, 8), np.complex64), np.eye(4)),
        tmp_path / "complex.nii.gz",
    )
    refused(tmp_path / "complex.nii.gz", "one real number per voxel")
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(np.zeros((8, 8, 8, 3), np.uint8), isVector=True),
        str(tmp_path / "colours.mha"),
    )
    refused(tmp_path / "colours.mha", "3 values per voxel")


def test_headers_that_claim_too_much(tmp_path):
    "Refused by the header alone: no such array is ever asked for."
    dim = [3, 30000, 30000, 30000, 1, 1, 1, 1]
    refused(nifti(tmp_path / "huge.nii", dim=dim), "30000 × 30000 × 30000 voxels.*1024³")
    refused(nifti(tmp_path / "large.nii", dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]), "cut short")
    Volume(body(), affine_of()).save(tmp_path / "scan.mha")
    content = (tmp_path / "scan.mha").read_bytes()
    (tmp_path / "huge.mha").write_bytes(
        content.replace(b"DimSize = 40 32 12", b"DimSize = 30000 30000 30000")
    )
    refused(tmp_path / "huge.mha", "30000 × 30000 × 30000 voxels")
    Volume(body(), affine_of()).save(tmp_path / "scan.nrrd")
    content = (tmp_path / "scan.nrrd").read_bytes()
    (tmp_path / "huge.nrrd").write_bytes(
        content.replace(b"sizes: 40 32 12", b"sizes: 30000 30000 30000")
    )
    refused(tmp_path / "huge.nrrd", "30000 × 30000 × 30000 voxels")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for name, shape in (("hu", (30000, 30000, 30000)), ("affine", (4, 4))):
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                head, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            archive.writestr(f"{name}.npy", head.getvalue() + bytes(128))
    refused(tmp_path / "huge.npz", "damaged|1024³")


# ---------------------------------------------------------------- where it lies
@pytest.mark.parametrize("spacing", [(1, 1, 0), (0, 0, 0), (1, -1, 1), (np.nan, 1, 1)])
def test_zero_and_negative_spacing_nifti(tmp_path, spacing):
    for name in ("scan.nii", "coded.nii"):
        codes = {} if name == "coded.nii" else {"sform_code": 0, "qform_code": 1}
        refused(
            nifti(tmp_path / name, pixdim=[1, *spacing, 1, 1, 1, 1], **codes),
            "voxel spacing is .* mm, it must be above 0",
        )


def test_singular_matrices(tmp_path):
    refused(nifti(tmp_path / "scan.nii", srow_z=[0, 0, 0, 0]), "affine: is singular")
    refused(nifti(tmp_path / "nan.nii", srow_x=[np.nan, 0, 0, 0]), "not finite")
    for affine, words in (
        (np.zeros((4, 4)), "last row|singular"),
        (np.eye(3), "4×4"),
        (affine_of().T, "transposed"),
    ):
        np.savez(tmp_path / "scan.npz", hu=body(), affine=affine)
        refused(tmp_path / "scan.npz", words)


@pytest.mark.parametrize("spacing", ["0.7 0 2", "0.7 -1 2"])
def test_zero_and_negative_spacing_itk(tmp_path, spacing):
    Volume(body(), affine_of()).save(tmp_path / "scan.mha")
    content = (tmp_path / "scan.mha").read_bytes()
    (tmp_path / "scan.mha").write_bytes(
        content.replace(b"ElementSpacing = 2 2 3", f"ElementSpacing = {spacing}".encode())
    )
    refused(tmp_path / "scan.mha", "must be above 0")
    head = (
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 40 32 12\nspacings: {spacing}\nencoding:"
        " raw\nendian: little\n\n"
    )
    (tmp_path / "scan.nrrd").write_bytes(head.encode() + body().astype("<i2").tobytes())
    refused(tmp_path / "scan.nrrd", "must be above 0")


def test_no_spacing_itk(tmp_path):
    Volume(body(), affine_of()).save(tmp_path / "scan.mha")
    content = (tmp_path / "scan.mha").read_bytes()
    (tmp_path / "scan.mha").write_bytes(content.replace(b"ElementSpacing = 2 2 3\n", b""))
    refused(tmp_path / "scan.mha", "gives no voxel spacing")
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 40 32 12\nencoding: raw\nendian: little\n\n"
    (tmp_path / "scan.nrrd").write_bytes(head.encode() + body().astype("<i2").tobytes())
    refused(tmp_path / "scan.nrrd", "gives no voxel spacing")
    (tmp_path / "flat.nrrd").write_bytes(
        head.replace(
            "encoding",
            "space: left-posterior-superior\nspace directions: (1,0,0) (0,0,0) (0,0,2)\nencoding",
        ).encode()
        + body().astype("<i2").tobytes()
    )
    refused(tmp_path / "flat.nrrd", "spacing|singular|damaged")


@pytest.mark.parametrize("spacing", [1e-3, 2000, 1e30])
def test_spacing_that_is_not_in_millimetres(tmp_path, spacing):
    refused(
        nifti(tmp_path / "scan.nii.gz", affine=np.diag([spacing, spacing, spacing, 1])),
        "no patient is; its voxel spacing is not in mm|singular",
    )


def test_npz_without_its_arrays(tmp_path):
    np.savez(tmp_path / "scan.npz", volume=body())
    refused(tmp_path / "scan.npz", "no array named affine and hu.*it has volume")
    np.savez(tmp_path / "pickled.npz", hu=np.array([object()]), affine=np.eye(4))
    refused(tmp_path / "pickled.npz", "object values")


# ---------------------------------------------------------------- not HU
def scales(hu):
    return {
        "picture": (
            np.round((np.clip(hu, -1000, 1000) + 1000) / 2000 * 255),
            "a picture, not a CT.*0 to [12][0-9]+, not in HU",
        ),
        "unit": ((np.clip(hu, -1000, 1000) + 1000) / 2000, "a picture, not a CT"),
        "network": (np.clip(hu, -1000, 1000) / 1000, "no air near -1000"),
        "twice": (hu - 1024, "rescaled twice"),
        "twice by 1000": (hu - 1000, "rescaled twice"),
        "ct-rate": (hu - 8192, "rescaled twice|not in HU"),
        "stored": (np.maximum(hu + 1024, 0), "no air near -1000"),
        "windowed": (np.clip(hu, -160, 240), "no air near -1000"),
        "mu": (np.maximum(hu / 1000 + 1, 0) * 0.0206, "picture|no air"),
        "air": (np.minimum(hu, -900), "no soft tissue near 0"),
        "inverted": (-hu, "not in HU|not the CT"),
    }


@pytest.mark.parametrize("case", scales(body()))
def test_other_scales_than_hu(tmp_path, case):
    values, words = scales(body())[case]
    Volume(values, affine_of()).save(tmp_path / "scan.nii.gz")
    assert "rescale slope and intercept once" in refused(tmp_path / "scan.nii.gz", words)


def test_other_scales_of_real_scans_are_refused_and_hu_is_not(real_ct):
    for path in sorted(real_ct.glob("*.nii.gz")):
        hu = np.asarray(nibabel.load(path).dataobj)[::4, ::4, ::3].astype(np.float32)
        for padding in (None, -2000, -2048, -3024):
            padded = hu.copy()
            if padding is not None:
                padded[: max(2, hu.shape[0] // 6)] = padding
            check_hounsfield(padded, path.name)
        for case, (values, words) in scales(hu).items():
            with refusals.refused(file=path.name, kind=CTReadError) as caught:
                check_hounsfield(values, path.name)
            assert re.search(words, caught.value.reason), case


# ---------------------------------------------------------------- DICOM
@pytest.fixture
def series(tmp_path):
    "Twelve good slices, 3 mm apart from z = 100."
    return write_series(tmp_path / "scan", body())


def test_empty_folder_and_folders_without_ct(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no CT slices")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.txt").write_text("nothing here")
    refused(tmp_path / "text", "holds no CT slices")
    write_series(tmp_path / "mr", body(), Modality="MR")
    refused(tmp_path / "mr", r"holds no CT slices in DICOM \(found MR\)")


@pytest.mark.parametrize(
    "lost, places",
    [
        ([4], r"1 of its slices is missing, at \(-40, -30, 112\)"),
        ([4, 5], r"2 of its slices are missing.*112\), \(-40, -30, 115\)"),
        ([3, 8], r"2 of its slices are missing.*109\), \(-40, -30, 124\)"),
    ],
)
def test_missing_slices(series, lost, places):
    for k in lost:
        series[k].unlink()
    message = refused(series[0].parent, places)
    assert (
        f"{lost[0] - 1:03d}.dcm" in message
        and f"{lost[-1] + 1 if lost != [3, 8] else 4:03d}.dcm" in message
        and "3 mm apart" in message
    )


def test_one_of_four_slices_missing(tmp_path):
    files = write_series(tmp_path, body((4, 32, 40)))
    files[1].unlink()
    refused(tmp_path, "1 of its slices is missing")


def test_two_different_slices_at_one_place(series):
    d = pydicom.dcmread(series[5])
    values = d.pixel_array.copy()
    values[3, 3] += 1
    d.PixelData = values.tobytes()
    d.save_as(series[0].parent / "other.dcm")
    message = refused(
        series[0].parent,
        "lies at the same place as .* but shows something else",
        name=series[0].parent,
    )
    assert "other.dcm" in message and "005.dcm" in message
    (series[0].parent / "other.dcm").write_bytes(series[5].read_bytes())
    change(series[0].parent / "other.dcm", RescaleIntercept=-1000)
    refused(series[0].parent, "shows something else", name=series[0].parent)


def test_several_series_are_listed(tmp_path):
    write_series(tmp_path / "a", body(), series="1.2.3.4", SeriesDescription="thin lung")
    write_series(tmp_path / "b", body(), series="1.2.3.5")
    message = refused(tmp_path, "holds 2 CT series; choose one with series=UID")
    assert (
        "1.2.3.4 (12 slices, thin lung)" in message
        and "1.2.3.5 (12 slices, no description)" in message
    )
    refused(tmp_path, "has no series 7; choose one of 1.2.3.4", series="7")


@pytest.mark.parametrize(
    "z",
    [
        [0, 3, 6, 9, 12, 15, 20, 25, 30, 35, 40, 45],
        [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26],
        [0, 3, 6, 9, 12, 15, 18, 21, 22, 24, 27, 30],
    ],
)
def test_mixed_slice_spacing(tmp_path, z):
    write_series(tmp_path, body(), z_mm=z)
    refused(
        tmp_path, "slice spacing is mixed, from .* to .* mm, it changes between .*dcm and .*dcm"
    )


@pytest.mark.parametrize(
    "tags, words",
    [
        (dict(PixelSpacing=[2.0, 2.1]), r"pixel spacing is \[2.0, 2.1\]"),
        (dict(ImageOrientationPatient=[1, 0, 0, 0, 0.9848, 0.1736]), "its orientation is"),
        (dict(PixelSpacing=[0, 2]), r"PixelSpacing is .* above 0"),
        (dict(PixelSpacing=[-2, 2]), "PixelSpacing is .* above 0"),
        (dict(PixelSpacing=None), "no usable PixelSpacing"),
        (dict(ImagePositionPatient=None), "no usable ImagePositionPatient"),
        (dict(ImageOrientationPatient=None), "no usable ImageOrientationPatient"),
        (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "perpendicular unit vectors"),
        (dict(ImagePositionPatient=[-40, -25, 118]), "shifted sideways"),
        (dict(RescaleSlope=0), "rescale slope is 0"),
        (
            dict(RescaleSlope=None, RescaleIntercept=None),
            "no rescale slope and intercept while other slices have",
        ),
        (dict(NumberOfFrames=5), "holds 5 frames"),
        (dict(Rows=31), "its size is"),
        (dict(PixelData=b"\0" * 100), "pixels .* (cut short|cannot be read)"),
    ],
)
def test_one_slice_that_does_not_fit(series, tags, words):
    change(series[6], **tags)
    refused(series[0].parent, words, name=series[6])


def test_a_smaller_slice_among_the_others(series):
    dicom_slice(np.full((16, 20), 1024), (-40, -30, 118)).save_as(
        series[6], enforce_file_format=True
    )
    refused(
        series[0].parent,
        r"its size is \[16.0, 20.0\], that of .*000.dcm is \[32.0, 40.0\]; the series is mixed",
        name=series[6],
    )


def test_no_rescale_tags_and_not_hu(series):
    for file in series:
        change(file, RescaleSlope=None, RescaleIntercept=None)
    refused(
        series[0].parent,
        "no rescale slope and intercept, the stored values are taken as they are; is not in HU:"
        " no air",
    )


def test_monochrome1_that_is_hu_in_neither_reading(tmp_path):
    write_series(
        tmp_path,
        np.round((body().clip(-1000, 1000) + 1000) / 8),
        intercept=0.0,
        PhotometricInterpretation="MONOCHROME1",
    )
    refused(tmp_path, "MONOCHROME1")


def test_rescaled_twice_in_dicom(tmp_path):
    write_series(tmp_path, body() - 1024, intercept=-2048.0)
    refused(tmp_path, "rescaled twice")


def test_damaged_dicom_files(series):
    content = series[6].read_bytes()
    for damaged, words in (
        (content[: len(content) // 2], "cut short"),
        (content[:200], "cut short|no DICOM|no usable"),
        (b"hello", "no DICOM file although"),
        (b"", "no DICOM file although|damaged"),
    ):
        series[6].write_bytes(damaged)
        refused(series[0].parent, words, name=series[6])


def test_one_slice_only(series):
    for file in series[1:]:
        file.unlink()
    refused(series[0].parent, "holds one slice .*000.dcm.*at least two")


def test_colour_pictures(tmp_path):
    for k in range(3):
        d = dicom_slice(
            np.zeros((8, 24)),
            (0, 0, k),
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
            Columns=8,
        )
        d.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
    refused(tmp_path, "colour picture", name=tmp_path / "0.dcm")


def test_compression_without_a_decoder(series):
    for file in series:
        d = pydicom.dcmread(file)
        d.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xc3" * 20])
        d["PixelData"].is_undefined_length = True
        d.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
        d.save_as(file)
    refused(
        series[0].parent,
        "is compressed as JPEG Lossless.*pylibjpeg.*decompress the series",
        name=series[0],
    )


# ---------------------------------------------------------------- archives
def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.fixture
def slices(series):
    return [(f"scan/{f.name}", f.read_bytes()) for f in series]


def test_slices_of_a_folder_and_of_a_zip_are_one_list(tmp_path):
    "Of whatever series, headers alone; the bounds of a zip hold here too."
    files = write_series(tmp_path / "scan" / "a", body()) + write_series(
        tmp_path / "scan" / "b", body((4, 32, 40)), series="1.2.4", SliceThickness=2.5
    )
    (tmp_path / "scan" / "notes.txt").write_text("no DICOM")
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(tmp_path))
    for path in (tmp_path / "scan", tmp_path / "scan.zip"):
        slices = dicom_slices(path)
        assert len(slices) == 16
        assert sorted({float(s.header.SliceThickness) for s in slices}) == [2.5, 7.5]
        assert not any("PixelData" in s.header for s in slices)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "scan.zip").read_bytes()[:500])
    with refusals.refused(file="cut.zip", kind=CTReadError):
        dicom_slices(tmp_path / "cut.zip")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.dcm",
        "scan/../../evil.dcm",
        "/etc/evil.dcm",
        "..\\evil.dcm",
        "C:\\evil.dcm",
        "C:/evil.dcm",
    ],
)
def test_members_that_lead_out_of_the_archive(tmp_path, slices, name):
    refused(
        zipped(tmp_path / "scan.zip", [*slices, (name, b"x")]),
        "a path that leads out of the archive",
    )
    assert not list(tmp_path.parent.glob("evil.dcm"))


def test_links_in_the_archive(tmp_path, slices):
    link = zipfile.ZipInfo("scan/link.dcm")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(tmp_path / "scan.zip", [*slices, (link, "/etc/passwd")]), "link.dcm', a link")


def test_bombs(tmp_path, slices, monkeypatch):
    message = refused(
        zipped(tmp_path / "bomb.zip", [*slices[:2], ("scan/bomb.dcm", bytes(50_000_000))]),
        "times its size.*zip bomb",
    )
    assert int(message.split("unpacks to ")[1].split()[0]) > 100
    noise = np.random.default_rng(0).bytes(2_000_000 // 100)
    refused(
        zipped(tmp_path / "hundred.zip", [("bomb.dcm", noise + bytes(1_980_000))]),
        "[89][0-9] times its size",
    )
    monkeypatch.setattr(zip_archives, "MAX_ZIP_BYTES", 10_000)
    refused(zipped(tmp_path / "large.zip", slices), "unpacks to .* GiB, more than")
    monkeypatch.setattr(zip_archives, "MAX_ZIP_MEMBERS", 5)
    refused(zipped(tmp_path / "many.zip", slices), "holds 12 files, more than 5")


def test_a_member_that_lies_about_its_size(tmp_path, slices):
    "The directory says 1000 bytes, the data are 5 MB: never unpacked past what was checked."
    path = zipped(
        tmp_path / "liar.zip", [("scan/000.dcm", bytes(128) + b"DICM" + bytes(5_000_000))]
    )
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = content.index(signature)
        content[at + offset : at + offset + 4] = struct.pack("<I", 1000)
    path.write_bytes(content)
    refused(path, "damaged|times its size|no CT slices", name=path)


def test_encrypted_members(tmp_path, slices):
    content = bytearray(zipped(tmp_path / "scan.zip", slices).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(signature)
        content[at + offset] |= 1
    (tmp_path / "scan.zip").write_bytes(content)
    refused(tmp_path / "scan.zip", "is encrypted")


def test_cut_short_and_corrupted_archives(tmp_path, slices):
    content = zipped(tmp_path / "scan.zip", slices).read_bytes()
    (tmp_path / "short.zip").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "short.zip", "damaged or cut short")
    corrupted = bytearray(content)
    corrupted[2000:2050] = bytes(50)
    (tmp_path / "corrupted.zip").write_bytes(corrupted)
    refused(tmp_path / "corrupted.zip", "damaged")


def test_archives_without_ct(tmp_path):
    refused(zipped(tmp_path / "empty.zip", []), "holds no CT slices")
    refused(zipped(tmp_path / "text.zip", [("README.txt", b"hello")]), "holds no CT slices")


def test_missing_slice_in_an_archive(tmp_path, slices):
    message = refused(
        zipped(tmp_path / "scan.zip", slices[:5] + slices[6:]),
        "1 of its slices is missing, at .*115",
    )
    assert f"{tmp_path}/scan.zip/scan/004.dcm" in message


def test_limits_are_those_of_real_scans():
    assert MAX_VOXELS >= 512 * 512 * 2000


def test_a_voxel_beyond_all_metal_and_a_voxel_of_a_micrometre(tmp_path):
    hu = body()
    hu[5, 16, 20] = 1e20
    np.savez(tmp_path / "bright.npz", hu=hu, affine=affine_of())
    np.savez(tmp_path / "small.npz", hu=body(), affine=affine_of((2.0, 2.0, 0.001)))
    for name in ("bright", "small"):
        with refusals.refused(file=f"{name}.npz", kind=CTReadError):
            read_ct(tmp_path / f"{name}.npz")
