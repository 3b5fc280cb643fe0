"""Attention with a folded relative bias is attention with the table of all pairs."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from layers_inputs import random, seeded
from refusals import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ct_nb.layers.relative_bias as attention_module
from ct_nb.layers.relative_bias import (
    BiasedAttention,
    append_bias_columns,
    biased_attention,
    expand_axis_biases,
    relative_biases,
)


def table_of(biases):
    "(heads, N, N) from the biases of the axes, entry by entry."
    places = list(itertools.product(*(range(b.shape[-1]) for b in biases)))
    return torch.stack(
        [
            torch.stack([sum(b[:, i, j] for b, i, j in zip(biases, p, q)) for q in places], -1)
            for p in places
        ],
        1,
    )


def naive(q, k, v, biases):
    return (q @ k.mT / q.shape[-1] ** 0.5 + table_of(biases)).softmax(-1) @ v


@pytest.mark.parametrize(
    "shape, d, e",
    [((2, 3, 4), 5, 5), ((3, 3, 3), 8, 8), ((1, 2, 6), 4, 40), ((4, 5), 3, 2), ((7,), 6, 1)],
)
def test_folded_bias_is_the_table(shape, d, e):
    def leaf(seed, *size):
        return random(seed, *size, dtype=torch.float64).requires_grad_()

    q = leaf(0, 2, 3, math.prod(shape), d)
    k = leaf(1, 2, 3, math.prod(shape), d)
    v = leaf(2, 2, 3, math.prod(shape), e)
    biases = [leaf(3 + a, 3, n, n) for a, n in enumerate(shape)]
    ours = biased_attention(q, k, v, biases)
    theirs = naive(q, k, v, biases)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-12
    weight = random(9, *ours.shape, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), [q, k, v, *biases]) for y in (ours, theirs))
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    "wrong", ["scale over the bias", "rows and columns swapped", "axes swapped"]
)
def test_wrong_bias_columns_are_not_the_table(wrong, monkeypatch):
    def other(q, k, biases, inner):
        if wrong == "rows and columns swapped":
            biases = [b.mT for b in biases]
        if wrong == "axes swapped":
            biases = biases[::-1]
        long_q, long_k = append_bias_columns(q, k, biases, inner)
        if wrong == "scale over the bias":
            long_q = torch.cat(
                [long_q[..., : q.shape[-1]], long_q[..., q.shape[-1] :] * q.shape[-1] ** -0.5], -1
            )
        return long_q, long_k

    q, k, v = (random(n, 1, 2, 27, 4, dtype=torch.float64) for n in range(3))
    biases = [random(3 + a, 2, 3, 3, dtype=torch.float64) for a in range(3)]
    monkeypatch.setattr(attention_module, "append_bias_columns", other)
    assert (biased_attention(q, k, v, biases) - naive(q, k, v, biases)).abs().max() > 0.01


class Largest(TorchDispatchMode):
    "Remembers the most numbers that any tensor had."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))]
        )
        return made


def test_no_tensor_of_all_pairs():
    layer = seeded(BiasedAttention, 32, 2, 10)
    x = random(0, 1, 1000, 32).requires_grad_()
    with Largest() as largest:
        layer(x).square().sum().backward()
    # the longest queries, of both heads
    assert largest.numbers <= 1000 * 2 * (16 + 3 * 10 + 8) < 1000**2 / 4


def test_the_fused_kernel_is_the_one_that_runs():
    q = random(0, 1, 2, 64, 12)
    biases = [random(1 + a, 2, 4, 4) for a in range(3)]
    # raises where it cannot
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), warnings.catch_warnings(action="ignore"):
        assert torch.allclose(biased_attention(q, q, q, biases), naive(q, q, q, biases), atol=1e-5)
        assert torch.allclose(
            biased_attention(q, q, q[..., :5], biases), naive(q, q, q[..., :5], biases), atol=1e-5
        )
        # values left narrower
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*append_bias_columns(q, q, biases), q, scale=1.0)


def test_relative_biases():
    offsets = random(0, 3, 2, 9)
    full = relative_biases(offsets, 5)
    for i, j in itertools.product(range(5), repeat=2):
        assert torch.equal(full[..., i, j], offsets[..., i - j + 4])
    assert torch.equal(relative_biases(offsets, 3), full[..., 1:4, 1:4])
    for size in (0, 6):
        with refused("size"):
            relative_biases(offsets, size)


def test_unit_vectors_are_in_the_order_of_a_flattened_grid():
    place = expand_axis_biases([torch.eye(n)[None] for n in (2, 3, 4)]).view(2, 3, 4, 9)
    assert place[1, 2, 3].nonzero().flatten().tolist() == [1, 4, 8] and place.sum() == 2 * 3 * 4 * 3


def test_attention_of_a_shifted_patch_is_the_same():
    "A relative bias knows offsets only: tokens that are moved as a whole attend as before."
    layer = seeded(BiasedAttention, 8, 2, 4)
    x = random(0, 1, 27, 8)
    torch.nn.init.normal_(layer.offsets)
    small = seeded(BiasedAttention, 8, 2, 3)
    small.load_state_dict({**layer.state_dict(), "offsets": layer.offsets[..., 1:-1]})
    assert torch.allclose(layer(x), small(x), atol=1e-6)


def test_biases_that_do_not_fit():
    q = random(0, 1, 2, 8, 4)
    for biases in (
        [torch.zeros(2, 2, 2)] * 2,
        [torch.zeros(1, 2, 2)] * 3,
        [torch.zeros(2, 3, 2)] * 3,
    ):
        with refused("biases"):
            biased_attention(q, q, q, biases)
    with refused("heads"):
        BiasedAttention(10, 3, 4)
    with refused("x"):
        BiasedAttention(8, 2, 4)(torch.zeros(1, 60, 8))
