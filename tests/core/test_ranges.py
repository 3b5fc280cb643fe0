"""Every number of the settings and presets has a range: what no network can be made of, or no run
trained with, is refused with the setting's name, as it is in drr2ct, cascade and refine.
"""

import math
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
from refusals import refused

from ct_nb.core.config import Config
from ct_nb.cascade.train import CASCADE_PRESETS
from ct_nb.ct_encoder.train import CT_ENCODER_PRESETS
from ct_nb.drr2ct.train import DRR2CT_PRESETS
from ct_nb.refine.network import RefinerConfig
from ct_nb.refine.pipeline import ConsistencySettings
from ct_nb.slices.models import SliceDiffusionConfig, SliceRegressorConfig
from ct_nb.slices.train import SLICES_PRESETS, SlicesRun
from ct_nb.slices.vae_train import VAE_PRESETS
from ct_nb.training.run import schedule

MICRO = CT_ENCODER_PRESETS["micro"]
SETTINGS = (
    SLICES_PRESETS["micro"],
    SLICES_PRESETS["micro"].network,
    SliceRegressorConfig.preset("smoke"),
    SliceDiffusionConfig.preset("smoke"),
    VAE_PRESETS["micro"],
    VAE_PRESETS["micro"].network,
    MICRO,
    MICRO.network,
    MICRO.network.encoder,
    CASCADE_PRESETS["micro"].stages[0].network,
    RefinerConfig.preset("smoke"),
    ConsistencySettings(),
)


def numbers(settings):
    "(name, whether it is a tuple) of the settings that are numbers."
    for name, kind in get_type_hints(type(settings)).items():
        if {int, float} & {kind, *get_args(kind)}:
            yield name, isinstance(getattr(settings, name), tuple)


@pytest.mark.parametrize(
    "settings, name, several",
    [
        pytest.param(one, *number, id=f"{type(one).__name__}.{number[0]}")
        for one in SETTINGS
        for number in numbers(one)
    ],
)
def test_no_number_is_negative_or_endless(settings, name, several):
    for value in (-1, -math.inf, math.inf, math.nan):
        many = (*getattr(settings, name)[:-1], value) if several else value
        with refused(name) as caught:
            replace(settings, **{name: many})
        assert str(caught.value).count("\n") == 0 and name in str(caught.value)


def test_the_numbers_of_drr2ct_have_ranges():
    config = DRR2CT_PRESETS["micro"].network
    for name in ("view_channels", "keep_tokens", "consistency_iterations", "xray_std"):
        with refused(name):
            replace(config, **{name: (-1,) if name == "view_channels" else -1})


@pytest.mark.parametrize(
    "settings, name, value",
    [
        (SLICES_PRESETS["micro"], "latent_size", 7),  # no latent is left of it
        (SLICES_PRESETS["micro"], "spacing", (1.2, 0.8)),
        (SLICES_PRESETS["micro"], "width", (0.0, 1.0)),
        (SLICES_PRESETS["micro"], "thick_mm", 0.0),
        (SLICES_PRESETS["micro"], "coarsest", 0.9),
        (VAE_PRESETS["micro"], "adversary_start", 1.1),
        (MICRO, "painted", 0),
        (MICRO.network, "writer_length", 2),
        (MICRO.network, "written_share", 1.1),
        (MICRO.network, "refine", (1, 0, 2)),
        (MICRO.network.encoder, "side_mm", 0.0),
        (MICRO.network.encoder, "side_mm", 3000.0),
    ],
)
def test_what_lies_just_outside(settings, name, value):
    with refused(name):
        replace(settings, **{name: value})


def test_what_lies_just_inside():
    "The ends of the ranges, and what may be left out, are taken."
    replace(SLICES_PRESETS["micro"], latent_size=8, spacing=(1.0, 1.0), coarsest=1.0)
    replace(VAE_PRESETS["micro"], adversary_start=1.0)
    replace(MICRO, painted=None, written=0)
    replace(MICRO.network, written_share=1.0, map_weight=0.0, writer_length=3)
    replace(MICRO.network.encoder, slice_weight=0.0, stem=0)
    replace(DRR2CT_PRESETS["micro"].network, keep_tokens=None)


def test_presets_hold_what_they_require():
    for presets in (SLICES_PRESETS, VAE_PRESETS, CT_ENCODER_PRESETS):
        for preset in presets.values():
            assert isinstance(preset, Config)
            replace(preset, **{own.name: getattr(preset, own.name) for own in fields(preset)})


def test_zero_is_not_the_default():
    "`--steps 0` and `--thick_mm 0` were taken for options that are not given."
    with refused("steps"):
        schedule(MICRO.trainer, 0)
    with refused("thick_mm"):
        SlicesRun("micro", thick_mm=0)
    assert schedule(MICRO.trainer, None).steps == MICRO.trainer.steps
    assert schedule(MICRO.trainer, 5).steps == 5
