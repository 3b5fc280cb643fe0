"Configurations beyond nbs/core/01_config.ipynb: nesting, defaults, unknown settings."

import json
from dataclasses import dataclass, replace

import pytest
from refusals import refused

from ct_nb.core.config import Config


@dataclass(frozen=True)
class Inner(Config):
    width: int = 4
    sides: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer(Config):
    stages: tuple[Inner, ...] = (Inner(),)
    network: Inner = Inner()
    name: str | None = None
    weights: dict | None = None


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(stages=()),
        Outer(stages=(Inner(8), Inner(sides=()))),
        Outer(network=Inner(1, (3, 4, 5)), name="a", weights={"b": 0.5}),
    ],
)
def test_json_round_trip(config):
    restored = Outer.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert isinstance(restored.stages, tuple) and isinstance(restored.network.sides, tuple)


def test_missing_settings_have_their_defaults():
    assert Outer.from_dict({}) == Outer()
    assert Outer.from_dict({"network": {"width": 9}}) == replace(Outer(), network=Inner(9))


@pytest.mark.parametrize(
    "values, kind, unknown",
    [
        ({"colour": 1, "age": 2}, "Outer", ["age", "colour"]),
        ({"network": {"depth": 1}}, "Inner", ["depth"]),
        ({"stages": [{}, {"depth": 1}]}, "Inner", ["depth"]),
    ],
)
def test_unknown_settings_are_named(values, kind, unknown):
    with refused(kind) as caught:
        Outer.from_dict(values)
    assert caught.value.unknown == unknown
