"Radiograph files: every format there and back, and what is said about a file that cannot be read."

import json
import os

import numpy as np
import pytest
import torch
from radiograph_files import GEOMETRY, IMAGES, INTENSITY, save_dicom, save_png
from refusals import refused

from ct_nb.data.linearize import read_radiographs
from ct_nb.data.radiograph_io import (
    Radiograph,
    RadiographError,
    open_radiographs,
    read_radiograph,
    write_radiographs,
)
from ct_nb.physics.geometry_io import geometry_from_json, load_geometry


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
