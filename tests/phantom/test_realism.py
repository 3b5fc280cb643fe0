"""Measures of realism: what is refused, and what must not move them."""

import numpy as np
import pytest

from ct_nb.core.errors import InputError
from ct_nb.phantom.chest import phantom
from ct_nb.phantom.chest_masks import chest_masks
from ct_nb.phantom.realism import MEASURES, compare_measures, measure_chest, measure_matrix
from ct_nb.phantom.two_sample import auc, two_sample_test
from ct_nb.physics.volume import Volume


@pytest.fixture(scope="module")
def volume():
    return phantom(3, 48).volume


def test_what_is_no_chest_is_refused(volume):
    stretched = volume.affine.copy()
    stretched[2, 2] *= 2
    with pytest.raises(InputError, match="one size along LPS"):
        chest_masks(Volume(volume.hu, stretched))
    with pytest.raises(InputError, match="no two separate lungs"):
        solid = np.where(volume.hu > -950, 0, -1000)
        chest_masks(Volume(np.maximum(volume.hu, solid), volume.affine))
    with pytest.raises(InputError, match="no body"):
        chest_masks(Volume(np.full_like(volume.hu, -1000), volume.affine))


def test_padding_beyond_a_short_scan_changes_nothing_that_is_measured(volume):
    scanned = np.ones(volume.hu.shape, bool)
    scanned[:3] = scanned[-3:] = False
    found = []
    for padding in (-1024, -2000):
        hu = np.where(scanned, volume.hu, padding)
        found.append(measure_chest(Volume(hu, volume.affine, [], scanned)))
    for name in MEASURES:
        np.testing.assert_allclose(*(f[name] for f in found), rtol=1e-5, err_msg=name)


def test_a_lung_that_the_side_of_the_cube_cuts_is_still_lung(volume):
    whole = chest_masks(volume)
    cut = np.flatnonzero((whole.lungs == 1).any(axis=(0, 1)))[0] + 2  # into the right lung
    hu = np.pad(volume.hu[:, :, cut:], ((0, 0), (0, 0), (0, cut)), constant_values=-1000)
    chest = chest_masks(Volume(hu, volume.affine))
    inside = whole.lungs[:, :, cut:] == 1
    assert whole.lungs[:, :, cut].any()
    found = (chest.lungs[:, :, :-cut] == 1)[inside].mean()
    assert found > 0.97


def test_sets_of_one_chest_and_unknown_groups_are_refused(volume):
    chest = measure_chest(volume)
    with pytest.raises(InputError, match="two chests"):
        compare_measures([chest], [chest, chest])
    with pytest.raises(InputError, match="none named"):
        measure_matrix([chest], "liver")
    with pytest.raises(InputError, match="two cases"):
        two_sample_test(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(InputError, match="both sets"):
        auc([1, 2], [True, True])


def test_a_feature_that_was_never_measured_is_left_out():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(10, 4)), random.normal(3, 1, size=(10, 4))
    first[:, 3] = second[:, 3] = np.nan
    second[4, 0] = np.nan
    assert two_sample_test(first, second, permutations=10).auc > 0.95
