"""The explorer of registrations without a browser: drags, numbers, buttons, and X-rays of files."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figure_marks import marks_faults
from radiograph_files import save_png
from refusals import refused

from ct_nb.app.registration_explorer import (
    NUMBERS,
    RegistrationExplorer,
    _verdict,
    views_for_ct,
)
from ct_nb.data.radiograph_io import write_radiographs
from ct_nb.phantom.chest import phantom
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.projector import project
from ct_nb.physics.registration import move, register, target_registration_error
from ct_nb.physics.setups import SETUPS, setup_geometry
from ct_nb.physics.volume import Volume, hu_to_mu
from ct_nb.viewer.widgets import join_markup

MOVEMENT = torch.tensor([[2.0, -3.0, 2.0, 12.0, -8.0, 9.0]], dtype=torch.float64)
SIZE = 48


@pytest.fixture(scope="module")
def chest():
    return phantom(44, SIZE).volume


@pytest.fixture(scope="module")
def start(chest):
    return ConeBeam.biplanar(grid=chest.grid, detector_shape=(SIZE, SIZE), pixel_mm=10.0)


@pytest.fixture(scope="module")
def truth(start):
    return move(start, MOVEMENT, np.zeros(3))


def xrays_of(volume, geometry, kev=80.0):
    return project(hu_to_mu(volume.tensor(), kev), geometry.on(volume.grid).to(torch.float32))


@pytest.fixture(scope="module")
def xrays(chest, truth):
    return xrays_of(chest, truth)


def explorer_of(chest, xrays, start, *given, **named):
    return RegistrationExplorer(
        chest, xrays, start, *given, **{"size": SIZE, "atlas": "phantom:2", **named}
    )


def drag(explorer, view: int, *places):
    "A press at the first place and on to the others."
    press = (explorer.pictures[view].click[2:] or [0])[0] + 1
    for u, v in places:
        explorer.pictures[view].click = [float(u), float(v), press]


def middle(explorer, geometry, view: int):
    "Where the middle of the body is seen."
    return geometry.project_points(torch.tensor(explorer.center_mm))[0][view].numpy()


def error_mm(explorer, truth) -> float:
    return float(target_registration_error(explorer.geometry, truth, explorer._body).max())


def digests(explorer):
    return [picture.frame["digest"] for picture in explorer.pictures]


def test_a_drag_takes_the_patient_along(chest, xrays, start, truth):
    explorer = explorer_of(chest, xrays, start)
    before, begin = digests(explorer), np.mean(explorer.similarity)
    wanted = middle(explorer, truth, 0)
    drag(explorer, 0, (5, 5))
    assert digests(explorer) == before, "a press alone moves nothing"
    steps = np.linspace(middle(explorer, start, 0), wanted, 4)
    drag(explorer, 0, *steps)
    assert np.allclose(middle(explorer, explorer.geometry, 0), wanted, atol=1e-6)
    assert np.mean(explorer.similarity) > begin
    assert all(a != b for a, b in zip(before, digests(explorer))), "the other view moves with it"
    shown = [explorer.numbers[0][name].value for name in NUMBERS]
    assert np.allclose(shown, explorer.movements[0]) and any(shown[3:]) and not any(shown[:3])
    explorer.how.value = "turn"
    here = middle(explorer, explorer.geometry, 0)
    drag(explorer, 0, here + (10, 0), here + (0, 10))
    assert np.linalg.norm(explorer.movements[0, :3]) == pytest.approx(90, abs=1e-6)
    explorer.pictures[0].wheel -= 180  # by half a degree each, back again
    assert np.linalg.norm(explorer.movements[0, :3]) == pytest.approx(0, abs=1e-6)
    explorer.buttons["reset"].click()
    assert digests(explorer) == before and not explorer.movements.any()


def test_views_by_themselves(chest, xrays, start):
    explorer = explorer_of(chest, xrays, start, separate=True)
    before = digests(explorer)
    drag(explorer, 1, (20, 20), (24, 21))
    explorer.numbers[1]["turn z, °"].value = 4.0
    assert [a == b for a, b in zip(before, digests(explorer))] == [True, False]
    assert not explorer.movements[0].any() and explorer.movements[1, 2] == 4.0
    still = explorer.geometry.select([0])
    assert torch.equal(still.source_mm, start.source_mm[:1])


def test_what_a_page_rounds_is_no_movement(chest, xrays, start):
    explorer = explorer_of(chest, xrays, start)
    drag(explorer, 0, (20, 20), (23.3, 21.7))
    at, seen = explorer.movements.clone(), digests(explorer)
    for slider in explorer.numbers[0].values():
        slider.value = round(slider.value, 1)
    assert torch.equal(explorer.movements, at) and digests(explorer) == seen
    explorer.numbers[0]["head, mm"].value += 0.2
    assert digests(explorer) != seen


def test_register_goes_there_and_says_how_sure_it_is(chest, xrays, start, truth):
    explorer = explorer_of(chest, xrays, start, truth=truth)
    apart = target_registration_error(start, truth, explorer._body).mean()
    assert f"<b>{apart:.1f} mm</b> from the true pose" in explorer.status.value
    drag(explorer, 0, (20, 20), (22, 21))
    explorer.numbers[0]["turn x, °"].value = 5.0
    explorer.buttons["register"].click()
    assert error_mm(explorer, truth) < 1 and explorer.found.accepted, explorer.found.doubts
    assert torch.allclose(explorer.geometry.source_mm, explorer.found.geometry.source_mm)
    assert np.mean(explorer.similarity) == pytest.approx(float(explorer.found.similarity), abs=1e-5)
    expected = register(chest, xrays, explorer.geometry, size=SIZE, starts=1)
    assert float(expected.similarity) == pytest.approx(np.mean(explorer.similarity), abs=1e-3)
    assert "Accepted" in explorer.verdict.value and "±" in explorer.verdict.value
    doubtful = join_markup(_verdict(replace(explorer.found, doubts=["view <1>: far"])))
    assert "Doubtful" in doubtful and "doubt: view &lt;1&gt;: far" in doubtful
    assert not any(button.disabled for button in explorer.buttons.values())
    shown = [explorer.numbers[0][name].value for name in NUMBERS]
    assert np.allclose(shown, explorer.movements[0])
    figure = explorer.static()
    assert len(figure.axes) == 4 and marks_faults(figure) == []
    explorer.pictures[0].wheel += 1
    assert explorer.found is None and explorer.verdict.value == "", "it was of another pose"
    plt.close("all")


def test_reconstruct_shows_the_atlas_beside_the_ct(chest, xrays, start, truth):
    explorer = explorer_of(chest, xrays, truth, energy_kev=80.0)
    explorer.buttons["reconstruct"].click()
    columns = explorer.reconstruction
    assert explorer.children[-1] is columns and list(columns.pictures) == ["CT", "reconstruction"]
    assert max(columns.xrays.residuals) < 0.05, "the X-rays are explained, at their energy"
    assert np.corrcoef(*(hu.ravel() for hu in columns.volumes.values()))[0, 1] > 0.9
    explorer.buttons["reconstruct"].click()
    assert explorer.reconstruction is not columns
    assert sum(part is columns for part in explorer.children) == 0


def test_greys_that_fall_and_pixels_that_do_not_count(chest, xrays, start, truth):
    greys = torch.stack([200 - 20 * xrays[0], 30 * xrays[1]])
    counted = torch.ones(greys.shape)
    greys[:, :4], counted[:, :4] = 255.0, 0.0
    explorer = explorer_of(chest, greys, start, grey=True, counted=counted)
    explorer.buttons["register"].click()
    assert error_mm(explorer, truth) < 1 and explorer.found.accepted, explorer.found.doubts


def test_xrays_of_files_stand_at_the_patient(chest, tmp_path):
    "Without a geometry the views of a set-up go to the body; a folder has its own."
    shift = np.array([40.0, -30.0, 200.0])
    affine = chest.affine.copy()
    affine[:3, 3] += shift
    elsewhere = Volume(chest.hu, affine)
    views = setup_geometry(SETUPS["chest"], ["PA"], (96, 96), [[4.0, 4.0]])
    image = xrays_of(chest, views)
    png = tmp_path / "pa.png"
    save_png(png, (60_000 * torch.exp(-image[0])).numpy().astype(np.uint16))
    how = dict(atlas="phantom:2", size=32, notes=[], kind="intensity", i0=60_000.0)
    found = views_for_ct(elsewhere, png, pixel_mm=4.0, **how)
    assert found.page is not None
    assert np.allclose(found.geometry.grid.center_mm, elsewhere.body_center_mm)
    expected = views.source_mm + torch.tensor(elsewhere.body_center_mm)
    assert torch.allclose(found.geometry.source_mm, expected, atol=1.0)
    explorer = explorer_of(elsewhere, found.xrays, found.geometry)
    assert explorer.similarity[0] > 0.5, "taken at the middle of the cube, beside the body's"
    write_radiographs(tmp_path / "folder", image, views)
    own = views_for_ct(elsewhere, [tmp_path / "folder"], notes=[])
    assert own.page is None and torch.allclose(own.geometry.source_mm, views.source_mm)


def test_what_does_not_fit_is_refused(chest, xrays, start):
    with refused("xrays"):
        explorer_of(chest, xrays[:, :-1], start)
    with refused():
        explorer_of(Volume(np.full((8, 8, 8), -1000.0), np.diag([9.0, 9, 9, 1])), xrays, start)
    broken = xrays.clone()
    broken[0, 0, 0] = float("nan")
    with refused("xrays"):
        explorer_of(chest, broken, start)
    counted = torch.isfinite(broken)
    assert np.isfinite(explorer_of(chest, broken, start, counted=counted).similarity).all()
    explorer = explorer_of(chest, xrays, start, atlas="nowhere")
    explorer.buttons["reconstruct"].click()
    assert "nowhere" in explorer.progress.value and explorer.reconstruction is None
    assert not explorer.buttons["reconstruct"].disabled
