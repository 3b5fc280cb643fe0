"""RPLHR-CT in its published layout, and its evaluator."""

import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from ct_nb.data.hounsfield import CTReadError
from ct_nb.physics.volume import Window
from ct_nb.slices.open import open_stacks
from ct_nb.slices.paired_stacks import (
    split_stacks,
)
from ct_nb.slices.rplhr_ct import rplhr, rplhr_scores, rplhr_ssim
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    average_slices,
    from_unit,
    slice_profile_matrix,
)


def nifti(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32).transpose(2, 1, 0), np.eye(4)), path)


@pytest.fixture(scope="module")
def rplhr_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rplhr")
    rng = np.random.default_rng(0)
    for folder in ("train", "val", "test"):
        for case in range(2):
            thin = rng.random((46, 12, 12))
            # thick slice i about thin slice 5i
            thick = np.stack([thin[max(5 * i - 2, 0) : 5 * i + 3].mean(0) for i in range(10)])
            nifti(root / folder / "1mm" / f"{folder}{case}.nii.gz", thin)
            nifti(root / folder / "5mm" / f"{folder}{case}.nii.gz", thick)
    return root


def test_rplhr_folders_and_alignment(rplhr_root):
    window = Window("set", -1000, 1000)
    source = rplhr(rplhr_root, window)
    assert len(source) == 6 and {side: part.ids for side, part in split_stacks(source).items()} == {
        "train": ["train0", "train1"],
        "validation": ["val0", "val1"],
        "test": ["test0", "test1"],
    }
    item = StackPairs(source)[0]
    # the first and last stand over the edge
    assert (
        item["thick"].shape[0] == 8
        and item["thick_axis"].first_mm == 5.0
        and len(item["thin"]) == 40
    )
    # HU; the alignment is that of the files
    assert (average_slices(item["thin"], item["matrix"]) - item["thick"]).abs().max() < 1e-2
    crop = StackPairs(source, count=2)[0]
    # its two inner slices answer a crop of four that begins one slice before
    start = round(crop["thick_axis"].first_mm / 5) - 1
    assert crop["thin_axis"].first_mm == 5 * start + 3 and crop["thin_axis"].count == 10
    beside = slice_profile_matrix(
        SliceAxis(0.0, 1.0, 46), SliceAxis(3.0, 5.0, 8), SliceProfile(5.0)
    )
    # centres at 5i + 3 would be wrong
    assert np.abs(average_slices(source[0].thin, beside) - source[0].thick[:8]).max() > 100
    assert np.allclose(from_unit(np.float32(0.5), window), 0) and "-1000" in source[0].notes[0]


def test_rplhr_by_name(rplhr_root):
    assert open_stacks(f"rplhr:{rplhr_root}").ids == rplhr(rplhr_root).ids


def test_rplhr_refusals(rplhr_root, tmp_path):
    with pytest.raises(ValueError, match="holds no train, val or test"):
        rplhr(tmp_path)
    for name, values, words in (
        ("hu", np.full((46, 12, 12), -900.0), r"from -900 to -900, RPLHR-CT is stored in \[0, 1\]"),
        ("short", np.zeros((30, 12, 12)), "about 46 slices of the same size"),
        ("small", np.zeros((46, 12, 10)), "of the same size"),
    ):
        nifti(tmp_path / name / "train" / "1mm" / "a.nii.gz", values)
        nifti(tmp_path / name / "train" / "5mm" / "a.nii.gz", np.zeros((10, 12, 12)))
        with pytest.raises(CTReadError, match=words):
            rplhr(tmp_path / name)[0]
    (tmp_path / "hu" / "train" / "5mm" / "a.nii.gz").unlink()
    with pytest.raises(ValueError, match="a is in only one of 1mm and 5mm"):
        rplhr(tmp_path / "hu")


def test_rplhr_evaluator_rules():
    rng = np.random.default_rng(1)
    truth = rng.random((31, 24, 20))
    predicted = truth + rng.normal(0, 0.05, truth.shape)
    scores = rplhr_scores(predicted, truth)
    inner = (np.clip(predicted, 0, 1) - truth)[5:-5]
    assert scores["psnr"] == pytest.approx(10 * math.log10(1 / np.mean(inner**2)))
    # all slices; not clamped; peak of the data
    wrong = [
        10 * math.log10(1 / np.mean((np.clip(predicted, 0, 1) - truth) ** 2)),
        10 * math.log10(1 / np.mean((predicted - truth)[5:-5] ** 2)),
        # or averaged over slices
        10 * math.log10(truth[5:-5].max() ** 2 / np.mean(inner**2)),
        np.mean([10 * math.log10(1 / np.mean(s**2)) for s in inner]),
    ]
    assert all(abs(scores["psnr"] - w) > 1e-4 for w in wrong)
    predicted[:5], predicted[-5:] = 9.0, -9.0
    assert rplhr_scores(predicted, truth) == scores
    with pytest.raises(ValueError, match="more than 10 slices"):
        rplhr_scores(truth[:10], truth[:10])
    with pytest.raises(ValueError, match="of one shape"):
        rplhr_scores(truth, truth[:, :5])


def test_rplhr_ssim_is_that_of_scikit_image_away_from_the_border():
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(2)
    a = rng.random((2, 48, 48))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    # zeros beyond the border, by hand
    framed = [np.pad(v, ((0, 0), (5, 5), (5, 5))) for v in (a, b)]
    for k in range(2):
        _, full = metrics.structural_similarity(
            framed[0][k],
            framed[1][k],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            truncate=3.4,
            full=True,
        )
        assert rplhr_ssim(torch.from_numpy(a), torch.from_numpy(b))[k].item() == pytest.approx(
            full[5:-5, 5:-5].mean(), abs=1e-9
        )
