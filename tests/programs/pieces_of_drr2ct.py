"""Gradients of drr2ct's joint stage for four cases, shared by the processes and cut into pieces:
writes loss and gradient of each process.
"""

import sys
from pathlib import Path

import torch

from ct_nb.drr2ct.objective import get_stages
from ct_nb.drr2ct.train import DRR2CTRun

CASES = 4
STEP = 1


def gradients(out, *pieces):
    "For each number of pieces of this process's share: the loss, and the gradient in one vector."
    run = DRR2CTRun("micro", out=out).open()
    run.build(progress=False)
    trainer = run._trainer(get_stages("joint")[0])
    trainer.model.train()
    rank = trainer.accelerator.process_index
    processes = trainer.accelerator.num_processes
    batch = trainer.collate([run.training[case] for case in range(rank, CASES, processes)])
    found = []
    for trainer.pieces in pieces:
        loss, _ = trainer._accumulate(batch, STEP)
        parts = [p.grad.flatten() for p in trainer.plain_model.parameters() if p.grad is not None]
        found.append((loss, torch.cat(parts)))
    return rank, found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rank, found = gradients(folder / "run", 1, 2)
    torch.save(found, folder / f"{rank}.pt")
