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
