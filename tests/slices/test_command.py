"""`ct-nb interpolate-slices`: a series is chosen, progress is shown, and errors are one sentence."""

import pytest
from commands import ct_nb, refusal
from ct_files import body, pair_members, zipped

from ct_nb.data.read import read_volume


def test_the_command_interpolates_a_series_and_shows_progress(slices_run, tmp_path, monkeypatch):
    path = zipped(tmp_path / "0001.zip", pair_members(body((60, 32, 40))))
    monkeypatch.chdir(tmp_path)
    words = ("interpolate-slices", path, "--weights", slices_run)
    chosen = ("--spacing", 1.25, "--series", "1.2.1", "--cover", "centers", "--out", "thin.nii")
    printed = ct_nb(*words, *chosen)
    assert printed.stdout.splitlines()[-1] == "thin.nii"
    assert "12/12" in printed.stderr and "thick slice" in printed.stderr
    assert read_volume(tmp_path / "thin.nii").hu.shape == (45, 32, 40)
    assert "--series" in refusal(*words)


@pytest.mark.parametrize(
    "option, value, argument",
    [
        ("--memory-gib", "inf", "--memory-gib"),
        ("--fwhm-mm", 0.0, "--fwhm-mm"),
        ("--out", "x.jpg", "--out"),
        ("--spacing", 5.0, "mm apart already"),
    ],
)
def test_the_command_ends_with_one_sentence(
    thick_ct, slices_run, tmp_path, monkeypatch, option, value, argument
):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    options = {"--weights": slices_run, "--out": "x.nii.gz"} | {option: value}
    words = [word for pair in options.items() for word in pair]
    assert argument in refusal("interpolate-slices", thick_ct[1], *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
