"""Where things are, for tests in any folder."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NBS = ROOT / "nbs"
PROGRAMS = TESTS / "programs"  # run by tests in processes of their own
REAL_CT = Path(os.environ.get("CT_NB_REAL_CT", ROOT.parent / "shared" / "ct"))

FULL = pytest.mark.skipif(
    not os.environ.get("CT_NB_TEST_ALL"), reason="takes long; part of `make test-all`"
)
