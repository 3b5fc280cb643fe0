"""Region attention, label maps and region histograms against plain reference code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from scipy import ndimage

import ct_nb.ct_encoder.region_attention as module
from ct_nb.core.regions import REGIONS
from ct_nb.ct_encoder.dataset import scan_and_regions
from ct_nb.ct_encoder.encoder import CTEncoderConfig
from ct_nb.ct_encoder.label_maps import name_region, total_doubt
from ct_nb.ct_encoder.region_attention import (
    REGION_ATTENTION_FORMS,
    RegionAttention,
    RegionPooling,
    merge_total,
    multiplicative_attention,
    overlap_means,
    patch_overlaps,
    prior_attention,
)
from ct_nb.ct_encoder.region_histograms import (
    HU_EDGES,
    RegionContents,
    box_maximum,
    box_minimum,
    region_histograms,
)
from ct_nb.data.folders import name_cases
from ct_nb.data.hounsfield import CTReadError
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Volume


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(shape, classes, seed=0, dtype=torch.uint8):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_overlaps(batch=2, tokens=30, classes=7, seed=0):
    "Rows sum to 1, many entries are 0, class 6 is nowhere."
    raw = torch.rand(
        batch, tokens, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    raw = raw * (raw > 0.6)
    raw[..., 0] += 0.1
    raw[..., 6] = 0
    return raw / raw.sum(-1, keepdim=True)


# labels


def test_every_total_id_is_used_once():
    used = sorted(n for _, ids in REGIONS.values() for n in ids)
    assert used == list(range(1, 118)) and sorted(REGIONS) == list(range(1, 21))
    merged = merge_total(np.arange(118))
    assert merged.dtype == np.uint8 and merged[0] == 0
    for region, (_, ids) in REGIONS.items():
        assert (merged[list(ids)] == region).all() and (merged == region).sum() == len(ids)


@pytest.mark.parametrize(
    "number, name",
    [
        (10, "left upper lobe"),
        (14, "right lower lobe"),
        (51, "heart"),
        (52, "aorta"),
        (5, "liver"),
        (79, "spine"),
        (26, "spine"),
        (1, "spleen, pancreas and adrenals"),
        (17, "thyroid"),
        (91, "pelvis and muscle"),
    ],
)
def test_known_ids(number, name):
    assert REGIONS[int(merge_total(np.array([number]))[0])][0] == name


@pytest.mark.parametrize("labels", [np.array([118]), np.array([-1]), np.array([1.0])])
def test_merge_refuses_what_is_not_total(labels):
    with refused("labels"):
        merge_total(labels)


# what a map's values mean


def SIDES(*names):
    return [f"{name}_{side}" for name in names for side in ("left", "right")]


TOTAL = [
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "lung_upper_lobe_left",
    "lung_lower_lobe_left",
    "lung_upper_lobe_right",
    "lung_middle_lobe_right",
    "lung_lower_lobe_right",
    "esophagus",
    "trachea",
    "thyroid_gland",
    "small_bowel",
    "duodenum",
    "colon",
    "urinary_bladder",
    "prostate",
    *SIDES("kidney_cyst"),
    "sacrum",
    "vertebrae_S1",
    *[
        f"vertebrae_{part}{n}"
        for part, most in (("L", 5), ("T", 12), ("C", 7))
        for n in range(most, 0, -1)
    ],
    "heart",
    "aorta",
    "pulmonary_vein",
    "brachiocephalic_trunk",
    *SIDES("subclavian_artery", "common_carotid_artery", "brachiocephalic_vein"),
    "atrial_appendage_left",
    "superior_vena_cava",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    *SIDES("iliac_artery", "iliac_vena", "humerus", "scapula", "clavicula", "femur", "hip"),
    "spinal_cord",
    *SIDES("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas"),
    "brain",
    "skull",
    *[f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)],
    "sternum",
    "costal_cartilages",
]


def test_every_name_of_total_means_its_region():
    assert len(TOTAL) == 117
    assert [name_region(name) for name in TOTAL] == merge_total(np.arange(1, 118)).tolist()
    assert [
        name_region(f"{name}.nii") for name in ("Left lung", "lungs", "tumor", "7", "body", "")
    ] == [None] * 6 and name_region("Lobus: RIGHT  middle_lobe") == 4


def total_map(regions, version=2):
    """A map in TotalSegmentator's numbers, from regions: the first number of each, of version 2 or
    1.
    """
    if version == 2:
        return np.array([0, *(ids[0] for _, ids in REGIONS.values())], np.uint8)[regions]
    # the lobes are 13 to 17, the vertebrae 18 to 41
    first = {1: 13, 2: 14, 3: 15, 4: 16, 5: 17, 7: 44, 8: 7, 13: 20, 14: 58, 16: 5, 17: 1, 19: 55}
    return np.array([first.get(region, 0) for region in range(21)], np.uint8)[regions]


def test_total_is_believed_where_the_scan_bears_it_out():
    chest = phantom(1, 48)
    hu, regions = chest.volume.hu, chest.regions
    assert total_doubt(total_map(regions), hu) == ""
    sick = np.where(np.isin(regions, (2, 5)), np.float32(40), hu)  # both lower lobes consolidated
    assert total_doubt(total_map(regions), sick) == ""
    assert "17 (thyroid) would be air" in total_doubt(total_map(regions, version=1), hu)
    # the liver as 10
    assert "would hold" in total_doubt(np.where(regions == 16, np.uint8(10), np.uint8(0)), hu)
    assert "bones" in total_doubt(
        np.where(regions == 16, np.uint8(30), np.uint8(0)), hu
    ) and "neither" in total_doubt((regions == 16).astype(np.uint8), hu)
    assert "is empty" in total_doubt(0 * regions, hu) and "118" in total_doubt(
        total_map(regions) + np.uint8(118) * (regions == 0), hu
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("cip-ct64", "neither their lungs"),
        ("4dlung-113", "would hold 4% air"),
        ("pancreas-cb001", "neither their lungs"),
        ("ts-example", ""),
    ],
)
def test_real_maps_are_taken_for_what_they_are(real_ct, name, said):
    config = CTEncoderConfig.preset("smoke")
    (found,) = name_cases(real_ct, [real_ct / f"{name}.nii.gz"])
    _, regions, notes = scan_and_regions(found, config)
    note = "; ".join(note for note in notes if f"labels/{name}.nii.gz" in note)
    if said:
        assert (regions == config.body).all() and said in note and "labels.json" in note
    else:
        assert (
            {13, 16, 17, 18, 19, 20} <= set(np.unique(regions))
            and regions.max() <= 20
            and note == ""
        )


def test_names_decide(tmp_path):
    config = CTEncoderConfig.preset("smoke")
    chest = phantom(1, 48)
    (tmp_path / "labels").mkdir()
    chest.volume.save(tmp_path / "a.nii.gz")

    def read(labels, names):
        Volume(labels.astype(np.float32), chest.volume.affine).save(
            tmp_path / "labels" / "a.nii.gz"
        )
        (tmp_path / "labels" / "labels.json").unlink(missing_ok=True)
        if names is not None:
            (tmp_path / "labels" / "labels.json").write_text(names)
        found = scan_and_regions(name_cases(tmp_path, [tmp_path / "a.nii.gz"])[0], config)
        return found[1], "; ".join(found[2])

    total, note = read(total_map(chest.regions), None)
    assert note == "" and len(np.unique(total)) > 15
    for labels, names in (
        (
            chest.regions,
            "{" + ", ".join(f'"{n}": "{name}"' for n, (name, _) in REGIONS.items()) + "}",
        ),
        (20 - chest.regions * (chest.regions > 0) + np.where(chest.regions > 0, 1, -20), None),
    ):
        # any numbering
        if names is None:
            names = (
                "{" + ", ".join(f'"{21 - n}": "{name}"' for n, (name, _) in REGIONS.items()) + "}"
            )
        assert np.array_equal(read(labels, names)[0], total)
    lungs = (
        np.isin(chest.regions, (1, 2)) * 1 + (chest.regions == 16) * 2 + (chest.regions == 7) * 9
    )
    regions, note = read(lungs, '{"1": "left lung", "2": "liver"}')
    assert (
        set(np.unique(regions)) == {0, 16}
        and "1 (left lung), 9 (without a name) are named like no single region" in note
    )
    regions, note = read(lungs, '{"1": "left lung", "2": "tumour"}')
    assert (
        regions == config.body
    ).all() and "none of its values, 1 (left lung), 2 (tumour), 9 (without a name), is named" in note
    with pytest.raises(CTReadError, match="labels.json: must be a JSON object"):
        read(lungs, "[1, 2]")


# overlaps


@pytest.mark.parametrize(
    "shape, patch",
    [
        ((2, 8, 32, 48), (4, 16, 16)),
        ((1, 6, 9, 10), (3, 3, 5)),
        ((3, 4, 4, 4), (4, 4, 4)),
        ((1, 2, 3, 5), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_overlaps_are_counts(shape, patch, dtype):
    labels = some_labels(shape, 6, dtype=dtype)
    overlaps = patch_overlaps(labels, patch, 6)
    expected = []
    for scan in labels:
        for z in range(0, shape[1], patch[0]):
            for y in range(0, shape[2], patch[1]):
                for x in range(0, shape[3], patch[2]):
                    block = scan[z : z + patch[0], y : y + patch[1], x : x + patch[2]]
                    expected.append([float((block == c).float().mean()) for c in range(6)])
    assert (
        overlaps.dtype == torch.float32
        and torch.equal(overlaps.flatten(0, 1), torch.tensor(expected))
        and torch.allclose(overlaps.sum(-1), torch.ones(overlaps.shape[:2]))
    )


def test_overlaps_of_a_map_that_is_not_contiguous():
    labels = some_labels((1, 8, 6, 4), 5)
    assert torch.equal(
        patch_overlaps(labels.permute(0, 3, 2, 1), (4, 3, 2), 5),
        patch_overlaps(labels.permute(0, 3, 2, 1).contiguous(), (4, 3, 2), 5),
    )


def test_overlaps_never_make_a_wide_map():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            self.numbers = max(
                [
                    self.numbers,
                    *(t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor)),
                ]
            )
            return made

    labels = some_labels((1, 16, 64, 64), 22)
    with Largest() as seen:
        patch_overlaps(labels, (4, 16, 16), 22)
    assert seen.numbers <= 8 * 4 * 64 * 64  # one slab of int64
    with Largest() as seen:
        F.one_hot(labels.long(), 22)
    assert seen.numbers >= 8 * labels.numel() * 22


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(8, 16, 16, dtype=torch.uint8),  # no batch
        torch.zeros(1, 8, 16, 16),  # floating point
        torch.zeros(1, 8, 15, 16, dtype=torch.uint8),  # no multiple of the patch
        torch.full((1, 8, 16, 16), 6, dtype=torch.uint8),  # too large a label
        torch.full((1, 8, 16, 16), -1),  # a negative label
    ],
)
def test_overlaps_refuse(labels):
    with refused("regions"):
        patch_overlaps(labels, (4, 16, 16), 6)


# attention with a prior


def expected_prior(q, k, v, prior):
    weight = (q @ k.mT / q.shape[-1] ** 0.5).exp() * prior[:, None]
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-300) @ v


def test_log_prior_is_the_formula_with_gradients():
    q = random(0, 2, 3, 30, 8).requires_grad_()
    k = random(1, 2, 3, 7, 8).requires_grad_()
    v = random(2, 2, 3, 7, 5).requires_grad_()
    prior = some_overlaps()
    outs = [f(q, k, v, prior) for f in (prior_attention, expected_prior)]
    grads = [torch.autograd.grad((out * random(3, *out.shape)).sum(), [q, k, v]) for out in outs]
    assert torch.allclose(*outs, atol=1e-13) and all(
        torch.allclose(a, b, atol=1e-13) for a, b in zip(*grads)
    )
    # the other formula does not pass
    assert (multiplicative_attention(q, k, v, prior) - outs[0]).abs().max() > 0.05


def test_zero_overlap_is_zero_weight_and_in_the_ablation_it_is_not():
    q = random(0, 2, 3, 30, 8)
    k = random(1, 2, 3, 7, 8)
    prior = some_overlaps()
    weights = {
        name: form(q, k, torch.eye(7, dtype=q.dtype).expand(2, 3, 7, 7), prior)
        for name, form in REGION_ATTENTION_FORMS.items()
    }
    nowhere = (prior == 0)[:, None].expand(-1, 3, -1, -1)
    assert (weights["log"][nowhere] == 0).all() and (
        weights["multiplicative"][nowhere] > 0.01
    ).all()
    for w in weights.values():
        assert torch.allclose(w.sum(-1), torch.ones_like(w[..., 0]))


def test_more_overlap_is_more_weight_but_not_in_the_ablation():
    one = torch.ones(1, 1, 1, 1)
    for logit in (-2.0, 0.0, 2.0):
        heard = {
            name: [
                float(
                    form(
                        logit * one,
                        one.expand(1, 1, 2, 1),
                        torch.eye(2)[None, None],
                        torch.tensor([[[share, 1 - share]]]),
                    )[..., 0]
                )
                for share in (0.2, 0.5, 0.8)
            ]
            for name, form in REGION_ATTENTION_FORMS.items()
        }
        assert heard["log"] == pytest.approx([0.2, 0.5, 0.8])
        if logit < 0:
            assert heard["multiplicative"] == sorted(heard["multiplicative"], reverse=True)


def test_a_query_without_any_prior_gets_zero_and_no_nan():
    q = random(0, 1, 2, 3, 4).requires_grad_()
    k = random(1, 1, 2, 5, 4)
    v = random(2, 1, 2, 5, 4)
    prior = torch.rand(1, 3, 5, dtype=torch.float64)
    prior[0, 1] = 0
    out = prior_attention(q, k, v, prior)
    out.square().sum().backward()
    assert (
        (out[:, :, 1] == 0).all()
        and (out[:, :, 0] != 0).all()
        and torch.isfinite(q.grad).all()
        and (q.grad[:, :, 1] == 0).all()
    )


def test_a_predicted_prior_gets_finite_gradients():
    prior = some_overlaps().requires_grad_()
    prior_attention(
        random(0, 2, 3, 30, 8), random(1, 2, 3, 7, 8), random(2, 2, 3, 7, 5), prior
    ).square().sum().backward()
    assert torch.isfinite(prior.grad).all() and prior.grad.abs().sum() > 0


# layers


def test_means():
    x, overlaps = random(0, 2, 30, 5), some_overlaps()
    means = overlap_means(x, overlaps)
    for b in range(2):
        for r in range(6):
            assert torch.allclose(
                means[b, r],
                sum(overlaps[b, p, r] * x[b, p] for p in range(30)) / overlaps[b, :, r].sum(),
            )
    assert (means[:, 6] == 0).all()


@pytest.mark.parametrize("form", REGION_ATTENTION_FORMS)
def test_a_patch_hears_its_regions_alone(form):
    torch.manual_seed(0)
    layer = RegionAttention(8, 2, form).double()
    x = random(0, 2, 30, 8)
    overlaps = some_overlaps()
    table = random(1, 7, 8)
    changed = table.clone()
    changed[3] += 5
    differs = (layer(x, table, overlaps) - layer(x, changed, overlaps)).abs().amax(-1) > 1e-9
    assert torch.equal(differs, overlaps[..., 3] > 0) == (form == "log")


def test_patches_of_one_region_hear_each_other():
    torch.manual_seed(0)
    layer = RegionAttention(8, 2).double()
    overlaps = torch.zeros(1, 10, 3, dtype=torch.float64)
    table = random(1, 3, 8)
    overlaps[0, :5, 1], overlaps[0, 5:, 2] = 1, 1
    x = random(0, 1, 10, 8)
    changed = x.clone()
    changed[0, 0] += 1
    differs = (layer(x, table, overlaps) - layer(changed, table, overlaps)).abs().amax(-1)[0] > 1e-9
    assert differs.tolist() == [True] * 5 + [False] * 5


def test_pooling_starts_as_means_and_learns_within_its_region():
    torch.manual_seed(0)
    pool = RegionPooling(8, 2, 7).double()
    x = random(0, 2, 30, 8)
    overlaps = some_overlaps()
    whole, regions = pool(x, overlaps)
    assert (
        torch.allclose(whole, x.mean(1))
        and torch.allclose(regions, overlap_means(x, overlaps))
        and (regions[:, 6] == 0).all()
    )
    with torch.no_grad():
        pool.query.normal_()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(pool(x, overlaps)[1][0, 3].sum(), x)
    assert torch.equal(grad[0].abs().sum(-1) > 0, overlaps[0, :, 3] > 0) and (grad[1] == 0).all()
    assert not torch.allclose(pool(x, overlaps)[0], x.mean(1))


def test_autocast_and_refusals():
    layer = RegionAttention(8, 2)
    pool = RegionPooling(8, 2, 7)
    x = random(0, 2, 30, 8, dtype=torch.float32)
    overlaps = some_overlaps().float()
    with torch.autocast("cpu", torch.bfloat16):
        (
            layer(x, torch.randn(7, 8), overlaps).float().sum() + pool(x, overlaps)[1].float().sum()
        ).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with refused("form"):
        RegionAttention(8, 2, "other")
    with refused("heads"):
        RegionAttention(8, 3)
    with refused("heads"):
        RegionPooling(8, 3, 4)
    assert module.TOTAL_LABELS == 117


# what a region holds


@pytest.mark.parametrize("radii", [(1, 1, 1), (0, 2, 3), (4, 0, 1)])
def test_boxes_are_those_of_scipy(radii):
    x = some_labels((9, 10, 11), 256)
    size = tuple(2 * r + 1 for r in radii)
    assert np.array_equal(
        box_maximum(x, radii), ndimage.maximum_filter(x.numpy(), size, mode="constant", cval=0)
    )
    assert np.array_equal(
        box_minimum(x, radii), ndimage.minimum_filter(x.numpy(), size, mode="constant", cval=255)
    )


@pytest.mark.parametrize("spacing", [(5.0, 5.0, 5.0), (5.0, 2.5, 2.0)])
def test_histograms_are_counted_by_hand(spacing):
    "Openings and closings of HU by scipy, binned by numpy, label by label."
    hu = 600 * random(0, 2, 10, 12, 14)
    labels = (
        some_labels((2, 2, 2, 2), 4)
        .repeat_interleave(7, 1)
        .repeat_interleave(7, 2)
        .repeat_interleave(7, 3)[:, :10, :12, :14]
    )
    size = tuple(2 * round(5 / s) + 1 for s in spacing)
    cube = np.prod(spacing) / 125
    found = region_histograms(hu.float(), labels, 6, spacing)
    assert found.shape == (2, 7, 9, len(HU_EDGES) + 1) and (found[:, 5:] == 0).all()
    for scan, label, one in zip(hu.float().round().numpy(), labels.numpy(), found.numpy()):
        kinds = [
            scan,
            ndimage.grey_opening(scan, size, mode="reflect"),
            ndimage.grey_closing(scan, size, mode="reflect"),
        ]
        boxes = [[2 * depth * round(5 / s) + 1 for s in spacing] for depth in range(3)]
        everywhere, inside, deep = (
            (ndimage.maximum_filter(label, box) == label)
            & (ndimage.minimum_filter(label, box) == label)
            for box in boxes
        )
        for row, kind in enumerate(kinds):

            def count(where):
                return cube * np.histogram(kind[where], [-np.inf, *HU_EDGES, np.inf])[0]

            for k, within in enumerate((everywhere, inside, deep)):
                assert np.allclose(one[0, 3 * k + row], count(label >= 0))
                for value in range(4):
                    assert np.allclose(
                        one[1 + value, 3 * k + row], count((label == value) & within)
                    )
        assert found[0, 1:5, 6].sum() > 0
    with refused("labels"):
        region_histograms(hu, labels[:1], 6, spacing)
    for wrong in (labels.int() - 1, labels + 3):
        with refused("labels"):
            region_histograms(hu, wrong, 6, spacing)


def test_finer_voxels_fill_the_same_histogram():
    hu = 400 * random(1, 1, 6, 6, 6)
    labels = some_labels((1, 6, 6, 6), 3)

    def fine(x):
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)

    coarse = region_histograms(hu, labels, 3, (5.0,) * 3)
    halved = region_histograms(fine(hu), fine(labels), 3, (2.5,) * 3)
    assert torch.allclose(coarse[:, :, 0], halved[:, :, 0]) and torch.allclose(
        coarse[0, 0].sum(-1), torch.full((9,), 216.0)
    )


def test_contents_of_a_label_are_its_own():
    """A voxel of one label changes that label and the whole; what is nowhere is 0 and stays 0 after
    measuring.
    """
    torch.manual_seed(0)
    hu = 300 * random(2, 6, 8, 8, 8, dtype=torch.float32)
    labels = some_labels((6, 8, 8, 8), 4)
    spacing = (5.0,) * 3
    contents = RegionContents(12, 5)
    contents.measure(zip(hu[:5].split(1), labels[:5].split(1)), spacing)
    assert (
        (contents.usual[5] == 0).all()
        and (contents.spread[5] == 1).all()
        and (contents.spread[:5] >= 0.25).all()
        and contents.usual[:5].abs().sum(-1).min() > 0
    )
    before = contents(hu[5:], labels[5:], spacing)
    changed = hu[5:].clone()
    z, y, x = (labels[5] == 2).nonzero()[0].tolist()
    changed[0, z, y, x] = 2000

    def counts(v):
        return region_histograms(v, labels[5:], 5, spacing)[0, :, 0]

    assert ((counts(changed) - counts(hu[5:])).abs().sum(-1) > 0).tolist() == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    after = contents(changed, labels[5:], spacing)
    assert (
        not torch.equal(before[0, 3], after[0, 3])
        and not torch.equal(before[0, 0], after[0, 0])
        and (before[0, 5] == 0).all()
        and before.shape == (1, 6, 12)
    )
    after.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in contents.parameters())


def test_what_is_usual_lies_about_zero():
    hu = 300 * random(3, 40, 6, 6, 6, dtype=torch.float32)
    labels = some_labels((40, 6, 6, 6), 3)
    spacing = (5.0,) * 3
    contents = RegionContents(4, 3)
    contents.measure([(hu, labels)], spacing)
    seen = (
        torch.log1p(region_histograms(hu, labels, 3, spacing).flatten(2)) - contents.usual
    ) / contents.spread
    assert seen.mean(0).abs().max() < 1e-4 and seen.std(0).max() < 1


def test_contents_under_autocast_and_on_meta():
    contents = RegionContents(8, 4)
    hu = 300 * random(4, 2, 8, 8, 8, dtype=torch.float32)
    labels = some_labels((2, 8, 8, 8), 4)
    with torch.autocast("cpu", torch.bfloat16):
        said = contents(hu, labels, (5.0,) * 3)
    assert torch.isfinite(said.float()).all()
    assert RegionContents(8, 4).to("meta")(hu.to("meta"), labels.to("meta"), (5.0,) * 3).shape == (
        2,
        5,
        8,
    )
