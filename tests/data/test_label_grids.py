"""Label maps lie where their grid says; one of the scan's size on another grid is refused."""

import numpy as np
import pytest
from refusals import refused

from ct_nb.data.hounsfield import CTReadError
from ct_nb.data.read import read_labels
from ct_nb.physics.volume import Grid, Volume

AFFINE = np.diag([0.703125, 0.703125, 5, 1.0])
AFFINE[:3, 3] = [-180, -150, -95]
SCAN = Grid((10, 500, 512), AFFINE)
LABELS = np.zeros(SCAN.shape, np.uint8)
LABELS[2:8, 100:300, 50:200] = 1
LABELS[3:6, 200:400, 300:500] = 2


def saved(tmp_path, labels, affine):
    Volume(labels, affine).save(tmp_path / "map.nii.gz")
    return tmp_path / "map.nii.gz"


def moved(**changes) -> np.ndarray:
    affine = AFFINE.copy()
    for place, value in changes.items():
        affine[int(place[1]), int(place[2])] = value
    return affine


@pytest.mark.parametrize(
    "affine",
    [moved(a00=0.7031, a11=0.7031), moved(a03=-180.0001), AFFINE.astype(np.float32)],
    ids=["rounded spacing", "rounded origin", "float32"],
)
def test_rounding_is_no_other_grid(tmp_path, affine):
    assert np.array_equal(read_labels(saved(tmp_path, LABELS, affine), SCAN), LABELS)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([-1.0, -1, 1, 1]),
        moved(a23=-35),
        moved(a00=-0.703125),
        moved(a03=-179.6),
        moved(a00=0.72),
        moved(a22=2.5),
    ],
    ids=["identity", "other origin", "flipped", "half a voxel", "other spacing", "other slices"],
)
def test_the_size_of_the_scan_on_another_grid_is_refused(tmp_path, affine):
    with refused(file="map.nii.gz", kind=CTReadError) as caught:
        read_labels(saved(tmp_path, LABELS, affine), SCAN)
    assert "grid" in str(caught.value)


def test_other_storage_of_the_same_grid(tmp_path):
    "The order of the array is another, its affine says so."
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SCAN.shape[2] - 1
    path = saved(tmp_path, LABELS[:, :, ::-1], AFFINE @ flip)
    assert np.array_equal(read_labels(path, SCAN), LABELS)


def test_a_part_of_the_scan(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 3] = SCAN.index_to_mm([40, 90, 2])
    cut = read_labels(saved(tmp_path, LABELS[2:9, 90:410, 40:505], affine), SCAN)
    assert np.array_equal(cut, LABELS)


def test_a_coarser_map_of_the_same_place(tmp_path):
    coarse = SCAN.resized((10, 250, 256))
    path = saved(tmp_path, LABELS[:, ::2, ::2], coarse.affine)
    assert (read_labels(path, SCAN) == LABELS).mean() > 0.99


@pytest.mark.parametrize("shape", [(7, 320, 465), (12, 512, 512)])
def test_no_grid_of_its_own_is_refused(tmp_path, shape):
    "numpy in, the identity for an affine out: a few voxels would meet the scan by chance."
    labels = np.ones(shape, np.uint8)
    with refused(file="map.nii.gz", kind=CTReadError):
        read_labels(saved(tmp_path, labels, np.diag([-1.0, -1, 1, 1])), SCAN)
