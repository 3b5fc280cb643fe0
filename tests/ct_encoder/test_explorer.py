"""The step explorer: sources of attention, scores, and what the planes show."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from ct_nb.ct_encoder import explorer as explore_steps
from ct_nb.ct_encoder.explorer import (
    BASELINE_METHOD,
    AttentionSources,
    StepExplorer,
    step_region_shares,
    open_step_scans,
    mask_outlines,
    patch_shares,
    phantom_step_scan,
    report_steps,
    step_scores,
    step_from_text,
)
from ct_nb.ct_encoder.model import ScanLanguage
from ct_nb.ct_encoder.reports import RadiologyReport, ReasoningStep
from ct_nb.ct_encoder.train import CT_ENCODER_PRESETS
from ct_nb.phantom.chest import phantom
from ct_nb.physics.volume import Grid
from ct_nb.training.checkpoints import save_weights
from ct_nb.viewer.slice_canvas import SliceCanvas

SMOKE = CT_ENCODER_PRESETS["smoke"].network


@pytest.fixture(scope="module")
def scan():
    return phantom_step_scan(2001, SMOKE.encoder, 48)


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
    floor = untrained.methods[BASELINE_METHOD](scan, scan.steps)
    inside = step_region_shares(scan, scan.steps, untrained.config)
    assert torch.allclose(floor.sum(1), torch.ones(len(scan.steps)), atol=1e-5)
    for row, share, step in zip(floor, inside, scan.steps):
        if step.regions:
            assert torch.allclose(row, share / share.sum()) and not row[share == 0].any()
        else:
            assert torch.allclose(row, torch.full_like(row, 1 / len(row)))
    nowhere = scan.steps[1].__class__("the couch", (), (20,))
    none = replace_labels(scan, lambda regions: torch.where(regions == 20, 0, regions))
    assert torch.allclose(
        untrained.methods[BASELINE_METHOD](none, [nowhere])[0],
        torch.tensor(1 / inside.shape[1]),
    ), "a region that is not in the scan"


def replace_labels(scan, change):
    return explore_steps.StepScan(
        scan.name, scan.volume, scan.labels, scan.hu, change(scan.regions), scan.steps, scan.lesions
    )


def test_without_weights_it_is_said_in_a_sentence(untrained, tmp_path):
    assert (
        not untrained.trained
        and "papermill nbs/train_ct_encoder.ipynb runs/train_ct_encoder.ipynb"
        in untrained.description
    )
    assert list(untrained.methods)[0].startswith("named region") and any(
        "chance" in name for name in untrained.methods
    )
    assert "in nothing_here;" in AttentionSources(tmp_path / "nothing_here", "smoke").description


def test_a_trained_encoder_is_asked_with_and_without_the_map(scan, encoder_run):
    sources = AttentionSources(encoder_run)
    assert (
        sources.trained
        and "2 scans" in sources.description
        and list(sources.methods)[0] == "encoder, scan and region map"
    )
    told, alone = (
        sources.methods[name](scan, scan.steps)
        for name in ("encoder, scan and region map", "encoder, scan only")
    )
    other = replace_labels(scan, lambda regions: regions.flip(2))
    assert torch.equal(
        sources.methods["encoder, scan only"](other, scan.steps), alone
    ), "nobody told it where the regions are"
    assert not torch.allclose(
        sources.methods["encoder, scan and region map"](other, scan.steps), told, atol=1e-6
    )
    changed = explore_steps.StepScan(
        scan.name, scan.volume, scan.labels, scan.hu.flip(0), scan.regions, scan.steps
    )
    assert not torch.allclose(
        sources.methods["encoder, scan only"](changed, scan.steps), alone, atol=1e-6
    ), "of the same name, but another scan"
    direct = sources.model.text_attention(
        [step.text for step in scan.steps], sources.model.encoder(scan.hu[None])
    )
    assert torch.allclose(alone, direct)


# steps: figures


def test_figures_tell_attention_from_luck():
    inside, lesion = torch.zeros(64), torch.zeros(64)
    inside[:16], lesion[:4] = 1, 1
    even = step_scores(torch.full((64,), 1 / 64), inside, lesion)
    assert even["inside"] == pytest.approx(0.25) == even["even"] and even["correlation"] == 0
    perfect = step_scores(lesion / 4, inside, lesion)
    assert perfect["inside"] == 1 and perfect["dice"] == 1 and 0 < perfect["correlation"] < 1
    wrong = step_scores(lesion.flip(0) / 4, inside, lesion)
    assert wrong["inside"] == 0 and wrong["dice"] == 0 and wrong["correlation"] < 0
    assert step_scores(lesion / 4, torch.zeros(64)) == {}


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
        (mark,) = mask_outlines(picture, mask, "#ffffff")
        points = np.array(mark["line"])
        assert (
            np.allclose((points.min(0) + points.max(0)) / 2, picture.to_pixel(at))
            and mark["dash"] == []
        )
        assert np.allclose(points.max(0) - points.min(0), 1.0)
        picture.place(picture.index - 3)
        (shadow,) = mask_outlines(picture, mask, "#ffffff")
        assert (
            shadow["dash"]
            and np.allclose(np.array(shadow["line"]), points)
            and mask_outlines(picture, mask, "#ffffff", projection=False) == []
        )
    assert mask_outlines(picture, np.zeros_like(mask), "#ffffff") == []


def pointing(sources, patch: int):
    "The same, but everything sources at one patch."
    sources.methods = {
        "one patch": (
            lambda scan, steps: torch.nn.functional.one_hot(
                torch.full((len(steps),), patch), 64
            ).float()
        )
    }
    return sources


def test_the_planes_go_where_a_step_looks(scan):
    sources = pointing(AttentionSources(preset="smoke"), 2 * 16 + 1 * 4 + 3)  # grid 4 × 4 × 4
    explorer = StepExplorer({"one": lambda: scan}, sources)
    low, high = scan.volume.grid.bounds_mm
    expected = low + (np.array([3, 1, 2]) + 0.5) / 4 * (high - low)
    assert np.abs(explorer.at_mm - expected).max() <= scan.volume.grid.spacing_mm[0] / 2 + 1e-6
    assert (
        explorer.attention_field[24 + 6, 12 + 6, 36 + 6]
        > 0.999 * explorer.attention_field.max()
        > 10
        and explorer.attention_field[:12].max() < 1
    )
    explorer.go_to(scan.volume.grid.center_mm)
    before = explorer.at_mm
    explorer.method.notify_change(
        {
            "name": "value",
            "old": None,
            "new": "one patch",
            "owner": explorer.method,
            "type": "change",
        }
    )
    assert np.array_equal(explorer.at_mm, before), "whoever is asked, the place stays"
    explorer.choose(0)
    assert np.abs(explorer.at_mm - expected).max() <= scan.volume.grid.spacing_mm[0] / 2 + 1e-6


def test_even_attention_is_not_coloured(scan, untrained):
    explorer = StepExplorer({"one": lambda: scan}, untrained)
    explorer.method.value = BASELINE_METHOD
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
    second = phantom_step_scan(2004, SMOKE.encoder, 32)
    explorer = StepExplorer({"one": lambda: scan, "two": lambda: second}, untrained)
    assert explorer.chosen == min(scan.lesions) and [b.description for b in explorer.buttons] == [
        f"{n + 1}.  {step.text}" for n, step in enumerate(scan.steps)
    ]
    explorer.buttons[3].click()
    assert (
        explorer.chosen == 3
        and ["ct-nb-chosen" in b._dom_classes for b in explorer.buttons].index(True) == 3
    )
    explorer.query.value = "  Nothing in the heart.  "
    assert (
        explorer.chosen == len(scan.steps)
        and explorer.steps[-1].text == "Nothing in the heart."
        and explorer.query.value == ""
        and explorer.steps[-1].regions == step_from_text("heart").regions != ()
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
        explorer.table.value.count("<tr>") == 1 + len(untrained.methods)
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
    assert texts.count("[named region (baseline)]") == 2
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
