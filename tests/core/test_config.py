"Configurations beyond nbs/core/01_config.ipynb: nesting, defaults, unknown settings."

import json
from dataclasses import dataclass

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


FULL = Outer().to_dict()


@pytest.mark.parametrize("name", FULL)
def test_missing_settings_are_named(name):
    with refused("Outer") as caught:
        Outer.from_dict({key: value for key, value in FULL.items() if key != name})
    assert caught.value.missing == [name]


@pytest.mark.parametrize(
    "name, value",
    [
        ("stages", {"width": 4, "sides": [1]}),
        ("stages", None),
        ("network", 3),
        ("network", None),
        ("name", 3),
        ("name", ["a"]),
        ("weights", [1]),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with refused():
        Outer.from_dict(FULL | {name: value})


@pytest.mark.parametrize("width", [0.5, 4.0, True, "4", None, [4], 10**9, -(10**30), float("nan")])
def test_a_whole_number_is_one(width):
    with refused("width"):
        Inner.from_dict({"width": width, "sides": []})
    with refused("sides"):
        Inner.from_dict({"width": 4, "sides": [1, width]})


@pytest.mark.parametrize(
    "values, kind, unknown",
    [
        ({"colour": 1, "age": 2}, "Outer", ["age", "colour"]),
        (FULL | {"network": {"depth": 1}}, "Inner", ["depth"]),
        (FULL | {"stages": [Inner().to_dict(), {"depth": 1}]}, "Inner", ["depth"]),
    ],
)
def test_unknown_settings_are_named(values, kind, unknown):
    with refused(kind) as caught:
        Outer.from_dict(values)
    assert caught.value.unknown == unknown
