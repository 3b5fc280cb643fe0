"""Prints how many numbers of a network of 16 million a process holds at most within a step, where
two share it by ZeRO-3.
"""

from functools import partial

import torch

from ct_nb.training.sharding import ZeroEngine, make_accelerator

accelerator = make_accelerator()
torch.manual_seed(0)
network = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(16)))
zero = ZeroEngine(accelerator, network, partial(torch.optim.AdamW, lr=1e-3), gradient_clip=1.0)
counts = []


def count(*_):
    counts.append(sum(weight.data.numel() for weight in zero.module.parameters()))


def loss(model, x):
    for layer in model:
        x = layer(x)
        x.register_hook(count)
        count()
    return x.square().mean()


for _ in range(3):  # DeepSpeed fetches ahead from the second step on
    zero.zero_grad()
    zero.engine(loss, torch.rand(4, 1000)).backward()
    zero.step()
if accelerator.is_main_process:
    print("gathered", max(counts))
accelerator.end_training()
