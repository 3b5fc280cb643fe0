"From detector readings to line integrals: the statements of file and caller, and the pixels."

import numpy as np
import pytest
import torch
from radiograph_files import (
    GEOMETRY,
    IMAGES,
    INTENSITY,
    LINEAR,
    NAMES,
    margin,
    modality_table,
    save_dicom,
    save_png,
    side_chest,
)
from refusals import refused

from ct_nb.data.direct_beam import find_direct_beam
from ct_nb.data.linearize import read_radiographs, to_line_integrals
from ct_nb.data.radiograph_io import RadiographError, read_radiograph, write_radiographs
from ct_nb.physics.geometry import ConeBeam


def refuses(argument, paths, **settings):
    "`read_radiographs` raises `RadiographError` about the last file, which `argument` can settle."
    with refused(argument, file=paths[-1], kind=RadiographError) as caught:
        read_radiographs(paths, **settings)
    assert "\n" not in caught.value.reason and len(str(caught.value)) < 500
    return caught.value.reason


# ---------------------------------------------------------------- several views
def test_wrong_size_and_count_name_both_sides(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    with refused(file="xray_0.png", kind=RadiographError) as caught:
        read_radiographs(pngs, ConeBeam.biplanar(detector_shape=(64, 64)))
    assert "20×30" in caught.value.reason and "64×64" in caught.value.reason
    with refused("paths"):
        read_radiographs(pngs, ConeBeam.orbit([0, 45, 90], detector_shape=(20, 30)))
    with refused("paths"):
        read_radiographs(pngs[:1], GEOMETRY)
    first = save_png(tmp_path / "first.png", INTENSITY[0])
    other = save_png(tmp_path / "other.png", INTENSITY[0][:10])
    reason = refuses(None, [first, other], kind="intensity", i0=50000)
    assert "10×30" in reason and "first.png has 20×30" in reason


def test_empty_lists_and_folders(tmp_path):
    with refused("paths"):
        read_radiographs([])
    with refused(file=tmp_path, kind=RadiographError):
        read_radiographs(tmp_path)


# ---------------------------------------------------------------- the step itself
@pytest.mark.parametrize(
    "settings, argument",
    [
        (dict(kind="intensity"), "i0"),
        (dict(kind="intensity", i0=-1.0), "i0"),
        (dict(kind="intensity", i0="bright"), "i0"),
        (dict(kind="intensity", i0=float("nan")), "i0"),
        (dict(kind="intensity", i0=10.0), "i0"),
        (dict(kind="intensity", i0=1.0, inverted=True), "white"),
        (dict(kind="intensity", i0=1.0, scale=1.0), "scale"),
        (dict(kind="line_integrals", i0=1.0), "i0"),
        (dict(kind="line_integrals", inverted=True), "inverted"),
        (dict(kind="log"), "kind"),
        (dict(kind="log_intensity", i0=1.0), "scale"),
        (dict(kind="log_intensity", i0=1.0, scale=-1.0), "scale"),
        (dict(kind="log_intensity", scale=1.0), "i0"),
        (dict(kind="log_intensity", scale=1.0, i0=float("nan")), "i0"),
        (dict(kind="log_intensity", scale=1.0, i0="border"), "i0"),
    ],
)
def test_arguments_that_are_missing_or_do_not_belong(settings, argument):
    with refused(argument):
        to_line_integrals(torch.from_numpy(INTENSITY.astype(np.float32))[0], **settings)


def test_dark_pixels_are_finite_and_the_maximum_can_be_given():
    image = torch.tensor([[0.0, -5.0, 100.0, 50.0]])
    p = to_line_integrals(image, "intensity", i0=100)
    expected = torch.tensor([[11.5129, 11.5129, 0.0, 0.6931]])
    assert torch.isfinite(p).all() and torch.allclose(p, expected, atol=1e-4)
    assert torch.equal(to_line_integrals(image, "intensity", i0="maximum"), p)


def test_images_without_a_direct_beam():
    ramp = np.arange(64.0)[None]
    noise = np.random.default_rng(0).random((64, 64))
    for image in (np.zeros((64, 64)), ramp.repeat(3, 0), noise, ramp.repeat(64, 0)):
        assert find_direct_beam(image) is None


# ---------------------------------------------------------------- the file, the caller, the pixels
def test_the_files_statement_against_the_callers(tmp_path):
    pngs = write_radiographs(tmp_path, IMAGES, GEOMETRY)
    refuses("kind", pngs[:1], kind="intensity", i0=1.0)
    refuses("scale", pngs[:1], scale=2.0)
    refuses("scale", [save_png(tmp_path / "raw.png", INTENSITY[0])], kind="line_integrals")


@pytest.fixture(scope="module")
def chest():
    "The X-rays of a phantom from the front and the side, with air beside it."
    from ct_nb.phantom.chest import phantom
    from ct_nb.physics.projector import project
    from ct_nb.physics.volume import hu_to_mu

    volume = phantom(3, 64).volume
    geometry = ConeBeam.biplanar(grid=volume.grid, detector_shape=(96, 128), pixel_mm=4.0)
    return project(hu_to_mu(volume.tensor()), geometry.to(torch.float32))


STORED = {
    "intensity": lambda p, top: 0.9 * top * torch.exp(-p),
    "intensity inverted": lambda p, top: top - 0.9 * top * torch.exp(-p),
    "log": lambda p, top: top * (0.95 - p / 10),
    "log inverted": lambda p, top: top * (0.05 + p / 10),
}


def store(path, p, encoding, bits):
    "Line integrals as a PNG of 8 or 16 bits in one of the encodings of `STORED`."
    top = 2**bits - 1
    stored = STORED[encoding](p, top).round().clamp(0, top).numpy()
    return save_png(path, stored.astype(np.uint8 if bits == 8 else np.uint16))


def largest_error(line_integrals, expected, most=6.0) -> float:
    "Where the line integral is below `most`."
    return float((line_integrals - expected)[expected < most].abs().max())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("encoding", STORED)
def test_four_encodings_are_recognised_and_noted(tmp_path, chest, encoding, bits):
    paths = [
        store(tmp_path / f"{name}.png", p, encoding, bits) for name, p in zip(("ap", "lat"), chest)
    ]
    notes = []
    top = 2**bits - 1
    logarithm = "log" in encoding
    settings = {"scale": 10 / top} if logarithm else {}
    line_integrals = read_radiographs(paths, notes=notes, **settings)
    assert len(notes) == 4 and "i0 = " in notes[1]
    assert ("logarithm" in notes[0]) == logarithm
    assert ("not inverted" in notes[0]) == ("inverted" not in encoding)
    # one stored step, in line integrals
    quantum = 10 / top if logarithm else torch.exp(chest) / (0.9 * top)
    error = (line_integrals - chest).abs()
    assert (error <= 2 * quantum + 0.15)[chest < (2.5 if bits == 8 else 6)].all()
    assert error.median() < (0.05 if bits == 16 else 0.15)
    if logarithm:
        refuses("scale", paths[:1])


def test_a_decision_is_a_warning_unless_notes_are_taken(tmp_path, chest):
    path = store(tmp_path / "ap.png", chest[1], "intensity", 16)
    with pytest.warns(UserWarning, match="ap.png: pixels are taken for intensity, not inverted"):
        read_radiographs([path])


def test_the_caller_overrules(tmp_path, chest):
    path = store(tmp_path / "lat.png", chest[1], "intensity inverted", 16)
    notes = []
    stated = read_radiographs([path], kind="intensity", i0=60000.0, notes=notes)[0]
    assert notes == [], "kind and i0 are stated: nothing is looked for"
    image = read_radiograph(path).image
    assert torch.equal(stated, to_line_integrals(image, "intensity", i0=60000.0))
    p = read_radiographs([path], i0=0.9 * 65535, notes=[])[0]
    assert largest_error(p, chest[1]) < 0.1
    logarithms = read_radiographs([path], kind="log_intensity", scale=1e-4, notes=notes)
    assert "logarithm" in notes[0] and logarithms.max() > 5, "the sign and the zero are still found"
    refuses("i0", [path], inverted=False, kind="intensity", notes=[])
    shifted = read_radiographs([path], kind="intensity", inverted=True, i0="border", notes=[])[0]
    assert largest_error(shifted, chest[1]) < 0.1


def test_a_view_without_air_is_what_the_others_are(tmp_path, chest):
    little = chest[1].clone()
    for edge in (little[:8], little[-8:], little[:, :8]):
        edge.fill_(2.0)
    # of the border, air at one end of one side
    little[8:-8, -8:] = torch.where(torch.arange(80)[:, None] < 16, 0.0, 2.0)
    paths = [
        store(tmp_path / "full.png", chest[1], "intensity", 16),
        store(tmp_path / "little.png", little, "intensity", 16),
    ]
    assert find_direct_beam(read_radiograph(paths[1]).image) is None
    notes = []
    p = read_radiographs(paths, notes=notes, i0=0.9 * 65535)
    assert any("little.png: its border shows too little" in note for note in notes)
    assert largest_error(p[1], little) < 0.05
    inside = store(tmp_path / "inside.png", chest[0][30:66, 40:90], "intensity", 16)
    refuses("kind", [inside])


def test_fractions_that_are_line_integrals(tmp_path, chest):
    import nibabel

    fractions = tmp_path / "p.nii.gz"
    nibabel.save(nibabel.Nifti1Image(chest[1].numpy().T, np.eye(4)), fractions)
    notes = []
    assert torch.equal(read_radiographs([fractions], notes=notes)[0], chest[1])
    assert "taken for line integrals" in notes[0]
    logarithm = tmp_path / "log.nii.gz"
    nibabel.save(nibabel.Nifti1Image(1000 - chest[1].numpy().T * 50, np.eye(4)), logarithm)
    p = read_radiographs([logarithm], scale=0.02, notes=[])[0]
    assert (p - chest[1]).abs().max() < 0.1
    refuses("scale", [logarithm])


def test_dicom_tags_state_the_encoding_and_may_be_overruled(tmp_path, chest):
    counts = (40000 * torch.exp(-chest[1])).round().numpy().astype(np.uint16)
    logs = (1000 + 5000 * chest[1]).round().numpy().astype(np.uint16)

    def save(name, stored, relation, sign=None):
        tags = {"PixelIntensityRelationship": relation}
        tags |= {} if sign is None else {"PixelIntensityRelationshipSign": sign}
        return save_dicom(tmp_path / name, stored, **tags)

    notes = []
    linear = read_radiographs([save("a.dcm", 65535 - counts, "LIN", -1)], notes=notes)[0]
    assert largest_error(linear, chest[1], 5) < 0.1 and "by its tags" in notes[0]
    for path in (save("b.dcm", logs, "LOG", -1), save("c.dcm", logs, "LOG")):
        p = read_radiographs([path], scale=1 / 5000, notes=[])[0]
        assert (p - chest[1]).abs().max() < 0.1
    wrong = save("d.dcm", counts, "LIN", -1)
    refuses("inverted", [wrong])
    p = read_radiographs([wrong], inverted=False, notes=[])[0]
    assert largest_error(p, chest[1], 5) < 0.1
    notes = []
    mislabelled = save("e.dcm", counts, "LOG", 1)
    p = read_radiographs([mislabelled], kind="intensity", notes=notes)[0]
    assert largest_error(p, chest[1], 5) < 0.1 and "against its tags" in notes[0]
    shown = save_dicom(tmp_path / "f.dcm", counts, PresentationIntentType="FOR PRESENTATION")
    assert "made for display" in refuses("kind", [shown])


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_of_one_value_is_refused(tmp_path, value):
    path = save_png(tmp_path / "flat.png", np.full((40, 40), value, dtype=np.uint8))
    for settings in ({}, {"kind": "intensity", "i0": 255}):
        assert "no patient" in refuses(None, [path], **settings)


# ---------------------------------------------------------------- as detectors store it
SIDE = side_chest()


def side_error(path, where=True, most=5.0, **settings) -> tuple[float, list[str]]:
    "Largest error of the line integrals of `side_chest` in a file, and the notes."
    notes = []
    p = read_radiographs([path], notes=notes, **settings)[0].numpy()
    return float(np.abs(p - SIDE)[where & (most > SIDE)].max()), notes


@pytest.mark.parametrize("low, high", [(65535, None), (60000, None), (60000, 65535)])
def test_padding_is_no_direct_beam(tmp_path, low, high):
    frame = margin(SIDE.shape)
    stored = np.round(40000 * np.exp(-SIDE)).astype(np.uint16)
    stored[frame] = np.random.default_rng(0).integers(low, (high or low) + 1, frame.sum())
    tags = {"PixelPaddingValue": low} | ({"PixelPaddingRangeLimit": high} if high else {})
    error, notes = side_error(save_dicom(tmp_path / "x.dcm", stored, **LINEAR, **tags), ~frame)
    assert error < 0.01 and f"{frame.sum()} of its" in notes[0] and "i0 = 40000" in notes[-1]


@pytest.mark.parametrize("kind", ["Collimator", "Shutter"])
def test_black_blades_are_no_direct_beam(tmp_path, kind):
    frame = margin(SIDE.shape)
    stored = np.where(frame, 0, np.round(65535 * (0.95 - SIDE / 10))).astype(np.uint16)
    tags = {f"{kind}Shape": "RECTANGULAR", "PhotometricInterpretation": "MONOCHROME2"}
    tags |= {f"{kind}{name}": edge for name, edge in zip(NAMES, (14, 179, 14, 179))}
    path = save_dicom(tmp_path / "x.dcm", stored, **tags)
    settings = dict(kind="log_intensity", scale=10 / 65535)
    error, notes = side_error(path, ~frame, **settings)
    assert error < 0.01 and "not measured" in notes[0]
    whole = read_radiographs([path], notes=[], **settings)
    assert whole.min() > -0.01, "the blades continue the picture, they are neither air nor lead"


def test_a_round_collimator_and_a_polygonal_shutter(tmp_path):
    from skimage.draw import polygon2mask

    row, column = np.mgrid[:192, :192]
    vertices = [[10, 20], [10, 180], [180, 170], [180, 10]]
    openings = {
        "circle": (row - 95) ** 2 + (column - 95) ** 2 < 90**2,
        "polygon": polygon2mask(SIDE.shape, np.array(vertices) - 1),
    }
    tags = {
        "circle": dict(
            CollimatorShape="CIRCULAR",
            CenterOfCircularCollimator=[96, 96],
            RadiusOfCircularCollimator=90,
        ),
        "polygon": dict(
            ShutterShape="POLYGONAL", VerticesOfThePolygonalShutter=np.ravel(vertices).tolist()
        ),
    }
    for name, inside in openings.items():
        stored = np.where(inside, np.round(40000 * np.exp(-SIDE)), 65535).astype(np.uint16)
        path = save_dicom(tmp_path / f"{name}.dcm", stored, **LINEAR, **tags[name])
        error, notes = side_error(path, inside)
        assert error < 0.01 and f"{(~inside).sum()} of its" in notes[0], name


@pytest.mark.parametrize("bits, signed", [(12, False), (16, False), (16, True)])
def test_negatives_in_three_pixel_formats(tmp_path, bits, signed):
    top = 2 ** (bits - signed) - 1
    stored = (top - np.round(0.8 * top * np.exp(-SIDE))).astype(np.int16 if signed else np.uint16)
    tags = LINEAR | dict(PixelIntensityRelationshipSign=-1, PhotometricInterpretation="MONOCHROME1")
    path = save_dicom(tmp_path / "x.dcm", stored, BitsStored=bits, HighBit=bits - 1, **tags)
    assert read_radiograph(path).white == top
    error, notes = side_error(path, most=4.0)
    assert error < 40 / top and f"i0 = {round(0.8 * top)}" in notes[-1]


def test_a_falling_rescale_of_a_negative(tmp_path):
    stored = np.round(40000 * np.exp(-SIDE)).astype(np.uint16)
    tags = LINEAR | dict(PixelIntensityRelationshipSign=-1, RescaleSlope=-1, RescaleIntercept=65535)
    assert side_error(save_dicom(tmp_path / "x.dcm", stored, **tags))[0] < 0.01


def test_empty_rescale_tags_are_absent(tmp_path):
    stored = np.round(40000 * np.exp(-SIDE)).astype(np.uint16)
    path = save_dicom(
        tmp_path / "x.dcm", stored, RescaleSlope=None, RescaleIntercept=None, **LINEAR
    )
    assert side_error(path)[0] < 0.01


@pytest.mark.parametrize("first", [0, -2048])
def test_a_modality_table(tmp_path, first):
    entries = np.round(60000 * np.exp(-np.arange(4096) / 500)).astype("<u2")
    stored = (np.clip(np.round(500 * SIDE), 0, 4095) + first).astype(np.int16)
    path = save_dicom(
        tmp_path / "x.dcm",
        stored,
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=int(first < 0),
        ModalityLUTSequence=[modality_table(entries, first)],
    )
    assert read_radiograph(path).white == 65535
    assert side_error(path, kind="intensity")[0] < 0.01


def test_logarithms_upside_down(tmp_path):
    stored = np.round(1000 + 5000 * SIDE).astype(np.uint16)
    tags = dict(PixelIntensityRelationship="LOG", PixelIntensityRelationshipSign=-1)
    path = save_dicom(tmp_path / "x.dcm", stored, **tags)
    assert side_error(path, scale=1 / 5000)[0] < 0.01


# ---------------------------------------------------------------- frames without a tag
def noisy(size: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (4 * rng.poisson(10_000 * np.exp(-side_chest(size, 500 / size)))).astype(np.uint16)


def test_a_frame_of_one_number_is_no_direct_beam(tmp_path):
    for name, image in (
        ("clean", np.round(40000 * np.exp(-SIDE)).astype(np.uint16)),
        ("noisy", noisy(192)),
    ):
        assert find_direct_beam(image).level == pytest.approx(40000, rel=0.01), name
        for number in (65535, 60000, 0):
            framed = np.where(margin(image.shape), number, image).astype(np.uint16)
            assert find_direct_beam(framed) is None, (name, number)
            path = save_png(tmp_path / "x.png", framed)
            refuses("i0", [path], kind="intensity", inverted=False, notes=[])


def test_two_strips_before_the_beam_and_a_saturated_beam():
    clean = np.round(40000 * np.exp(-SIDE))
    strips = clean.copy()
    strips[:, :14] = strips[:, -14:] = 65535
    assert find_direct_beam(strips) is None, "behind the strips begins the beam itself"
    saturated = np.minimum(noisy(320), 30000)
    assert find_direct_beam(saturated) is None, "cut off at one number in a noisy image"
    assert find_direct_beam(noisy(320)) is not None
    assert find_direct_beam(np.round(255 * np.exp(-side_chest(320, 1.6)))) is not None


# ---------------------------------------------------------------- the end of it
@pytest.mark.parametrize("factor", [1000.0, -40.0])
def test_line_integrals_that_no_body_has(tmp_path, factor):
    np.savez(tmp_path / "x.npz", line_integrals=factor * IMAGES.numpy())
    with refused("scale", file="x.npz", kind=RadiographError):
        read_radiographs(tmp_path / "x.npz")
    with refused("scale"):
        to_line_integrals(factor * IMAGES, "line_integrals")
    with refused("scale"):
        to_line_integrals(torch.full((4, 4), float("nan")), "line_integrals")
