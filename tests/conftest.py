import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))  # tests share helpers as plain modules

from places import REAL_CT  # noqa: E402


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
