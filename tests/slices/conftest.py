import numpy as np
import pytest
from slice_scans import TRAINING_RANGE, body_hu, random_model

from ct_nb.physics.volume import Volume
from ct_nb.slices.models import (
    SliceDiffusion,
    SliceDiffusionConfig,
    SliceRegressor,
    SliceRegressorConfig,
)
from ct_nb.slices.train import SliceModels
from ct_nb.training.checkpoints import save_weights


@pytest.fixture(scope="session")
def regressor():
    return random_model(SliceRegressor, SliceRegressorConfig.preset("smoke"))


@pytest.fixture(scope="session")
def diffusion():
    return random_model(SliceDiffusion, SliceDiffusionConfig.preset("smoke"))


@pytest.fixture(scope="session")
def slices_run(tmp_path_factory, regressor, diffusion):
    "The folder of a run with random weights."
    folder = tmp_path_factory.mktemp("run")
    models = SliceModels(regressor, diffusion)
    about = {
        "system": "slices",
        "network": models.networks(),
        "preset": "smoke",
        "seen": TRAINING_RANGE,
        "training": {"fingerprint": "f"},
    }
    save_weights(folder, models, about)
    return folder


@pytest.fixture
def thick_ct(tmp_path):
    "Twelve slices of 48×48 at 5 mm, rotated in the patient; and its file."
    rotation = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = rotation * [3.0, 2.5, 5.0]
    affine[:3, 3] = [10, -40, 77]
    volume = Volume(body_hu(12, 48).numpy(), affine)
    volume.save(tmp_path / "thick.nii.gz")
    return volume, tmp_path / "thick.nii.gz"
