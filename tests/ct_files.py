"Made-up scans and hand-written DICOM for the tests of reading and writing."

import io
import zipfile
from pathlib import Path

import numpy as np
import pydicom

ORIENTATION = (1, 0, 0, 0, 1, 0)


def body(shape=(12, 32, 40), seed=0) -> np.ndarray:
    "HU (D, H, W), whole numbers: noisy air about a body with two lungs and a spine."
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.7) ** 2 < 1] = 30
    hu[((np.abs(x) - 0.4) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    hu[x**2 + (y - 0.45) ** 2 < 0.12**2] = 400
    return np.round(hu + np.random.default_rng(seed).normal(0, 8, shape)).clip(-1024)


def affine_of(spacing=(2.0, 2.0, 3.0), origin=(-40.0, -30.0, 100.0)) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def dicom_slice(
    stored,
    position,
    orientation=ORIENTATION,
    slope=1.0,
    intercept=-1024.0,
    spacing=(2.0, 2.0),
    series="1.2.3",
    signed=False,
    **tags,
) -> pydicom.Dataset:
    "One CT slice of stored values (R, C) in 16 bits; `tags` replace, a tag of None is left out."
    d = pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    d.SOPClassUID = pydicom.uid.CTImageStorage
    d.SOPInstanceUID = pydicom.uid.generate_uid()
    d.SeriesInstanceUID = series
    d.Modality = "CT"
    d.PhotometricInterpretation = "MONOCHROME2"
    d.SamplesPerPixel = 1
    d.Rows, d.Columns = stored.shape
    d.PixelSpacing, d.SliceThickness = list(spacing), 7.5
    d.ImagePositionPatient = [float(v) for v in position]
    d.ImageOrientationPatient = [float(v) for v in orientation]
    d.RescaleSlope, d.RescaleIntercept = slope, intercept
    d.BitsAllocated = 16
    d.BitsStored = 16
    d.HighBit = 15
    d.PixelRepresentation = int(signed)
    assert stored.min() >= (-32768 if signed else 0) and stored.max() < (32768 if signed else 65536)
    d.PixelData = np.round(stored).astype(np.int16 if signed else np.uint16).tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(d, name)
        else:
            setattr(d, name, value)
    return d


def write_series(
    folder, hu, z_mm=None, names=None, intercept=-1024.0, slope=1.0, **tags
) -> list[Path]:
    """`hu` (D, H, W) as an axial series at heights `z_mm` (default 3 mm apart from 100); returns
    the files, in order of z.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    z_mm = 100 + 3.0 * np.arange(len(hu)) if z_mm is None else z_mm
    files = [folder / (names[k] if names else f"{k:03d}.dcm") for k in range(len(hu))]
    for k, file in enumerate(files):
        dicom_slice(
            (hu[k] - intercept) / slope,
            (-40, -30, z_mm[k]),
            intercept=intercept,
            slope=slope,
            **tags,
        ).save_as(file, enforce_file_format=True)
    return files


def enhanced_ct(hu, z_mm=None, per_frame=None, shared=None, **tags) -> pydicom.Dataset:
    """`hu` (D, H, W) as one Enhanced CT (PS3.3 A.38.1): a frame a slice, at heights `z_mm`, all it
    says about space and rescale in the functional groups. `per_frame(k)` and `shared` give further
    macros, name -> tags of its item.
    """
    z_mm = 100 + 3.0 * np.arange(len(hu)) if z_mm is None else z_mm
    item = sequence_item
    d = dicom_slice(
        np.zeros(hu[0].shape),
        (0, 0, 0),
        SOPClassUID=pydicom.uid.EnhancedCTImageStorage,
        **dict.fromkeys(
            ["PixelSpacing", "SliceThickness", "ImagePositionPatient"]
            + ["ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"]
        ),
    )
    frames, stored = [], []
    for k, (image, z) in enumerate(zip(hu, z_mm, strict=True)):
        macros = {"PlanePositionSequence": {"ImagePositionPatient": [-40.0, -30.0, float(z)]}}
        macros |= per_frame(k) if per_frame else {}
        frames.append(item(**{name: [item(**tags)] for name, tags in macros.items()}))
        scale = macros.get("PixelValueTransformationSequence", {})
        slope = scale.get("RescaleSlope", 1)
        intercept = scale.get("RescaleIntercept", -1024)
        stored.append(np.round((image - intercept) / slope))
    macros = {
        "PixelMeasuresSequence": {"PixelSpacing": [2.0, 2.0], "SliceThickness": 7.5},
        "PlaneOrientationSequence": {"ImageOrientationPatient": list(ORIENTATION)},
        "PixelValueTransformationSequence": {
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "RescaleType": "HU",
        },
    } | (shared or {})
    macros = {name: tags for name, tags in macros.items() if tags is not None}
    d.SharedFunctionalGroupsSequence = [
        item(**{name: [item(**tags)] for name, tags in macros.items()})
    ]
    d.PerFrameFunctionalGroupsSequence = frames
    d.NumberOfFrames = len(frames)
    d.PixelData = np.array(stored).astype(np.uint16).tobytes()
    d.update(tags)
    return d


def sequence_item(**tags) -> pydicom.Dataset:
    "An item of a sequence."
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def other_object(path, sop_class: str, modality: str, **tags) -> None:
    "A DICOM file that is no CT image, of the study of `dicom_slice`."
    d = sequence_item(
        SOPClassUID=sop_class,
        SOPInstanceUID=pydicom.uid.generate_uid(),
        SeriesInstanceUID="1.2.77",
        Modality=modality,
        **tags,
    )
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)


def disc_index(folder, files) -> None:
    "A DICOMDIR at the top of `folder` that lists `files` (PS3.3 F.3)."
    records = [
        sequence_item(
            OffsetOfTheNextDirectoryRecord=0,
            RecordInUseFlag=0xFFFF,
            OffsetOfReferencedLowerLevelDirectoryEntity=0,
            DirectoryRecordType="IMAGE",
            ReferencedFileID=list(Path(file).relative_to(folder).parts),
        )
        for file in files
    ]
    d = sequence_item(FileSetID="CD", DirectoryRecordSequence=records)
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    d.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    d.save_as(Path(folder) / "DICOMDIR", enforce_file_format=True)


def series_members(hu, first, spacing, uid, folder, **tags) -> list[tuple[str, bytes]]:
    "Slices of a series as files of a zip, out of order."
    members = []
    for k in np.random.default_rng(0).permutation(len(hu)):
        d = dicom_slice(
            np.rint(hu[k]) + 1024,
            (-40, -30, first + spacing * k),
            series=uid,
            **{"SliceThickness": spacing} | tags,
        )
        buffer = io.BytesIO()
        d.save_as(buffer, enforce_file_format=True)
        members.append((f"{folder}/IM{k:04d}", buffer.getvalue()))
    return members


def pair_members(thin, **tags) -> list[tuple[str, bytes]]:
    """A PE archive's zip: `thin` (D, H, W) 1 mm apart as series 1.2.2, and the means of every five
    of them as series 1.2.1.
    """
    return series_members(
        thin.reshape(-1, 5, *thin.shape[1:]).mean(1), 2.0, 5.0, "1.2.1", "1", **tags
    ) + series_members(thin, 0.0, 1.0, "1.2.2", "2", **tags)


def zipped(path, members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def change(file, **tags) -> None:
    "Set tags of a DICOM file; None removes one."
    d = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(d, name)
        else:
            setattr(d, name, value)
    d.save_as(file, enforce_file_format=True)


def write_stored(path, stored, affine, slope=1.0, intercept=0.0) -> None:
    """Whole numbers (D, H, W) as a NIfTI of 16 bits whose header scales them, on an affine in LPS
    mm.
    """
    import nibabel

    image = nibabel.Nifti1Image(
        np.round(stored).astype(np.int16).transpose(2, 1, 0),
        np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine,
    )
    image.header.set_slope_inter(slope, intercept)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def write_table(path, columns, *rows) -> Path:
    import csv

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return Path(path)


# ---------------------------------------------------------------- volume files, byte by byte
def nifti_bytes(hu, ras=None, dtype="<i2", **header) -> bytes:
    """A .nii of `hu` (D, H, W), sform and qform both `ras`; `header` goes straight into the bytes,
    unmended.
    """
    import nibabel

    values = np.asarray(hu).astype(dtype)
    head = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    head.set_data_dtype(values.dtype)
    ras = np.diag([-2.0, -2.0, 3.0, 1.0]) if ras is None else ras
    image = nibabel.Nifti1Image(values.transpose(range(values.ndim)[::-1]), ras, head)
    image.set_qform(ras, 1)
    image.set_sform(ras, 1)
    raw = image.to_bytes()
    block = nibabel.Nifti1Header(raw[:348], endianness=head.endianness, check=False)
    for name, value in header.items():
        block[name] = value
    return block.binaryblock + raw[348:]


NRRD_AXES = "(2,0,0) (0,2,0) (0,0,3)"


def nrrd_bytes(hu, data=None, **fields) -> bytes:
    """A NRRD0004 of `hu` (D, H, W), int16 raw in LPS at (-40, -30, 100) mm; `fields` replace (`_`
    is a blank), None removes, `data` is what follows the header.
    """
    values = np.asarray(hu)
    head = {
        "type": "short",
        "dimension": values.ndim,
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, values.shape[::-1])),
        "space directions": NRRD_AXES,
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-40,-30,100)",
    } | {name.replace("_", " "): value for name, value in fields.items()}
    lines = [f"{name}: {value}" for name, value in head.items() if value is not None]
    if data is None:
        data = values.astype("<i2").tobytes()
    return "\n".join(["NRRD0004", "# written by a test", *lines, "", ""]).encode() + data


def mha_bytes(hu, data=None, **fields) -> bytes:
    """A MetaImage of `hu` (D, H, W), int16 raw, axial at (-40, -30, 100) mm; `fields` replace, None
    removes, `data` is what follows the header.
    """
    values = np.asarray(hu)
    head = {
        "ObjectType": "Image",
        "NDims": values.ndim,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-40 -30 100",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": "2 2 3",
        "DimSize": " ".join(map(str, values.shape[::-1])),
        "ElementType": "MET_SHORT",
    } | fields
    head["ElementDataFile"] = fields.get("ElementDataFile", "LOCAL")
    if "ElementDataFile" in fields:  # it is always the last line
        head["ElementDataFile"] = head.pop("ElementDataFile")
    lines = [f"{name} = {value}" for name, value in head.items() if value is not None]
    if data is None:
        data = values.astype("<i2").tobytes() if head["ElementDataFile"] == "LOCAL" else b""
    return "\n".join([*lines, ""]).encode() + data
