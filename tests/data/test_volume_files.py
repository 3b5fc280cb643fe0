"NIfTI, NRRD, MetaImage and npz as other programs write, change and damage them."

import bz2
import gzip
import io
import re
import tracemalloc
import zipfile
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK
from ct_files import (
    NRRD_AXES,
    affine_of,
    body,
    mha_bytes,
    nifti_bytes,
    nrrd_bytes,
    write_series,
)
from refusals import refused
from scipy.spatial.transform import Rotation

from ct_nb.core.errors import FileError
from ct_nb.data import hounsfield
from ct_nb.data.hounsfield import CTReadError, air_and_tissue, check_background
from ct_nb.data.read import read_ct, read_volume, volume_files
from ct_nb.data.readers import open_nifti
from ct_nb.data.voxel_bytes import describe_bytes
from ct_nb.physics.volume import FLIP_XY, Volume

HU = body()
LPS = affine_of()
RAS = FLIP_XY @ LPS
RAW = HU.astype("<i2").tobytes()


def placed(path, content, **beside):
    "`content` at `path`, with other files beside it."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    for name, other in beside.items():
        path.with_name(name.replace("_raw", ".raw")).write_bytes(other)
    return path


def same(path, affine=LPS, note=None, hu=HU):
    "The file is read as `hu` on `affine`, with a note that matches, or none."
    scan = read_ct(path)
    assert (scan.hu == hu).all() and np.abs(scan.affine - affine).max() < 1e-4
    notes = "; ".join(scan.notes)
    assert re.search(note, notes) if note else not notes, notes


def refusal(path, words, read=read_ct):
    "The reason of the refusal; it names the file, is one sentence and says what to do."
    with refused(file=path.name, kind=CTReadError) as caught:
        read(path)
    reason = caught.value.reason
    assert re.search(words, reason) and ";" in reason and "\n" not in reason, reason
    return reason


# ---------------------------------------------------------------- what the bytes are
def dicom_bytes(tmp_path):
    return write_series(tmp_path / "series", HU)[0].read_bytes()


def zip_bytes(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("scan.nii", nifti_bytes(HU, RAS))
    return buffer.getvalue()


KINDS = {
    "page": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "HTML.*log in"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "annex": (b"/annex/objects/MD5E-s3--6.nii.gz\n", "git annex get"),
    "xz": (b"\xfd7zXZ\0\0\4" + bytes(range(99)), "xz file.*unpack"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(99)), "PNG picture"),
    "zeros": (bytes(4000), "nothing but zeros"),
    "json": (b'{"error": "not found"}', "text.*not found"),
    "zip": (zip_bytes, "zip archive.*unpack"),
    "dicom": (dicom_bytes, "DICOM file.*folder of its series"),
}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".npz"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_files_under_these_names_are_told_by_their_bytes(tmp_path, suffix, kind):
    content, words = KINDS[kind]
    content = content(tmp_path) if callable(content) else content
    if (kind, suffix) == ("zip", ".npz"):
        words = "no array named affine and hu.*it has scan.nii"
    reason = refusal(placed(tmp_path / f"scan{suffix}", content), words)
    assert "damaged" not in reason


@pytest.mark.parametrize("inside", [".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".npz"])
def test_one_format_under_the_name_of_another(tmp_path, inside, suffix):
    contents = {".nii": nifti_bytes(HU), ".nrrd": nrrd_bytes(HU), ".mha": mha_bytes(HU)}
    if inside != suffix:
        reason = refusal(placed(tmp_path / f"scan{suffix}", contents[inside]), f"name it {inside}")
        assert "damaged" not in reason


def test_an_unknown_ending_says_what_the_file_is(tmp_path):
    refusal(placed(tmp_path / "scan.img", nifti_bytes(HU)), "unknown kind of file.*NIfTI.*name it")
    assert describe_bytes(b"")[0] == "nothing but zeros"


# ---------------------------------------------------------------- NIfTI headers
def mirrored_qform():
    header = nibabel.Nifti1Header()
    header.set_qform(np.diag([-1.0, 1, 1, 1]) @ RAS, 1)
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim")
    return {name: header[name] for name in names}


def pixdim(*lengths):
    return [1, *lengths, 1, 1, 1, 1]


HEADERS = {
    # ours, `../shared/cases/nifti_headers.py`
    "vox_offset 0": (dict(vox_offset=0), LPS, "vox_offset is 0"),
    "slope 0": (dict(scl_slope=0, scl_inter=-1024), LPS, "scl_slope is 0"),
    "slope NaN": (dict(scl_slope=np.nan, scl_inter=np.nan), LPS, None),
    "sform zero": (dict(srow_x=0, srow_y=0, srow_z=0), LPS, "sform is marked as valid but empty"),
    "no codes": (
        dict(sform_code=0, qform_code=0),
        np.array([[2.0, 0, 0, -39], [0, -2, 0, 31], [0, 0, 3, -16.5], [0, 0, 0, 1]]),
        "left and right are not known",
    ),
    # what else people report
    "pixdim of 1": (dict(pixdim=pixdim(1, 1, 1), qform_code=0), LPS, "pixdim is 1 × 1 × 1 mm"),
    "qform of other spacing": (dict(pixdim=pixdim(2, 2, 5)), LPS, "differ, by up to 22 mm"),
    "qform shifted": (dict(qoffset_z=90), LPS, "differ, by up to 10 mm"),
    "qform no rotation": (dict(quatern_b=0.9, quatern_c=0.9), LPS, "no rotation"),
    "qfac 0": (dict(pixdim=[0, 2, 2, 3, 1, 1, 1, 1], sform_code=0), LPS, None),
    "unit code 5": (dict(xyzt_units=5), LPS, "unit .* taken as mm"),
    "dim[4] 0": (dict(dim=[4, 40, 32, 12, 0, 1, 1, 1]), LPS, None),
    "bitpix 0": (dict(bitpix=0), LPS, None),
    "vox_offset 348": (dict(vox_offset=348), LPS, "vox_offset is 348"),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_headers_that_writers_get_wrong(tmp_path, case, suffix):
    header, affine, note = HEADERS[case]
    content = nifti_bytes(HU, RAS, **header)
    content = gzip.compress(content) if suffix == ".nii.gz" else content
    same(placed(tmp_path / f"scan{suffix}", content), affine, note)


BAD_HEADERS = {
    "mirror": (mirrored_qform(), "sform and qform mirror each other"),
    "slope infinite": (dict(scl_slope=np.inf), "scl_slope is inf"),
    "intercept NaN": (dict(scl_slope=1, scl_inter=np.nan), "scl_inter nan"),
    "pair": (dict(magic=b"ni1"), r"NIfTI pair.*\.img"),
    "Analyze": (dict(magic=b""), "Analyze 7.5"),
    "offset beyond the end": (dict(vox_offset=1e9), r"byte 1e\+09"),
    "offset into the data": (dict(vox_offset=5000), "cannot hold|ends after"),
    "offset NaN": (dict(vox_offset=np.nan), "vox_offset"),
    "code 23": (dict(sform_code=23), "sform_code is 23"),
    "bitpix 32": (dict(bitpix=32), "int16.*32 bits"),
    "datatype 77": (dict(datatype=77), "unknown datatype 77"),
    "colours": (dict(datatype=128, bitpix=24), "one real number per voxel"),
    "two volumes": (dict(dim=[4, 40, 32, 6, 2, 1, 1, 1]), "4 dimensions"),
    "dim[0] 900": (dict(dim=[900, 40, 32, 12, 1, 1, 1, 1]), "dimensions"),
    "negative": (dict(dim=[3, 40, -32, 12, 1, 1, 1, 1]), "dimensions"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_headers_that_cannot_be_right(tmp_path, case, suffix):
    header, words = BAD_HEADERS[case]
    content = nifti_bytes(HU, RAS, **header)
    content = gzip.compress(content) if suffix == ".nii.gz" else content
    refusal(placed(tmp_path / f"scan{suffix}", content), words)


def test_compression_is_told_from_the_bytes(tmp_path):
    content = nifti_bytes(HU, RAS)
    same(placed(tmp_path / "plain.nii.gz", content), note="not compressed although")
    same(placed(tmp_path / "packed.nii", gzip.compress(content)), note="compressed although")
    parts = gzip.compress(content[:9000]) + gzip.compress(content[9000:])
    same(placed(tmp_path / "parts.nii.gz", parts))  # as bgzip and pigz write
    same(placed(tmp_path / "filled.nii.gz", parts + bytes(512)))  # as tapes fill up


def test_bytes_behind_the_voxels_are_said_and_bounded(tmp_path):
    content = nifti_bytes(HU, RAS)
    same(placed(tmp_path / "a.nii", content + bytes(777)), note="777 bytes behind")
    same(placed(tmp_path / "a.nii.gz", gzip.compress(content + bytes(777))), note="777 bytes")
    same(placed(tmp_path / "b.nii.gz", gzip.compress(content) + b"rubbish"), note="7 bytes")
    refusal(placed(tmp_path / "c.nii.gz", gzip.compress(content + bytes(2**24))), "8 MiB behind")


def test_numbers_in_steps_of_a_tenth(tmp_path):
    stored = np.round(HU * 10)
    path = placed(tmp_path / "scan.nii", nifti_bytes(stored, RAS, scl_slope=0.1))
    same(path, hu=(stored * np.float64(np.float32(0.1))).astype(np.float32))


def test_sheared_sform_is_kept(tmp_path):
    shear = RAS.copy()
    shear[1, 2] = 0.9
    image = nibabel.Nifti1Image(HU.astype(np.int16).transpose(2, 1, 0), shear)
    nibabel.save(image, tmp_path / "scan.nii")
    same(tmp_path / "scan.nii", FLIP_XY @ shear)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_nifti_types_and_byte_orders_against_nibabel(tmp_path, dtype, order):
    values = np.random.default_rng(0).integers(0, 120, (3, 4, 5))
    path = placed(tmp_path / "scan.nii", nifti_bytes(values, RAS, order + dtype))
    volume = read_volume(path)
    image = nibabel.load(path)
    assert (volume.hu == image.get_fdata().T).all() and (volume.hu == values).all()
    assert np.allclose(volume.affine, FLIP_XY @ image.affine)


def test_open_nifti_serves_other_shapes_and_errors(tmp_path):
    class OtherError(FileError):
        pass

    picture = np.arange(12.0).reshape(3, 4)
    path = placed(tmp_path / "xray.nii", nifti_bytes(picture, dtype="<f4"))
    content = open_nifti(path, OtherError, lambda path, shape: None)
    assert (content.values == picture).all() and (content.slope, content.intercept) == (1, 0)
    with refused(file="xray.nii", kind=OtherError):
        open_nifti(placed(path, nifti_bytes(picture)[:300]), OtherError, lambda path, shape: None)


# ---------------------------------------------------------------- damage
def damaged_files():
    npz = io.BytesIO()
    np.savez_compressed(npz, hu=HU.astype(np.int16), affine=LPS)
    return {
        ".nii.gz": gzip.compress(nifti_bytes(HU, RAS)),
        ".nrrd": nrrd_bytes(HU, data=gzip.compress(RAW), encoding="gzip"),
        ".mha": mha_bytes(HU, data=zlib.compress(RAW), CompressedData="True"),
        ".npz": npz.getvalue(),
    }


@pytest.mark.parametrize("suffix", damaged_files())
def test_one_flipped_bit_in_packed_voxels_is_a_sentence_or_the_same_volume(tmp_path, suffix):
    "Behind the text headers, which have no checksum; in a .nii.gz anywhere."
    path = tmp_path / f"scan{suffix}"
    intact = damaged_files()[suffix]
    path.write_bytes(intact)
    whole = read_ct(path)
    first = len(intact) - len(zlib.compress(RAW)) if suffix in (".nrrd", ".mha") else 0
    rng = np.random.default_rng(0)
    refusals = 0
    for bit in rng.integers(8 * first, 8 * len(intact), 120):
        content = bytearray(intact)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            scan = read_ct(path)
        except CTReadError as error:
            refusals += 1
            assert str(path) in str(error)
            continue
        assert (scan.hu == whole.hu).all() and (scan.affine == whole.affine).all(), bit
    assert refusals > 60


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".npz"])
def test_damaged_headers_end_in_a_volume_or_a_sentence(tmp_path, suffix):
    "Numbers, signs, lines and bytes of the header, changed at random; never another exception."
    rng = np.random.default_rng(len(suffix))
    intact = damaged_files() | {
        ".nii": nifti_bytes(HU, RAS),
        ".mhd": mha_bytes(HU, ElementDataFile="scan.raw"),
    }
    (tmp_path / "scan.raw").write_bytes(RAW)
    intact, path = intact[suffix], tmp_path / f"scan{suffix}"
    words = [b"-1", b"1e308", b"nan", b"0", b"99999999999", b"(", b"none", b"\n", b"=", b"x" * 3000]
    for _ in range(150):
        content = bytearray(gzip.decompress(intact) if suffix == ".nii.gz" else intact)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, min(len(content), 420)))
            word = words[rng.integers(len(words))] if rng.random() < 0.5 else rng.bytes(1)
            content[at : at + int(rng.integers(0, 4))] = word
        path.write_bytes(gzip.compress(content, 1) if suffix == ".nii.gz" else content)
        try:
            assert np.isfinite(read_volume(path).hu).all()
        except CTReadError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------- claims and memory
def npz_claiming(path, dtype, shape):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("affine.npy", npy(LPS))
        archive.writestr("hu.npy", head.getvalue() + bytes(4000))
    return path


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_small_files_with_large_claims_take_no_memory(tmp_path):
    big = [3, 1000, 1000, 950, 1, 1, 1, 1]
    files = [
        placed(tmp_path / "a.nii", nifti_bytes(HU, RAS, dim=big)),
        placed(tmp_path / "a.nii.gz", gzip.compress(nifti_bytes(HU, RAS, dim=big))),
        placed(tmp_path / "a.nrrd", nrrd_bytes(HU, data=b"", sizes="1000 1000 950", encoding="gz")),
        placed(tmp_path / "b.nrrd", nrrd_bytes(HU, sizes="1000 1000 950")),
        placed(tmp_path / "c.nrrd", nrrd_bytes(HU, sizes="1000 1000 950", encoding="ascii")),
        placed(tmp_path / "a.mha", mha_bytes(HU, DimSize="1000 1000 950")),
        npz_claiming(tmp_path / "a.npz", "<i2", (950, 1000, 1000)),
    ]
    tracemalloc.start()
    for path in files:
        refusal(path, "cannot hold")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e7


def test_what_unpacks_to_a_hundred_times_its_size(tmp_path):
    zeros = nifti_bytes(np.zeros((2, 2, 2)), RAS, dim=[3, 1024, 1024, 300, 1, 1, 1, 1])[:352]
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = packer.compress(zeros) + b"".join(packer.compress(bytes(2**20)) for _ in range(600))
    refusal(placed(tmp_path / "a.nii.gz", packed + packer.flush()), "times its size")


def test_a_label_map_of_one_value_may_pack_well(tmp_path):
    Volume(np.ones((100, 200, 200)), LPS).save(tmp_path / "labels.nii.gz")
    assert (tmp_path / "labels.nii.gz").stat().st_size < 8_000_000 / 200
    assert (read_volume(tmp_path / "labels.nii.gz").hu == 1).all()


# ---------------------------------------------------------------- NRRD
AXES_CM = "(.2,0,0) (0,.2,0) (0,0,.3)"
NO_SPACE = dict(space=None, space_directions=None, space_origin=None)
LIST_AXIS = dict(
    dimension=4, kinds="list domain domain domain", space_directions="none " + NRRD_AXES
)
NRRDS = {
    "RAS": (
        dict(space="RAS", space_origin="(40,30,100)", space_directions="(-2,0,0) (0,-2,0) (0,0,3)"),
        LPS,
        None,
    ),
    "LAS": (
        dict(space="left-anterior-superior", space_origin="(-40,30,100)")
        | dict(space_directions="(2,0,0) (0,-2,0) (0,0,3)"),
        LPS,
        None,
    ),
    "scanner": (dict(space="scanner-xyz"), LPS, "scanner-xyz, so left and right are not known"),
    "no space": (dict(space=None, space_dimension=3), LPS, "names no space"),
    "spacings": (NO_SPACE | dict(spacings="2 2 3"), np.diag([2.0, 2, 3, 1]), "names no space"),
    "cm": (
        dict(space_units='"cm" "cm" "cm"', space_directions=AXES_CM, space_origin="(-4,-3,10)"),
        LPS,
        "space units are cm",
    ),
    "mm": (dict(space_units='"mm" "mm" "mm"'), LPS, None),
    "no origin": (dict(space_origin=None), np.diag([2.0, 2, 3, 1]), "no space origin"),
    "list axis": (LIST_AXIS | dict(sizes="1 40 32 12"), LPS, None),
    "time axis": (
        dict(dimension=4, sizes="40 32 12 1", space_directions=NRRD_AXES + " none"),
        LPS,
        None,
    ),
    "big": (dict(endian="big", data=HU.astype(">i2").tobytes()), LPS, None),
    "gzip": (dict(encoding="gz", data=gzip.compress(RAW)), LPS, None),
    "bzip2": (dict(encoding="bz2", data=bz2.compress(RAW)), LPS, None),
    "text": (
        dict(encoding="ascii", endian=None, data=" ".join(f"{v:g}" for v in HU.ravel()).encode()),
        LPS,
        None,
    ),
    "last bytes": (dict(byte_skip=-1, data=b"in front" + RAW), LPS, None),
    "skips": (dict(line_skip=2, byte_skip=5, data=b"one\ntwo\nthree" + RAW), LPS, None),
    "skip in gzip": (
        dict(encoding="gzip", byte_skip=3, data=gzip.compress(b"abc" + RAW)),
        LPS,
        None,
    ),
    "own keys": ({"content": "a: b", "a_key:=x": "y", "type": "signed short"}, LPS, None),
}


@pytest.mark.parametrize("case", NRRDS)
def test_nrrd_headers(tmp_path, case):
    fields, affine, note = NRRDS[case]
    same(placed(tmp_path / "scan.nrrd", nrrd_bytes(HU, **fields)), affine, note)


BAD_NRRDS = {
    "two values": (
        LIST_AXIS | dict(sizes="2 40 32 12", data=np.repeat(HU.astype("<i2"), 2).tobytes()),
        "2 values per voxel",
    ),
    "colours": (dict(kinds="domain RGB-color domain"), "32 values per voxel"),
    "unit": (dict(space_units='"pixel" "pixel" "pixel"'), "space units are pixel"),
    "two units": (dict(space_units='"mm" "cm" "mm"'), "space units are cm, mm"),
    "long line": (dict(kinds="domain " * 300), "kinds"),
    "sizes": (dict(sizes="40 32"), "sizes are '40 32', not 3"),
    "sizes in words": (dict(sizes="40 32 twelve"), "sizes"),
    "axes": (dict(space_directions="(2,0,0) (0,2,0)"), "space directions"),
    "spacings beside axes": (dict(spacings="2 2 5"), "spacings and space directions differ"),
    "type": (dict(type="block"), "type is 'block'"),
    "encoding": (dict(encoding="hex"), "encoding is 'hex'"),
    "endian": (dict(endian=None), "endian"),
    "space": (dict(space="head-first"), "space is 'head-first'"),
    "unknown field": (dict(space_direction="1"), "no field of NRRD"),
    "twice": ({"content": "a", "content ": "b"}, "gives content twice"),
    "skip": (dict(byte_skip=-2), "byte skip is -2"),
    "flat": (dict(space_directions="(2,0,0) (0,0,0) (0,0,3)"), "singular"),
    "dimension": (dict(dimension=-1), "dimension is -1"),
    "checksum": (
        dict(encoding="gzip", data=gzip.compress(RAW)[:-8] + bytes(8)),
        "compressed data are damaged",
    ),
    "text cut": (dict(encoding="ascii", data=b"1 2 3\n" * 12000), "its header claims"),
    "short": (dict(data=RAW[:-2]), "cannot hold"),
}


@pytest.mark.parametrize("case", BAD_NRRDS)
def test_bad_nrrd_headers(tmp_path, case):
    fields, words = BAD_NRRDS[case]
    refusal(placed(tmp_path / "scan.nrrd", nrrd_bytes(HU, **fields)), words)


SLICES = {f"s{k:02d}_raw": HU[k].astype("<i2").tobytes() for k in range(12)}


def test_nrrd_with_data_files(tmp_path):
    for name, data in (("scan.raw", RAW), ("a b.raw", RAW)):
        placed(tmp_path / name, data)
        same(placed(tmp_path / "one.nrrd", nrrd_bytes(HU, data=b"", data_file=name)))
    listed = "".join(f"s{k:02d}.raw\n" for k in range(12)).encode()
    content = nrrd_bytes(HU, data=b"", data_file="LIST").removesuffix(b"\n") + listed
    same(placed(tmp_path / "list.nrrd", content, **SLICES))
    same(placed(tmp_path / "many.nrrd", nrrd_bytes(HU, data=b"", data_file="s%02d.raw 0 11 1")))
    assert len(volume_files(tmp_path / "list.nrrd")) == 13
    path = placed(tmp_path / "some.nrrd", nrrd_bytes(HU, data=b"", data_file="s%02d.raw 0 9 1"))
    refusal(path, "10 data files for 12 slices")
    path = placed(tmp_path / "lost.nrrd", nrrd_bytes(HU, data=b"", data_file="scan.gz"))
    refusal(path, "data file 'scan.gz', which is not there; put it beside")


# ---------------------------------------------------------------- MetaImage
METAS = {
    "plain": ({}, LPS, None),
    "Windows lines": ({"Comment": "x\r"}, LPS, None),
    "other names": (
        dict(Offset=None, Origin="-40 -30 100", TransformMatrix=None, Rotation="1 0 0 0 1 0 0 0 1"),
        LPS,
        None,
    ),
    "ElementSize": (dict(ElementSpacing=None, ElementSize="2 2 3"), LPS, None),
    "big": (
        dict(BinaryDataByteOrderMSB=None, ElementByteOrderMSB="True")
        | dict(data=HU.astype(">i2").tobytes()),
        LPS,
        None,
    ),
    "zlib": (dict(CompressedData="True", data=zlib.compress(RAW)), LPS, None),
    "gzip": (dict(CompressedData="True", data=gzip.compress(RAW)), LPS, None),
    "wrong size": (
        dict(CompressedData="True", CompressedDataSize=77, data=zlib.compress(RAW)),
        LPS,
        "CompressedDataSize is 77",
    ),
    "letters": (dict(AnatomicalOrientation="ASL"), LPS, "AnatomicalOrientation ASL contradicts"),
    "letters to": (dict(AnatomicalOrientation="LPS"), LPS, None),
    "unknown letters": (dict(AnatomicalOrientation="???"), LPS, None),
    "cm": (
        dict(DistanceUnits="cm", ElementSpacing=".2 .2 .3", Offset="-4 -3 10"),
        LPS,
        "DistanceUnits are cm",
    ),
    "no matrix": (dict(TransformMatrix=None), LPS, "no TransformMatrix"),
    "no order": (dict(BinaryDataByteOrderMSB=None), LPS, "no BinaryDataByteOrderMSB"),
    "no offset": (dict(Offset=None), np.diag([2.0, 2, 3, 1]), "no Offset"),
    "four": (
        dict(NDims=4, DimSize="40 32 12 1", ElementSpacing="2 2 3 1", Offset="-40 -30 100 0")
        | dict(TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"),
        LPS,
        None,
    ),
    "text": (
        dict(BinaryData="False", data=" ".join(f"{v:g}" for v in HU.ravel()).encode()),
        LPS,
        None,
    ),
    "header": (dict(HeaderSize=5, data=b"12345" + RAW), LPS, None),
    "last bytes": (dict(HeaderSize=-1, data=b"12345" + RAW), LPS, None),
}


@pytest.mark.parametrize("case", METAS)
def test_metaimage_headers(tmp_path, case):
    fields, affine, note = METAS[case]
    same(placed(tmp_path / "scan.mha", mha_bytes(HU, **fields)), affine, note)


BAD_METAS = {
    "NDims": (dict(NDims=-1), "NDims is -1"),
    "NDims large": (dict(NDims=99999999), "NDims is 99999999"),
    "NDims real": (dict(NDims="1e308"), "NDims"),
    "channels": (dict(ElementNumberOfChannels=3), "3 values per voxel"),
    "arrays": (dict(ElementType="MET_SHORT_ARRAY"), "ElementType"),
    "sizes": (dict(DimSize="40 32"), "DimSize"),
    "twice": ({"Offset": "0 0 0", "Origin": "1 1 1"}, "Offset twice"),
    "no equals": ({"Comment": "x\nDimSize 3 3 3"}, "without ="),
    "rescaled": (dict(ElementToIntensityFunctionSlope=2), "does not apply"),
    "matrix": (dict(TransformMatrix="2 0 0 0 1 0 0 0 1"), "axes of length 2 × 1 × 1"),
    "unit": (dict(DistanceUnits="inch"), "DistanceUnits are 'inch'"),
    "order": (dict(BinaryDataByteOrderMSB="maybe"), "not True or False"),
    "mesh": (dict(ObjectType="Mesh"), "ObjectType is 'Mesh'"),
    "HeaderSize": (dict(HeaderSize=-7), "HeaderSize is -7"),
    "cut": (dict(CompressedData="True", data=zlib.compress(RAW)[:-5]), "cut short"),
    "checksum": (
        dict(CompressedData="True", data=zlib.compress(RAW)[:-4] + bytes(4)),
        "compressed data are damaged",
    ),
    "nan": (dict(ElementSpacing="2 nan 3"), "ElementSpacing"),
}


@pytest.mark.parametrize("case", BAD_METAS)
def test_bad_metaimage_headers(tmp_path, case):
    fields, words = BAD_METAS[case]
    refusal(placed(tmp_path / "scan.mha", mha_bytes(HU, **fields)), words)


def test_metaimage_with_data_files(tmp_path):
    """The first two are ours, `../shared/cases/mhd_without_raw.py`."""
    header = mha_bytes(HU, ElementDataFile="scan.raw")
    path = placed(tmp_path / "alone" / "scan.mhd", header)
    refusal(path, "data file 'scan.raw', which is not there; put it beside")
    path = placed(tmp_path / "renamed" / "scan.mhd", header)
    (path.parent / "scan (1).raw").write_bytes(RAW)
    refusal(path, "data file 'scan.raw', which is not there; put it beside")
    same(placed(tmp_path / "with spaces" / "scan.mhd", header, scan_raw=RAW))
    refusal(
        placed(tmp_path / "half" / "scan.mhd", header, scan_raw=RAW[:9999]),
        "its data file scan.raw is cut short or its header is wrong, its 9999 bytes cannot hold",
    )
    listed = "".join(f"s{k:02d}.raw\n" for k in range(12)).encode()
    content = mha_bytes(HU, data=listed, ElementDataFile="LIST 2D")
    same(placed(tmp_path / "list" / "scan.mhd", content, **SLICES))
    content = mha_bytes(HU, ElementDataFile="s%02d.raw 0 11 1")
    path = placed(tmp_path / "list" / "many.mhd", content)
    same(path)
    assert volume_files(path) == [path, *(path.with_name(f"s{k:02d}.raw") for k in range(12))]


@pytest.mark.parametrize(
    "name", ["/etc/services", "../scan.raw", "a/../../scan.raw", "C:\\scan.raw", "..\\scan.raw"]
)
def test_data_files_outside_the_folder_are_not_opened(tmp_path, name):
    (tmp_path / "scan.raw").write_bytes(RAW)
    path = placed(tmp_path / "in" / "scan.mhd", mha_bytes(HU, ElementDataFile=name))
    refusal(path, "lies outside its folder")
    path = placed(tmp_path / "in" / "scan.nrrd", nrrd_bytes(HU, data=b"", data_file=name))
    refusal(path, "lies outside its folder")


# ---------------------------------------------------------------- SimpleITK as the peer
def oblique(seed=0):
    rng = np.random.default_rng(seed)
    matrix = Rotation.random(rng=rng).as_matrix()
    return matrix, rng.uniform(0.4, 6, 3).tolist(), rng.uniform(-900, 900, 3).tolist()


ORIENTATIONS = {
    "axial": (np.eye(3), [0.7, 0.7, 1.25], [-123.4, 98.7, -1234.5]),
    "flipped": (np.diag([-1.0, -1, 1]), [2.0, 2, 3], [1.0, 2, 3]),
    "sagittal": (np.array([[0, 0, 1.0], [1, 0, 0], [0, -1, 0]]), [1.0, 2, 3], [0.0, 0, 0]),
    "oblique": oblique(),
}
TYPES = ["Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64"]


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii", ".nii.gz"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_simpleitk_writes(tmp_path, suffix, orientation, compressed):
    direction, spacing, origin = ORIENTATIONS[orientation]
    values = np.random.default_rng(0).integers(0, 120, (3, 5, 7))
    for name in [*TYPES, "Float32", "Float64"]:
        image = SimpleITK.Cast(
            SimpleITK.GetImageFromArray(values.astype(np.float64)),
            getattr(SimpleITK, f"sitk{name}"),
        )
        image.SetDirection(direction.ravel().tolist())
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        path = tmp_path / f"{name}{suffix}"
        SimpleITK.WriteImage(image, str(path), useCompression=compressed)
        if suffix == ".nhdr":
            path = path.rename(path.with_name(f"{name}-header.nrrd"))
        volume = read_volume(path)
        peer = SimpleITK.ReadImage(str(path))
        assert (volume.hu == SimpleITK.GetArrayFromImage(peer)).all() and volume.notes == []
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(peer.GetDirection(), (3, 3)) * peer.GetSpacing()
        affine[:3, 3] = peer.GetOrigin()
        assert np.abs(volume.affine - affine).max() < (1e-3 if ".nii" in suffix else 1e-9)


def test_real_scans_that_simpleitk_writes(real_ct, tmp_path):
    for name in ("lidc-0001", "cip-ct64", "ctfm-s0335"):
        scan = read_ct(real_ct / f"{name}.nii.gz")
        image = SimpleITK.ReadImage(str(real_ct / f"{name}.nii.gz"))
        for suffix in (".nrrd", ".mha", ".mhd"):
            SimpleITK.WriteImage(image, str(tmp_path / f"scan{suffix}"), useCompression=True)
            again = read_ct(tmp_path / f"scan{suffix}")
            assert (again.hu == scan.hu).all() and again.notes == scan.notes, (name, suffix)
            assert np.abs(again.affine - scan.affine).max() < 1e-3


# ---------------------------------------------------------------- npz
def test_npz_of_any_layout(tmp_path):
    for values in (
        np.asfortranarray(HU),
        HU.astype(">f8"),
        np.asfortranarray(HU.astype(">i2")),
        HU.astype(np.float16),
    ):
        np.savez_compressed(tmp_path / "scan.npz", hu=values, affine=LPS.astype(">f4"), more=[1])
        same(tmp_path / "scan.npz", hu=values.astype(np.float32))


def test_bad_npz(tmp_path):
    path = tmp_path / "scan.npz"
    high = HU.copy()
    high[0, 0, 0] = 70_000
    with np.errstate(over="ignore"):
        np.savez(path, hu=high.astype(np.float16), affine=LPS)
    refusal(path, "1 voxels are NaN or infinite")
    for hu, words in (
        (HU.astype(object), "object values"),
        (HU > 0, "bool values"),
        (HU.astype(str), "values"),
    ):
        np.savez(path, hu=hu, affine=LPS)
        refusal(path, words)
    np.savez(path, hu=HU, affine=LPS.astype(object))
    refusal(path, "affine holds object")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("affine.npy", npy(LPS))
        archive.writestr("hu.npy", npy(HU))
    same(path)


# ---------------------------------------------------------------- values
def outside(fill, dtype="<i2"):
    "A scan whose corners outside a circle hold one value (`../shared/cases/background_zero.py`)."
    _, y, x = np.indices(HU.shape)
    return np.where(np.hypot((y - 15.5) / 16, (x - 19.5) / 20) > 1.05, fill, HU)


@pytest.mark.parametrize("fill", [0, 1, 40, 3071, 32767])
def test_a_background_that_is_not_air(tmp_path, fill):
    path = placed(tmp_path / "scan.nii.gz", gzip.compress(nifti_bytes(outside(fill), RAS)))
    refusal(path, f"background is one value, {fill} HU, on [0-9]+% of its sides")


@pytest.mark.parametrize("fill", [-1000, -1024, -2048, -32768])
def test_a_background_of_air_or_padding(tmp_path, fill):
    path = placed(tmp_path / "scan.nii.gz", gzip.compress(nifti_bytes(outside(fill), RAS)))
    scan = read_ct(path)
    assert (scan.hu == np.where(outside(fill) < -1024, -1000, outside(fill))).all()


def test_slices_of_zero_at_an_end_and_every_orientation():
    shifted = HU.copy()
    shifted[-2:] = 0
    for axes in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)):
        affine = np.eye(4)
        affine[:3, :3] = LPS[:3, [2 - a for a in axes[::-1]]]
        check_background(Volume(HU.transpose(axes), affine))
        with refused(file="scan", kind=CTReadError):
            check_background(Volume(shifted.transpose(axes), affine), "scan")


def test_no_real_scan_has_a_background_other_than_air(real_ct):
    for path in sorted(real_ct.glob("*.nii.gz")):
        volume = read_volume(path)
        check_background(volume, path.name, share=0.001)


def test_the_sample_is_even_whatever_the_size(monkeypatch):
    "A step that the rows' length divides would look at the same column of every row."
    monkeypatch.setattr(hounsfield, "SAMPLE", 1024)
    columns = np.tile(np.repeat([-1000.0, 0.0], 256), (2, 512, 1))
    assert columns.size // 1024 == 512
    air, tissue, _ = air_and_tissue(columns)
    assert abs(air - 0.5) < 0.01 and abs(tissue - 0.5) < 0.01
