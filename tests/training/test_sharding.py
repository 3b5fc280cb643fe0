"""A network shared by two processes (FSDP2) against one process, and its checkpoints."""

import shutil

import pytest
import torch
from programs.train_line import network
from places import FULL
from refusals import refused
from train_line_runs import FSDP2, TWO_PROCESSES, train

from ct_nb.training.checkpoints import load_state
from ct_nb.training.sharding import SHARDS_FOLDER, make_accelerator, shard
from ct_nb.training.trainer import read_history

SHARED = {"launcher": TWO_PROCESSES, **FSDP2, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}


def final(out):
    return torch.load(out / "final.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train(out)
    return out


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    out = tmp_path_factory.mktemp("shared")
    train(out, "pieces", **SHARED)
    return out


def test_two_processes_that_share_the_network_give_the_single_process_result(alone, shared):
    assert torch.allclose(final(shared), final(alone), atol=2e-6)
    for one, two in zip(read_history(alone), read_history(shared), strict=True):
        names = one.keys() - {"seconds_per_step"}
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, abs=1e-5)


def test_the_checkpoint_is_in_shards_and_is_read_whole(alone, shared):
    pointed = torch.load(shared / "training_state.pt", weights_only=True)
    (folder,) = (shared / SHARDS_FOLDER).iterdir()  # of the last checkpoint alone
    assert pointed["shards"] == folder.name and len(list(folder.glob("*.safetensors"))) == 2
    assert isinstance(pointed["model"]["1.weight"], str)
    one, two = load_state(alone), load_state(shared)
    for part in ("model", "average"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], atol=2e-6)
    for number, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            found = two["optimizer"]["state"][number][name]
            assert torch.allclose(value, found, rtol=1e-4, atol=1e-7)
    network().load_state_dict(two["model"])


@FULL
def test_a_shared_run_resumes_to_the_last_bit(tmp_path, shared):
    train(tmp_path, "pieces", "stop", **SHARED)
    assert load_state(tmp_path)["step"] == 10
    train(tmp_path, "pieces", "resume", **SHARED)
    assert torch.equal(final(tmp_path), final(shared))


@FULL
def test_gradient_caching_in_a_shared_network(tmp_path, alone):
    train(tmp_path, "cached", **SHARED)
    assert torch.allclose(final(tmp_path), final(alone), atol=2e-6)


@FULL
def test_a_weight_that_a_step_does_not_reach_has_a_gradient_of_zero(tmp_path):
    train(tmp_path / "shared", "seldom", **SHARED)
    train(tmp_path / "alone", "seldom", "zeros")
    assert torch.allclose(final(tmp_path / "shared"), final(tmp_path / "alone"), atol=2e-6)


@FULL
def test_a_checkpoint_of_a_network_that_was_not_shared_is_refused(tmp_path, alone):
    shutil.copy(alone / "training_state.pt", tmp_path)
    done = train(tmp_path, "resume", expect=1, **SHARED)
    message = "each hold the network, those of this run share the network by FSDP2"
    assert message in " ".join(done.stderr.split())


def test_another_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with refused("fsdp_version"):
        make_accelerator()


def test_a_weight_without_axis_cannot_be_shared():
    network = torch.nn.Linear(2, 1)
    network.factor = torch.nn.Parameter(torch.tensor(1.0))
    with refused("distributed_type"):
        shard(None, network, None)
