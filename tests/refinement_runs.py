"""What tests of the refiner share: a tiny drr2ct on disk, and one cache of phantoms for all of them."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from trained_runs import use_cache

from ct_nb.data.open import phantom_source
from ct_nb.drr2ct.network import DRR2CT
from ct_nb.drr2ct.train import DRR2CT_PRESETS, DRR2CTRun
from ct_nb.training.checkpoints import save_weights

NETWORK = replace(DRR2CT_PRESETS["smoke"].network, size=16, latent_size=8, prior_modes=4)


@pytest.fixture(scope="module", autouse=True)
def cache():
    "Phantoms are rendered once for all modules that import this, and for later sessions."
    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch)
        yield


@lru_cache
def volumes(count=6, size=16):
    return torch.stack([phantom_source(count, size)[i].volume.tensor().float() for i in range(count)])


def save_coarse(folder, training=None, **changes):
    "What a smoke run of drr2ct leaves, with the linear prior fitted and the network as it began."
    run = DRR2CTRun(
        "smoke", "phantom", folder, settings=replace(DRR2CT_PRESETS["smoke"], network=NETWORK)
    ).open()
    torch.manual_seed(0)
    model = DRR2CT(NETWORK)
    model.prior.fit(volumes())
    save_weights(
        folder,
        model,
        {
            "system": "drr2ct",
            "network": NETWORK.to_dict(),
            "preset": "smoke",
            "data": "phantom",
            "seed": 0,
            "settings": {"phantoms": 12, "validation_phantoms": 2},
            "training": {"cases": run.training.ids if training is None else training},
            "validation": {"cases": run.validation.ids},
            **changes,
        },
    )
    return run
