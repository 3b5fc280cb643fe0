"Configurations, weights and histories that are damaged, or of somebody else."

import json

import pytest
import torch
from refusals import refused

from ct_nb.core.errors import InputError
from ct_nb.training.checkpoints import (
    WeightsError,
    load_model,
    load_state,
    load_weights,
    read_config,
    save_state,
    save_weights,
)
from ct_nb.training.run import join_histories
from ct_nb.training.trainer import read_history, write_history


def saved(folder, **changes):
    "Weights of a line with entries of their configuration changed; None leaves one out."
    torch.manual_seed(0)
    config = {"system": "drr2ct", "network": {"inputs": 3}, "seed": 0, "training": {"cases": ["a"]}}
    save_weights(folder, torch.nn.Linear(3, 2), config)
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"system": 3},
        {"system": None},
        {"network": [1]},
        {"network": None},
        {"seed": "0"},
        {"seed": True},
        {"training": [1]},
        {"training": {"cases": "a"}},
        {"training": {"fingerprint": 3}},
        {"residual": 0.1},
    ],
)
def test_an_entry_of_the_configuration_of_another_form(tmp_path, changes):
    with refused(file="config.json", kind=WeightsError):
        read_config(saved(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 10**5, '{"a": NaN}', "\xff", "a\0"])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with refused(file="config.json", kind=WeightsError):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[1, 2] = value
    save_weights(tmp_path, model, {"system": "drr2ct", "network": {}})
    with refused(file="model.safetensors", kind=WeightsError) as caught:
        load_weights(tmp_path, torch.nn.Linear(3, 2))
    assert "weight" in caught.value.reason


def test_weights_of_another_type(tmp_path):
    save_weights(tmp_path, torch.nn.Linear(3, 2).half(), {"system": "drr2ct", "network": {}})
    with refused(file="model.safetensors", kind=WeightsError):
        load_weights(tmp_path, torch.nn.Linear(3, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda network: torch.nn.Linear(10**6, 10**6),  # 4 TB
        lambda network: torch.nn.ModuleList(torch.nn.Identity() for _ in range(10**9)),
        lambda network: torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(10**9)),
        lambda network: torch.nn.Linear(network["outputs"], 2),
        lambda network: torch.nn.Linear("3", 2),
        lambda network: InputError("channels", "must be 3").argument.missing,
    ],
)
def test_settings_that_make_no_network_of_these_weights(tmp_path, build):
    with refused(file="config.json", kind=WeightsError):
        load_model(saved(tmp_path), "drr2ct", build)


def test_settings_that_do_not_fit_name_their_file(tmp_path):
    def build(network):
        raise InputError("channels", "must be at least 1, got 0")

    with refused(file="config.json", kind=WeightsError) as caught:
        load_model(saved(tmp_path), "drr2ct", build)
    assert "channels: must be at least 1" in caught.value.reason
    assert torch.nn.Linear(2000, 2000).weight.shape == (2000, 2000)  # the bound is gone


ROW = '{"step": 1, "loss": 0.5, "stage": "joint"}\n'


def test_a_history_comes_back(tmp_path):
    rows = [{"step": 1, "loss": 0.5, "stage": "a"}, {"step": 2, "psnr": float("inf")}]
    write_history(tmp_path, rows)
    assert "Infinity" not in (tmp_path / "history.jsonl").read_text()
    first, second = read_history(tmp_path)
    assert first == rows[0] and second["step"] == 2 and second["psnr"] != second["psnr"]
    assert read_history(tmp_path / "history.jsonl")[0] == first
    assert read_history(tmp_path / "nowhere") == []


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    (tmp_path / "history.jsonl").write_text(ROW + ROW[:20])
    assert [row["step"] for row in read_history(tmp_path)] == [1]


@pytest.mark.parametrize(
    "line",
    [
        ROW[:20],
        "3",
        "[1]",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": -1}',
        '{"step": true}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "loss": [1]}',
        '{"step": 1, "loss": true}',
        '{"step": 1, "stage": 3}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "step": 2}',
    ],
)
def test_a_line_of_the_history_that_is_no_row(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(f"{ROW}{line}\n{ROW}")
    with refused(file="history.jsonl") as caught:
        read_history(tmp_path)
    assert "line 2" in str(caught.value)


def test_an_empty_history_joins_with_others():
    joined = join_histories({"a": [], "b": [{"step": 3}], "c": [{"step": 2}]})
    assert [(row["step"], row["stage"]) for row in joined] == [(3, "b"), (5, "c")]


def test_every_bit_of_a_training_state_is_checked(tmp_path):
    state = {"step": 7, "random": [], "model": {"weight": torch.arange(64.0)}}
    save_state(tmp_path, state)
    path = tmp_path / "training_state.pt"
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 131):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load_state(tmp_path)
        except WeightsError:
            continue
        assert found["step"] == 7 and torch.equal(found["model"]["weight"], torch.arange(64.0))
    path.write_bytes(whole)
    assert load_state(tmp_path)["step"] == 7
