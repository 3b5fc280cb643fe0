"""Radiographs: every format there and back, and every bad file in one sentence. What a reader should see stands in nbs/data/04_radiographs.ipynb."""

import json
import os

import numpy as np
import pytest
import torch

from ct_nb.data.radiographs import (
    Radiograph,
    RadiographError,
    find_direct_beam,
    open_radiographs,
    read_radiograph,
    read_radiographs,
    to_line_integrals,
    write_radiographs,
)
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.geometry_io import geometry_from_json, load_geometry

GEOMETRY = ConeBeam.biplanar(detector_shape=(20, 30), pixel_mm=10.0)
# noise makes some a little negative
IMAGES = (
    torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    * torch.tensor([6.0, 3.0])[:, None, None]
    - 0.02
)
INTENSITY = (50000 * torch.exp(-IMAGES)).round().numpy().astype(np.uint16)


def save_png(path, array):
    from PIL import Image

    Image.fromarray(array).save(path)
    return path


def refuses(words, function, *args, **kwargs):
    with pytest.raises(RadiographError, match=words) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# ---------------------------------------------------------------- our own folder
def test_round_trip_within_16_bits(tmp_path):
    pngs = write_radiographs(tmp_path / "out", IMAGES, GEOMETRY, names=["ap", "lateral"])
    geometry = load_geometry(tmp_path / "out" / "geometry.json")
    back = read_radiographs(pngs, geometry)
    step = (IMAGES.amax((1, 2)) - IMAGES.amin((1, 2))) / 65535
    assert (
        back.dtype == torch.float32
        and ((back - IMAGES).abs() <= 0.51 * step[:, None, None] + 1e-6).all()
    )
    assert torch.equal(
        read_radiographs(tmp_path / "out" / "xrays.npz", geometry), IMAGES
    ) and torch.equal(read_radiographs(tmp_path / "out"), back)
    assert torch.equal(geometry.source_mm, GEOMETRY.source_mm) and geometry.grid == GEOMETRY.grid
    assert sorted(os.listdir(tmp_path / "out")) == [
        "ap.png",
        "geometry.json",
        "lateral.png",
        "xrays.npz",
    ]
    with np.load(tmp_path / "out" / "xrays.npz") as content:
        assert torch.equal(
            geometry_from_json(str(content["geometry"])).source_mm, GEOMETRY.source_mm
        )


def test_png_that_lost_its_text_is_read_by_the_sidecar(tmp_path):
    from PIL import Image

    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    expected = read_radiographs(pngs)
    for png in pngs:
        save_png(png, np.array(Image.open(png)))
    assert torch.equal(read_radiographs(pngs), expected)
    (tmp_path / "geometry.json").unlink()
    refuses("does not say what its numbers are", read_radiographs, pngs)


def test_constant_image(tmp_path):
    flat = torch.full((2, 20, 30), 1.25)
    assert torch.allclose(read_radiographs(write_radiographs(tmp_path, flat, GEOMETRY)), flat)


def test_writing_refuses(tmp_path):
    refuses("must be", write_radiographs, tmp_path, IMAGES[:1], GEOMETRY)
    refuses("must be", write_radiographs, tmp_path, IMAGES[:, :10], GEOMETRY)
    refuses(
        "2 NaN or infinite",
        write_radiographs,
        tmp_path,
        torch.where(torch.arange(1200).reshape(2, 20, 30) % 800 == 7, float("nan"), IMAGES),
        GEOMETRY,
    )
    refuses("different ones", write_radiographs, tmp_path, IMAGES, GEOMETRY, ["a", "a"])
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        write_radiographs(tmp_path / "file", IMAGES, GEOMETRY)


# ---------------------------------------------------------------- formats of others
def test_sixteen_and_eight_bit_png(tmp_path):
    sixteen = save_png(tmp_path / "a.png", INTENSITY[0])
    assert read_radiograph(sixteen).white == 65535 and np.array_equal(
        read_radiograph(sixteen).image, INTENSITY[0]
    )
    assert (
        read_radiographs([sixteen], kind="intensity", i0=50000) - IMAGES[0].clamp(min=-0.3)
    ).abs().max() < 0.01
    negative = save_png(tmp_path / "b.png", 65535 - INTENSITY[0])
    assert torch.equal(
        read_radiographs([negative], kind="intensity", i0=50000, inverted=True),
        read_radiographs([sixteen], kind="intensity", i0=50000),
    )
    eight = save_png(
        tmp_path / "c.png", (IMAGES[1].clamp(0, 3) * 80).round().numpy().astype(np.uint8)
    )
    assert read_radiograph(eight).white == 255
    assert (
        read_radiographs([eight], kind="line_integrals", scale=1 / 80) - IMAGES[1].clamp(min=0)
    ).abs().max() < 0.007


def test_nifti_and_npz(tmp_path):
    import nibabel
    import SimpleITK as sitk

    volume = IMAGES.numpy()
    nibabel.save(nibabel.Nifti1Image(volume[0].T, np.eye(4)), tmp_path / "one.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume[0].T[:, :, None], np.eye(4)), tmp_path / "flat.nii")
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), tmp_path / "both.nii.gz")
    sitk.WriteImage(sitk.GetImageFromArray(volume[0]), str(tmp_path / "itk.nii.gz"))
    for name in ("one.nii.gz", "flat.nii", "itk.nii.gz"):
        assert torch.equal(
            read_radiographs([tmp_path / name], kind="line_integrals"), IMAGES[:1]
        ), name
    assert torch.equal(
        read_radiographs([tmp_path / "both.nii.gz"], GEOMETRY, kind="line_integrals"), IMAGES
    )
    np.savez(tmp_path / "i.npz", intensity=50000 * torch.exp(-IMAGES).numpy())
    assert torch.allclose(
        read_radiographs(tmp_path / "i.npz", GEOMETRY, i0=50000), IMAGES, atol=1e-5
    )
    refuses("holds 2 images", read_radiograph, tmp_path / "i.npz")


def save_dicom(path, stored, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = (
        *stored.shape[-2:],
        1,
        "MONOCHROME1",
    )
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelRepresentation = 0
    data.PixelData = stored.tobytes()
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    data.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    linear = save_dicom(
        tmp_path / "linear.dcm",
        INTENSITY[0],
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=1,
    )
    assert read_radiograph(linear).kind == "intensity"
    assert (read_radiographs([linear], i0=50000) - IMAGES[0]).abs().max() < 0.01
    # no ending: told by its preamble
    shown = save_dicom(
        tmp_path / "shown",
        INTENSITY[0],
        PixelIntensityRelationship="DISP",
        PixelIntensityRelationshipSign=-1,
    )
    assert "MONOCHROME1" in refuses(
        r"does not say what its numbers are \(PixelIntensityRelationship DISP",
        read_radiographs,
        [shown],
    )
    assert len(open_radiographs(save_dicom(tmp_path / "frames.dcm", INTENSITY))) == 2
    rescaled = save_dicom(
        tmp_path / "rescaled.dcm", INTENSITY[0], RescaleSlope=2, RescaleIntercept=-10
    )
    assert read_radiograph(rescaled).white == 2 * 65535 - 10 and np.array_equal(
        read_radiograph(rescaled).image, 2.0 * INTENSITY[0] - 10
    )


# ---------------------------------------------------------------- faults
def test_wrong_size_and_count_name_both_sides(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    assert "xray_0.png" in refuses(
        "20×30 pixels .* 64×64", read_radiographs, pngs, ConeBeam.biplanar(detector_shape=(64, 64))
    )
    refuses(
        "2 images for a geometry of 3 views",
        read_radiographs,
        pngs,
        ConeBeam.orbit([0, 45, 90], detector_shape=(20, 30)),
    )
    refuses("1 images for a geometry of 2 views", read_radiographs, pngs[:1], GEOMETRY)
    other = save_png(tmp_path / "other.png", INTENSITY[0][:10])
    refuses(
        "other.png: has 10×30 pixels .*first.png has 20×30",
        read_radiographs,
        [save_png(tmp_path / "first.png", INTENSITY[0]), other],
        kind="intensity",
        i0=50000,
    )


def test_the_files_word_against_the_callers(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    refuses(
        "holds line_integrals by its own word and intensity by yours",
        read_radiographs,
        pngs,
        kind="intensity",
        i0=1.0,
    )
    refuses(
        "holds line integrals by its own word, with their scale", read_radiographs, pngs, scale=2.0
    )
    refuses(
        "need scale",
        read_radiographs,
        [save_png(tmp_path / "raw.png", INTENSITY[0])],
        kind="line_integrals",
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("text.png", b"not an image", "cannot be read as PNG"),
        ("text.npz", b"not an archive", "cannot be read as npz"),
        ("text.nii.gz", b"not a volume", "cannot be read as NIfTI"),
        ("text.dcm", b"not dicom", "cannot be read as DICOM"),
        ("text.jpg", b"no", "unknown kind of file"),
        ("text", b"no", "unknown kind of file"),
        ("empty.png", b"", "cannot be read as PNG"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert name in refuses(words, read_radiographs, [tmp_path / name], kind="intensity", i0=1.0)


def test_truncated_files(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    for path, words in (
        (pngs[0], "cannot be read as PNG"),
        (tmp_path / "xrays.npz", "cannot be read as npz"),
    ):
        path.write_bytes(path.read_bytes()[:300])
        refuses(words, read_radiographs, [path])
    refuses("no such file", read_radiographs, [tmp_path / "missing.png"])


def test_colour_nan_and_damaged_notes(tmp_path):
    rng = np.random.default_rng(0)
    refuses(
        "colour or indexed PNG .mode RGB",
        read_radiographs,
        [save_png(tmp_path / "rgb.png", rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))],
        kind="intensity",
        i0=255,
    )
    refuses(
        "mode RGBA",
        read_radiographs,
        [save_png(tmp_path / "rgba.png", rng.integers(0, 255, (20, 30, 4), dtype=np.uint8))],
        kind="intensity",
        i0=255,
    )
    broken = IMAGES.numpy().copy()
    broken[1, 3, 4] = np.nan
    np.savez(tmp_path / "nan.npz", line_integrals=broken)
    refuses("nan.npz, view 1: 1 of 600 pixels are NaN", read_radiographs, tmp_path / "nan.npz")
    np.savez(tmp_path / "names.npz", image=broken)
    refuses("exactly one array named", read_radiographs, tmp_path / "names.npz")
    np.savez(tmp_path / "object.npz", line_integrals=np.array([{}], dtype=object))
    refuses("cannot be read as npz", read_radiographs, tmp_path / "object.npz")
    np.savez(tmp_path / "deep.npz", line_integrals=np.zeros((2, 2, 3, 4)))
    refuses("must hold one image", read_radiographs, tmp_path / "deep.npz")
    write_radiographs(tmp_path, IMAGES, GEOMETRY)
    content = json.loads((tmp_path / "geometry.json").read_text())
    content["images"][0]["scale"] = "half"
    (tmp_path / "geometry.json").write_text(json.dumps(content))
    save_png(tmp_path / "xray_0.png", INTENSITY[0])
    refuses("geometry.json: the note about the scale", read_radiographs, [tmp_path / "xray_0.png"])


def test_empty_lists_and_folders(tmp_path):
    refuses("list of files is empty", read_radiographs, [])
    refuses("no geometry.json that lists its images", read_radiographs, tmp_path)
    with pytest.raises(RadiographError, match="rows and columns"):
        Radiograph(np.zeros((0, 4)), "x")


@pytest.mark.parametrize(
    "told, words",
    [
        (dict(kind="intensity"), "intensities need i0"),
        (dict(kind="intensity", i0=-1.0), "intensities need i0"),
        (dict(kind="intensity", i0="bright"), "intensities need i0"),
        (dict(kind="intensity", i0=float("nan")), "intensities need i0"),
        (dict(kind="intensity", i0=10.0), "i0 is too small"),
        (dict(kind="intensity", i0=1.0, inverted=True), "needs white"),
        (dict(kind="intensity", i0=1.0, scale=1.0), "scale belongs to"),
        (dict(kind="line_integrals", i0=1.0), "belong to kind='intensity'"),
        (dict(kind="line_integrals", inverted=True), "belong to"),
        (dict(kind="log"), "kind must be one of"),
    ],
)
def test_to_line_integrals_refuses(told, words):
    refuses(words, to_line_integrals, torch.from_numpy(INTENSITY.astype(np.float32)), **told)


def test_dark_pixels_are_finite_and_the_maximum_can_be_told():
    image = torch.tensor([[0.0, -5.0, 100.0, 50.0]])
    p = to_line_integrals(image, "intensity", i0=100)
    assert torch.isfinite(p).all() and torch.allclose(
        p, torch.tensor([[11.5129, 11.5129, 0.0, 0.6931]]), atol=1e-4
    )
    assert torch.equal(to_line_integrals(image, "intensity", i0="maximum"), p)


# ---------------------------------------------------------------- what the file does not say and
# the pixels show
@pytest.fixture(scope="module")
def chest():
    "The X-rays of a phantom from the front and the side, with air beside it."
    from ct_nb.phantom.chest import phantom
    from ct_nb.physics.projector import project
    from ct_nb.physics.volume import hu_to_mu

    volume = phantom(3, 64).volume
    return project(
        hu_to_mu(volume.tensor()),
        ConeBeam.biplanar(grid=volume.grid, detector_shape=(96, 128), pixel_mm=4.0).to(
            torch.float32
        ),
    )


STORED = {
    "intensity": lambda p, top: 0.9 * top * torch.exp(-p),
    "intensity inverted": lambda p, top: top - 0.9 * top * torch.exp(-p),
    "log": lambda p, top: top * (0.95 - p / 10),
    "log inverted": lambda p, top: top * (0.05 + p / 10),
}


def store(path, p, how, bits):
    top = 2**bits - 1
    return save_png(
        path,
        STORED[how](p, top)
        .round()
        .clamp(0, top)
        .numpy()
        .astype(np.uint8 if bits == 8 else np.uint16),
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("how", STORED)
def test_four_encodings_are_found_out_and_said(tmp_path, chest, how, bits):
    paths = [store(tmp_path / f"{name}.png", p, how, bits) for name, p in zip(("ap", "lat"), chest)]
    notes = []
    top = 2**bits - 1
    told = {"scale": 10 / top} if "log" in how else {}
    found = read_radiographs(paths, notes=notes, **told)
    assert (
        ("logarithm" in notes[0]) == ("log" in how)
        and ("not inverted" in notes[0]) == ("inverted" not in how)
        and "i0 = " in notes[1]
        and len(notes) == 4
    )
    # one stored step, in line integrals
    quantum = 10 / top if "log" in how else torch.exp(chest) / (0.9 * top)
    error = (found - chest).abs()
    assert (error <= 2 * quantum + 0.15)[chest < (2.5 if bits == 8 else 6)].all(), float(
        error.max()
    )
    assert error.median() < (0.05 if bits == 16 else 0.15)
    if "log" in how:
        refuses(
            "logarithm of the intensity.* nothing says how much line integral one step is",
            read_radiographs,
            paths,
        )


def test_what_was_found_is_a_warning_unless_notes_are_taken(tmp_path, chest):
    path = store(tmp_path / "ap.png", chest[1], "intensity", 16)
    with pytest.warns(UserWarning, match="ap.png: pixels are taken for intensity, not inverted"):
        read_radiographs([path])


def test_the_callers_word_overrules(tmp_path, chest):
    path = store(tmp_path / "lat.png", chest[1], "intensity inverted", 16)
    as_told = read_radiographs([path], kind="intensity", i0=60000.0, notes=(notes := []))
    assert notes == [] and torch.equal(
        as_told[0], to_line_integrals(read_radiograph(path).image, "intensity", i0=60000.0)
    ), "kind and i0 told: nothing is looked for"
    assert (read_radiographs([path], i0=0.9 * 65535, notes=[]) - chest[1])[0][
        chest[1] < 6
    ].abs().max() < 0.1
    logs = read_radiographs([path], kind="log_intensity", scale=1e-4, notes=(notes := []))
    assert (
        "logarithm" in notes[0] and logs.max() > 5
    ), "another kind, as told; the sign and the zero are still found"
    refuses(
        "no direct beam|none is seen",
        read_radiographs,
        [path],
        inverted=False,
        kind="intensity",
        notes=[],
    )
    shifted = read_radiographs([path], kind="intensity", inverted=True, i0="border", notes=[])
    assert (shifted - chest[1])[0][chest[1] < 6].abs().max() < 0.1


def test_a_view_without_air_is_what_the_others_are(tmp_path, chest):
    little = chest[1].clone()
    little[:8] = 2.0
    little[-8:] = 2.0
    little[:, :8] = 2.0
    # of the border, air at one end of one side
    little[8:-8, -8:] = torch.where(torch.arange(80)[:, None] < 16, 0.0, 2.0)
    paths = [
        store(tmp_path / "full.png", chest[1], "intensity", 16),
        store(tmp_path / "little.png", little, "intensity", 16),
    ]
    assert find_direct_beam(read_radiograph(paths[1]).image) is None
    found = read_radiographs(paths, notes=(notes := []), i0=0.9 * 65535)
    assert (
        any("little.png: its border shows too little" in note for note in notes)
        and (found[1] - little)[little < 6].abs().max() < 0.05
    )
    inside = [store(tmp_path / "inside.png", chest[0][30:66, 40:90], "intensity", 16)]
    refuses("nor do they show it; tell: kind=", read_radiographs, inside)


def test_fractions_that_are_line_integrals(tmp_path, chest):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(chest[1].numpy().T, np.eye(4)), tmp_path / "p.nii.gz")
    assert (
        torch.equal(read_radiographs([tmp_path / "p.nii.gz"], notes=(notes := [])), chest[1:])
        and "taken for line integrals" in notes[0]
    )
    nibabel.save(
        nibabel.Nifti1Image(1000 - chest[1].numpy().T * 50, np.eye(4)), tmp_path / "log.nii.gz"
    )
    assert (
        read_radiographs([tmp_path / "log.nii.gz"], scale=0.02, notes=[]) - chest[1:]
    ).abs().max() < 0.1
    refuses("give scale", read_radiographs, [tmp_path / "log.nii.gz"])


def test_dicom_tags_tell_and_may_be_overruled(tmp_path, chest):
    counts = (40000 * torch.exp(-chest[1])).round().numpy().astype(np.uint16)
    logs = (1000 + 5000 * chest[1]).round().numpy().astype(np.uint16)
    linear = save_dicom(
        tmp_path / "a.dcm",
        65535 - counts,
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=-1,
    )
    assert (read_radiographs([linear], notes=(notes := [])) - chest[1])[0][
        chest[1] < 5
    ].abs().max() < 0.1 and "by its tags" in notes[0]
    logarithm = save_dicom(
        tmp_path / "b.dcm",
        logs,
        PixelIntensityRelationship="LOG",
        PixelIntensityRelationshipSign=-1,
    )
    assert (read_radiographs([logarithm], scale=1 / 5000, notes=[]) - chest[1]).abs().max() < 0.1
    unsigned = save_dicom(tmp_path / "c.dcm", logs, PixelIntensityRelationship="LOG")
    assert (read_radiographs([unsigned], scale=1 / 5000, notes=[]) - chest[1]).abs().max() < 0.1
    wrong = save_dicom(
        tmp_path / "d.dcm",
        counts,
        PixelIntensityRelationship="LIN",
        PixelIntensityRelationshipSign=-1,
    )
    refuses(
        "high numbers mean few X-rays, but the direct beam .* high numbers; tell inverted",
        read_radiographs,
        [wrong],
    )
    assert (read_radiographs([wrong], inverted=False, notes=[]) - chest[1])[0][
        chest[1] < 5
    ].abs().max() < 0.1
    mislabelled = save_dicom(
        tmp_path / "e.dcm",
        counts,
        PixelIntensityRelationship="LOG",
        PixelIntensityRelationshipSign=1,
    )
    assert (read_radiographs([mislabelled], kind="intensity", notes=(notes := [])) - chest[1])[0][
        chest[1] < 5
    ].abs().max() < 0.1 and "against its tags" in notes[0]
    for_eyes = save_dicom(tmp_path / "f.dcm", counts, PresentationIntentType="FOR PRESENTATION")
    refuses("which were made for the eye", read_radiographs, [for_eyes])


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_of_one_value_is_refused(tmp_path, value):
    path = save_png(tmp_path / "flat.png", np.full((40, 40), value, dtype=np.uint8))
    for told in ({}, {"kind": "intensity", "i0": 255}):
        refuses(
            f"all 1600 pixels are {value}, so there is no patient", read_radiographs, [path], **told
        )


def test_no_air_no_verdict():
    assert (
        find_direct_beam(np.zeros((64, 64))) is None
        and find_direct_beam(np.arange(64.0)[None].repeat(3, 0)) is None
    )
    assert (
        find_direct_beam(np.random.default_rng(0).random((64, 64))) is None
        and find_direct_beam(np.arange(64.0)[None].repeat(64, 0)) is None
    )


@pytest.mark.parametrize(
    "told, words",
    [
        (dict(i0=1.0), "log intensities need scale"),
        (dict(i0=1.0, scale=-1.0), "need scale"),
        (dict(scale=1.0), "log intensities need i0"),
        (dict(scale=1.0, i0=float("nan")), "log intensities need i0"),
        (dict(scale=1.0, i0="border"), "no direct beam is seen"),
    ],
)
def test_logs_refuse(told, words):
    refuses(
        words,
        to_line_integrals,
        torch.from_numpy(INTENSITY.astype(np.float32))[0],
        "log_intensity",
        **told,
    )
