"Radiographs and their files for the tests of reading and linearizing."

import zlib

import numpy as np
import torch

from ct_nb.physics.geometry import ConeBeam

GEOMETRY = ConeBeam.biplanar(detector_shape=(20, 30), pixel_mm=10.0)
# noise makes some a little negative
IMAGES = (
    torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0))
    * torch.tensor([6.0, 3.0])[:, None, None]
    - 0.02
)
INTENSITY = (50000 * torch.exp(-IMAGES)).round().numpy().astype(np.uint16)


# PixelIntensityRelationship of counts, as a detector states it
LINEAR = {
    "PixelIntensityRelationship": "LIN",
    "PixelIntensityRelationshipSign": 1,
    "PhotometricInterpretation": "MONOCHROME2",
}
NAMES = ("LeftVerticalEdge", "RightVerticalEdge", "UpperHorizontalEdge", "LowerHorizontalEdge")


def side_chest(size=192, pixel_mm=2.6):
    """Line integrals (R, C) of a made-up chest: parallel rays through ellipses of tissue, a lung
    and a spine; the direct beam is left and right of it, and has no noise.
    """
    v, u = (np.mgrid[:size, :size] - size / 2 + 0.5) * pixel_mm

    def chord(u0, v0, width, height, depth):
        inside = 1 - ((u - u0) / width) ** 2 - ((v - v0) / height) ** 2
        return 2 * depth * np.sqrt(np.clip(inside, 0, None))

    tissue = chord(0, 0, 145, 1e9, 150) - 0.85 * chord(-25, -20, 85, 150, 110)
    return np.clip(0.0206 * tissue + 0.012 * chord(95, 0, 14, 1e9, 60), 0, None)


def margin(shape, width=14):
    "True (R, C) in a frame of this many pixels."
    frame = np.ones(shape, dtype=bool)
    frame[width:-width, width:-width] = False
    return frame


def modality_table(entries, first=0, bits=16):
    "An item of a Modality LUT Sequence: `entries` for stored values from `first` on."
    from pydicom.dataset import Dataset

    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries) % 65536, first % 65536, bits])
    item.add_new("LUTData", "OW", np.asarray(entries).tobytes())
    item.ModalityLUTType = "US"
    return item


def with_chunk(path, name: bytes, data: bytes):
    "Puts a chunk in front of the pixels of a PNG."
    content = path.read_bytes()
    place = content.index(b"IDAT") - 4
    checksum = zlib.crc32(name + data).to_bytes(4, "big")
    chunk = len(data).to_bytes(4, "big") + name + data + checksum
    path.write_bytes(content[:place] + chunk + content[place:])
    return path


def save_png(path, array):
    from PIL import Image

    Image.fromarray(array).save(path)
    return path


def save_dicom(path, stored, preamble=True, **tags):
    "A digital radiograph of 16-bit stored values (R, C) or (frames, R, C); `tags` replace."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME1"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit = 15
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    if preamble:
        data.save_as(path, enforce_file_format=True)
    else:
        del data.file_meta
        data.save_as(path, implicit_vr=True, little_endian=True)
    return path
