"""InfoNCE under data-parallel training: writes loss and gradients of each process."""

import sys
from pathlib import Path

import torch

from ct_nb.training.projection_losses import cross_view_infonce


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.views = torch.nn.Linear(5, 4)
        self.latents = torch.nn.Linear(7, 4)

    def forward(self, a, b):
        return self.views(a), self.latents(b)


def network():
    torch.manual_seed(0)
    return Tokens()


def loss_of(model, cases: slice):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(6, 2, 5, generator=generator)
    b = torch.randn(6, 7, generator=generator)
    return cross_view_infonce(
        *model(a[cases], b[cases]), 0.2, torch.tensor([0, 1, 2, 0, 3, 4])[cases]
    )


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(network())
    loss = loss_of(model, slice(3 * rank, 3 * rank + 3))
    loss.backward()
    torch.save(
        {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()]},
        Path(sys.argv[1]) / f"{rank}.pt",
    )
    dist.destroy_process_group()
