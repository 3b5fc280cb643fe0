"""Contrastive losses: reference values, several processes, the gradient cache, refused input."""

import math
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from refusals import refused
from torch import multiprocessing

from ct_nb.ct_encoder import contrastive as alignment
from ct_nb.ct_encoder.contrastive import (
    ContrastiveLoss,
    EquivalenceKeys,
    GlobalPairs,
    StepAttention,
    StepPairs,
    Temperature,
    anchor_loss,
    equivalence_keys,
    info_nce,
    inside_regions,
    is_positive_pair,
    row_losses,
    step_nce,
)
from ct_nb.training import gradient_cache as gradient_caching
from ct_nb.training.gradient_cache import cached_backward


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_twins(n, offset=0):
    return EquivalenceKeys(torch.arange(n) + offset, torch.full((n,), -1))


def test_symmetric_info_nce_is_two_cross_entropies():
    image, text = random(0, 7, 5), random(1, 7, 5)
    scores = 9.0 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    both = (
        F.cross_entropy(scores, torch.arange(7)) + F.cross_entropy(scores.T, torch.arange(7))
    ) / 2
    assert torch.allclose(info_nce(image, text, 9.0), both) and torch.allclose(
        info_nce(image, text, 9.0, no_twins(7)), both
    )
    # one way only is something else
    assert not torch.allclose(F.cross_entropy(scores, torch.arange(7)), both)
    assert torch.allclose(info_nce(3 * image, text, 9.0), both)  # lengths do not count


def test_rows_are_divergences_from_even_targets():
    scores = random(2, 4, 6)
    positive = torch.tensor(
        [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6], dtype=torch.bool
    )
    target = positive[:3].double() / positive[:3].sum(1, keepdim=True)
    peer = F.kl_div(scores[:3].log_softmax(-1), target, reduction="none").sum(1)
    assert torch.allclose(row_losses(scores, positive), torch.cat([peer, torch.zeros(1)]))
    inside_log = -(
        torch.where(positive[:1], scores[:1], -torch.inf).logsumexp(1) - scores[:1].logsumexp(1)
    )
    assert not torch.allclose(inside_log, peer[:1])  # the sum within the logarithm is another loss


def test_twins_are_no_negatives():
    identity = torch.tensor([0, 0, 1, 2])
    features = F.one_hot(identity, 3).double()
    twins = EquivalenceKeys(identity, torch.full((4,), -1))
    assert (
        info_nce(features, features, 50.0, twins) < 1e-6
        and info_nce(features, features, 50.0) > 0.3
    )
    # other words, both normal
    normal = EquivalenceKeys(torch.arange(4), torch.tensor([5, 5, -1, -1]))
    assert info_nce(features, features, 50.0, normal) < 1e-6


def test_keys():
    keys = equivalence_keys(
        [
            "Normal spleen.",
            "NORMAL  spleen",
            "The spleen is normal.",
            "The liver is normal.",
            "Liver cyst of 8 mm.",
            "Liver cyst of 8 mm.",
        ],
        [17, 17, 17, 16, 16, 3],
    )
    wanted = torch.tensor(
        [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 0, 0]] + [[0, 0, 0, 0, 1, 1]] * 2
    )
    assert torch.equal(is_positive_pair(keys, keys).int(), wanted.int()) and keys.text.min() >= 0
    # two that are not normal share no -1
    assert is_positive_pair(equivalence_keys(["A cyst."]), equivalence_keys(["A mass."])).sum() == 0
    with refused("scopes"):
        equivalence_keys(["a"], [1, 2])


def test_temperature_has_a_cap_and_a_way_back():
    temperature = Temperature(0.07, 0.01)
    assert temperature().item() == pytest.approx(1 / 0.07, rel=1e-5)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=10.0)
    for _ in range(50):
        optimizer.zero_grad()
        (-temperature()).backward()
        optimizer.step()
    assert temperature().item() == pytest.approx(100)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.zero_grad()
    temperature().backward()
    optimizer.step()
    assert temperature().item() < 95  # one step the other way is felt at once
    stuck = torch.tensor(8.0, requires_grad=True)
    stuck.clamp(max=math.log(100)).exp().backward()
    assert stuck.grad == 0  # where a clipped value would stay for good
    with refused("temperature"):
        Temperature(0.01, 0.07)


# steps


def attend_by_hand(layer, text, volume):
    q = layer.query(text)
    k = layer.key(volume)
    v = layer.value(volume)
    width = q.shape[-1] // layer.heads
    found, weights = [], []
    for h in range(layer.heads):
        cut = slice(h * width, (h + 1) * width)
        weights.append((q[cut] @ k[:, cut].T / width**0.5).softmax(-1))
        found.append(weights[-1] @ v[:, cut])
    return layer.out(torch.cat(found)), torch.stack(weights).mean(0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return StepAttention(6, 5, 8, heads=2).double()


def test_step_attention_by_hand(layer):
    text = random(3, 4, 6)
    patches = random(4, 3, 10, 5)
    case = torch.tensor([2, 0, 2, 1])
    features = layer.features(text, patches)
    weights = layer.attention(text, patches, case)
    for s in range(4):
        for b in range(3):
            assert torch.allclose(features[b, s], attend_by_hand(layer, text[s], patches[b])[0])
        assert torch.allclose(weights[s], attend_by_hand(layer, text[s], patches[case[s]])[1])
    assert torch.allclose(weights.sum(1), torch.ones(4, dtype=torch.float64))


def test_step_nce_by_hand(layer):
    # volume 1 has no step
    text = random(3, 4, 6)
    patches = random(4, 3, 10, 5)
    case = torch.tensor([2, 0, 2, 0])
    # step 0 of volume 2 says what step 1 of volume 0 says
    keys = EquivalenceKeys(torch.tensor([1, 1, 2, 3]), torch.full((4,), -1))
    scores = 7 * torch.stack(
        [
            torch.stack(
                [
                    F.cosine_similarity(attend_by_hand(layer, t, volume)[0], layer.text(t), dim=0)
                    for t in text
                ]
            )
            for volume in patches
        ]
    )
    positive = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    wanted = (
        row_losses(scores[[0, 2]], positive[[0, 2]]).mean()
        + row_losses(scores.T, positive.T).mean()
    ) / 2
    assert torch.allclose(step_nce(layer, text, case, patches, 7.0, keys), wanted)
    # without keys the twin counts as wrong
    assert not torch.allclose(step_nce(layer, text, case, patches, 7.0), wanted)


def test_same_patients_cannot_be_told_apart(layer):
    text = random(3, 6, 6)
    patches = random(4, 1, 10, 5).expand(3, -1, -1)
    case = torch.arange(6) % 3
    columns = layer.scores(text, patches)
    # a column knows nothing of the patient
    assert torch.allclose(columns, columns[:1].expand_as(columns))
    assert step_nce(layer, text, case, patches, 5.0).item() >= math.log(3) - 1e-9


def test_anchor():
    overlap = torch.tensor([[[0.5, 0.5, 0], [0, 0, 1.0], [1, 0, 0]]]).double()
    inside = inside_regions(overlap, [(1,), (1, 2), ()], torch.zeros(3, dtype=torch.long))
    assert torch.equal(inside, torch.tensor([[0.5, 0, 0], [0.5, 1, 0], [0, 0, 0]]).double())
    attention = torch.tensor([[0.2, 0.3, 0.5]] * 3).double().requires_grad_()
    loss = anchor_loss(attention, inside)
    assert loss.item() == pytest.approx(-(math.log(0.1) + math.log(0.4)) / 2)
    loss.backward()
    assert (attention.grad[2] == 0).all() and (attention.grad[:2, 0] < 0).all()
    assert anchor_loss(attention[2:], inside[2:]).item() == 0
    with refused("regions"):
        inside_regions(overlap, [(3,)], torch.zeros(1, dtype=torch.long))


# all levels, in one process and in two

# volumes; regions said and steps of each, on two processes of unlike size
SPLITS = [(3, [5, 0, 2], [2, 1, 1]), (2, [4, 3], [0, 3])]


def batch(first, count, regions, steps):
    """Levels of the volumes `first` … of a fixed batch of five, made row by row so that shares and
    the whole agree.
    """
    volumes = range(first, first + count)

    def stack(rows, *shape):
        return torch.stack(rows) if rows else torch.zeros(0, *shape, dtype=torch.float64)

    region_rows = [(v, i) for v, n in zip(volumes, regions) for i in range(n)]
    step_rows = [(v, i) for v, n in zip(volumes, steps) for i in range(n)]

    # some twins
    def numbers(rows):
        return torch.tensor([(v * 7 + i) % 5 for v, i in rows], dtype=torch.long)

    return dict(
        overall=GlobalPairs(
            stack([random(10 + v, 8) for v in volumes]),
            stack([random(30 + v, 6) for v in volumes]),
            EquivalenceKeys(torch.tensor([v % 4 for v in volumes]), torch.full((count,), -1)),
        ),
        regions=GlobalPairs(
            stack([random(100 + 20 * v + i, 8) for v, i in region_rows], 8),
            stack([random(300 + 20 * v + i, 6) for v, i in region_rows], 6),
            EquivalenceKeys(numbers(region_rows), torch.full((len(region_rows),), -1)),
        ),
        steps=StepPairs(
            stack([random(500 + 20 * v + i, 6) for v, i in step_rows], 6),
            torch.tensor([v - first for v, _ in step_rows], dtype=torch.long),
            stack([random(700 + v, 9, 5) for v in volumes]),
            stack([(random(900 + 20 * v + i, 9) > 0).double() * (i != 1) for v, i in step_rows], 9),
            EquivalenceKeys(numbers(step_rows), torch.full((len(step_rows),), -1)),
        ),
    )


def run(levels):
    torch.manual_seed(3)
    model = ContrastiveLoss(8, 6, 5, heads=2).double()
    leaves = [
        levels["overall"].image,
        levels["regions"].image,
        levels["steps"].patches,
        levels["steps"].text,
        levels["overall"].text,
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    total, parts = model(**levels)
    total.backward()
    weights = {name: p.grad for name, p in model.named_parameters()}
    return (
        {k: v.item() for k, v in parts.items()} | {"total": total.item()},
        weights,
        [leaf.grad for leaf in leaves],
    )


def worker(rank, address, queue, break_backward):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
        if break_backward:  # the wrong formula: gradients do not cross the gathering
            alignment._Gather.backward = staticmethod(
                lambda ctx, g: (g[sum(ctx.counts[:rank]) : sum(ctx.counts[: rank + 1])], None)
            )
        values, weights, leaves = run(batch(0 if rank == 0 else SPLITS[0][0], *SPLITS[rank]))
        for gradient in weights.values():  # what DDP does
            dist.all_reduce(gradient)
            gradient /= 2
        queue.put(
            (
                rank,
                values,
                {k: v.tolist() for k, v in weights.items()},
                [(g / 2).tolist() for g in leaves],
            )
        )
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, traceback.format_exc(), None, None))


def two_processes(address, break_backward=False):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=worker, args=(rank, address, queue, break_backward))
        for rank in (0, 1)
    ]
    for w in workers:
        w.start()
    found = sorted([queue.get(timeout=300) for _ in workers], key=lambda item: item[0])
    for w in workers:
        w.join()
    assert all(item[2] is not None for item in found), found
    return found


def largest_difference(found, weights, leaves):
    of_weights = max(
        float((torch.tensor(item[2][k], dtype=torch.float64) - weights[k]).abs().max())
        for item in found
        for k in weights
    )
    joined = [
        torch.cat(
            [
                torch.tensor(item[3][i], dtype=torch.float64).reshape(-1, *leaf.shape[1:])
                for item in found
            ]
        )
        for i, leaf in enumerate(leaves)
    ]
    return of_weights, max(float((a - b).abs().max()) for a, b in zip(joined, leaves))


def test_two_processes_equal_one(tmp_path):
    values, weights, leaves = run(
        batch(0, 5, SPLITS[0][1] + SPLITS[1][1], SPLITS[0][2] + SPLITS[1][2])
    )
    found = two_processes(tmp_path / "right")
    for _, theirs, _, _ in found:
        assert theirs == pytest.approx(values, abs=1e-12)
    assert max(largest_difference(found, weights, leaves)) < 1e-12
    assert min(float(g.abs().max()) for g in leaves) > 1e-3
    wrong = two_processes(tmp_path / "wrong", break_backward=True)
    assert largest_difference(wrong, weights, leaves)[1] > 1e-4


# gradient caching


def tower():
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Dropout(0.4), torch.nn.Linear(16, 8)
    ).double()


def test_cached_gradients_are_the_plain_ones():
    data = random(6, 12, 6)
    texts = random(7, 12, 8)
    chunks = [slice(0, 5), slice(5, 6), slice(6, 12)]
    results = []
    for mode in ("plain", "cached", "each chunk alone"):
        model, factor = tower(), Temperature().double()
        torch.manual_seed(8)

        def encode(rows):
            return {"image": model(data[rows]), "row": torch.arange(12)[rows]}

        def loss(f):
            return info_nce(f["image"], texts[f["row"]], factor())

        if mode == "cached":
            value = cached_backward(encode, chunks, loss)
        elif mode == "plain":
            parts = [encode(rows) for rows in chunks]
            value = loss({k: torch.cat([p[k] for p in parts]) for k in parts[0]})
            value.backward()
        else:
            value = sum(loss(encode(rows)) for rows in chunks) / 3
            value.backward()
        results.append(
            (
                value.item(),
                torch.cat([p.grad.flatten() for p in (*model.parameters(), *factor.parameters())]),
                torch.rand(1),
            )
        )
    (plain, gradient, drawn), (cached, cached_gradient, cached_drawn), (_, alone, _) = results
    assert (
        cached == pytest.approx(plain, abs=1e-12)
        and (cached_gradient - gradient).abs().max() < 1e-12
        and torch.equal(drawn, cached_drawn)
    )
    assert (alone - gradient).abs().max() > 1e-3  # small batches are not a large one
    with pytest.raises(ValueError, match="chunks"):
        cached_backward(lambda c: c, [], lambda f: f)


def test_caching_needs_the_generators_states(monkeypatch):
    data, texts = random(6, 12, 6), random(7, 12, 8)
    gradients = []
    for keep in (True, False):
        model = tower()
        torch.manual_seed(8)
        if not keep:
            monkeypatch.setattr(
                gradient_caching,
                "random_states",
                lambda: [torch.Generator().manual_seed(99).get_state()],
            )
        cached_backward(
            lambda rows: {"image": model(data[rows])},
            [slice(0, 6), slice(6, 12)],
            lambda f: info_nce(f["image"], texts, 10.0),
        )
        gradients.append(model[0].weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


# what is refused


def test_bad_input(layer):
    text, patches = random(3, 4, 6), random(4, 3, 10, 5)
    with refused("text"):
        info_nce(random(0, 3, 4), random(0, 3, 5), 1.0)
    with refused("keys"):
        info_nce(random(0, 3, 4), random(0, 3, 4), 1.0, no_twins(2))
    with refused("case"):
        step_nce(layer, text, torch.zeros(3, dtype=torch.long), patches, 1.0)
    with refused("case"):
        step_nce(layer, text, torch.tensor([0, 1, 2, 3]), patches, 1.0)
    with refused("alignment"):
        ContrastiveLoss(8, 6, 5)()
    with refused("weights"):
        ContrastiveLoss(8, 6, 5, weights={"words": 1.0})
    with refused("heads"):
        StepAttention(6, 5, 9, heads=2)


def test_empty_levels_cost_nothing():
    empty = batch(0, 2, [0, 0], [0, 0])
    total, parts = ContrastiveLoss(8, 6, 5, heads=2).double()(**empty)
    assert (
        parts["region"] == parts["step"] == parts["anchor"] == 0
        and total == parts["global"]
        and total.isfinite()
    )
    total.backward()
