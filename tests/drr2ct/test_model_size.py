"""Parameters, operations and activations of drr2ct against closed forms and real runs."""

from dataclasses import replace

import pytest
import torch
from places import ROOT

from ct_nb.drr2ct.model_size import (
    GATHERED,
    PARTS,
    buffer_bytes,
    count_activations,
    measure_model,
    meta_forward,
    parameter_counts,
    process_memory,
    scene,
    size_table,
)
from ct_nb.drr2ct.network import DRR2CT, DRR2CTConfig
from ct_nb.training.sharding import ZERO_BUCKET

SMOKE = DRR2CTConfig.preset("smoke")


@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_shape_tells_what_a_run_tells(views):
    run, shape = (
        measure_model(SMOKE, device, views=views, detector=64) for device in ("cpu", "meta")
    )
    assert run.parameters == shape.parameters and run.buffer_bytes == shape.buffer_bytes
    assert all(run.flops[part] == shape.flops[part] for part in PARTS if part != "joints")
    assert sum(run.activations.values()) == pytest.approx(sum(shape.activations.values()), rel=0.05)


def test_parts_are_the_whole():
    model = DRR2CT(SMOKE)
    counts = parameter_counts(model)
    assert sum(counts[part] for part in PARTS) == sum(p.numel() for p in model.parameters())
    assert counts["prior"] == sum(b.numel() for b in model.prior.buffers()) and buffer_bytes(
        model
    ) == sum(b.nbytes for b in model.buffers())


def test_operations_grow_with_the_batch():
    one, two = (measure_model(SMOKE, detector=64, batch=b) for b in (1, 2))
    assert sum(two.flops.values()) == pytest.approx(2 * sum(one.flops.values()), rel=0.02)
    assert sum(two.activations.values()) == pytest.approx(
        2 * sum(one.activations.values()), rel=0.1
    )


def test_a_known_layer_is_counted_right():
    """The decoder's last level at 32³: head 3³·6·6 and last 6·1, a multiplication and an addition
    each.
    """
    model = DRR2CT(SMOKE)
    up = 12 * 6 * 32**3
    block = 2 * 27 * 12 * 12 * 16**3
    last = (27 * 6 * 6 + 6) * 32**3
    camera = model.decoder.camera.layer.weight.numel() * 2 + sum(
        b.modulation.weight.numel() for b in model.decoder.blocks
    )
    assert measure_model(SMOKE, detector=64).flops["decoder"] == 2 * (up + block + last + camera)


def test_recompute_keeps_only_what_blocks_are_given():
    plain, thrifty = (measure_model(replace(SMOKE, recompute=r)) for r in (False, True))
    assert plain.flops == thrifty.flops and plain.parameters == thrifty.parameters
    for part in ("epipolar", "trunk"):
        assert thrifty.activations[part] < 0.3 * plain.activations[part]
    assert thrifty.activations["decoder"] == plain.activations["decoder"]


def test_counting_leaves_the_network_as_it_was():
    import ct_nb.drr2ct.network
    from ct_nb.physics.projector import project

    with torch.device("meta"):
        model = DRR2CT(SMOKE)
    finders = [a.find for a in model.views.epipolar.values()]
    with pytest.raises(RuntimeError), meta_forward(model):
        raise RuntimeError
    with meta_forward(model):
        count_activations(model, *scene(SMOKE))
    assert ct_nb.drr2ct.network.project is project and finders == [
        a.find for a in model.views.epipolar.values()
    ]
    assert model.training and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


def test_paper_is_built_on_the_meta_device():
    size = measure_model(DRR2CTConfig.preset("paper"))
    assert sum(size.parameters[p] for p in PARTS) > 3e7 and all(
        size.flops[p] > 0 and size.activations[p] >= 0 for p in PARTS
    )
    # of the 80 GB of a card, in float32
    assert sum(size.activations.values()) + size.buffer_bytes + size.state_bytes < 70e9
    assert "paper: GFLOP" in size_table({"paper": size})


def test_paper_takes_a_real_step_at_a_small_size():
    import resource

    torch.manual_seed(0)
    config = replace(DRR2CTConfig.preset("paper"), size=32, prior_modes=2, consistency_detector=64)
    model = DRR2CT(config)
    xrays, geometry, base = scene(config, "cpu", detector=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    found = model(xrays + 2, geometry, base=base)
    loss = (
        (found.hu - 40).abs().mean() / 1000
        + found.latent.kl()
        + found.view_tokens.square().mean()
        + found.latent_tokens.square().mean()
    )
    loss.backward()
    assert torch.isfinite(loss) and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )
    optimizer.step()
    moved = [bool((a != b).any()) for a, b in zip(before, model.parameters())]
    assert sum(moved) > 0.9 * len(moved) and all(
        torch.isfinite(p).all() for p in model.parameters()
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6  # kB


def test_shares_add_up_and_offloaded_activations_leave_the_card():
    config = DRR2CTConfig.preset("gpu")
    alone = process_memory(config, 10**9, 1)
    assert process_memory(config, 10**9, 3) == alone  # each holds all of it
    shared = process_memory(config, 10**9, 3, "FSDP2", offload=True)
    for name in ("weights", "gradients", "moments of AdamW", "average"):
        assert 0 <= 3 * shared[name] - alone[name] < 6
    assert 0 < shared["gathered weights"] < alone["weights"]
    assert (shared["activations"], shared["host"]) == (0, 10**9) == (alone["host"], 10**9)
    zero = process_memory(config, 10**9, 3, "ZeRO-3")
    assert zero["weights"] == 2 * shared["weights"]  # AdamW's and those that are gathered
    for name in ("gradients", "moments of AdamW", "average", "buffers of the prior"):
        assert zero[name] == shared[name]
    layers = [m for m in DRR2CT(config).modules() if list(m.parameters(recurse=False))]
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in layers)
    assert 4 * ZERO_BUCKET < zero["gathered weights"] <= 4 * (ZERO_BUCKET + largest)


def test_accelerate_reads_the_configuration_that_ships(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    from ct_nb.drr2ct.train import DRR2CT_PRESETS

    path = str(ROOT / "launch" / "fsdp.yaml")
    config = load_config_from_file(path)
    preset = DRR2CT_PRESETS["paper"].trainer
    assert config.distributed_type.value == "FSDP" and config.num_processes == 3
    assert config.mixed_precision == preset.mixed_precision == "bf16"
    assert 16 <= preset.batch_size <= 32
    assert preset.batch_size % (config.num_processes * preset.accumulation) == 0
    assert DRR2CTConfig.preset("paper").recompute
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(
            ["--config_file", path, "-m", "ct_nb.drr2ct.train", "--preset", "paper"]
        )
    )
    assert arguments.use_fsdp and arguments.num_processes == 3
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    assert plugin.activation_checkpointing_offload
    assert plugin.transformer_cls_names_to_wrap == [block.__name__ for block in GATHERED]
