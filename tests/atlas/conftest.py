"""An atlas of three phantoms, and a patient who is none of them."""

import pytest

from ct_nb.atlas.volumes import Atlas
from ct_nb.phantom.chest import phantom


@pytest.fixture(scope="module")
def atlas():
    return Atlas.open("phantom:3", size=32, cache_dir=None)


@pytest.fixture(scope="module")
def patient():
    return phantom(41, 32).volume.tensor().float()
