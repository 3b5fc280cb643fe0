"Odd DICOM series as people report them: phases, frames, and what lies beside a scan."

import io
import os
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
from ct_files import (
    body,
    change,
    dicom_slice,
    disc_index,
    enhanced_ct,
    other_object,
    sequence_item,
    write_series,
)

from ct_nb.data.hounsfield import CTReadError
from ct_nb.data.read import read_ct

UID = "1.2.3"  # the series of `write_series`


def reason(path, **kwargs) -> str:
    "Why `read_ct` refuses this path; the error's file lies at or under it."
    with pytest.raises(CTReadError) as caught:
        read_ct(path, **kwargs)
    assert str(caught.value.file).startswith(str(path)), caught.value.file
    assert "\n" not in caught.value.reason
    return caught.value.reason


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


# ---------------------------------------------------------------- several scans in one series
@pytest.mark.parametrize("shift", [0, 1.5], ids=["same places", "interleaved"])
def test_two_phases_under_one_uid_are_told_apart(tmp_path, shift):
    "Native and contrast in one series; interleaved, they would pass for one scan of half the step."
    first, second = body(), body(seed=1)
    z = 100 + 3.0 * np.arange(12)
    write_series(tmp_path, first, z, AcquisitionNumber=1)
    names = [f"b{k:03d}.dcm" for k in range(12)]
    write_series(tmp_path, second, z + shift, names, AcquisitionNumber=2)
    text = reason(tmp_path)
    assert "2 acquisitions" in text and "AcquisitionNumber" in text and f"{UID}:2" in text
    assert (read_ct(tmp_path, f"{UID}:1").hu == first).all()
    assert (read_ct(tmp_path, f"{UID}:2").hu == second).all()
    assert f"{UID}:1" in reason(tmp_path, series=f"{UID}:3")


def test_acquisitions_one_after_the_other_are_one_scan(tmp_path):
    "Every rotation of a sequential scan counts its own acquisition."
    for k, file in enumerate(write_series(tmp_path, body())):
        change(file, AcquisitionNumber=1 + k // 4, AcquisitionTime=f"1200{k:02d}")
    assert (read_ct(tmp_path).hu == body()).all()


def test_two_patients_under_one_uid(tmp_path):
    "Anonymisers write one UID for everybody; the halves would fit."
    hu, z = body(), 100 + 3.0 * np.arange(12)
    write_series(tmp_path / "a", hu[:6], z[:6], PatientID="A")
    write_series(tmp_path / "b", hu[6:], z[6:], PatientID="B")
    assert "patient" in reason(tmp_path)


# ---------------------------------------------------------------- headers
def test_a_comma_in_the_spacing_is_no_damage(tmp_path):
    files = write_series(tmp_path, body())
    content = files[3].read_bytes()
    assert content.count(b"2.0\\2.0 ") == 1
    files[3].write_bytes(content.replace(b"2.0\\2.0 ", b"2,0\\2,0 "))
    text = reason(tmp_path)
    assert "PixelSpacing" in text and "2,0" in text and "damaged" not in text


@pytest.mark.parametrize("kind", ["Z_EFF", "MGML", "ED"])
def test_what_is_rescaled_to_another_unit_than_hu(tmp_path, kind):
    "Spectral scanners write effective atomic numbers and densities as CT images."
    write_series(tmp_path, body(), RescaleType=kind)
    assert kind in reason(tmp_path)


def test_negative_values_called_positive(tmp_path):
    "Padding of -2000 in a file whose PixelRepresentation says unsigned."
    for k, image in enumerate(body()):
        stored = (image + 1024).astype(int)
        stored[:3, :3] = 65536 - 2000
        save(dicom_slice(stored, (-40, -30, 100 + 3 * k)), tmp_path / f"{k:02d}.dcm")
    assert "62512 HU" in reason(tmp_path)


def test_a_private_transfer_syntax_is_no_damage(tmp_path):
    files = write_series(tmp_path, body())
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = "1.3.46.670589.33.1.4.1"
        dataset.save_as(file, implicit_vr=False, little_endian=True)
    text = reason(tmp_path)
    assert "1.3.46.670589.33.1.4.1" in text and "damaged" not in text


def test_the_last_file_cut_short(tmp_path):
    files = write_series(tmp_path, body())
    files[-1].write_bytes(files[-1].read_bytes()[:-1000])
    with pytest.raises(CTReadError) as caught:
        read_ct(tmp_path)
    assert caught.value.file == str(files[-1])


def test_old_files_without_a_sop_class(tmp_path):
    "The modality decides."
    for modality in ("CT", "MR"):
        for file in write_series(tmp_path / modality, body(), Modality=modality):
            dataset = pydicom.dcmread(file)
            del dataset.SOPClassUID
            del dataset.file_meta.MediaStorageSOPClassUID
            dataset.save_as(file)
    assert (read_ct(tmp_path / "CT").hu == body()).all()
    assert "MR" in reason(tmp_path / "MR")


def test_tilted_series_with_a_gap(tmp_path):
    tilt, hu = np.radians(-17), body()
    orientation = (1, 0, 0, 0, np.cos(tilt), -np.sin(tilt))
    for k in range(len(hu)):
        if k != 5:
            position = (-40, -30, 5 * k)
            save(dicom_slice(hu[k] + 1024, position, orientation), tmp_path / f"{k}.dcm")
    assert "1 of its slices is missing, at (-40, -30, 25)" in reason(tmp_path)


def test_a_claim_that_the_bytes_cannot_hold(tmp_path):
    for file in write_series(tmp_path, body()):
        change(file, Rows=20000, Columns=20000)
    text = reason(tmp_path)
    assert "20000" in text and "bytes" in text


def test_a_deflated_bomb_is_not_inflated(tmp_path):
    "40 KB that would be 40 MB; pydicom would inflate 4 GB as well."
    files = write_series(tmp_path, body())
    content = files[0].read_bytes()
    start = content.index(b"\x08\x00\x16\x00")
    meta = pydicom.dcmread(files[0]).file_meta
    meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content[start:] + bytes(200 * 2**20)) + packer.flush()
    head = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(head, meta)
    files[0].write_bytes(bytes(128) + b"DICM" + head.getvalue() + packed)
    tracemalloc.start()
    text = reason(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "inflates" in text and peak < 150 * 2**20


def test_deflated_slices_are_read(tmp_path):
    for file in write_series(tmp_path, body()):
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        dataset.save_as(file, enforce_file_format=True)
    assert (read_ct(tmp_path).hu == body()).all()


# ---------------------------------------------------------------- beside the scan
def test_objects_beside_the_scan_are_left_out_by_class(tmp_path):
    write_series(tmp_path, body())
    other_object(tmp_path / "structures.dcm", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT")
    other_object(tmp_path / "state.dcm", "1.2.840.10008.5.1.4.1.1.11.1", "PR")
    other_object(tmp_path / "dose.dcm", "1.2.840.10008.5.1.4.1.1.88.67", "SR")
    other_object(tmp_path / "raw.dcm", "1.2.840.10008.5.1.4.1.1.66", "CT")
    other_object(tmp_path / "pdf.dcm", "1.2.840.10008.5.1.4.1.1.104.1", "CT")
    capture = dicom_slice(
        np.zeros((64, 64)),
        (0, 0, 0),
        SOPClassUID=pydicom.uid.SecondaryCaptureImageStorage,
        ImagePositionPatient=None,
    )
    save(capture, tmp_path / "capture.dcm")
    labels = enhanced_ct(body(), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", Modality="SEG")
    save(labels, tmp_path / "labels.dcm")
    scan = read_ct(tmp_path)
    assert (scan.hu == body()).all()
    (note,) = scan.notes
    assert re.search("^7 .*left out", note) and "Secondary Capture" in note


def test_an_object_without_places_under_the_class_of_ct(tmp_path):
    "A protocol page stored as CT, in a series of its own or in the scan's."
    for series in ("1.2.999", UID):
        folder = tmp_path / series
        write_series(folder, body())
        page = dicom_slice(
            np.zeros((64, 64)),
            (0, 0, 0),
            series=series,
            ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"],
            ImagePositionPatient=None,
            ImageOrientationPatient=None,
            PixelSpacing=None,
        )
        save(page, folder / "page.dcm")
        scan = read_ct(folder)
        assert (scan.hu == body()).all() and "left out" in scan.notes[0]


def test_an_index_that_names_files_that_are_missing(tmp_path):
    "The last slices of a disc could not be copied: nothing else tells."
    files = write_series(tmp_path / "DICOM" / "SE0", body(), names=[f"IM{k}" for k in range(12)])
    disc_index(tmp_path, files)
    assert read_ct(tmp_path).notes == []
    for file in files[-2:]:
        file.unlink()
    scan = read_ct(tmp_path)
    assert (scan.hu == body()[:-2]).all()
    assert "DICOMDIR" in scan.notes[0] and "2 files" in scan.notes[0]


def test_links_to_links_and_in_circles(tmp_path):
    write_series(tmp_path / "real", body())
    study = tmp_path / "study"
    study.mkdir()
    (study / "series").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "up").symlink_to(study, target_is_directory=True)
    (tmp_path / "again").symlink_to(study, target_is_directory=True)
    for folder in ("study", "again", "real"):
        scan = read_ct(tmp_path / folder)
        assert (scan.hu == body()).all() and scan.notes == [], folder


def test_names_that_are_not_ascii(tmp_path):
    names = [f"Schicht {k} é.dcm" for k in range(12)]
    files = write_series(tmp_path / "Größe", body(), names=names)
    assert (read_ct(tmp_path / "Größe").hu == body()).all()
    with zipfile.ZipFile(tmp_path / "Müller.zip", "w") as archive:
        for file in files:
            archive.write(file, f"Größe/{file.name}")
    assert (read_ct(tmp_path / "Müller.zip").hu == body()).all()
    latin = bytes(tmp_path) + b"/latin"
    os.mkdir(latin)
    for k, file in enumerate(files):
        with open(latin + b"/\xe9%d" % k, "wb") as copy:
            copy.write(file.read_bytes())
    assert (read_ct(os.fsdecode(latin)).hu == body()).all()


def test_a_method_of_zip_that_is_not_known(tmp_path):
    "Windows writes deflate64 above 2 GB: the file is whole."
    files = write_series(tmp_path / "scan", body())
    path = tmp_path / "scan.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.index(signature)
        content[at + offset : at + offset + 2] = struct.pack("<H", 9)
    path.write_bytes(content)
    text = reason(path)
    assert "deflate64" in text and "damaged" not in text and "download" not in text


# ---------------------------------------------------------------- multi-frame
def test_frames_in_any_order_with_their_own_rescale(tmp_path):
    "By itself with and without an ending, in a folder, in a zip."
    hu = body()
    order = np.random.default_rng(0).permutation(12)

    def scale(k):
        rescale = {"RescaleSlope": [0.5, 1, 0.25][k % 3], "RescaleIntercept": -1100 - k}
        return {"PixelValueTransformationSequence": rescale}

    dataset = enhanced_ct(hu[order], 100 + 3.0 * order, scale)
    paths = [save(dataset, tmp_path / "folder" / "scan.dcm"), save(dataset, tmp_path / "IM0001")]
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.write(paths[1], "study/IM0001")
    for path in (*paths, tmp_path / "folder", tmp_path / "scan.zip"):
        scan = read_ct(path)
        assert (scan.hu == hu).all() and scan.notes == []
        assert np.allclose(scan.affine[:3], [[2, 0, 0, -40], [0, 2, 0, -30], [0, 0, 3, 100]])


def test_legacy_converted_frames(tmp_path):
    "All groups per frame."

    def groups(k):
        return {
            "PixelMeasuresSequence": {"PixelSpacing": [2.0, 2.0]},
            "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            "PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": -1100 - k},
        }

    dataset = enhanced_ct(
        body(),
        per_frame=groups,
        shared=dict.fromkeys(
            ["PixelMeasuresSequence", "PlaneOrientationSequence"]
            + ["PixelValueTransformationSequence"]
        ),
        SOPClassUID=pydicom.uid.LegacyConvertedEnhancedCTImageStorage,
    )
    assert (read_ct(save(dataset, tmp_path / "scan.dcm")).hu == body()).all()


def test_frames_with_a_gap_or_another_step(tmp_path):
    hu, z = body(), 3.0 * np.arange(12)
    uneven = z + np.maximum(0, np.arange(12) - 6) * 2
    path = save(enhanced_ct(hu, uneven), tmp_path / "uneven.dcm")
    assert "spacing is mixed" in reason(path) and "frame 7" in reason(path)
    path = save(enhanced_ct(np.delete(hu, 5, 0), np.delete(z, 5)), tmp_path / "gap.dcm")
    assert "1 of its slices is missing, at (-40, -30, 15)" in reason(path)


@pytest.mark.parametrize("tag", ["StackID", "TemporalPositionIndex"])
def test_stacks_and_times_are_told_apart(tmp_path, tag):
    first, second = body(), body(seed=1)

    def content(k):
        value = 1 + k // 12
        return {"FrameContentSequence": {tag: str(value) if tag == "StackID" else value}}

    z = np.tile(100 + 3.0 * np.arange(12), 2)
    z[12:] += 300 if tag == "StackID" else 0
    path = save(enhanced_ct(np.concatenate([first, second]), z, content), tmp_path / "scan.dcm")
    text = reason(path)
    assert tag in text and f"{UID}:2" in text
    assert (read_ct(path, f"{UID}:2").hu == second).all()


def test_a_long_scan_in_two_files(tmp_path):
    "A concatenation (PS3.3 C.7.6.16.2.2.4)."
    hu, z = body(), 100 + 3.0 * np.arange(12)
    save(enhanced_ct(hu[:7], z[:7]), tmp_path / "b.dcm")
    save(enhanced_ct(hu[7:], z[7:]), tmp_path / "a.dcm")
    assert (read_ct(tmp_path).hu == hu).all()


@pytest.mark.parametrize("place", ["alone", "folder"])
def test_frames_that_nothing_places(tmp_path, place):
    "Several frames in a classic CT image, and fewer places than frames."
    classic = dicom_slice(body()[0] + 1024, (0, 0, 0))
    classic.NumberOfFrames = 12
    classic.PixelData = (body() + 1024).astype(np.uint16).tobytes()
    path = save(classic, tmp_path / "classic" / "scan.dcm")
    assert "12 frames" in reason(path if place == "alone" else path.parent)
    short = enhanced_ct(body())
    short.PerFrameFunctionalGroupsSequence = short.PerFrameFunctionalGroupsSequence[:-1]
    path = save(short, tmp_path / "short" / "scan.dcm")
    text = reason(path if place == "alone" else path.parent)
    assert "12 frames" in text and "11" in text
    lost = enhanced_ct(body())
    lost.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence = [sequence_item()]
    path = save(lost, tmp_path / "lost" / "scan.dcm")
    text = reason(path if place == "alone" else path.parent)
    assert "frame 5" in text and "ImagePositionPatient" in text


def test_one_classic_slice_alone(tmp_path):
    file = write_series(tmp_path, body())[0]
    assert "one DICOM slice" in reason(file)
    bare = file.rename(tmp_path / "slice")
    assert "one DICOM slice" in reason(bare)


# ---------------------------------------------------------------- second round
def test_a_chest_and_an_abdomen_that_overlap(tmp_path):
    hu, z = body(), 100 + 3.0 * np.arange(12)
    write_series(tmp_path / "a", hu[:8], z[:8], AcquisitionNumber=1)
    write_series(tmp_path / "b", body(seed=1)[6:], z[6:], AcquisitionNumber=2)
    assert f"{UID}:1 (8 slices" in reason(tmp_path)
    assert (read_ct(tmp_path, f"{UID}:1").hu == hu[:8]).all()


def test_two_kernels_of_one_scan_half_a_step_apart(tmp_path):
    z = 100 + 3.0 * np.arange(12)
    write_series(tmp_path / "soft", body(), z, ConvolutionKernel="B30f")
    write_series(tmp_path / "sharp", body(), z + 1.5, ConvolutionKernel=["B70f", "3"])
    assert f"{UID}:B70f/3 (12 slices" in reason(tmp_path)
    assert (read_ct(tmp_path, f"{UID}:B30f").hu == body()).all()


def test_copies_that_were_sent_again_are_one_scan(tmp_path):
    "Equal pixels under another instance, time and acquisition number."
    write_series(tmp_path / "a", body(), AcquisitionNumber=1)
    write_series(tmp_path / "b", body(), AcquisitionNumber=2)
    scan = read_ct(tmp_path)
    assert (scan.hu == body()).all() and "12 of the files repeat a slice" in scan.notes[0]


def test_one_place_at_many_times(tmp_path):
    "The monitoring series of a bolus, and sagittal slices whose orientation was lost."
    for k in range(6):
        save(
            dicom_slice(body(seed=k)[5] + 1024, (-40, -30, 9), AcquisitionNumber=k),
            tmp_path / str(k),
        )
    assert "same place along the normal as all 6" in reason(tmp_path)
    for k, file in enumerate(sorted(tmp_path.iterdir())):
        change(file, ImagePositionPatient=[3.0 * k, -30, 9])
    assert "orientations were lost" in reason(tmp_path)


def test_frames_of_reference_are_said(tmp_path):
    for k, file in enumerate(write_series(tmp_path, body())):
        change(file, FrameOfReferenceUID=f"1.2.{k // 6}")
    assert "2 frames of reference" in read_ct(tmp_path).notes[0]


def test_a_link_to_a_slice_that_was_not_fetched(tmp_path):
    files = write_series(tmp_path / "scan", body(), names=[f"IM{k}" for k in range(12)])
    files[-1].unlink()
    files[-1].symlink_to(tmp_path / "annex" / "IM11")
    assert "not there" in reason(tmp_path / "scan")


def test_the_index_given_as_a_scan(tmp_path):
    disc_index(tmp_path, write_series(tmp_path / "DICOM", body()))
    assert "index of a disc" in reason(tmp_path / "DICOMDIR")


def test_a_folder_that_holds_an_archive_only(tmp_path):
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for file in write_series(tmp_path.parent / f"{tmp_path.name}-files", body()):
            archive.write(file, file.name)
    assert "give the archive scan.zip" in reason(tmp_path)


def test_big_endian_slices(tmp_path):
    for k, image in enumerate(body()):
        dataset = dicom_slice(image + 1024, (-40, -30, 100 + 3 * k))
        dataset.PixelData = (image + 1024).astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
        save(dataset, tmp_path / f"{k}.dcm")
    assert (read_ct(tmp_path).hu == body()).all()


def test_compressed_frames(tmp_path):
    dataset = enhanced_ct(body())
    dataset.compress(pydicom.uid.RLELossless)
    assert (read_ct(save(dataset, tmp_path / "scan.dcm")).hu == body()).all()


@pytest.mark.parametrize(
    "measures, words",
    [
        ({"SliceThickness": 3}, "frame 1: has no usable PixelSpacing"),
        ({"PixelSpacing": [0.0, 2.0]}, "frame 1: its PixelSpacing is .* above 0"),
        ({"PixelSpacing": [2.0, 2.0, 2.0]}, "frame 1: its PixelSpacing is .* not 2 numbers"),
    ],
)
def test_spacing_of_frames(tmp_path, measures, words):
    dataset = enhanced_ct(body(), shared={"PixelMeasuresSequence": measures})
    assert re.search(words, reason(save(dataset, tmp_path / "scan.dcm")))


def test_frames_of_different_spacing_and_cut_pixels(tmp_path):
    def wider(k):
        return {"PixelMeasuresSequence": {"PixelSpacing": [2.0 + (k == 7), 2.0]}}

    path = save(enhanced_ct(body(), per_frame=wider), tmp_path / "scan.dcm")
    assert "frame 8: its pixel spacing is [3.0, 2.0]" in reason(path)
    path = save(enhanced_ct(body()), tmp_path / "cut.dcm")
    path.write_bytes(path.read_bytes()[:-3000])
    assert "cut short" in reason(path)


def test_pictures_of_several_frames_are_no_ct(tmp_path):
    capture = enhanced_ct(
        body(), SOPClassUID=pydicom.uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    )
    path = save(capture, tmp_path / "capture.dcm")
    assert "Secondary Capture" in reason(path) and "damaged" not in reason(path)


def test_empty_rescale_is_none(tmp_path):
    for file in write_series(tmp_path, body(), intercept=0.0, signed=True):
        change(file, RescaleSlope="", RescaleIntercept="")
    scan = read_ct(tmp_path)
    assert (scan.hu == body()).all() and "no rescale slope and intercept" in scan.notes[0]


def test_no_series_uid(tmp_path):
    write_series(tmp_path, body(), SeriesInstanceUID=None)
    assert (read_ct(tmp_path).hu == body()).all()
