"""What explorers 4 and 5 show: whose attention, where, with which figures; which slices, which way up, and answered by whom."""

import csv
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.ct_encoder import explorer as explore_steps
from ct_nb.ct_encoder.explorer import (
    AttentionSources,
    StepExplorer,
    inside_step,
    open_step_scans,
    outline,
    patch_shares,
    phantom_scan,
    report_steps,
    step_figures,
    typed_step,
)
from ct_nb.ct_encoder.model import ScanLanguage
from ct_nb.ct_encoder.reports import RadiologyReport, ReasoningStep
from ct_nb.ct_encoder.train import CT_ENCODER_PRESETS
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Grid, Volume
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
from ct_nb.viewer.slice_canvas import SliceCanvas

SMOKE = CT_ENCODER_PRESETS["smoke"].network


@pytest.fixture(scope="module")
def scan():
    return phantom_scan(2001, SMOKE.encoder, 48)


@pytest.fixture(scope="module")
def untrained():
    return AttentionSources(preset="smoke")


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory):
    "A folder as train_ct_encoder leaves it, of a network whose attention is not flat."
    torch.manual_seed(3)
    model = ScanLanguage(
        replace(SMOKE, words=("lobe", "lung", "effusion", "nodule", "right", "left"))
    )
    with torch.no_grad():
        for parameter in model.alignment.steps.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("runs") / "ct_encoder"
    save_weights(
        folder,
        model,
        {
            "system": "ct_encoder",
            "network": model.config.to_dict(),
            "data": "phantom",
            "training": {"cases": ["phantom-02002", "phantom-00001"]},
        },
    )
    return folder


# steps: who is asked


def test_the_floor_is_the_region_and_nothing_else(scan, untrained):
    floor = untrained.ask["region that it names, nothing learnt"](scan, scan.steps)
    inside = inside_step(scan, scan.steps, untrained.config)
    assert torch.allclose(floor.sum(1), torch.ones(len(scan.steps)), atol=1e-5)
    for row, share, step in zip(floor, inside, scan.steps):
        if step.regions:
            assert torch.allclose(row, share / share.sum()) and not row[share == 0].any()
        else:
            assert torch.allclose(row, torch.full_like(row, 1 / len(row)))
    nowhere = scan.steps[1].__class__("the couch", (), (20,))
    none = replace_labels(scan, lambda regions: torch.where(regions == 20, 0, regions))
    assert torch.allclose(
        untrained.ask["region that it names, nothing learnt"](none, [nowhere])[0],
        torch.tensor(1 / inside.shape[1]),
    ), "a region that is not in the scan"


def replace_labels(scan, change):
    return explore_steps.StepScan(
        scan.name, scan.volume, scan.labels, scan.hu, change(scan.regions), scan.steps, scan.lesions
    )


def test_without_weights_it_is_said_in_a_sentence(untrained, tmp_path):
    assert (
        not untrained.trained
        and "papermill nbs/train_ct_encoder.ipynb runs/train_ct_encoder.ipynb" in untrained.says
    )
    assert list(untrained.ask)[0].startswith("region") and any(
        "chance" in name for name in untrained.ask
    )
    assert "in nothing_here;" in AttentionSources(tmp_path / "nothing_here", "smoke").says


def test_a_trained_encoder_is_asked_with_and_without_the_map(scan, encoder_run):
    looks = AttentionSources(encoder_run)
    assert (
        looks.trained
        and "2 scans" in looks.says
        and list(looks.ask)[0] == "encoder, scan and region map"
    )
    told, alone = (
        looks.ask[name](scan, scan.steps)
        for name in ("encoder, scan and region map", "encoder, scan alone")
    )
    other = replace_labels(scan, lambda regions: regions.flip(2))
    assert torch.equal(
        looks.ask["encoder, scan alone"](other, scan.steps), alone
    ), "nobody told it where the regions are"
    assert not torch.allclose(
        looks.ask["encoder, scan and region map"](other, scan.steps), told, atol=1e-6
    )
    changed = explore_steps.StepScan(
        scan.name, scan.volume, scan.labels, scan.hu.flip(0), scan.regions, scan.steps
    )
    assert not torch.allclose(
        looks.ask["encoder, scan alone"](changed, scan.steps), alone, atol=1e-6
    ), "of the same name, but another scan"
    direct = looks.model.look(
        [step.text for step in scan.steps], looks.model.encoder(scan.hu[None])
    )
    assert torch.allclose(alone, direct)


# steps: figures


def test_figures_tell_attention_from_luck():
    inside, lesion = torch.zeros(64), torch.zeros(64)
    inside[:16], lesion[:4] = 1, 1
    even = step_figures(torch.full((64,), 1 / 64), inside, lesion)
    assert even["inside"] == pytest.approx(0.25) == even["even"] and even["correlation"] == 0
    perfect = step_figures(lesion / 4, inside, lesion)
    assert perfect["inside"] == 1 and perfect["dice"] == 1 and 0 < perfect["correlation"] < 1
    wrong = step_figures(lesion.flip(0) / 4, inside, lesion)
    assert wrong["inside"] == 0 and wrong["dice"] == 0 and wrong["correlation"] < 0
    assert step_figures(lesion / 4, torch.zeros(64)) == {}


def test_patch_shares_are_shares():
    mask = np.zeros((8, 8, 8), bool)
    mask[:2, :4, 4:6] = True
    share = patch_shares(mask, (2, 2, 2)).view(2, 2, 2)
    assert share[0, 0, 1] == 0.25 and share.sum() == 0.25


# steps: what is drawn


def test_an_outline_runs_about_its_voxels():
    grid = Grid.cube(8, 80.0)
    mask = np.zeros((8, 8, 8), bool)
    mask[5, 2, 6] = True
    at = grid.index_to_mm([6, 2, 5])
    for plane in ("axial", "coronal", "sagittal"):
        picture = SliceCanvas(grid, np.zeros((8, 8, 8), np.float32), plane)
        picture.place(round(float(grid.mm_to_index(at)[picture.normal])))
        (mark,) = outline(picture, mask, "#ffffff")
        points = np.array(mark["line"])
        assert (
            np.allclose((points.min(0) + points.max(0)) / 2, picture.to_pixel(at))
            and mark["dash"] == []
        )
        assert np.allclose(points.max(0) - points.min(0), 1.0)
        picture.place(picture.index - 3)
        (shadow,) = outline(picture, mask, "#ffffff")
        assert (
            shadow["dash"]
            and np.allclose(np.array(shadow["line"]), points)
            and outline(picture, mask, "#ffffff", shadow=False) == []
        )
    assert outline(picture, np.zeros_like(mask), "#ffffff") == []


def pointing(looks, patch: int):
    "The same, but everything looks at one patch."
    looks.ask = {
        "one patch": (
            lambda scan, steps: torch.nn.functional.one_hot(
                torch.full((len(steps),), patch), 64
            ).float()
        )
    }
    return looks


def test_the_planes_go_where_a_step_looks(scan):
    looks = pointing(AttentionSources(preset="smoke"), 2 * 16 + 1 * 4 + 3)  # grid 4 × 4 × 4
    explorer = StepExplorer({"one": lambda: scan}, looks)
    low, high = scan.volume.grid.bounds_mm
    expected = low + (np.array([3, 1, 2]) + 0.5) / 4 * (high - low)
    assert np.abs(explorer.at_mm - expected).max() <= scan.volume.grid.spacing_mm[0] / 2 + 1e-6
    assert (
        explorer.heat[24 + 6, 12 + 6, 36 + 6] > 0.999 * explorer.heat.max() > 10
        and explorer.heat[:12].max() < 1
    )
    explorer.go_to(scan.volume.grid.center_mm)
    before = explorer.at_mm
    explorer.look.notify_change(
        {"name": "value", "old": None, "new": "one patch", "owner": explorer.look, "type": "change"}
    )
    assert np.array_equal(explorer.at_mm, before), "whoever is asked, the place stays"
    explorer.choose(0)
    assert np.abs(explorer.at_mm - expected).max() <= scan.volume.grid.spacing_mm[0] / 2 + 1e-6


def test_even_attention_is_not_coloured(scan, untrained):
    explorer = StepExplorer({"one": lambda: scan}, untrained)
    explorer.look.value = "region that it names, nothing learnt"
    explorer.choose(0)  # names no region
    for picture in explorer.pictures.values():
        assert (picture.pixels[..., 0] == picture.pixels[..., 1]).all() and (
            picture.pixels[..., 0] == picture.pixels[..., 2]
        ).all()
    explorer.choose(1)
    assert any(
        (picture.pixels[..., 0] != picture.pixels[..., 2]).any()
        for picture in explorer.pictures.values()
    )


def test_menus_buttons_and_own_sentences(scan, untrained):
    second = phantom_scan(2004, SMOKE.encoder, 32)
    explorer = StepExplorer({"one": lambda: scan, "two": lambda: second}, untrained)
    assert explorer.chosen == min(scan.lesions) and [b.description for b in explorer.buttons] == [
        f"{n + 1}.  {step.text}" for n, step in enumerate(scan.steps)
    ]
    explorer.buttons[3].click()
    assert (
        explorer.chosen == 3
        and ["ct-nb-chosen" in b._dom_classes for b in explorer.buttons].index(True) == 3
    )
    explorer.own.value = "  Nothing in the heart.  "
    assert (
        explorer.chosen == len(scan.steps)
        and explorer.steps[-1].text == "Nothing in the heart."
        and explorer.own.value == ""
        and explorer.steps[-1].regions == typed_step("heart").regions != ()
    )
    explorer.scan.value = "two"
    assert (
        explorer.case is second
        and len(explorer.buttons) == len(second.steps)
        and explorer.sliders["axial"].max == 31
    )
    for picture in explorer.pictures.values():
        assert picture.grid == second.volume.grid and picture.frame["rows"] == 32
    assert (
        explorer.table.value.count("<tr>") == 1 + len(untrained.ask)
        and "papermill" in explorer.table.value
    )
    z, y, x = np.unravel_index(int(second.volume.hu.argmax()), second.volume.hu.shape)
    explorer.pictures["axial"].hover = (
        explorer.pictures["axial"]
        .to_pixel(second.volume.grid.index_to_mm([x, y, explorer.sliders["axial"].value]))
        .tolist()
    )
    assert (
        f"{second.volume.hu[explorer.sliders['axial'].value, y, x]:.0f} HU"
        in explorer.readout.value
    )


def test_the_figure_says_who_was_asked(scan, untrained):
    import matplotlib.pyplot as plt

    figure = StepExplorer({"one": lambda: scan}, untrained).static(2)
    texts = " ".join(text.get_text() for axis in figure.axes for text in axis.texts).replace(
        "\n", " "
    )
    assert texts.count("[region that it names, nothing learnt]") == 2
    plt.close(figure)
    with refused("scans"):
        StepExplorer({}, untrained)


def test_reports_without_steps_and_folders(tmp_path):
    said = RadiologyReport("v", regions=((3, "A nodule."), (7, "Normal.")))
    assert [step.regions for step in report_steps(said)] == [(3,), (7,)]
    assert report_steps(
        RadiologyReport("v", findings="Fluid in the right lower lobe. The liver is normal.")
    )[0] == ReasoningStep("Fluid in the right lower lobe.", (), (5,))
    assert report_steps(replace(said, steps=(ReasoningStep("Only this."),))) == (
        ReasoningStep("Only this."),
    )
    for seed in (1, 2):
        phantom(seed, 32).volume.save(tmp_path / f"train_{seed}_a_1.nii.gz")
    with open(tmp_path / "train_reports.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                [
                    "VolumeName",
                    "ClinicalInformation_EN",
                    "Technique_EN",
                    "Findings_EN",
                    "Impressions_EN",
                ]
            ]
            + [
                [
                    f"train_{seed}_a_1.nii.gz",
                    "",
                    "",
                    "There is fluid in the right lower lobe.",
                    "Effusion.",
                ]
                for seed in (1, 2)
            ]
        )
    scans = open_step_scans(str(tmp_path), SMOKE.encoder)
    assert len(scans) == 2
    found = next(iter(scans.values()))()
    assert (
        found.volume.hu.shape == SMOKE.encoder.size == tuple(found.hu.shape)
        and found.steps[0].regions == (5,)
        and not found.labels.any()
        and not found.lesions
    )
    assert (found.regions == SMOKE.encoder.body).all() and np.allclose(
        found.volume.grid.extent_mm, SMOKE.encoder.side_mm
    )
    StepExplorer(scans, AttentionSources(preset="smoke"))


# slices


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
    from test_figures import marks_faults

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
