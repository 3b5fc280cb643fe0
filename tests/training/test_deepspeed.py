"""A network shared by two processes through DeepSpeed (ZeRO-3) against one process, and what is
refused. Where DeepSpeed is not installed, the configuration alone is tested.
"""

import os

import pytest
import torch
from places import PROGRAMS, ROOT
from refusals import refused
from train_line_runs import NEEDS_DEEPSPEED, TWO_PROCESSES, ZERO3, run_program, train

from ct_nb.training.checkpoints import load_state
from ct_nb.training.sharding import SHARDS_FOLDER, ZERO_BUCKET, make_accelerator
from ct_nb.training.trainer import read_history

SHARED = {"launcher": TWO_PROCESSES, **ZERO3}


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


@NEEDS_DEEPSPEED
def test_two_processes_that_share_the_network_give_the_single_process_result(alone, shared):
    assert torch.allclose(final(shared), final(alone), atol=2e-6)
    for one, two in zip(read_history(alone), read_history(shared), strict=True):
        names = one.keys() - {"seconds_per_step"}
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, abs=1e-5)


@NEEDS_DEEPSPEED
def test_the_checkpoint_is_in_shards_and_is_read_whole(alone, shared):
    (folder,) = (shared / SHARDS_FOLDER).iterdir()  # of the last checkpoint alone
    assert len(list(folder.glob("*.safetensors"))) == 2
    one, two = load_state(alone), load_state(shared)
    for part in ("model", "average"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert torch.allclose(value.flatten(), two[part][name][: value.numel()], atol=2e-6)
    (moments,) = two["optimizer"].values()
    assert moments["step"] == one["step"] and moments["exp_avg"].ndim == 1


@NEEDS_DEEPSPEED
def test_a_shared_run_resumes_to_the_last_bit(tmp_path, shared):
    train(tmp_path, "pieces", "stop", **SHARED)
    assert load_state(tmp_path)["step"] == 10
    train(tmp_path, "pieces", "resume", **SHARED)
    assert torch.equal(final(tmp_path), final(shared))


@NEEDS_DEEPSPEED
def test_gradient_caching_in_a_shared_network(tmp_path, alone):
    train(tmp_path, "cached", **SHARED)
    assert torch.allclose(final(tmp_path), final(alone), atol=2e-6)


@NEEDS_DEEPSPEED
def test_a_weight_that_a_step_does_not_reach_has_a_gradient_of_zero(tmp_path):
    train(tmp_path / "shared", "seldom", **SHARED)
    train(tmp_path / "alone", "seldom", "zeros")
    assert torch.allclose(final(tmp_path / "shared"), final(tmp_path / "alone"), atol=2e-6)


@NEEDS_DEEPSPEED
def test_autocast_is_that_of_two_processes_that_each_hold_the_network(tmp_path, alone):
    train(tmp_path / "shared", "bf16", **SHARED)
    train(tmp_path / "held", "bf16", launcher=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    assert torch.allclose(final(tmp_path / "shared"), final(tmp_path / "held"), atol=2e-6)
    assert (final(tmp_path / "shared") - final(alone)).abs().max() > 1e-4  # bfloat16 was at work


@NEEDS_DEEPSPEED
def test_no_more_is_gathered_than_the_table_of_memory_says():
    done = run_program(PROGRAMS / "gathered_weights.py", **SHARED)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("gathered")]
    layer = 1000 * 1000 + 1000
    assert layer < int(line.split()[1]) <= ZERO_BUCKET + layer


@NEEDS_DEEPSPEED
def test_a_checkpoint_of_a_network_that_was_not_shared_is_refused(alone):
    done = train(alone, "resume", expect=1, **SHARED)
    message = "each hold the network, those of this run share the network by ZeRO-3"
    assert message in " ".join(done.stderr.split())


def launched(monkeypatch, *words):
    "The environment that `accelerate launch` makes of the configuration that ships."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = str(ROOT / "launch" / "deepspeed.yaml")
    arguments, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(
            ["--config_file", path, *words, "-m", "ct_nb.drr2ct.train", "--preset", "paper"]
        )
    )
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    return arguments


def test_accelerate_reads_the_configuration_that_ships(monkeypatch):
    from accelerate import DeepSpeedPlugin

    from ct_nb.drr2ct.train import DRR2CT_PRESETS

    arguments = launched(monkeypatch)
    preset = DRR2CT_PRESETS["paper"].trainer
    assert arguments.use_deepspeed and arguments.num_processes == 3
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == preset.mixed_precision == "bf16"
    assert preset.batch_size % (arguments.num_processes * preset.accumulation) == 0
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3 and not plugin.zero3_init_flag


@pytest.mark.parametrize(
    "words, precision, argument",
    [
        (["--zero_stage", "2"], "bf16", "zero_stage"),
        (["--offload_optimizer_device", "cpu"], "bf16", "offload_optimizer_device"),
        ([], "fp16", "mixed_precision"),
    ],
)
def test_what_is_not_supported_is_refused(monkeypatch, words, precision, argument):
    launched(monkeypatch, *words)
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: True)
    with refused(argument):
        make_accelerator(precision)


def test_deepspeed_that_is_not_installed_is_refused(monkeypatch):
    launched(monkeypatch)
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with refused("distributed_type"):
        make_accelerator("bf16")
