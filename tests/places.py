"""Where things are, for tests in any folder."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NBS = ROOT / "nbs"
PROGRAMS = TESTS / "programs"  # run by tests in processes of their own
REAL_CT = Path(os.environ.get("CT_NB_REAL_CT", ROOT.parent / "shared" / "ct"))
