import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))  # tests share helpers as plain modules

from places import REAL_CT  # noqa: E402


# files that take longest, by processor seconds; begun first, they do not keep one worker busy
# when the others have ended
LONG = (
    "test_recipes.py",
    "drr2ct/test_train.py",
    "test_pieces.py",
    "test_trainer.py",
    "test_sharding.py",
    "test_resume.py",
    "drr2ct/test_network.py",
    "refine/test_train.py",
    "ct_encoder/test_train.py",
    "test_predict.py",
    "test_joseph_triton.py",
    "test_run_folder.py",
    "test_projector_peers.py",
    "test_chest.py",
)


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(LONG) if path.endswith(name)), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session")
def real_ct() -> Path:
    "The folder of real CT, or a skip with its reason."
    if not REAL_CT.is_dir():
        pytest.skip("no real CT here; set CT_NB_REAL_CT to a folder of CT volumes")
    return REAL_CT


@pytest.fixture(scope="session")
def trained():
    """`trained(system)` is the folder of a finished run of the preset `micro`, with its scores:
    drr2ct, cascade, refinement, vae, slices or ct_encoder; `trained(system, "smoke")` of another.

    It is trained once for all tests, all workers and all sessions with the same code. For reading
    only.
    """
    from trained_runs import trained_folder

    return trained_folder


@pytest.fixture(scope="module")
def trained_cache():
    "Phantoms and X-rays of a module come from the cache of the trained runs."
    from trained_runs import use_cache

    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch)
        yield
