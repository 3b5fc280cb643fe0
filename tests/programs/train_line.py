"""A small training run for the tests of the trainer; prints a digest of the weights.

`train_line.py OUT [resume] [noise] [stop] [pieces] [cached] [bf16] [seldom [zeros]]
[kill-in-save | small-disk]`; `noise` is drawn from each process's own generator, `stop` ends after
15 of 30 steps, between two checkpoints, `pieces` works off a batch in two, `cached` by gradient
caching. In `seldom` every other step leaves out the last layer, which has a gradient of zero with
`zeros`.
"""

import os
import resource
import signal
import sys

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ct_nb.training.gradient_cache import CachedLoss
from ct_nb.training.trainer import Trainer, TrainerConfig


class Points(Dataset):
    def __len__(self):
        return 12

    def at(self, epoch, index):
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        x = torch.rand(8, generator=generator)
        return {"id": f"{epoch}/{index}", "x": x, "y": x.sum() - 2 * x[0]}


def collate(cases):
    return {
        "id": [c["id"] for c in cases],
        "x": torch.stack([c["x"] for c in cases]),
        "y": torch.stack([c["y"] for c in cases]),
    }


class Block(torch.nn.Sequential):
    "What a process gathers at a time where the network is shared."


class Network(torch.nn.Sequential):
    "Two layers, the first of which is computed again in the backward pass."

    def forward(self, x):
        return self[1](checkpoint(self[0], x, use_reentrant=False))


def network():
    torch.manual_seed(5)
    return Network(Block(torch.nn.Linear(8, 64), torch.nn.GELU()), torch.nn.Linear(64, 1))


def step(model, batch, number):
    loss = ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
    return loss, {"error": loss.item()}


def encode(model, batch, number):
    # not by `forward`, as networks with several methods
    return {"rows": model[1](model[0](batch["x"])), "y": batch["y"]}


def loss_of_rows(model, rows, *number):
    loss = ((rows["rows"][:, 0] - rows["y"]) ** 2).mean()
    return loss, {"error": loss.item()}


def validate(model):
    return {"sum": model(torch.ones(1, 8)).item()}


def main(out, *words):
    os.makedirs(out, exist_ok=True)
    model = network()
    config = TrainerConfig(
        steps=30,
        batch_size=4,
        learning_rate=0.01,
        checkpoint_every=10,
        validate_every=7,
        log_every=10,
        accumulation=2 if {"pieces", "cached"} & set(words) else 1,
        mixed_precision="bf16" if "bf16" in words else "no",
    )

    def used(model, batch, number):
        if "stop" in words and number == 15:
            sys.exit(0)
        if "noise" in words:
            batch = {**batch, "x": batch["x"] + 0.1 * torch.randn(8)}
        if "seldom" in words and number % 2:
            loss = model[0](batch["x"]).square().mean()
            if "zeros" in words:
                loss = loss + 0 * model[1](model[0](batch["x"])).sum()
            return loss, {}
        return step(model, batch, number)

    cached = CachedLoss(encode, loss_of_rows) if "cached" in words else None
    trainer = Trainer(model, used, Points(), config, out, collate, validate, cached=cached)
    if "kill-in-save" in words:
        whole, calls = torch.save, []

        def half(state, path):
            calls.append(path)
            if len(calls) < 2:
                return whole(state, path)
            whole(state, path)
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = half
    if "small-disk" in words:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    trainer.fit(resume="resume" in words, progress=False)
    if trainer.is_main:
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        print("weights", flat.double().abs().sum().item(), flat[::97].tolist())
        torch.save(flat, os.path.join(out, "final.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
