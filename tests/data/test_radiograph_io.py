"Radiograph files: every format there and back, and what is said about a file that cannot be read."

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from radiograph_files import (
    GEOMETRY,
    IMAGES,
    INTENSITY,
    LINEAR,
    NAMES,
    save_dicom,
    save_png,
    with_chunk,
)
from refusals import refused

from ct_nb.data.linearize import read_radiographs
from ct_nb.data.radiograph_io import (
    Radiograph,
    RadiographError,
    open_radiographs,
    read_radiograph,
    write_radiographs,
)
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.geometry_io import geometry_from_json, geometry_to_json, load_geometry
from ct_nb.physics.volume import Grid


# ---------------------------------------------------------------- our own folder
def test_round_trip_within_16_bits(tmp_path):
    folder = tmp_path / "out"
    pngs = write_radiographs(folder, IMAGES, GEOMETRY, names=["ap", "lateral"])
    geometry = load_geometry(folder / "geometry.json")
    back = read_radiographs(pngs, geometry)
    step = (IMAGES.amax((1, 2)) - IMAGES.amin((1, 2))) / 65535
    assert back.dtype == torch.float32
    assert ((back - IMAGES).abs() <= 0.51 * step[:, None, None] + 1e-6).all()
    assert torch.equal(read_radiographs(folder / "xrays.npz", geometry), IMAGES)
    assert torch.equal(read_radiographs(folder), back)
    assert torch.equal(geometry.source_mm, GEOMETRY.source_mm) and geometry.grid == GEOMETRY.grid
    assert sorted(os.listdir(folder)) == ["ap.png", "geometry.json", "lateral.png", "xrays.npz"]
    with np.load(folder / "xrays.npz") as content:
        stored = geometry_from_json(str(content["geometry"]))
    assert torch.equal(stored.source_mm, GEOMETRY.source_mm)


def test_png_that_lost_its_text_is_read_by_the_sidecar(tmp_path):
    from PIL import Image

    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    expected = read_radiographs(pngs)
    for png in pngs:
        save_png(png, np.array(Image.open(png)))
    assert torch.equal(read_radiographs(pngs), expected)
    (tmp_path / "geometry.json").unlink()
    with refused("kind", file=pngs[0], kind=RadiographError):
        read_radiographs(pngs)


def test_constant_image(tmp_path):
    flat = torch.full((2, 20, 30), 1.25)
    assert torch.allclose(read_radiographs(write_radiographs(tmp_path, flat, GEOMETRY)), flat)


def test_writing_refuses(tmp_path):
    holes = torch.where(torch.arange(1200).reshape(2, 20, 30) % 800 == 7, float("nan"), IMAGES)
    for images in (IMAGES[:1], IMAGES[:, :10], holes):
        with refused("line_integrals"):
            write_radiographs(tmp_path, images, GEOMETRY)
    with refused("names"):
        write_radiographs(tmp_path, IMAGES, GEOMETRY, ["a", "a"])
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        write_radiographs(tmp_path / "file", IMAGES, GEOMETRY)


# ---------------------------------------------------------------- formats of others
def test_sixteen_and_eight_bit_png(tmp_path):
    sixteen = save_png(tmp_path / "a.png", INTENSITY[0])
    image = read_radiograph(sixteen)
    assert image.white == 65535 and np.array_equal(image.image, INTENSITY[0])
    p = read_radiographs([sixteen], kind="intensity", i0=50000)
    assert (p - IMAGES[0].clamp(min=-0.3)).abs().max() < 0.01
    negative = save_png(tmp_path / "b.png", 65535 - INTENSITY[0])
    assert torch.equal(read_radiographs([negative], kind="intensity", i0=50000, inverted=True), p)
    stored = (IMAGES[1].clamp(0, 3) * 80).round().numpy().astype(np.uint8)
    eight = save_png(tmp_path / "c.png", stored)
    assert read_radiograph(eight).white == 255
    p = read_radiographs([eight], kind="line_integrals", scale=1 / 80)
    assert (p - IMAGES[1].clamp(min=0)).abs().max() < 0.007


def test_nifti_and_npz(tmp_path):
    import nibabel
    import SimpleITK as sitk

    volume = IMAGES.numpy()
    nibabel.save(nibabel.Nifti1Image(volume[0].T, np.eye(4)), tmp_path / "one.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume[0].T[:, :, None], np.eye(4)), tmp_path / "flat.nii")
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), tmp_path / "both.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(volume[0]), str(tmp_path / "itk.nii.gz"))
    for name in ("one.nii.gz", "flat.nii", "itk.nii.gz"):
        p = read_radiographs([tmp_path / name], kind="line_integrals")
        assert torch.equal(p, IMAGES[:1]), name
    p = read_radiographs([tmp_path / "both.nii.gz"], GEOMETRY, kind="line_integrals")
    assert torch.equal(p, IMAGES)
    np.savez(tmp_path / "i.npz", intensity=50000 * torch.exp(-IMAGES).numpy())
    p = read_radiographs(tmp_path / "i.npz", GEOMETRY, i0=50000)
    assert torch.allclose(p, IMAGES, atol=1e-5)
    with refused(file="i.npz", kind=RadiographError):
        read_radiograph(tmp_path / "i.npz")


def test_dicom(tmp_path):
    linear = save_dicom(
        tmp_path / "linear.dcm",
        INTENSITY[0],
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=1,
    )
    assert read_radiograph(linear).kind == "intensity"
    assert (read_radiographs([linear], i0=50000) - IMAGES[0]).abs().max() < 0.01
    # no ending: recognised by its preamble
    shown = save_dicom(
        tmp_path / "shown",
        INTENSITY[0],
        PixelIntensityRelationship="DISP",
        PixelIntensityRelationshipSign=-1,
    )
    image = read_radiograph(shown)
    assert image.processed and image.kind is image.inverted is None
    assert "PhotometricInterpretation MONOCHROME1" in image.notes
    with refused("kind", file=shown, kind=RadiographError) as caught:
        read_radiographs([shown])
    assert "PixelIntensityRelationship DISP" in caught.value.reason
    frames = open_radiographs(save_dicom(tmp_path / "frames.dcm", INTENSITY))
    assert [(f.view, f.label) for f in frames] == [
        (0, "frames.dcm, view 0"),
        (1, "frames.dcm, view 1"),
    ]
    rescaled = save_dicom(
        tmp_path / "rescaled.dcm", INTENSITY[0], RescaleSlope=2, RescaleIntercept=-10
    )
    assert read_radiograph(rescaled).white == 2 * 65535 - 10
    assert np.array_equal(read_radiograph(rescaled).image, 2.0 * INTENSITY[0] - 10)


def test_dicom_without_preamble_with_sign_and_with_empty_tags(tmp_path):
    "What CT slices may do, radiographs may do too: one reader of pixels serves both."
    stored = INTENSITY[0]
    bare = save_dicom(tmp_path / "bare.dcm", stored, preamble=False)
    assert np.array_equal(read_radiograph(bare).image, stored)
    half = (stored // 2 - 16384).astype(np.int16)
    signed = save_dicom(tmp_path / "signed.dcm", half, RescaleSlope=None, RescaleIntercept=None)
    assert np.array_equal(read_radiograph(signed).image, half)
    assert read_radiograph(signed).white == 32767
    twelve = (stored // 16) | 0x7000  # an overlay in the bits that are not stored
    overlay = save_dicom(tmp_path / "overlay.dcm", twelve, BitsStored=12, HighBit=11)
    assert np.array_equal(read_radiograph(overlay).image, stored // 16)
    assert read_radiograph(overlay).white == 4095
    with refused(file="flat.dcm", kind=RadiographError):
        read_radiograph(save_dicom(tmp_path / "flat.dcm", stored, RescaleSlope=0))


# ---------------------------------------------------------------- faults
@pytest.mark.parametrize(
    "name, content",
    [
        ("text.png", b"not an image"),
        ("text.npz", b"not an archive"),
        ("text.nii.gz", b"not a volume"),
        ("text.dcm", b"not dicom"),
        ("text.jpg", b"no"),
        ("text", b"no"),
        ("empty.png", b""),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with refused(file=name, kind=RadiographError) as caught:
        read_radiographs([tmp_path / name], kind="intensity", i0=1.0)
    assert "\n" not in caught.value.reason and len(str(caught.value)) < 500


def test_truncated_files(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    dicom = save_dicom(tmp_path / "a.dcm", INTENSITY[0])
    for path in (pngs[0], tmp_path / "xrays.npz", dicom):
        path.write_bytes(path.read_bytes()[:300])
        with refused(file=path.name, kind=RadiographError):
            read_radiographs([path])
    with refused(file="missing.png", kind=RadiographError):
        read_radiographs([tmp_path / "missing.png"])


def test_colours(tmp_path):
    rng = np.random.default_rng(0)
    for channels in (3, 4):
        colours = rng.integers(0, 255, (20, 30, channels), dtype=np.uint8)
        path = save_png(tmp_path / f"{channels}.png", colours)
        with refused(file=path, kind=RadiographError):
            read_radiographs([path], kind="intensity", i0=255)
    path = save_dicom(
        tmp_path / "rgb.dcm",
        rng.integers(0, 255, (20, 30, 3), dtype=np.uint8),
        Rows=20,
        Columns=30,
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        PhotometricInterpretation="RGB",
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        NumberOfFrames=1,
    )
    with refused(file="rgb.dcm", kind=RadiographError) as caught:
        read_radiograph(path)
    assert "colour" in caught.value.reason


def test_nan_and_arrays_of_other_names_and_shapes(tmp_path):
    broken = IMAGES.numpy().copy()
    broken[1, 3, 4] = np.nan
    arrays = {
        "nan": dict(line_integrals=broken),
        "names": dict(image=broken),
        "object": dict(line_integrals=np.array([{}], dtype=object)),
        "deep": dict(line_integrals=np.zeros((2, 2, 3, 4))),
    }
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with refused(file=f"{name}.npz", kind=RadiographError) as caught:
            read_radiographs(tmp_path / f"{name}.npz")
        assert getattr(caught.value, "view", None) == (1 if name == "nan" else None)
    with refused(file="x", kind=RadiographError):
        Radiograph(np.zeros((0, 4)), "x")


def test_a_damaged_sidecar(tmp_path):
    write_radiographs(tmp_path, IMAGES, GEOMETRY)
    content = json.loads((tmp_path / "geometry.json").read_text())
    content["images"][0]["scale"] = "half"
    (tmp_path / "geometry.json").write_text(json.dumps(content))
    save_png(tmp_path / "xray_0.png", INTENSITY[0])
    with refused(file="geometry.json", kind=RadiographError):
        read_radiographs([tmp_path / "xray_0.png"])


# ---------------------------------------------------------------- which picture is it?
def test_a_picture_that_its_sidecar_does_not_describe(tmp_path):
    first, second = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with refused(file="xray_0.png", kind=RadiographError) as caught:
        read_radiographs([first, second])
    assert "geometry.json" in caught.value.reason
    first.write_bytes(whole)
    write_radiographs(tmp_path / "other", IMAGES.flip(0), GEOMETRY)
    (tmp_path / "xrays.npz").write_bytes((tmp_path / "other" / "xrays.npz").read_bytes())
    with refused(file="xrays.npz", kind=RadiographError):
        read_radiographs(tmp_path / "xrays.npz")


def change_sidecar(folder, change):
    content = json.loads((folder / "geometry.json").read_text())
    change(content)
    (folder / "geometry.json").write_text(json.dumps(content))


def test_an_old_sidecar_without_digests_reads_with_a_note(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    expected = read_radiographs(pngs)
    change_sidecar(tmp_path, lambda c: [entry.pop("sha256") for entry in c["images"]])
    notes = []
    assert torch.equal(read_radiographs(pngs, notes=notes), expected)
    assert ["no digest" in note for note in notes] == [True, True]


def test_a_picture_and_its_sidecar_of_two_scales(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    change_sidecar(tmp_path, lambda c: c["images"][0].update(scale=1.0))
    with refused(file="xray_0.png", kind=RadiographError) as caught:
        read_radiographs(pngs)
    assert "geometry.json" in caught.value.reason


def test_files_in_another_order_than_the_sidecars(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    notes = []
    read_radiographs(pngs, notes=notes)
    assert notes == []
    read_radiographs(pngs[::-1], notes=notes)
    assert len(notes) == 1 and "another order" in notes[0]


def test_a_geometry_that_is_not_the_sidecars(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    notes = []
    read_radiographs(pngs, GEOMETRY, notes=notes)
    read_radiographs(pngs[::-1], GEOMETRY.select([1, 0]), notes=notes)
    assert notes == [], "the files and their views, in either order"
    other = ConeBeam.orbit([10, 100], detector_shape=(20, 30), pixel_mm=10.0)
    for files, geometry in ((pngs[::-1], GEOMETRY), (pngs, other)):
        notes = []
        read_radiographs(files, geometry, notes=notes)
        assert len(notes) == 1 and "is not that of the geometry.json" in notes[0]
    change_sidecar(tmp_path, lambda c: c.pop("views"))
    notes = []
    read_radiographs(pngs, GEOMETRY, notes=notes)
    assert len(notes) == 1 and "cannot be compared" in notes[0]


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/passwd", "..", "", ".", "..\\x.png", "C:x.png", 3, None, "a/b.png"]
)
def test_a_sidecar_that_names_no_file_of_its_folder(tmp_path, name):
    write_radiographs(tmp_path, IMAGES, GEOMETRY)
    change_sidecar(tmp_path, lambda c: c["images"][0].update(file=name))
    with refused(file="geometry.json", kind=RadiographError):
        read_radiographs(tmp_path)
    change_sidecar(tmp_path, lambda c: c["images"][0].update(file="xray_1.png"))  # twice
    with refused(file="geometry.json", kind=RadiographError):
        read_radiographs(tmp_path)
    (tmp_path / "geometry.json").write_text("[" * 100_000)
    with refused(file="geometry.json", kind=RadiographError):
        read_radiographs(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\n"])
def test_names_that_lead_elsewhere_are_not_written(tmp_path, name):
    with refused("names"):
        write_radiographs(tmp_path / "xrays", IMAGES, GEOMETRY, ["xray", name])
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("scale", [0, -1, 1e300, "half", None])
def test_a_note_of_an_impossible_scale(tmp_path, scale):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    code = {"kind": "line_integrals", "scale": scale, "offset": 0}
    text.add_text("ct_nb radiograph", json.dumps(code))
    Image.fromarray(INTENSITY[0]).save(tmp_path / "x.png", pnginfo=text)
    with refused(file="x.png", kind=RadiographError):
        read_radiographs([tmp_path / "x.png"])


# ---------------------------------------------------------------- damage and claims
def png_of(header, raw) -> bytes:
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", *header)), (b"IDAT", zlib.compress(raw)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
        for k, d in (*chunks, (b"IEND", b""))
    )


@pytest.mark.parametrize(
    "header, raw",
    [
        ((30_000, 30_000, 8, 0, 0, 0, 0), b"\0" * 10),
        ((4, 4, 8, 0, 0, 0, 0), b"\0" * 15),  # a line is missing
        ((4, 4, 8, 0, 0, 0, 0), b"\0" * 2**22),  # far more than claimed
        ((4, 0, 8, 0, 0, 0, 0), b""),
        ((4, 4, 8, 7, 0, 0, 0), b"\0" * 20),
        ((4, 4, 8, 4, 0, 0, 0), b"\0" * 36),  # grey with alpha
        ((4, 4, 8, 3, 0, 0, 0), b"\0" * 20),  # a palette
    ],
)
def test_pngs_whose_header_is_not_what_they_hold(tmp_path, header, raw):
    (tmp_path / "x.png").write_bytes(png_of(header, raw))
    with refused(file="x.png", kind=RadiographError):
        read_radiograph(tmp_path / "x.png")


def test_interlaced_and_four_bit_pngs(tmp_path):
    numbers = (np.arange(48 * 64).reshape(48, 64) * 11).astype(">u2")
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2))
    raw = b"".join(
        b"\0" + row.tobytes()
        for y, x, down, right in (*passes, (0, 1, 2, 2), (1, 0, 2, 1))
        for row in numbers[y::down, x::right]
    )
    (tmp_path / "i.png").write_bytes(png_of((64, 48, 16, 0, 0, 0, 1), raw))
    assert np.array_equal(read_radiograph(tmp_path / "i.png").image, numbers)
    (tmp_path / "four.png").write_bytes(png_of((4, 2, 4, 0, 0, 0, 0), b"\0\x01\x2f\0\x34\x56"))
    image = read_radiograph(tmp_path / "four.png")
    assert image.white == 255 and image.image.tolist() == [[0, 17, 34, 255], [51, 68, 85, 102]]


def test_one_flipped_bit_is_seen(tmp_path):
    import nibabel

    rng = np.random.default_rng(0)
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    nibabel.save(nibabel.Nifti1Image(IMAGES.numpy().T, np.eye(4)), tmp_path / "x.nii.gz")
    for path, least in ((pngs[0], 8), (tmp_path / "xrays.npz", 40), (tmp_path / "x.nii.gz", 10)):
        content = path.read_bytes()
        expected = [image.image for image in open_radiographs(path)]
        refusals = 0
        for place in rng.integers(least, len(content), 40):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                found = [image.image for image in open_radiographs(path)]
            except RadiographError as error:
                refusals += 1
                assert error.file == str(path)
            else:
                assert all(map(np.array_equal, found, expected)), (path.name, place)
        assert refusals > 20, path.name


def test_what_a_png_says_about_its_display(tmp_path):
    from PIL import Image

    gamma = with_chunk(
        save_png(tmp_path / "g.png", INTENSITY[0]), b"gAMA", struct.pack(">I", 45455)
    )
    notes = []
    read_radiographs([gamma], kind="intensity", i0=50000, notes=notes)
    assert len(notes) == 1 and "gAMA" in notes[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(INTENSITY[0]).save(tmp_path / "turned.png", exif=exif)
    animated = with_chunk(save_png(tmp_path / "a.png", INTENSITY[0]), b"acTL", bytes(8))
    for path in (tmp_path / "turned.png", animated):
        with refused(file=path, kind=RadiographError):
            read_radiograph(path)
    clear = save_png(tmp_path / "clear.png", INTENSITY[0])
    with_chunk(clear, b"tRNS", struct.pack(">H", int(INTENSITY[0][3, 4])))
    assert read_radiograph(clear).masked[3, 4]


def test_archives_that_claim_more_than_they_hold(tmp_path):
    from numpy.lib import format as npy

    file = io.BytesIO()
    npy.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    for name, content in (
        ("claim.npz", file.getvalue() + bytes(100)),
        ("text.npz", b"no array"),
        (
            "bomb.npz",
            file.getvalue().replace(b"1000000, 1000000", b"4096, 4096      ") + bytes(2**26),
        ),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("line_integrals.npy", content)
        if name == "bomb.npz":
            assert read_radiograph(tmp_path / name).image.shape == (4096, 4096)
            continue
        with refused(file=name, kind=RadiographError) as caught:
            read_radiograph(tmp_path / name)
        assert "memory" not in caught.value.reason
    np.save(tmp_path / "one.npz", np.zeros((3, 4)))
    os.rename(tmp_path / "one.npz.npy", tmp_path / "one.npz")
    with refused(file="one.npz", kind=RadiographError):
        read_radiograph(tmp_path / "one.npz")


def test_numbers_of_half_precision(tmp_path):
    half = IMAGES.numpy().astype(np.float16)
    np.savez(tmp_path / "half.npz", line_integrals=half)
    assert (read_radiographs(tmp_path / "half.npz") - IMAGES).abs().max() < 0.01
    half[0, 0, 0] = np.inf
    np.savez(tmp_path / "inf.npz", line_integrals=half)
    with refused(file="inf.npz", kind=RadiographError):
        read_radiographs(tmp_path / "inf.npz")


# ---------------------------------------------------------------- DICOM
@pytest.mark.parametrize(
    "tags, word",
    [
        (dict(LossyImageCompression="01", LossyImageCompressionRatio=12), "with loss (ratio 12"),
        (dict(BurnedInAnnotation="YES"), "BurnedInAnnotation"),
        (dict(PresentationIntentType="FOR PRESENTATION"), "approximate"),
        (dict(PixelPaddingValue=int(INTENSITY[0][3, 4])), "not measured"),
    ],
)
def test_what_makes_a_radiograph_less_than_it_seems_is_noted(tmp_path, tags, word):
    notes = []
    read_radiographs(
        [save_dicom(tmp_path / "x.dcm", INTENSITY[0], **LINEAR, **tags)], i0=5e4, notes=notes
    )
    assert any("x.dcm" in note and word in note for note in notes), notes


def test_a_table_of_the_display_is_no_part_of_the_values(tmp_path):
    from radiograph_files import modality_table

    table = modality_table(np.arange(65536, dtype="<u2")[::-1])
    path = save_dicom(
        tmp_path / "x.dcm", INTENSITY[0], VOILUTSequence=[table], WindowCenter=9, WindowWidth=9
    )
    assert np.array_equal(read_radiograph(path).image, INTENSITY[0])


def test_dicom_files_that_are_no_readings_of_a_beam(tmp_path):
    film = save_dicom(tmp_path / "film.dcm", INTENSITY[0], RescaleSlope=1, RescaleType="OD")
    with refused("kind", file=film, kind=RadiographError) as caught:
        read_radiographs([film])
    assert "RescaleType OD" in caught.value.reason and "densities" in caught.value.reason
    scan = save_dicom(tmp_path / "scan.dcm", INTENSITY[0], Modality="CT", ImageType=["ORIGINAL"])
    with refused(file=scan, kind=RadiographError):
        read_radiograph(scan)
    scout = dict(Modality="CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert read_radiograph(save_dicom(tmp_path / "scout.dcm", INTENSITY[0], **scout)).white == 65535


def test_masked_pixels_continue_the_nearest_measured_one():
    image = np.arange(12.0).reshape(3, 4)
    image[1, 2] = np.nan
    masked = np.zeros((3, 4), dtype=bool)
    masked[1, 2] = masked[:, 0] = True
    radiograph = Radiograph(image, "x.dcm", masked=masked)
    assert radiograph.image[:, 0].tolist() == [1, 5, 9] and radiograph.image[1, 2] in (2, 5, 7, 10)
    assert "4 of its 12 pixels" in radiograph.remarks[0]
    assert Radiograph(image[:1], "x", masked=np.zeros((1, 4), dtype=bool)).masked is None
    with refused(file="x", kind=RadiographError):
        Radiograph(image, "x", masked=np.ones((3, 4), dtype=bool))


# ---------------------------------------------------------------- a geometry in two places
OTHER = ConeBeam.orbit([10, 100], detector_shape=(20, 30), pixel_mm=10.0)


def with_geometry(path, geometry, images=IMAGES):
    "The arrays that `write_radiographs` puts into an npz, with a geometry of their own."
    np.savez(path, line_integrals=images.numpy(), geometry=np.array(geometry_to_json(geometry)))


def test_an_npz_and_its_sidecar_of_two_geometries(tmp_path):
    "The digest covers the images alone, so that a geometry could be another's without a word."
    write_radiographs(tmp_path, IMAGES, GEOMETRY)
    with_geometry(tmp_path / "xrays.npz", OTHER)
    with refused(file="xrays.npz", kind=RadiographError) as caught:
        read_radiographs(tmp_path / "xrays.npz")
    assert "geometry.json" in caught.value.reason
    with_geometry(tmp_path / "xrays.npz", GEOMETRY.on(Grid.cube(16, 100.0)))
    with refused(file="xrays.npz", kind=RadiographError):
        read_radiographs(tmp_path / "xrays.npz")
    with_geometry(tmp_path / "xrays.npz", GEOMETRY)
    notes = []
    assert torch.equal(read_radiographs(tmp_path / "xrays.npz", notes=notes), IMAGES)
    change_sidecar(tmp_path, lambda c: c.pop("arrays"))  # it does not speak of this file
    with_geometry(tmp_path / "xrays.npz", OTHER)
    read_radiographs(tmp_path / "xrays.npz", OTHER, notes=notes)
    assert notes == []


def test_a_geometry_that_is_not_the_files_own(tmp_path):
    with_geometry(tmp_path / "a.npz", GEOMETRY)
    for geometry, said in ((GEOMETRY, 0), (OTHER, 1), (GEOMETRY.select([1, 0]), 1)):
        notes = []
        read_radiographs(tmp_path / "a.npz", geometry, notes=notes)
        assert len(notes) == said and all("a.npz" in note for note in notes)


def test_a_geometry_in_a_file_that_is_none(tmp_path):
    with_geometry(tmp_path / "views.npz", GEOMETRY.select([0]))
    with refused(file="views.npz", kind=RadiographError):
        read_radiographs(tmp_path / "views.npz")
    np.savez(tmp_path / "text.npz", line_integrals=IMAGES.numpy(), geometry=np.array("{"))
    with refused(file="text.npz"):
        read_radiographs(tmp_path / "text.npz")
    # an array of another program that has this name
    np.savez(tmp_path / "theirs.npz", line_integrals=IMAGES.numpy(), geometry=np.eye(3))
    assert torch.equal(read_radiographs(tmp_path / "theirs.npz"), IMAGES)


@pytest.mark.parametrize("shape", ["BITMAP", ["RECTANGULAR", "BITMAP"], "OVAL\x1b[2J"])
def test_a_shutter_that_is_not_applied_is_said(tmp_path, shape):
    edges = {f"Shutter{name}": edge for name, edge in zip(NAMES, (1, 30, 1, 20))}
    save_dicom(tmp_path / "a.dcm", INTENSITY[0], **LINEAR, ShutterShape=shape, **edges)
    image = read_radiograph(tmp_path / "a.dcm")
    said = [remark for remark in image.remarks if "ShutterShape" in remark]
    assert len(said) == 1 and "is not applied" in said[0] and said[0].isprintable()
