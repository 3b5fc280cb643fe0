"""A small training run for the tests of the trainer; prints a digest of the weights.

`train_line.py OUT [resume] [noise] [stop] [kill-in-save | small-disk]`; `noise` is drawn from each
process's own generator, `stop` ends after 15 of 30 steps, between two checkpoints.
"""

import os
import resource
import signal
import sys

import torch
from torch.utils.data import Dataset

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


def step(model, batch, number):
    loss = ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()
    return loss, {"error": loss.item()}


def main(out, *words):
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    config = TrainerConfig(
        steps=30,
        batch_size=4,
        learning_rate=0.01,
        checkpoint_every=10,
        validate_every=0,
        log_every=10,
        shard_optimizer="zero" in words,
        accumulation=2 if "zero" in words else 1,
    )
    def noisy_step(model, batch, number):
        if "stop" in words and number == 15:
            sys.exit(0)
        return step(model, {**batch, "x": batch["x"] + 0.1 * torch.randn(8)}, number)

    used = noisy_step if "noise" in words else step
    trainer = Trainer(model, used, Points(), config, out, collate)
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
