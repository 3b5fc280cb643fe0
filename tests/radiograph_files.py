"Radiographs and their files for the tests of reading and linearizing."

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
