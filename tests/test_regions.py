"""Regions: overlaps against counting by hand, the log-prior against the formula, the ablation's defect, pooling, and what is refused."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ct_nb.nets.regions as module
from ct_nb.nets.regions import FORMS, RegionAttention, RegionPooling, merge_total, multiplicative_attention, overlap_means, patch_overlaps, prior_attention
from ct_nb.physics.anatomy import REGIONS


def random(seed, *shape, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(shape, classes, seed=0, dtype=torch.uint8):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_overlaps(batch=2, tokens=30, classes=7, seed=0):
    "Rows sum to 1, many entries are 0, class 6 is nowhere."
    raw = torch.rand(batch, tokens, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
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
    for region, (_, ids) in REGIONS.items(): assert (merged[list(ids)] == region).all() and (merged == region).sum() == len(ids)


@pytest.mark.parametrize("number, name", [(10, "left upper lobe"), (14, "right lower lobe"), (51, "heart"), (52, "aorta"), (5, "liver"), (79, "spine"), (26, "spine"), (1, "spleen, pancreas and adrenals"), (17, "thyroid"), (91, "pelvis and muscle")])
def test_known_ids(number, name): assert REGIONS[int(merge_total(np.array([number]))[0])][0] == name


@pytest.mark.parametrize("labels", [np.array([118]), np.array([-1]), np.array([1.0])])
def test_merge_refuses_what_is_not_total(labels):
    with pytest.raises(ValueError, match="labels: TotalSegmentator"): merge_total(labels)


# overlaps

@pytest.mark.parametrize("shape, patch", [((2, 8, 32, 48), (4, 16, 16)), ((1, 6, 9, 10), (3, 3, 5)), ((3, 4, 4, 4), (4, 4, 4)), ((1, 2, 3, 5), (1, 1, 1))])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_overlaps_are_counts(shape, patch, dtype):
    labels = some_labels(shape, 6, dtype=dtype)
    overlaps = patch_overlaps(labels, patch, 6)
    expected = []
    for scan in labels:
        for z in range(0, shape[1], patch[0]):
            for y in range(0, shape[2], patch[1]):
                for x in range(0, shape[3], patch[2]):
                    block = scan[z:z + patch[0], y:y + patch[1], x:x + patch[2]]
                    expected.append([float((block == c).float().mean()) for c in range(6)])
    assert overlaps.dtype == torch.float32 and torch.equal(overlaps.flatten(0, 1), torch.tensor(expected)) and torch.allclose(overlaps.sum(-1), torch.ones(overlaps.shape[:2]))


def test_overlaps_of_a_map_that_is_not_contiguous():
    labels = some_labels((1, 8, 6, 4), 5)
    assert torch.equal(patch_overlaps(labels.permute(0, 3, 2, 1), (4, 3, 2), 5), patch_overlaps(labels.permute(0, 3, 2, 1).contiguous(), (4, 3, 2), 5))


def test_overlaps_never_make_a_wide_map():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    class Largest(TorchDispatchMode):
        numbers = 0
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
            return made
    labels = some_labels((1, 16, 64, 64), 22)
    with Largest() as seen: patch_overlaps(labels, (4, 16, 16), 22)
    assert seen.numbers <= 8 * 4 * 64 * 64  # one slab of int64
    with Largest() as seen: F.one_hot(labels.long(), 22)
    assert seen.numbers >= 8 * labels.numel() * 22


@pytest.mark.parametrize("labels, words", [
    (torch.zeros(8, 16, 16, dtype=torch.uint8), "expected a label map"), (torch.zeros(1, 8, 16, 16), "whole numbers"), (torch.zeros(1, 8, 15, 16, dtype=torch.uint8), "multiple of the patch"),
    (torch.full((1, 8, 16, 16), 6, dtype=torch.uint8), "labels from 6 to 6, expected 0 to 5"), (torch.full((1, 8, 16, 16), -1), "labels from -1 to -1")])
def test_overlaps_refuse(labels, words):
    with pytest.raises(ValueError, match=words): patch_overlaps(labels, (4, 16, 16), 6)


# attention with a prior

def expected_prior(q, k, v, prior):
    weight = (q @ k.mT / q.shape[-1] ** 0.5).exp() * prior[:, None]
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-300) @ v


def test_log_prior_is_the_formula_with_gradients():
    q, k, v = random(0, 2, 3, 30, 8).requires_grad_(), random(1, 2, 3, 7, 8).requires_grad_(), random(2, 2, 3, 7, 5).requires_grad_()
    prior = some_overlaps()
    outs = [f(q, k, v, prior) for f in (prior_attention, expected_prior)]
    grads = [torch.autograd.grad((out * random(3, *out.shape)).sum(), [q, k, v]) for out in outs]
    assert torch.allclose(*outs, atol=1e-13) and all(torch.allclose(a, b, atol=1e-13) for a, b in zip(*grads))
    assert (multiplicative_attention(q, k, v, prior) - outs[0]).abs().max() > 0.05  # the other formula does not pass


def test_zero_overlap_is_zero_weight_and_in_the_ablation_it_is_not():
    q, k, prior = random(0, 2, 3, 30, 8), random(1, 2, 3, 7, 8), some_overlaps()
    weights = {name: form(q, k, torch.eye(7, dtype=q.dtype).expand(2, 3, 7, 7), prior) for name, form in FORMS.items()}
    nowhere = (prior == 0)[:, None].expand(-1, 3, -1, -1)
    assert (weights["log"][nowhere] == 0).all() and (weights["multiplicative"][nowhere] > 0.01).all()
    for w in weights.values(): assert torch.allclose(w.sum(-1), torch.ones_like(w[..., 0]))


def test_more_overlap_is_more_weight_but_not_in_the_ablation():
    one = torch.ones(1, 1, 1, 1)
    for logit in (-2.0, 0.0, 2.0):
        heard = {name: [float(form(logit * one, one.expand(1, 1, 2, 1), torch.eye(2)[None, None], torch.tensor([[[share, 1 - share]]]))[..., 0]) for share in (0.2, 0.5, 0.8)] for name, form in FORMS.items()}
        assert heard["log"] == pytest.approx([0.2, 0.5, 0.8])
        if logit < 0: assert heard["multiplicative"] == sorted(heard["multiplicative"], reverse=True)


def test_a_query_without_any_prior_gets_zero_and_no_nan():
    q, k, v, prior = random(0, 1, 2, 3, 4).requires_grad_(), random(1, 1, 2, 5, 4), random(2, 1, 2, 5, 4), torch.rand(1, 3, 5, dtype=torch.float64)
    prior[0, 1] = 0
    out = prior_attention(q, k, v, prior)
    out.square().sum().backward()
    assert (out[:, :, 1] == 0).all() and (out[:, :, 0] != 0).all() and torch.isfinite(q.grad).all() and (q.grad[:, :, 1] == 0).all()


def test_a_predicted_prior_gets_finite_gradients():
    prior = some_overlaps().requires_grad_()
    prior_attention(random(0, 2, 3, 30, 8), random(1, 2, 3, 7, 8), random(2, 2, 3, 7, 5), prior).square().sum().backward()
    assert torch.isfinite(prior.grad).all() and prior.grad.abs().sum() > 0


# layers

def test_means():
    x, overlaps = random(0, 2, 30, 5), some_overlaps()
    means = overlap_means(x, overlaps)
    for b in range(2):
        for r in range(6): assert torch.allclose(means[b, r], sum(overlaps[b, p, r] * x[b, p] for p in range(30)) / overlaps[b, :, r].sum())
    assert (means[:, 6] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_patch_hears_its_regions_alone(form):
    torch.manual_seed(0)
    layer, x, overlaps = RegionAttention(8, 2, form).double(), random(0, 2, 30, 8), some_overlaps()
    table = random(1, 7, 8)
    changed = table.clone()
    changed[3] += 5
    differs = (layer(x, table, overlaps) - layer(x, changed, overlaps)).abs().amax(-1) > 1e-9
    assert torch.equal(differs, overlaps[..., 3] > 0) == (form == "log")


def test_patches_of_one_region_hear_each_other():
    torch.manual_seed(0)
    layer, overlaps, table = RegionAttention(8, 2).double(), torch.zeros(1, 10, 3, dtype=torch.float64), random(1, 3, 8)
    overlaps[0, :5, 1], overlaps[0, 5:, 2] = 1, 1
    x = random(0, 1, 10, 8)
    changed = x.clone()
    changed[0, 0] += 1
    differs = (layer(x, table, overlaps) - layer(changed, table, overlaps)).abs().amax(-1)[0] > 1e-9
    assert differs.tolist() == [True] * 5 + [False] * 5


def test_pooling_starts_as_means_and_learns_within_its_region():
    torch.manual_seed(0)
    pool, x, overlaps = RegionPooling(8, 2, 7).double(), random(0, 2, 30, 8), some_overlaps()
    whole, regions = pool(x, overlaps)
    assert torch.allclose(whole, x.mean(1)) and torch.allclose(regions, overlap_means(x, overlaps)) and (regions[:, 6] == 0).all()
    with torch.no_grad(): pool.query.normal_()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(pool(x, overlaps)[1][0, 3].sum(), x)
    assert torch.equal(grad[0].abs().sum(-1) > 0, overlaps[0, :, 3] > 0) and (grad[1] == 0).all()
    assert not torch.allclose(pool(x, overlaps)[0], x.mean(1))


def test_autocast_and_refusals():
    layer, pool, x, overlaps = RegionAttention(8, 2), RegionPooling(8, 2, 7), random(0, 2, 30, 8, dtype=torch.float32), some_overlaps().float()
    with torch.autocast("cpu", torch.bfloat16): (layer(x, torch.randn(7, 8), overlaps).float().sum() + pool(x, overlaps)[1].float().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with pytest.raises(ValueError, match="form: must be one of log, multiplicative, got 'other'"): RegionAttention(8, 2, "other")
    with pytest.raises(ValueError, match="heads: must divide"): RegionAttention(8, 3)
    with pytest.raises(ValueError, match="heads: must divide"): RegionPooling(8, 3, 4)
    assert module.TOTAL_LABELS == 117
