"Seeded generators beyond nbs/core/04_seeding.ipynb: processes, order, and kinds of keys."

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from places import ROOT
from refusals import refused

from ct_nb.core.seeding import case_generators, draw, seeded_generator


def numbers(*key):
    return torch.rand(4, generator=seeded_generator(*key))


def test_equal_in_another_process():
    code = (
        "import torch; from ct_nb.core.seeding import seeded_generator as s;"
        " print(s(3, 'noise', 1.5, None).initial_seed())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert int(run.stdout) == seeded_generator(3, "noise", 1.5, None).initial_seed()


@pytest.mark.parametrize("other", [(1, 0), (0, 1, 0), (0,), ("0", 1), (0, "1"), (0.0, 1)])
def test_different_keys_give_different_numbers(other):
    assert not torch.equal(numbers(0, 1), numbers(*other))


def test_the_global_generator_is_not_touched():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    numbers("a")
    assert torch.equal(torch.rand(2), expected)


def test_seeds_fit_into_63_bits():
    seeds = [seeded_generator(i).initial_seed() for i in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_keys_that_json_cannot_hold():
    with pytest.raises(TypeError):
        seeded_generator(np.arange(2))


@pytest.mark.parametrize("function", [torch.rand, torch.randn, partial(torch.randint, 9)])
def test_numbers_of_a_case_do_not_depend_on_its_batch(function):
    def of(*names):
        return draw(function, (len(names), 4, 5), case_generators({"id": list(names)}, 3, "noise"))

    assert torch.equal(of("a", "b", "c"), torch.cat([of("a"), of("b", "c")]))
    assert torch.equal(of("a", "b").flip(0), of("b", "a"))
    assert not torch.equal(*of("a", "b"))


def test_a_case_that_is_twice_in_a_batch_has_two_entries():
    batch = {"id": ["a", "a"], "entry": [[0, 3], [0, 9]]}
    assert torch.equal(*draw(torch.rand, (2, 4), case_generators({"id": ["a", "a"]}, 3)))
    assert not torch.equal(*draw(torch.rand, (2, 4), case_generators(batch, 3)))


def test_one_generator_for_each_case():
    with refused("generator"):
        draw(torch.rand, (3, 4), case_generators({"id": ["a", "b"]}, 3))
