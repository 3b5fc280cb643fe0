"""The table in README is what papers/measured.py makes of papers/measured.json, and the script reads what runs leave."""
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("measured", ROOT / "papers" / "measured.py")
measured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured)


def test_the_readme_has_the_table_of_what_was_measured():
    kept = json.loads(measured.KEPT.read_text())
    expected = measured.table(kept)
    index = "".join(line for cell in json.loads(measured.INDEX.read_text())["cells"] for line in cell["source"])
    assert expected in index, "run `python papers/measured.py` and `make readme`"
    for line in expected.splitlines(): assert line in (ROOT / "README.md").read_text()
    changed = json.loads(json.dumps(kept))
    changed["drr2ct"]["psnr"] += 1
    assert measured.table(changed) not in index


def test_figures_come_from_the_files_of_a_run(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"predictors": {"regressor_consistent": {"psnr": 35.5}, "cubic": {"psnr": 34.25}, "linear": {"psnr": 33}}, "thick_mm": 5.0, "cases": 1}))
    figures = measured.slices(tmp_path)
    assert figures["psnr"] == 35.5 and "5 mm → thin, a patient left out: 35.50 dB, cubic 34.25, linear 33.00" in measured.table({"slices_real": figures}) and measured.table({}).count("not yet") == 5


def test_the_marks_must_stand_once():
    text = "a" + measured.MARKS[0] + "old" + measured.MARKS[1] + "b"
    assert measured.put(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="expected one"): measured.put("nothing", "new")
