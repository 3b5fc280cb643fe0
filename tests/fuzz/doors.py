"""Everything that ct_nb reads, as doors: what writes a small whole input, what reads it, and what
a reader may give.
"""

import functools
import gzip
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import torch

from ct_files import body, dicom_slice, write_table

AFFINE = np.array([[8.0, 0, 0, -120], [0, 8, 0, -90], [0, 0, 10, 60], [0, 0, 0, 1]])
SHAPE = (12, 24, 32)


@dataclass(frozen=True)
class Door:
    "A kind of input."

    name: str
    write: Callable[[Path], None]  # a whole input, into an empty folder
    read: Callable[[Path], object]  # the value of that folder
    check: Callable[[object], str]  # what is wrong with a value that was read; "" for nothing
    damaged: dict[str, str]  # pattern of file names → kind of mutators for these
    # patterns of files whose own checksum tells blind damage
    checksummed: tuple[str, ...] = ()


# ---- values -----------------------------------------------------------------------------------


def check_numbers(value, low=-math.inf, high=math.inf) -> str:
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        return f"holds {array.dtype}"
    if not np.isfinite(array).all():
        return "is not finite"
    if array.size and not (low <= array.min() and array.max() <= high):
        return f"runs from {array.min():g} to {array.max():g}"
    return ""


def check_text(value, what="text") -> str:
    if not isinstance(value, str):
        return f"{what} is {type(value).__name__}"
    return ""


def check_name(value) -> str:
    "A name that is fit to be a file name and to be printed."
    if not isinstance(value, str) or not value or re.search(r"[\x00-\x1f\x7f\u2028/\\]", value):
        return f"the name {value!r}"
    return "the name is dots" if value.strip(".") == "" else ""


def first(*problems: str) -> str:
    return next((p for p in problems if p), "")


def check_volume(value) -> str:
    "HU on a grid of a patient's size."
    hu, affine, notes = value
    if hu.ndim != 3 or hu.dtype != np.float32 or min(hu.shape) < 2:
        return f"hu is {hu.dtype} {hu.shape}"
    extent = np.linalg.norm(affine[:3, :3], axis=0) * hu.shape[::-1]
    unprintable = [note for note in notes if re.search(r"[\x00-\x1f\x7f-\x9f\u2028]", note)]
    return first(
        check_numbers(hu, -1024, 100_000),
        check_numbers(affine),
        check_numbers(extent, 0.1, 10_000),
        f"a note has control characters: {unprintable[0]!r}" if unprintable else "",
    )


def check_line_integrals(value) -> str:
    if value.ndim != 3 or 0 in value.shape:
        return f"has the shape {tuple(value.shape)}"
    return check_numbers(value, -50, 50)


def check_geometry(value) -> str:
    vectors = [value.source_mm, value.detector_center_mm, value.column_step_mm, value.row_step_mm]
    return first(
        *(check_numbers(v, -1e7, 1e7) for v in vectors),
        check_numbers(value.detector_shape, 1, 100_000),
        check_numbers(value.grid.affine),
    )


def check_cases(value) -> str:
    return first(*(first(check_name(id), check_text(patient)) for id, patient, _ in value))


def check_reports(value) -> str:
    for report in value:
        for one in fields(report):
            kind = {"labels": dict, "regions": tuple, "steps": tuple, "questions": tuple}
            if not isinstance(getattr(report, one.name), kind.get(one.name, str)):
                return f"{one.name} is {getattr(report, one.name)!r:.60}"
        texts = [t for _, t in report.regions] + [t for q in report.questions for t in q]
        texts += [step.text for step in report.steps] + [
            t for s in report.steps for t in s.entities
        ]
        problem = first(check_name(report.volume), *map(check_text, texts))
        if problem:
            return problem
        if not all(type(v) is bool and type(k) is str for k, v in report.labels.items()):
            return f"labels are {report.labels!r:.60}"
    return ""


def check_index(index) -> str:
    count = len(index.scans)
    if not count == len(index.files) == len(index.about) == len(index.vectors):
        return "its columns have different lengths"
    lengths = np.linalg.norm(index.vectors, axis=1)
    texts = [*index.scans, *index.files, *index.about, index.weights, index.digest]
    return first(check_numbers(lengths, 0.99, 1.01), *map(check_text, texts))


def check_model(value) -> str:
    "Finite weights, and settings of the types that the class says."
    network, about = value
    if not all(bool(torch.isfinite(t).all()) for t in network.state_dict().values()):
        return "its weights are not finite"
    count = sum(t.numel() for t in network.state_dict().values())
    return f"has {count} weights" if count > 50_000_000 else ""


def check_samples(value) -> str:
    for id, patient, hu, affine, labels, names, notes in value:
        problem = first(
            check_name(id),
            check_text(patient, "the patient"),
            check_volume((hu, affine, notes)),
            "" if labels is None else check_numbers(labels, 0, 255),
            "" if labels is None or labels.shape == hu.shape else f"labels are {labels.shape}",
            *(check_text(name, "a label's name") for name in names.values()),
        )
        if problem:
            return problem
    return ""


def check_stacks(value) -> str:
    for id, patient, side, thin, thick, pixel, axes, affine in value:
        problem = first(
            check_name(id),
            check_text(patient, "the patient"),
            "" if side in ("train", "validation", "test") else f"the side {side!r}",
            check_numbers(pixel, 1e-3, 100),
            check_numbers([number for axis in axes for number in axis]),
            *(check_numbers(a, -32768, 100_000) for a in (thin, thick) if a is not None),
            f"thin is {thin.shape} of {axes[0]}" if len(thin) != axes[0][2] else "",
            "" if affine is None else check_numbers(affine),
        )
        if problem:
            return problem
    return ""


def check_state(state) -> str:
    return "" if type(state["step"]) is int else f"step {state['step']!r}"


def check_history(rows) -> str:
    for row in rows:
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            return f"a row is {row!r:.60}"
        numbers = [v for v in row.values() if not isinstance(v, str)]
        if not all(type(v) in (int, float) for v in numbers):
            return f"a row is {row!r:.60}"
    return ""


# ---- volumes ----------------------------------------------------------------------------------


def hu(seed=0) -> np.ndarray:
    return body(SHAPE, seed).astype(np.int16)


def volume(seed=0):
    from ct_nb.physics.volume import Volume

    return Volume(hu(seed).astype(np.float32), AFFINE)


def save_scan(name: str, folder: Path) -> None:
    "The scan by the library's own writer."
    volume().save(folder / name)


def save_nifti(name: str, folder: Path) -> None:
    "A scan with slope and intercept, as scanners' converters write it."
    import nibabel

    image = nibabel.Nifti1Image(
        (hu() + 1024).transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ AFFINE
    )
    image.header.set_slope_inter(1, -1024)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / name)


NRRD_HEADER = """NRRD0004
# by hand
type: int16
dimension: 3
space: left-posterior-superior
sizes: 32 24 12
space directions: (8,0,0) (0,8,0) (0,0,10)
kinds: domain domain domain
endian: little
encoding: {encoding}
space origin: (-120,-90,60)
{more}
"""


def save_nrrd(encoding: str, detached: bool, folder: Path) -> None:
    content = hu().astype("<i2").tobytes()
    content = gzip.compress(content, 6, mtime=0) if encoding == "gzip" else content
    more = "data file: scan.raw\n" if detached else ""
    header = NRRD_HEADER.format(encoding=encoding, more=more).rstrip("\n") + "\n\n"
    (folder / "scan.nrrd").write_bytes(header.encode() + (b"" if detached else content))
    if detached:
        (folder / "scan.raw").write_bytes(content)


def save_metaimage(name: str, packed: bool, folder: Path) -> None:
    import zlib

    content = hu().astype("<i2").tobytes()
    content = zlib.compress(content) if packed else content
    local = name.endswith(".mha")
    header = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        + f"CompressedData = {packed}\n"
        + (f"CompressedDataSize = {len(content)}\n" if packed else "")
        + "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -120 -90 60\n"
        "CenterOfRotation = 0 0 0\nAnatomicalOrientation = RAI\nElementSpacing = 8 8 10\n"
        "DimSize = 32 24 12\nElementType = MET_SHORT\n"
        f"ElementDataFile = {'LOCAL' if local else 'scan.raw'}\n"
    )
    (folder / name).write_bytes(header.encode() + (content if local else b""))
    if not local:
        (folder / "scan.raw").write_bytes(content)


def slices():
    "The scan as single DICOM images, the same every time."
    for k, image in enumerate(hu() + 1024):
        yield dicom_slice(
            image,
            AFFINE[:3, 3] + [0, 0, 10 * k],
            spacing=(8.0, 8.0),
            SOPInstanceUID=f"1.2.3.{k}",
            SliceThickness=10.0,
            PatientID="somebody",
            SeriesDescription="CHEST",
            PatientPosition="HFS",
            ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        )


def save_dicom_folder(folder: Path) -> None:
    (folder / "scan").mkdir()
    for k, dataset in enumerate(slices()):
        dataset.save_as(folder / "scan" / f"{k:03d}.dcm", enforce_file_format=True)


def save_dicom_zip(folder: Path) -> None:
    import io

    with zipfile.ZipFile(folder / "scan.zip", "w") as archive:
        for k, dataset in enumerate(slices()):
            buffer = io.BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            member = zipfile.ZipInfo(f"1/IM{k:04d}")
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, 6)


def save_enhanced(folder: Path) -> None:
    "One multi-frame file with its numbers in functional groups (PS3.3 A.38)."
    from pydicom.dataset import Dataset

    def item(**tags):
        one = Dataset()
        for name, value in tags.items():
            setattr(one, name, value)
        return one

    dataset = dicom_slice(
        hu()[0] + 1024,
        (0, 0, 0),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1",
        SOPInstanceUID="1.2.3.1",
        PixelSpacing=None,
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        RescaleSlope=None,
        RescaleIntercept=None,
        SliceThickness=None,
    )
    dataset.NumberOfFrames = SHAPE[0]
    dataset.PixelData = (hu() + 1024).astype("<u2").tobytes()
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[8, 8], SliceThickness=10)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
            PixelValueTransformationSequence=[
                item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
            ],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=list(AFFINE[:3, 3] + [0, 0, 10 * k]))]
        )
        for k in range(SHAPE[0])
    ]
    (folder / "scan").mkdir()
    dataset.save_as(folder / "scan" / "enhanced.dcm", enforce_file_format=True)


def read_scan(name: str, folder: Path):
    from ct_nb.data.read import read_ct

    found = read_ct(folder / name)
    return found.hu, found.affine, found.notes


# ---- radiographs ------------------------------------------------------------------------------


@functools.cache
def radiographs():
    "A geometry of two views and line integrals (2, 40, 48) with a direct beam on both sides."
    from ct_nb.physics.geometry import ConeBeam

    geometry = ConeBeam.biplanar(detector_shape=(40, 48), pixel_mm=10.0)
    rows, columns = np.meshgrid(np.arange(40), np.arange(48), indexing="ij")
    chord = np.sqrt(np.clip(1 - ((columns - 23.5) / 17) ** 2, 0, None)) * (1 + 0.2 * np.cos(rows))
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 40, 48))
    return geometry, (np.stack([5 * chord, 3 * chord]) + noise).astype(np.float32)


def save_pngs(folder: Path) -> None:
    from ct_nb.data.radiograph_io import write_radiographs

    geometry, images = radiographs()
    write_radiographs(folder, images, geometry)
    (folder / "xrays.npz").unlink()


def save_radiograph_npz(folder: Path) -> None:
    np.savez_compressed(folder / "xrays.npz", line_integrals=radiographs()[1])


def save_radiograph_nifti(folder: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Image(radiographs()[1].T, np.eye(4))
    nibabel.save(image, folder / "xrays.nii.gz")


def save_radiograph_dicom(xa: bool, folder: Path) -> None:
    from radiograph_files import save_dicom

    _, images = radiographs()
    for view, image in enumerate(images):
        angles = {
            "PositionerPrimaryAngle": 90.0 * view,
            "PositionerSecondaryAngle": 0.0,
            "DistanceSourceToPatient": 1000.0,
            "DistanceSourceToDetector": 1500.0,
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.1",
            "Modality": "XA",
        }
        save_dicom(
            folder / f"view_{view}.dcm",
            (50000 * np.exp(-image)).round().clip(0, 65535).astype(np.uint16),
            PhotometricInterpretation="MONOCHROME2",
            PixelIntensityRelationship="LIN",
            PixelIntensityRelationshipSign=1,
            ImagerPixelSpacing=[10.0, 10.0],
            PatientID="somebody",
            **(angles if xa else {"Modality": "DX"}),
        )


def read_line_integrals(names: tuple, options: dict, folder: Path):
    from ct_nb.data.linearize import read_radiographs

    paths = [folder / name for name in names] if names else folder
    return read_radiographs(paths, notes=[], **options)


def read_pngs(folder: Path):
    from ct_nb.data.linearize import read_radiographs
    from ct_nb.physics.geometry_io import load_geometry

    return read_radiographs(folder, load_geometry(folder / "geometry.json"), notes=[])


def read_xa(folder: Path):
    from ct_nb.physics.geometry_io import geometry_from_dicom

    return geometry_from_dicom([folder / "view_0.dcm", folder / "view_1.dcm"])


def save_geometry_file(form: str, folder: Path) -> None:
    from ct_nb.physics.geometry_io import geometry_to_json

    content = json.loads(geometry_to_json(radiographs()[0]))
    if form == "angles":
        del content["views"]
        content |= {
            "azimuth_deg": [0, 90],
            "source_to_isocenter_mm": 1000,
            "source_to_detector_mm": [1500, 1500],
            "pixel_mm": 10,
        }
    if form == "matrices":
        views = content.pop("views")
        content["matrices"] = [
            [[150, 0, 24 / 10, 0], [0, 20 / 10, -150, 0], [0, 0.1, 0, 100 + 0 * len(view)]]
            for view in views
        ]
        content["source_to_detector_mm"] = 1500
    (folder / "geometry.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_geometry_file(folder: Path):
    from ct_nb.physics.geometry_io import load_geometry

    return load_geometry(folder / "geometry.json")


# ---- folders of cases -------------------------------------------------------------------------


def save_patients(folder: Path) -> None:
    for name in ("a", "b", "c"):
        np.savez_compressed(folder / f"{name}.npz", hu=hu(), affine=AFFINE)
    write_table(folder / "patients.csv", ("case", "patient"), ("a", "p1"), ("b", "p1"), ("c", "p2"))


def read_patient_names(folder: Path):
    from ct_nb.data.folders import find_cases, name_cases

    return [(c.id, c.patient, c.name) for c in name_cases(folder, find_cases(folder))]


def read_samples(folder: Path):
    from ct_nb.data.folders import read_folder

    source = read_folder(folder, 16)
    return [
        (s.id, s.patient, s.volume.hu, s.volume.affine, s.labels, s.label_names, s.volume.notes)
        for s in source
    ]


def save_labelled(folder: Path) -> None:
    from ct_nb.physics.volume import Volume

    volume().save(folder / "scan.nii.gz")
    (folder / "labels").mkdir()
    lungs = ((hu() < -700) & (hu() > -950)).astype(np.float32)
    Volume(lungs, AFFINE).save(folder / "labels" / "scan.nii.gz")
    (folder / "labels" / "labels.json").write_text('{"1": "lung left", "2": "lung right"}')


def save_prepared(folder: Path) -> None:
    from ct_nb.data.cases import CTSource
    from ct_nb.data.prepare import prepare

    lungs = ((hu() < -700) & (hu() > -950)).astype(np.uint8)
    source = CTSource.from_list(
        [volume(0), volume(1)], 16, ids=["a", "b"], labels=[lungs, None], label_names={1: "lung"}
    )
    prepare(source, folder)


def save_stacks(folder: Path) -> None:
    from ct_nb.core.files import write_json
    from ct_nb.slices.prepared import PREPARED_FILE, PREPARED_FORMAT, write_stack
    from ct_nb.slices.slice_profile import SliceAxis, SliceProfile, ThinStack

    thin = body((10, 24, 24))
    for name in ("a", "b", "c"):
        stack = ThinStack(
            name,
            f"patient-{name}",
            thin,
            SliceAxis(0.0, 1.0, 10),
            (2.0, 2.0),
            thin.reshape(2, 5, 24, 24).mean(1),
            SliceAxis(2.0, 5.0, 2),
            SliceProfile(5.0),
            AFFINE,
            ("a note",),
        )
        write_stack(stack, folder / name, "0" * 32)
    sides = {"patient-a": "train", "patient-b": "validation", "patient-c": "test"}
    write_json(
        folder / PREPARED_FILE,
        {"format": PREPARED_FORMAT, "sides": sides, "shares": [1, 1, 1], "seed": 0},
    )


def read_stacks(folder: Path):
    from ct_nb.slices.prepared import prepared_stacks

    source = prepared_stacks(folder)
    result = []
    for case in source.cases:
        stack = case.load()
        axes = [tuple(asdict(a).values()) for a in (stack.thin_axis, stack.thick_axis) if a]
        thick = None if stack.thick is None else np.array(stack.thick)
        thin = np.array(stack.thin)
        result.append(
            (case.id, case.patient, case.side, thin, thick, stack.pixel_mm, axes, stack.affine)
        )
    return result


# ---- reports ----------------------------------------------------------------------------------

FINDINGS = (
    "No pleural effusion. A 9 mm nodule is seen in the left lower lobe.\nThe heart is enlarged.",
    'Trachea is open, "patent". There is consolidation in the right upper lobe.',
)


def save_ct_rate(folder: Path) -> None:
    from ct_nb.ct_encoder.reports import CT_RATE_LABELS

    data = folder / "dataset"
    names = ["valid_1_a_1.nii.gz", "valid_2_b_1.nii.gz"]
    write_table(
        data / "radiology_text_reports" / "validation_reports.csv",
        ("VolumeName", "Findings_EN", "Impressions_EN"),
        *((name, text, "Nodule.") for name, text in zip(names, FINDINGS)),
    )
    write_table(
        data / "multi_abnormality_labels" / "valid_predicted_labels.csv",
        ("VolumeName", *CT_RATE_LABELS),
        *((name, *("01" * 9)) for name in names),
    )
    write_table(
        data / "metadata" / "validation_metadata.csv",
        (
            *("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"),
            *("ImageOrientationPatient", "ImagePositionPatient"),
        ),
        *(
            (name, "1.0", "-1024", "[0.7, 0.7]", "1.5", "[1, 0, 0, 0, 1, 0]", "[-1, -2, 3]")
            for name in names
        ),
    )
    talk = [
        {"from": "human", "value": "<image> Where is the nodule? <short_answer>"},
        {"from": "gpt", "value": "In the left lower lobe."},
    ]
    (data / "vqa").mkdir()
    (data / "vqa" / "valid_vqa.json").write_text(
        json.dumps([{"image": name, "conversations": talk} for name in names])
    )
    (folder / "cot.jsonl").write_text(
        "".join(
            json.dumps({"volumename": n, "thinking": "Step 1: The heart. Step 2: The left lung."})
            + "\n"
            for n in names
        )
    )


def read_ct_rate_folder(folder: Path):
    from ct_nb.ct_encoder.ct_rate import ct_rate_metadata
    from ct_nb.ct_encoder.report_readers import ct_rate_published

    return ct_rate_published(folder, folder / "cot.jsonl"), ct_rate_metadata(folder)


def check_ct_rate(value) -> str:
    reports, metadata = value
    rows = [first(check_name(name), *map(_check_cell, row)) for name, row in metadata.items()]
    return first(check_reports(reports), *rows)


def _check_cell(cell) -> str:
    return "" if cell is None or isinstance(cell, str) else check_numbers(cell)


def save_radgenome(folder: Path) -> None:
    write_table(
        folder / "train_region_report.csv",
        ("Volumename", "Anatomy", "Sentence"),
        ("valid_1_a_1.nii.gz", "lung", FINDINGS[0]),
        ("valid_1_a_1.nii.gz", "", "Nodule."),
        ("valid_2_b_1.nii.gz", "heart", FINDINGS[1]),
    )


OMNIABNORM = (
    {
        "case_id": "case1",
        "category": "nodule",
        "region": "left lower lobe",
        "cot_reasoning": [
            {"text": "The lung.", "anatomical_entities": ["left lung"], "mask_region": "lung"},
            {"text": "A nodule is seen."},
        ],
    },
    {
        "image_id": "case2",
        "findings": [{"disease": "nodule", "location": "left lower lobe", "present": True}],
        "reasoning": ["Step 1: The lung.", "Step 2: The heart."],
        "summary": "A nodule.",
    },
    {"volumename": "case3", "question": "What is seen?", "answer": "A nodule. The heart is large."},
)


def save_omniabnorm(lines: bool, folder: Path) -> None:
    if lines:
        text = "".join(json.dumps(record) + "\n" for record in OMNIABNORM)
        (folder / "reports.jsonl").write_text(text)
    else:
        (folder / "reports.json").write_text(json.dumps(OMNIABNORM, indent=1))


def read_report_folder(folder: Path):
    from ct_nb.ct_encoder.dataset import read_reports

    return read_reports(folder)


def save_index(folder: Path) -> None:
    from ct_nb.ct_encoder.index import EmbeddingIndex

    vectors = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"scan{k // 2}" for k in range(6)]
    EmbeddingIndex(
        names, [f"{n}.nii.gz" for n in names], ["scan", "heart"] * 3, vectors, "runs/x", "0" * 32
    ).save(folder / "embeddings.parquet")


def read_index(folder: Path):
    from ct_nb.ct_encoder.index import EmbeddingIndex

    return EmbeddingIndex.load(folder / "embeddings.parquet")


# ---- runs -------------------------------------------------------------------------------------


def _network(system: str):
    "An untrained network of the smallest preset, and its entry `network` in config.json."
    from dataclasses import replace

    if system == "drr2ct":
        from ct_nb.drr2ct.network import DRR2CT
        from ct_nb.drr2ct.train import DRR2CT_PRESETS

        network = DRR2CT(DRR2CT_PRESETS["micro"].network)
    elif system == "cascade":
        from ct_nb.cascade.network import Cascade, CascadeConfig
        from ct_nb.cascade.train import CASCADE_PRESETS

        start = {"size": 16, "modes": 2, "noise": 0.5, "energy_kev": 60.0}
        network = Cascade(CascadeConfig(CASCADE_PRESETS["micro"].stages, "prior", start))
    elif system == "refiner":
        from ct_nb.refine.network import RefinerConfig
        from ct_nb.refine.pipeline import ConsistencySettings, RefinementModel

        network = RefinementModel(
            replace(RefinerConfig.preset("smoke"), size=16), ConsistencySettings()
        )
        return network, network.refiner.config.to_dict()
    elif system == "slices":
        from ct_nb.slices.models import SliceRegressor, SliceRegressorConfig
        from ct_nb.slices.train import SliceModels

        network = SliceModels(SliceRegressor(SliceRegressorConfig.preset("smoke")), None)
        return network, network.networks()
    elif system == "slice_vae":
        from ct_nb.slices.vae import SliceVAE, SliceVAEConfig

        network = SliceVAE(SliceVAEConfig.preset("smoke"))
    else:
        from ct_nb.ct_encoder.model import ScanLanguage
        from ct_nb.ct_encoder.train import CT_ENCODER_PRESETS

        words = ("an", "heart", "lung", "nodule", "the")
        network = ScanLanguage(replace(CT_ENCODER_PRESETS["micro"].network, words=words))
    return network, network.config.to_dict()


def save_run(system: str, folder: Path) -> None:
    from ct_nb.training.checkpoints import save_weights

    torch.manual_seed(0)
    network, settings = _network(system)
    config = {
        "system": system,
        "preset": "micro",
        "data": "phantom:4",
        "seed": 0,
        "network": settings,
        "residual": {"median": 0.02, "limit": 0.1},
        "consistency": {"noise": 0.05, "iterations": 8, "detector": 128, "rounds": 2},
        "settings": {"phantoms": 4, "trained_on": "both", "samples": 2, "sampling_steps": 4},
        "coarse": None,
        "training": {"cases": ["a"], "patients": ["a"], "fingerprint": "f"},
        "validation": {"cases": ["b"], "patients": ["b"], "fingerprint": "g"},
    }
    save_weights(folder, network, config)


def read_run(system: str, folder: Path):
    from ct_nb.training.checkpoints import read_config

    if system == "drr2ct":
        from ct_nb.drr2ct.predict import load_drr2ct as load
    elif system == "cascade":
        from ct_nb.cascade.train import load_cascade as load
    elif system == "refiner":
        from ct_nb.refine.pipeline import load_refiner as load
    elif system == "slices":
        from ct_nb.slices.train import load_slices as load
    elif system == "slice_vae":
        from ct_nb.slices.vae_train import load_vae as load
    else:
        from ct_nb.ct_encoder.train import load_ct_encoder as load
    if system in ("drr2ct", "cascade", "refiner"):
        from ct_nb.refine.coarse_inputs import known_cases

        known_cases(folder)
    return load(folder), read_config(folder)


def save_history(folder: Path) -> None:
    from ct_nb.training.trainer import write_history

    rows = [{"step": k, "loss": 1 / k, "learning_rate": 1e-3, "stage": "joint"} for k in (1, 2, 3)]
    write_history(folder, rows)


def read_history_rows(folder: Path):
    from ct_nb.training.run import join_histories
    from ct_nb.training.trainer import read_history

    return join_histories({"joint": read_history(folder)})


def draw_history(folder: Path):
    from matplotlib import pyplot as plt

    from ct_nb.viewer.figures import training_figure

    plt.close(training_figure(folder / "history.jsonl"))
    return []


def save_training_state(folder: Path) -> None:
    from ct_nb.training.checkpoints import save_state

    torch.manual_seed(0)
    state = {"step": 7, "model": torch.nn.Linear(8, 8).state_dict(), "random": []}
    save_state(folder, state)


def read_training_state(folder: Path):
    from ct_nb.training.checkpoints import load_state

    state = load_state(folder)
    return {name: state[name] for name in ("step", "model")}


IDENTITY = {
    "system": "slices",
    "seed": 0,
    "settings": {"thick_mm": 5.0, "spacing": [0.8, 1.2], "regressor": {"steps": 8}},
    "vae": None,
    "model": "both",
    "training": {"cases": ["a", "b"], "patients": ["a", "b"], "fingerprint": "f"},
    "validation": {"cases": ["c"], "patients": ["c"], "fingerprint": "g"},
    "inputs": {"vae": "0" * 32},
    "processes": 1,
    "versions": {"python": "3.11.9", "torch": "2.13.0", "monai": None},
    "threads": 2,
}


def save_identity(folder: Path) -> None:
    from ct_nb.training.run_folder import claim_folder

    claim_folder(folder, IDENTITY, ["model.safetensors"], go_on=True)
    (folder / "model.safetensors").touch()


def go_on(folder: Path):
    "What is said to a run that goes on in the folder, and what its run.json holds."
    from ct_nb.training.run_folder import claim_folder, read_run

    return claim_folder(folder, IDENTITY, ["model.safetensors"], go_on=True), read_run(folder)


def _without_null(value):
    "An entry of null is one that is not there."
    if not isinstance(value, dict):
        return value
    return {name: _without_null(one) for name, one in value.items() if one is not None}


def check_identity(value) -> str:
    "Only what does not decide the numbers may differ, and it is told."
    notes, there = value
    here, there = _without_null(IDENTITY), _without_null(there)
    told = [[one.pop(name, None) for name in ("versions", "threads")] for one in (here, there)]
    if here != there:
        return f"another run is taken for this one: {there!r:.60}"
    if bool(notes) != (told[0] != told[1]):
        return f"of {told[1]!r:.60} is said {notes}"
    return first(*(f"the note {n!r:.60}" for n in notes if not n.isprintable() or len(n) > 2000))


def save_pe_archive(folder: Path) -> None:
    from ct_files import pair_members

    (folder / "APE").mkdir()
    members = pair_members(body((40, 24, 24)))
    with zipfile.ZipFile(folder / "APE" / "0001.zip", "w") as archive:
        for number, (name, content) in enumerate(sorted(members)):
            archive.writestr(zipfile.ZipInfo(name), _same_uid(content, number), 8, 6)


def _same_uid(content: bytes, number: int) -> bytes:
    "A DICOM image whose own UID is the same every time."
    import io

    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(content))
    dataset.SOPInstanceUID = f"1.2.3.{number}"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read_pe_archive(folder: Path):
    from ct_nb.slices.pe_archive import pe_archive

    result = []
    for s in pe_archive(folder):
        axes = [tuple(asdict(axis).values()) for axis in (s.thin_axis, s.thick_axis)]
        result.append((s.id, s.patient, "train", s.thin, s.thick, s.pixel_mm, axes, s.affine))
    return result


# ---- all of them ------------------------------------------------------------------------------


def _scan_door(name, file, write, damaged, checksummed=()):
    return Door(name, write, functools.partial(read_scan, file), check_volume, damaged, checksummed)


def _run_door(system):
    return Door(
        f"run {system}",
        functools.partial(save_run, system),
        functools.partial(read_run, system),
        check_model,
        {"config.json": "json", "*.safetensors": "safetensors"},
    )


_LIN = {"kind": "intensity", "i0": 50000.0, "inverted": False}
_partial = functools.partial
DOORS = [
    _scan_door("nii", "scan.nii", _partial(save_nifti, "scan.nii"), {"*.nii": "nifti"}),
    _scan_door("nii.gz", "scan.nii.gz", _partial(save_scan, "scan.nii.gz"),
               {"*.nii.gz": "nifti.gz"}, ("*.nii.gz",)),
    _scan_door("nrrd", "scan.nrrd", _partial(save_nrrd, "raw", False), {"*.nrrd": "nrrd"}),
    _scan_door("nrrd gzip", "scan.nrrd", _partial(save_nrrd, "gzip", False), {"*.nrrd": "nrrd"}),
    _scan_door("nrrd detached", "scan.nrrd", _partial(save_nrrd, "gzip", True),
               {"*.nrrd": "nrrd", "*.raw": "raw"}, ("*.raw",)),
    _scan_door("mha", "scan.mha", _partial(save_metaimage, "scan.mha", False),
               {"*.mha": "metaimage"}),
    _scan_door("mha zlib", "scan.mha", _partial(save_metaimage, "scan.mha", True),
               {"*.mha": "metaimage"}),
    _scan_door("mhd", "scan.mhd", _partial(save_metaimage, "scan.mhd", False),
               {"*.mhd": "metaimage", "*.raw": "raw"}),
    _scan_door("npz", "scan.npz", _partial(save_scan, "scan.npz"), {"*.npz": "npz"}, ("*.npz",)),
    _scan_door("dicom folder", "scan", save_dicom_folder, {"*.dcm": "dicom"}),
    _scan_door("dicom zip", "scan.zip", save_dicom_zip, {"*.zip": "zip of dicom"}, ("*.zip",)),
    _scan_door("dicom enhanced", "scan", save_enhanced, {"*.dcm": "dicom"}),
    Door("radiograph dicom", _partial(save_radiograph_dicom, False),
         _partial(read_line_integrals, ("view_0.dcm", "view_1.dcm"), _LIN),
         check_line_integrals, {"*.dcm": "dicom"}),
    Door("radiograph xa geometry", _partial(save_radiograph_dicom, True), read_xa,
         check_geometry, {"*.dcm": "dicom"}),
    Door("radiograph png", save_pngs, read_pngs, check_line_integrals,
         {"*.png": "png", "geometry.json": "json"}, ("*.png",)),
    Door("radiograph npz", save_radiograph_npz,
         _partial(read_line_integrals, ("xrays.npz",), {}), check_line_integrals,
         {"*.npz": "npz"}, ("*.npz",)),
    Door("radiograph nifti", save_radiograph_nifti,
         _partial(read_line_integrals, ("xrays.nii.gz",), {"kind": "line_integrals"}),
         check_line_integrals, {"*.nii.gz": "nifti.gz"}, ("*.nii.gz",)),
    *(Door(f"geometry {form}", _partial(save_geometry_file, form), read_geometry_file,
           check_geometry, {"geometry.json": "json"}) for form in ("views", "angles", "matrices")),
    Door("patients.csv", save_patients, read_patient_names, check_cases,
         {"patients.csv": "table"}),
    Door("labels", save_labelled, read_samples, check_samples,
         {"labels.json": "json", "labels/*.nii.gz": "nifti.gz"}, ("labels/*.nii.gz",)),
    Door("prepared npz", save_prepared, read_samples, check_samples, {"*.npz": "npz"}, ("*.npz",)),
    Door("prepared stacks", save_stacks, read_stacks, check_stacks,
         {"about.json": "json", "stacks.json": "json", "*.npy": "npy"}),
    Door("CT-RATE", save_ct_rate, read_ct_rate_folder, check_ct_rate,
         {"*.csv": "table", "*.json": "json", "*.jsonl": "json lines"}),
    Door("RadGenome", save_radgenome, read_report_folder, check_reports, {"*.csv": "table"}),
    Door("OmniAbnorm json", _partial(save_omniabnorm, False), read_report_folder, check_reports,
         {"*.json": "json"}),
    Door("OmniAbnorm jsonl", _partial(save_omniabnorm, True), read_report_folder, check_reports,
         {"*.jsonl": "json lines"}),
    Door("embeddings.parquet", save_index, read_index, check_index, {"*.parquet": "parquet"}),
    *map(_run_door, ("drr2ct", "cascade", "refiner", "slices", "slice_vae", "ct_encoder")),
    Door("training state", save_training_state, read_training_state, check_state,
         {"*.pt": "zip"}, ("*.pt",)),
    Door("run.json", save_identity, go_on, check_identity, {"run.json": "json"}),
    Door("PE archive", save_pe_archive, read_pe_archive, check_stacks,
         {"*.zip": "zip of dicom"}, ("*.zip",)),
    Door("history.jsonl", save_history, read_history_rows, check_history,
         {"*.jsonl": "json lines"}),
    Door("history figure", save_history, draw_history, check_history, {"*.jsonl": "json lines"}),
]  # fmt: skip


# ---- equal or not -----------------------------------------------------------------------------


def plain(value):
    "A value in parts that can be compared by `==`."
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    if isinstance(value, torch.nn.Module):
        return {name: plain(tensor) for name, tensor in value.state_dict().items()}
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def read_quietly(door: Door, folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return door.read(folder)
