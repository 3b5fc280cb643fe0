"""Slice attention against the naive form: values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ct_nb.ct_encoder.slice_attention import SliceAttention, slice_attention, slice_biases
from ct_nb.layers.relative_bias import biased_attention


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_bias(table, slices, plane):
    "(heads, N, N), entry by entry."

    def at(i, j):
        return table[:, min(abs(i // plane - j // plane), table.shape[1] - 1)]

    n = slices * plane
    return torch.stack([torch.stack([at(i, j) for j in range(n)], -1) for i in range(n)], 1)


def naive(q, k, v, table, slices):
    return (q @ k.mT / q.shape[-1] ** 0.5 + slow_bias(table, slices, q.shape[2] // slices)).softmax(
        -1
    ) @ v


def ours(q, k, v, table, slices):
    return slice_attention(q, k, v, slice_biases(table, slices))


def results(attention, slices, plane, d, e, bins, heads=2, batch=2):
    "Values and gradients to q, k, v and the table."
    inputs = [
        random(s, batch, heads, slices * plane, w).requires_grad_() for s, w in enumerate((d, d, e))
    ] + [random(3, heads, bins).requires_grad_()]
    out = attention(*inputs, slices)
    return [
        out.detach(),
        *torch.autograd.grad((out * random(4, *out.shape)).sum(), inputs, materialize_grads=True),
    ]


def difference(a, b):
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1)) for x, y in zip(a, b))


CASES = [
    (4, 9, 8, 8, 32),
    (5, 4, 16, 16, 3),
    (1, 12, 4, 4, 2),
    (12, 1, 4, 4, 5),
    (3, 5, 6, 30, 32),
    (6, 3, 30, 2, 1),
]


@pytest.mark.parametrize("slices, plane, d, e, bins", CASES)
def test_the_folded_bias_is_the_table(slices, plane, d, e, bins):
    "Shares of the largest number: values within 2e-15, gradients within 1e-14."
    ours_, naive_ = (results(f, slices, plane, d, e, bins) for f in (ours, naive))
    assert difference(ours_[:1], naive_[:1]) < 2e-15 and difference(ours_, naive_) < 1e-14


def test_typical_error_is_of_the_last_digit():
    "Mean error of values and of every gradient below 1e-15 of the largest number."
    a, b = (results(f, 5, 8, 16, 16, 4) for f in (ours, naive))
    for x, y in zip(a, b):
        assert float((x - y).abs().mean() / y.abs().max()) < 1e-15


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, t, s: ours(
            q, k, v, t / q.shape[-1] ** 0.5, s
        ),  # the factor over the bias too
        lambda q, k, v, t, s: ours(q, k, v, t.flip(-1), s),  # distances the wrong way round
        # z innermost
        lambda q, k, v, t, s: ours(
            *(x.unflatten(2, (s, -1)).transpose(2, 3).flatten(2, 3) for x in (q, k, v)), t, s
        )
        .unflatten(2, (-1, s))
        .transpose(2, 3)
        .flatten(2, 3),
        lambda q, k, v, t, s: F.scaled_dot_product_attention(q, k, v),  # no bias
    ],
)
def test_wrong_formulas_are_seen(wrong):
    assert (
        difference(results(wrong, 5, 4, 16, 16, 5)[:1], results(naive, 5, 4, 16, 16, 5)[:1]) > 1e-2
    )


def test_the_sign_does_not_count_and_far_is_far():
    bias = slice_biases(random(0, 3, 32), 50)
    assert (
        torch.equal(bias, bias.mT)
        and torch.equal(bias[:, 0, 31:], bias[:, 0, 31:32].expand(-1, 19))
        and not torch.equal(bias[:, 0, 30], bias[:, 0, 31])
    )


def test_the_neighbouring_chapter_says_the_same():
    q, k, v = (random(s, 1, 2, 60, 8) for s in range(3))
    bias = slice_biases(random(3, 2, 32), 5)
    peer = biased_attention(
        q,
        k,
        v,
        [bias, torch.zeros(2, 3, 3, dtype=bias.dtype), torch.zeros(2, 4, 4, dtype=bias.dtype)],
    )
    assert torch.allclose(slice_attention(q, k, v, bias), peer, atol=1e-14)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))]
        )
        return made


def test_full_size_in_bounded_memory():
    "16,384 tokens, forward and backward: nothing larger than the lengthened queries."
    q, k, v = (random(s, 1, 1, 16384, 8, dtype=torch.float32).requires_grad_() for s in range(3))
    table = random(3, 1, 32, dtype=torch.float32).requires_grad_()
    with Largest() as seen:
        ours(q, k, v, table, 16).square().sum().backward()
    assert seen.numbers == 16384 * 24 and all(
        torch.isfinite(t.grad).all() for t in (q, k, v, table)
    )
    with Largest() as seen:
        naive_small = (q[:, :, :512] @ k[:, :, :512].mT).softmax(-1)
    assert seen.numbers == 512**2 == naive_small.numel()  # the table would be seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_size_in_bounded_memory_on_a_gpu(dtype):
    """12 heads of 64 channels, 16,384 tokens, forward and backward: far below the 6.4 GB that one
    table of all pairs takes in bfloat16.
    """
    q, k, v = (
        random(s, 1, 12, 16384, 64, dtype=torch.float32).to("cuda", dtype).requires_grad_()
        for s in range(3)
    )
    table = random(3, 12, 32, dtype=torch.float32).cuda().requires_grad_()
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(q, k, v, table, 16).float().square().sum().backward()
    assert (
        torch.cuda.max_memory_allocated() - before < 20 * 12 * 16384 * 80 * 4 < 12 * 16384**2 * 2
        and torch.isfinite(table.grad).all()
    )
    # 64 tokens of two heads, against the table
    short = [
        t.detach()[:, :2, :, :].unflatten(2, (16, 1024))[:, :, :, :4].flatten(2, 3).float()
        for t in (q, k, v)
    ]
    slab = torch.arange(64, device="cuda") // 4
    exact = (
        short[0] @ short[1].mT / 8 + slice_biases(table.detach()[:2], 16)[:, slab[:, None], slab]
    ).softmax(-1) @ short[2]
    found = ours(*(t.to(dtype) for t in short), table.detach()[:2], 16).float()
    assert torch.allclose(found, exact, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_fused_kernel_takes_it_without_a_mask(monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append((a, k)) or real(*a, **k)
    )
    q, k, v = (random(s, 1, 2, 24, 8, dtype=torch.float32) for s in range(3))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        ours(q, k, v, random(3, 2, 32, dtype=torch.float32), 6)
    ((arguments, settings),) = calls
    assert (
        settings == {"scale": 1.0}
        and len({t.shape[-1] for t in arguments}) == 1
        and arguments[0].shape[-1] % 8 == 0
    )


def test_half_precision_and_autocast():
    q, k, v = (random(s, 1, 2, 24, 8, dtype=torch.float32) for s in range(3))
    table = random(3, 2, 32, dtype=torch.float32)
    exact = ours(q, k, v, table, 6)
    half = ours(*(t.bfloat16() for t in (q, k, v)), table, 6)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), exact, atol=0.05)
    layer = SliceAttention(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(random(5, 1, 24, 16, dtype=torch.float32), 6).float().sum().backward()
    assert layer.table.grad.abs().sum() > 0


def test_the_layer_weighs_its_table_by_a_half():
    torch.manual_seed(0)
    layer = SliceAttention(16, 2).double()
    assert layer.table.shape == (2, 32) and layer.weight == 0.5
    with torch.no_grad():
        layer.table.normal_()
    x = random(0, 2, 24, 16)
    q, k, v = layer.qkv(x).view(2, 24, 3, 2, 8).permute(2, 0, 3, 1, 4)
    for weight, same in ((0.5, True), (1.0, False)):
        expected = layer.out(naive(q, k, v, weight * layer.table, 6).transpose(1, 2).flatten(2))
        assert torch.allclose(layer(x, 6), expected, atol=1e-12) == same


def test_refusals():
    q = random(0, 1, 2, 12, 4)
    for bias in (torch.zeros(2, 5, 5), torch.zeros(3, 4, 4), torch.zeros(2, 4, 3)):
        with refused("bias"):
            slice_attention(q, q, q, bias)
    with refused("heads"):
        SliceAttention(10, 3)
    with refused("slices"):
        slice_biases(torch.zeros(2, 4), 0)
