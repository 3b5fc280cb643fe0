"""The command of the system: a series is chosen, progress is shown, and errors are one sentence."""

import pytest
from ct_files import body, pair_members, zipped

from ct_nb.app.cli import thin
from ct_nb.data.read import read_volume


def test_the_command_interpolates_a_series_and_shows_progress(
    slices_run, tmp_path, monkeypatch, capsys
):
    path = zipped(tmp_path / "0001.zip", pair_members(body((60, 32, 40))))
    monkeypatch.chdir(tmp_path)
    thin(
        str(path),
        weights=str(slices_run),
        spacing=1.25,
        series="1.2.1",
        convention="centres",
        out="thin.nii",
    )
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "thin.nii"
    assert "12/12" in printed.err and "thick slice" in printed.err
    assert read_volume(tmp_path / "thin.nii").hu.shape == (45, 32, 40)
    with pytest.raises(SystemExit, match="--series"):
        thin(str(path), weights=str(slices_run))


@pytest.mark.parametrize(
    "arguments, argument",
    [
        ({"memory": float("inf")}, "memory_gib"),
        ({"width": 0.0}, "width_mm"),
        ({"out": "x.jpg"}, "out"),
        ({"spacing": 5.0}, "mm apart already"),
    ],
)
def test_the_command_ends_with_one_sentence(
    thick_ct, slices_run, tmp_path, monkeypatch, arguments, argument
):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        thin(str(thick_ct[1]), **{"weights": str(slices_run), "out": "x.nii.gz"} | arguments)
    message = ended.value.code  # a string is printed on stderr, and the exit code is 1
    assert isinstance(message, str) and argument in message and "\n" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == before
