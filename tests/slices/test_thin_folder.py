"""Folders of thin CT, and sources by name."""

import numpy as np
import pytest
from ct_files import body
from places import PROGRAMS

from ct_nb.data.hounsfield import CTReadError
from ct_nb.physics.scanned import PADDING_HU, scanned_voxels
from ct_nb.physics.volume import Volume
from ct_nb.slices.open import open_stacks
from ct_nb.slices.paired_stacks import pair_stack
from ct_nb.slices.thin_folder import thin_folder

THIN = body((60, 32, 40))
THICK = THIN.reshape(12, 5, 32, 40).mean(1)


def volume(hu, spacing, first, pixel=2.0, origin=(-40.0, -30.0)):
    affine = np.diag([pixel, pixel, spacing, 1.0])
    affine[:3, 3] = (*origin, first)
    return Volume(hu, affine)


def test_folders_of_thin_ct(tmp_path):
    volume(THIN, 1.0, 0.0).save(tmp_path / "thin.nii.gz")
    volume(THICK, 5.0, 0.0).save(tmp_path / "thick.nii.gz")
    source = thin_folder(tmp_path)
    assert (
        source.ids == ["thick", "thin"]
        and np.array_equal(source[1].thin, THIN)
        and source[1].thick is None
    )
    with pytest.raises(
        CTReadError, match="thick.nii.gz: its slices are 5 mm apart, at most 1.5 mm count as thin"
    ):
        source[0]
    assert (
        thin_folder(tmp_path, 5.0)[0].thin_axis.spacing_mm == 5
        and open_stacks(str(tmp_path)).ids == source.ids
    )
    with pytest.raises(ValueError, match="neither 'phantom:COUNT'"):
        open_stacks(f"pe:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="holds no zip"):
        open_stacks(f"pe:{tmp_path}")
    with pytest.raises(ValueError, match="holds no CT"):
        thin_folder(PROGRAMS)


def test_phantoms_are_stacks():
    source = open_stacks("phantom:1", size=16, side_mm=320.0)
    stack = source[0]
    assert (
        stack.thin.shape == (16, 16, 16)
        and stack.thin_axis.spacing_mm == 20
        and stack.thick is None
        and source.cases[0].content
    )


def test_real_thin_folder(real_ct):
    if not (real_ct / "thin").is_dir():
        pytest.skip("no thin CT among the real CTs here")
    source = thin_folder(real_ct / "thin")
    assert {"lidc-0002", "nsclcrg-R01-001"} <= set(source.ids)


@pytest.mark.parametrize("fill", [-2000, -3024, -1024])
def test_padding_can_be_told_in_the_stack(tmp_path, fill):
    "Padding of any number is -1024 HU in the stack: the metrics find it, also after storage."
    y, x = np.indices(THIN.shape[1:]) - np.array([[[15.5]], [[19.5]]])
    radius = np.broadcast_to(np.hypot(y, x), THIN.shape)
    volume(np.where(radius < 14, THIN, fill), 1.0, 0.0).save(tmp_path / "thin.npz")
    stack = thin_folder(tmp_path)[0]
    found = scanned_voxels(stack.thin.astype(np.int16))
    inside, outside = radius < 12, radius > 16  # the corners of the circle count as either
    assert np.array_equal(stack.thin[inside], THIN[inside]) and found[inside].all()
    assert (stack.thin[outside] == PADDING_HU).all() and not found[outside].any()


def test_a_pair_is_padded_in_both_stacks():
    inside = np.ones(THIN.shape, bool)
    inside[:, :6] = False
    thin = volume(np.where(inside, THIN, -1000), 1.0, 0.0)
    thick = volume(np.where(inside[::5], THICK, -1000), 5.0, 2.0)
    thin.scanned, thick.scanned = inside, inside[::5]
    stack = pair_stack("a", "a", thick, thin)
    assert (stack.thin[:, :6] == PADDING_HU).all() and (stack.thick[:, :6] == PADDING_HU).all()
    assert np.array_equal(stack.thin[:, 6:], THIN[:, 6:])
