"""The slice explorer: what is shown, which way up, and the answers of the networks."""

import threading

import numpy as np
import pytest
import torch
from refusals import refused
from viewer.test_figures import marks_faults

from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Volume
from ct_nb.slices import explorer as explore_slices
from ct_nb.slices.explorer import (
    INTERPOLATION_NAMES,
    SliceExplorer,
    SliceNetworks,
    ThickCut,
    open_thin_scans,
)
from ct_nb.slices.models import (
    SliceDiffusion,
    SliceDiffusionConfig,
    SliceRegressor,
    SliceRegressorConfig,
)
from ct_nb.slices.slice_profile import SliceAxis, SliceProfile, average_slices, slice_profile_matrix
from ct_nb.slices.train import SliceModels
from ct_nb.slices.vae import SliceVAE
from ct_nb.training.checkpoints import save_weights


@pytest.fixture(scope="module")
def thin():
    return phantom(1001, 48, 240.0).volume


def make(thin, networks=None, **settings):
    return SliceExplorer(
        {"one": lambda: thin}, networks or SliceNetworks(), **{"spacing_mm": 12.0, **settings}
    )


def test_the_cut_is_what_the_scan_would_give(thin):
    cut = ThickCut.over(SliceAxis.along(thin.grid), 12.0)
    part = thin.hu[cut.first : cut.first + cut.thin_axis.count]
    whole = average_slices(
        part, slice_profile_matrix(cut.thin_axis, cut.thick_axis, SliceProfile(12.0))
    )
    explorer = make(thin)
    for name, along in (("coronal", 1), ("sagittal", 2)):
        explorer.cut.value = name
        assert np.allclose(explorer.thick, whole.take(explorer.position.value, along), atol=1e-2)
        assert np.allclose(explorer.truth, part.take(explorer.position.value, along))


def test_only_what_is_consistent_adds_up(thin):
    cut = ThickCut.over(SliceAxis.along(thin.grid), 12.0, "gaussian")
    truth = thin.hu[cut.first : cut.first + cut.thin_axis.count, 24].astype(float)
    found = {
        name: cut.figures(cut.back[name] @ (cut.mean @ truth), truth)
        for name in INTERPOLATION_NAMES
    }
    assert (
        found["back-projection"]["reaveraged_hu"] < 1e-6
        and min(found[name]["reaveraged_hu"] for name in ("linear", "cubic")) > 5
    )
    assert cut.figures(truth, truth) == {
        "error_hu": 0.0,
        "edge": pytest.approx(1.0),
        "reaveraged_hu": 0.0,
    }
    assert cut.figures(truth / 2, truth)["edge"] == pytest.approx(0.5, abs=0.02)


def test_the_head_is_at_the_top_and_the_finger_where_it_is_put():
    hu = np.full((24, 20, 16), -1000, np.float32)
    hu[21, 7, 3] = 900
    volume = Volume(hu, np.diag([3.0, 2.0, 2.5, 1.0]))
    explorer = make(volume, spacing_mm=5.0)
    for cut, position, column, pixel in (
        ("coronal", 7, 3, [3.0, 2.5]),
        ("sagittal", 3, 7, [2.0, 2.5]),
    ):
        explorer.cut.value, explorer.position.value = cut, position
        picture = explorer.pictures["truth"]
        row, where = np.argwhere(picture.pixels == picture.pixels.max())[0]
        assert (
            where == column
            and row == explorer.thin.count - 1 - (21 - explorer.work.first)
            and picture.letters[2:] == ["H", "F"]
            and list(picture.pixel_mm) == pixel
        )
        picture.click = [where + 0.5, row + 0.5, position]
        assert (
            explorer.finger == (column, pytest.approx(float(volume.grid.affine[2, 3] + 21 * 2.5)))
            and "truth <b>900 HU</b>" in explorer.readout.value
        )


def test_curves_are_those_of_the_column(thin):
    explorer = make(thin)
    explorer.point(20.0, 0.0)
    lines = [
        np.array(mark["line"]) for mark in explorer.pictures["profile"].marks if "line" in mark
    ]
    truth = next(
        points
        for points, mark in zip(
            lines, [m for m in explorer.pictures["profile"].marks if "line" in m]
        )
        if mark["color"] == explore_slices.TRUTH
    )
    near = np.abs(explorer.thin.positions_mm) <= explore_slices.REACH_MM
    assert (
        len(truth) == near.sum()
        and np.corrcoef(truth[:, 0], explorer.truth[near, 20])[0, 1] > 0.999999
    )
    assert np.all(np.diff(truth[:, 1]) < 0), "z runs upwards"
    other = explorer.pictures["profile"].marks
    explorer.pictures["answer"].hover = [30.5, 10.5]
    assert explorer.pictures["profile"].marks != other and explorer.finger[0] == 20.0
    explorer.pictures["answer"].hover = []
    assert explorer.pictures["profile"].marks == other


def test_sliders_follow_the_scan(thin):
    coarse = Volume(thin.hu[::2], thin.affine @ np.diag([1, 1, 2.0, 1]))  # 10 mm
    explorer = SliceExplorer({"fine": lambda: thin, "coarse": lambda: coarse}, spacing_mm=8.0)
    explorer.scan.value = "coarse"
    assert (
        explorer.spacing.min == 12.0 <= explorer.spacing.value <= explorer.spacing.max
        and explorer.thin.spacing_mm == 10.0
    )
    explorer.scan.value = "fine"
    explorer.cut.value = "sagittal"
    assert explorer.position.max == thin.hu.shape[2] - 1
    explorer.pictures["truth"].wheel += 2
    assert (
        f"x = {thin.grid.index_to_mm([explorer.position.value, 0, 0])[0]:.1f} mm"
        in explorer.readout.value
    )


@pytest.fixture(scope="module")
def slices_run(tmp_path_factory):
    torch.manual_seed(0)
    drawn = SliceDiffusionConfig.preset("smoke")
    slices = SliceModels(
        SliceRegressor(SliceRegressorConfig.preset("smoke")),
        SliceDiffusion(drawn, SliceVAE(drawn.vae)),
    )
    for network in (slices.regressor.network, slices.diffusion.network):
        torch.nn.init.normal_(network.last.weight, std=0.05)
    folder = tmp_path_factory.mktemp("runs") / "slices"
    save_weights(
        folder,
        slices,
        {
            "system": "slices",
            "network": slices.networks(),
            "data": "phantom",
            "seen": {"thick_mm": [9.6, 14.4], "width": [0.8, 1.2], "thin_mm": [5.0, 7.5]},
            "training": {"cases": ["one", "x"]},
        },
    )
    return folder


def test_networks_answer_and_add_up(thin, slices_run):
    networks = SliceNetworks(slices_run, steps=2)
    assert (
        list(networks.thinners) == ["regressor", "diffusion, one draw"]
        and "2 scans" in networks.says
    )
    explorer = make(thin, networks)
    assert explorer.scan.options[0][0] == "one (trained on)"
    start = explorer.shown.copy()
    for name in networks.thinners:
        explorer.answer.value = name
        explorer.wait()
        assert (
            explorer.pictures["answer"].title == name
            and np.abs(explorer.shown - start).mean() > 0.5
        )
        assert explorer.work.figures(explorer.shown, explorer.truth)["reaveraged_hu"] < 0.1
    assert "Beware" not in explorer.table.value
    explorer.answer.value = "linear"
    explorer.spacing.value = 20.0
    assert "nobody tested this" in explorer.table.value


class Slow:
    "Answers zeros, when it is let."

    def __init__(self):
        self.let, self.asked = threading.Event(), 0

    def thin(self, thick, thick_axis, thin_axis, profile):
        self.asked += 1
        assert self.let.wait(20)
        return torch.zeros(thin_axis.count, *thick.shape[1:])


def test_a_network_that_takes_its_time_does_not_hold_up_the_page(thin):
    networks, slow = SliceNetworks(), Slow()
    networks.thinners["slow"] = slow
    explorer = make(thin, networks)
    explorer.answer.value = "slow"
    assert (
        explorer.pictures["answer"].title == "slow is at it; until then: back-projection"
        and explorer.shown.any()
    )
    explorer.spacing.value = 14.0  # meanwhile the reader goes on
    explorer.position.value = 3
    slow.let.set()
    explorer.wait()
    assert (
        explorer.pictures["answer"].title == "slow" and not explorer.shown.any() and slow.asked == 2
    ), "what it was asked first, and what is shown now"
    explorer.position.value = 4
    assert explorer.pictures["answer"].title == "slow" and slow.asked == 2, "the band is known"


def test_an_answer_that_comes_too_late_is_not_shown_for_another_scan(thin):
    networks, slow = SliceNetworks(), Slow()
    networks.thinners["slow"] = slow
    other = Volume(thin.hu[:, ::-1].copy(), thin.affine)
    explorer = SliceExplorer({"one": lambda: thin, "other": lambda: other}, networks, 12.0, "slow")
    explorer.scan.value = "other"
    explorer.answer.value = "linear"
    slow.let.set()
    explorer.wait()
    assert explorer.pictures["answer"].title == "linear" and not explorer._known


def test_a_network_that_fails_is_said_to(thin):
    class Broken:
        def thin(self, *_):
            raise ValueError("thick: too few slices")

    networks = SliceNetworks()
    networks.thinners["broken"] = Broken()
    explorer = make(thin, networks)
    explorer.answer.value = "broken"
    explorer.wait()
    assert (
        explorer.answer.value == "back-projection" == explorer.pictures["answer"].title
        and "broken has no answer: thick: too few slices" in explorer.note.value
    )
    with pytest.raises(ValueError, match="too few"):
        networks.band("broken", thin.hu, explorer.work, 0, 1)


def test_bad_calls_and_the_figure(thin, tmp_path):
    import matplotlib.pyplot as plt

    with refused("scans"):
        SliceExplorer({})
    with refused("answer"):
        make(thin, answer="regressor")
    assert (
        "papermill nbs/train_slices.ipynb runs/train_slices.ipynb"
        in SliceNetworks(tmp_path / "slices").says
    )
    explorer = make(thin, answer="cubic")
    figure = explorer.static()
    assert len(figure.axes) == 5 and "cubic" in figure.axes[1].get_title()
    assert marks_faults(figure, besides=[explorer.pictures["profile"].title]) == []
    plt.close(figure)


def test_scans_of_a_folder_stand_upright(tmp_path):
    fine = phantom(5, 96, 144.0).volume  # 1.5 mm
    Volume(
        fine.hu[::-1].copy(),
        fine.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 95.0], [0, 0, 0, 1]]),
    ).save(tmp_path / "upside_down.nii.gz")
    (load,) = open_thin_scans(str(tmp_path)).values()
    volume = load()
    assert (
        np.allclose(volume.affine, fine.affine, atol=1e-3)
        and np.abs(volume.hu - fine.hu).max() <= 1
    )
