"""Each metric against a value computed by hand or by a second library."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.core.errors import FileError
from ct_nb.evaluation.lpips import CHANNELS, LPIPS
from ct_nb.evaluation.metrics import (
    CHEST,
    X2CT,
    as_pair,
    bias_hu,
    by_patient,
    legacy_x2ct_psnr,
    mae_hu,
    mean_sd,
    paired_mean_ci,
    psnr,
    psnr_x2ct_honest,
    ssim,
    ssim_map,
    tissue_errors,
)
from ct_nb.evaluation.segmentation_metrics import (
    body_mask,
    dice,
    hd95_mm,
    mask_metrics,
    threshold_masks,
)
from ct_nb.physics.volume import Grid


def smooth_noise(seed, size=24, scale=600.0):
    from scipy import ndimage

    field = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=(size, size + 2, size + 5)), 2
    )
    return (field / field.std() * scale - 300).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    truth = smooth_noise(0)
    return truth + 0.3 * smooth_noise(1), truth


def scaled(volume, window):
    return (
        np.clip(volume.astype(np.float64), window.low_hu, window.high_hu) - window.low_hu
    ) / window.width_hu


@pytest.mark.parametrize("window", [CHEST, X2CT], ids=lambda w: w.name)
def test_psnr_and_ssim_agree_with_scikit_image(pair, window):
    metrics = pytest.importorskip("skimage.metrics")
    pred, truth = (scaled(v, window) for v in pair)
    assert psnr(*pair, window) == pytest.approx(
        metrics.peak_signal_noise_ratio(truth, pred, data_range=1), abs=1e-5
    )
    mean, full = metrics.structural_similarity(
        truth,
        pred,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(*pair, window) == pytest.approx(mean, abs=1e-6)
    np.testing.assert_allclose(ssim_map(*pair, window).numpy(), full[5:-5, 5:-5, 5:-5], atol=1e-5)
    body = np.zeros(pair[1].shape, bool)
    body[3:12, 4:20, 6:22] = True
    inner = np.zeros_like(body)
    inner[5:-5, 5:-5, 5:-5] = True
    assert ssim(*pair, window, mask=body) == pytest.approx(full[body & inner].mean(), abs=1e-5)


def test_psnr_and_ssim_agree_with_monai(pair):
    monai = pytest.importorskip("monai.metrics")
    pred, truth = (torch.from_numpy(scaled(v, CHEST).astype(np.float32))[None, None] for v in pair)
    assert psnr(*pair) == pytest.approx(monai.PSNRMetric(max_val=1.0)(pred, truth).item(), abs=1e-4)
    assert ssim(*pair) == pytest.approx(
        monai.SSIMMetric(spatial_dims=3, data_range=1.0)(pred, truth).item(), abs=1e-4
    )


def test_one_prediction_under_the_definitions_of_the_field():
    truth = np.full((20, 20, 20), -1000.0)
    truth[5:15] = 0
    pred = truth.copy()
    pred[5:15] += 100  # ten of twenty slices along z, all along y and x
    mse = 100**2 / 2
    assert psnr(pred, truth) == pytest.approx(10 * math.log10(2048**2 / mse))
    assert psnr_x2ct_honest(pred, truth) == pytest.approx(10 * math.log10(2500**2 / mse))
    along_z = (10 * 100 + 10 * 10 * math.log10(4095**2 / 100**2)) / 20
    assert legacy_x2ct_psnr(pred, truth) == pytest.approx(
        (along_z + 2 * 10 * math.log10(4095**2 / mse)) / 3
    )
    assert (
        legacy_x2ct_psnr(truth, truth) == 100
        and psnr(truth, truth) == math.inf
        and ssim(truth, truth) == pytest.approx(1)
    )


def test_hu_errors_by_hand():
    truth = np.array([-990.0, -900, -300, -100, 50, 300, 2000, -3000]).repeat(2)[None, None]
    pred = truth + np.array([10, -10.0] * 8)[None, None]
    body = np.ones(truth.shape, bool)
    # the last two voxels and the metal are outside the window on both sides
    assert mae_hu(pred, truth) == pytest.approx(10 * 12 / 16) and bias_hu(
        pred, truth
    ) == pytest.approx(0, abs=1e-5)
    pred = truth + 7
    errors = tissue_errors(pred, truth, body)
    assert errors["mae_hu_lung"] == pytest.approx(7, abs=1e-4) and errors[
        "bias_hu_fat"
    ] == pytest.approx(7, abs=1e-4)
    assert errors["bias_hu_bone"] == pytest.approx(7 * 2 / 4, abs=1e-4)  # two of four clipped
    assert math.isnan(tissue_errors(pred, truth, ~body)["mae_hu_soft_tissue"])
    assert [name for name in errors if name.startswith("mae")] == [
        "mae_hu_air",
        "mae_hu_lung",
        "mae_hu_fat",
        "mae_hu_soft_tissue",
        "mae_hu_bone",
    ]


def blobs(seed, size=28):
    noise = smooth_noise(seed, size)
    return noise > noise.mean() + 1.2 * noise.std()


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("spacing", [(5.0, 5.0, 5.0), (0.7, 1.3, 4.0)], ids=str)
def test_dice_and_hd95_agree_with_monai(seed, spacing):
    monai = pytest.importorskip("monai.metrics")
    a, b = blobs(seed), blobs(seed + 1)
    one_hot = [torch.from_numpy(m.astype(np.float32))[None, None] for m in (a, b)]
    assert dice(a, b) == pytest.approx(monai.compute_dice(*one_hot, include_background=True).item())
    theirs = monai.compute_hausdorff_distance(
        *one_hot, include_background=True, percentile=95, spacing=list(spacing[::-1])
    ).item()
    assert hd95_mm(a, b, spacing) == pytest.approx(theirs, rel=1e-5)


def test_hd95_by_brute_force():
    from scipy.ndimage import binary_erosion

    a, b = blobs(5, 20), blobs(6, 20)
    points = [np.argwhere(m & ~binary_erosion(m)) * np.array([4.0, 1.3, 0.7]) for m in (a, b)]
    distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    expected = max(np.percentile(distance.min(1), 95), np.percentile(distance.min(0), 95))
    assert hd95_mm(a, b, (0.7, 1.3, 4.0)) == pytest.approx(expected)


def test_empty_masks_are_not_those_of_monai():
    """Why `dice` is ours: MONAI leaves out a predicted structure that the truth has not, or scores
    two empty masks as perfect.
    """
    monai = pytest.importorskip("monai.metrics")
    full, empty = np.ones((2, 4, 4, 4), bool)
    empty[:] = False

    def theirs(a, b, ignore_empty):
        one_hot = [torch.from_numpy(m.astype(np.float32))[None, None] for m in (a, b)]
        return monai.compute_dice(
            *one_hot, include_background=True, ignore_empty=ignore_empty
        ).item()

    assert dice(full, empty) == dice(empty, full) == 0 and math.isnan(dice(empty, empty))
    assert math.isnan(theirs(full, empty, True)) and theirs(empty, empty, False) == 1


def test_a_missing_structure_counts():
    something, nothing = np.zeros((2, 6, 6, 6), bool)
    something[2:4, 2:4, 2:4] = True
    metrics = mask_metrics(
        {"a": nothing, "b": something, "c": nothing},
        {"a": something, "b": nothing, "c": nothing},
        (1, 1, 1),
    )
    assert (
        metrics["dice_a"] == 0 and math.isnan(metrics["hd95_mm_a"]) and metrics["detected_a"] == 0
    )
    assert (
        metrics["dice_b"] == 0
        and math.isnan(metrics["hd95_mm_b"])
        and math.isnan(metrics["detected_b"])
    )
    assert math.isnan(metrics["dice_c"]) and math.isnan(metrics["detected_c"])


@pytest.mark.parametrize("size", [48, 96])
def test_body_mask_of_a_torso_with_couch_arms_and_open_lungs(size):
    grid = Grid.cube(size)
    x, y, z = (t.numpy() for t in grid.centers_mm().unbind(-1))
    torso = (x / 140) ** 2 + (y / 95) ** 2 < 1
    lungs = ((np.abs(x) - 65) / 45) ** 2 + (y / 60) ** 2 < 1
    couch = (y > 110) & (y < 125)
    arm = (x - 152) ** 2 + y**2 < 5**2
    hu = np.full(grid.shape, -1000.0, np.float32)
    hu[couch] = -100
    hu[arm] = 30
    hu[torso] = 40
    hu[lungs] = -850
    body = body_mask(hu, grid)
    assert (
        body[lungs].all()
        and not body[couch].any()
        and not body[arm].any()
        and (body == torso).mean() > 0.999
    )
    assert not body_mask(np.full(grid.shape, -1000.0), grid).any()
    assert body_mask(np.full(grid.shape, 40.0), grid).all()
    assert threshold_masks(torch.from_numpy(hu), grid)["lung"].sum() == lungs.sum()


def test_statistics_over_patients():
    assert list(by_patient([1, 3, 10, math.nan], "aabb")) == [2, 10]
    mean, sd = mean_sd([1, 2, 3, math.nan])
    assert mean == 2 and sd == 1
    assert (
        mean_sd([math.inf, 30])[0] == math.inf
        and math.isnan(mean_sd([math.inf, 30])[1])
        and math.isnan(mean_sd([])[0])
    )
    from scipy.stats import ttest_rel

    a, b = np.random.default_rng(0).normal(size=(2, 9))
    expected = ttest_rel(a, b).confidence_interval(0.9)
    interval = paired_mean_ci(a, b, range(9), level=0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.patients == 9


def test_refusals_name_the_argument():
    good = np.zeros((12, 12, 12), np.float32)
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    with refused("pred"):
        psnr(bad, good)
    with refused("pred"):
        mae_hu(good[1:], good)
    with refused("truth"):
        as_pair(good[None], good[None])
    with refused("ssim"):
        ssim(good[:5], good[:5])
    for metric in (dice, lambda a, b: hd95_mm(a, b, (1, 1, 1))):
        with refused("pred_mask"):
            metric(good > 0, good[1:] > 0)
    with refused("hu"):
        body_mask(good, Grid.cube(8))
    with refused("mask"):
        mae_hu(good, good, np.ones((3, 3, 3), bool))


class PlainLPIPS(torch.nn.Module):
    "The paper's equation over a stock stack of layers, written apart from the library's."

    def __init__(self):
        super().__init__()
        n = torch.nn
        self.features = n.Sequential(
            n.Conv2d(3, 64, 11, 4, 2),
            n.ReLU(),
            n.MaxPool2d(3, 2),
            n.Conv2d(64, 192, 5, padding=2),
            n.ReLU(),
            n.MaxPool2d(3, 2),
            n.Conv2d(192, 384, 3, padding=1),
            n.ReLU(),
            n.Conv2d(384, 256, 3, padding=1),
            n.ReLU(),
            n.Conv2d(256, 256, 3, padding=1),
            n.ReLU(),
        )
        for i, c in enumerate(CHANNELS):
            setattr(
                self,
                f"lin{i}",
                n.ModuleDict({"model": n.Sequential(n.Dropout(), n.Conv2d(c, 1, 1, bias=False))}),
            )

    def forward(self, a, b):
        total = 0
        mean = torch.tensor([-0.030, -0.088, -0.188])
        sd = torch.tensor([0.458, 0.448, 0.450])
        a, b = ((v - mean.view(3, 1, 1)) / sd.view(3, 1, 1) for v in (a, b))
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in (1, 4, 7, 9, 11):
                unit = [v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (a, b)]
                weight = (
                    getattr(self, f"lin{(1, 4, 7, 9, 11).index(i)}")
                    .model[1]
                    .weight.view(1, -1, 1, 1)
                )
                total = total + (weight * (unit[0] - unit[1]) ** 2).sum(1).mean((1, 2))
        return total


@torch.no_grad()
def test_lpips_is_the_papers_equation_on_every_slice(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plain = PlainLPIPS()
    save_file(plain.state_dict(), tmp_path / "lpips.safetensors")
    ours = LPIPS(tmp_path / "lpips.safetensors")
    truth = torch.randn(33, 36, 40) * 300
    pred = truth + torch.randn_like(truth) * 100
    expected = []
    for axis in range(3):
        a, b = (
            (v.clip(-1024, 1024) / 1024).movedim(axis, 0)[:, None].repeat(1, 3, 1, 1)
            for v in (pred, truth)
        )
        expected.append(plain(a, b).mean())
    assert ours(pred, truth) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_lpips_refuses_other_files_by_name(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text.safetensors").write_text("not weights")
    with refused(file="text.safetensors", kind=FileError):
        LPIPS(tmp_path / "text.safetensors")
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    with refused(file="part.safetensors", kind=FileError) as caught:
        LPIPS(tmp_path / "part.safetensors")
    assert caught.value.reason.startswith("features.0.bias")


def test_metrics_import_without_monai():
    code = (
        "import sys; sys.modules['monai'] = None; import ct_nb.evaluation.metrics as m, numpy as"
        " np; v = np.zeros((12,)*3); print(m.psnr(v + 1, v), m.ssim(v, v))"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.startswith("66.2")
