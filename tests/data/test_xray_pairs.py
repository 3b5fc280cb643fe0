"""Pairs: the same numbers in every process, damaged caches, true X-rays of augmented volumes."""

import math
import multiprocessing
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused
from torch.utils.data import DataLoader

from ct_nb.core.seeding import seeded_generator
from ct_nb.data.augmentation import FOLDING_LIMIT, VolumeAugmentation, augment, elastic_displacement
from ct_nb.data.cases import CTSource
from ct_nb.data.xray_pairs import XrayPairs, collate, xray_statistics
from ct_nb.physics.drr import render_drr
from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import translate
from ct_nb.physics.volume import Grid, Volume
from ct_nb.physics.xray_noise import (
    PoseNoise,
    XrayNoise,
    add_xray_noise,
    cut_out,
    move_detector,
    perturb_pose,
)

POINTS = Grid.cube(32, 320.0).centers_mm()
VIEWS = ConeBeam.biplanar(detector_shape=(24, 24), pixel_mm=20.0)


def chest(seed: int) -> Volume:
    "Not much of a chest: a cylinder with two holes, another for each seed."
    x, y, z = (POINTS + torch.tensor([0.0, 5.0 * seed, 0.0])).unbind(-1)
    lungs = (
        torch.minimum(((x - 60) / 40) ** 2, ((x + 60) / 40) ** 2) + (y / 60) ** 2 + (z / 100) ** 2
        < 1
    )
    hu = torch.where((x / 130) ** 2 + (y / 90) ** 2 < 1, 40.0, -1000.0)
    return Volume(
        torch.where(lungs, -820.0, hu).numpy(), Grid.cube(32, 320.0, (0, 0, 100.0 * seed)).affine
    )


@pytest.fixture(scope="module")
def source() -> CTSource:
    volumes = [chest(seed) for seed in range(4)]
    return CTSource.from_list(volumes, 32, labels=[(v.hu < -500).astype(np.uint8) for v in volumes])


def everything(source, **changes) -> XrayPairs:
    settings = dict(
        noise=replace(XrayNoise.radiograph(), cutout_mm=80.0),
        pose=PoseNoise.gentle(),
        augmentation=VolumeAugmentation.gentle(),
        seed=3,
    )
    return XrayPairs(source, 16, geometry=VIEWS, **(settings | changes))


def same(a: dict, b: dict) -> bool:
    return all(
        torch.equal(a[key], b[key]) for key in ("hu", "xrays", "affine", "labels")
    ) and torch.equal(a["geometry"].source_mm, b["geometry"].source_mm)


# ---------------------------------------------------------------- items
def test_item(source):
    item = XrayPairs(source, 16, geometry=VIEWS)[-1]
    assert item["id"] == item["patient"] == "case-0003" and item["geometry"].grid == Grid.cube(
        16, 320.0
    )
    assert torch.allclose(
        item["hu"],
        torch.from_numpy(source[3].volume.hu).view(16, 2, 16, 2, 16, 2).mean((1, 3, 5)),
        atol=1e-3,
    )
    center = item["affine"].numpy()[:3, :3] @ [7.5, 7.5, 7.5] + item["affine"].numpy()[:3, 3]
    # the patient's frame, though the geometry is in the cube's
    assert np.allclose(center, (0, 0, 300)) and item["affine"][0, 0] == 20
    assert torch.equal(
        item["xrays"], render_drr(source[3].volume.tensor(), VIEWS.on(Grid.cube(32, 320.0)))
    )
    with pytest.raises(IndexError):
        XrayPairs(source, 16)[4]
    assert len(list(XrayPairs(source, 16, geometry=VIEWS))) == 4


def test_render_size(source):
    finest = XrayPairs(source, 16, geometry=VIEWS)[0]
    coarser = XrayPairs(source, 16, render_size=16, geometry=VIEWS)[0]
    assert torch.allclose(finest["hu"], coarser["hu"], atol=1e-3) and not torch.equal(
        finest["xrays"], coarser["xrays"]
    )
    for size, render_size in ((12, None), (16, 24), (16, 64)):
        with refused("size"):
            XrayPairs(source, size, render_size)
    with refused("geometry"):
        XrayPairs(source, 16, geometry=ConeBeam.stack([VIEWS, VIEWS]))


def test_energy(source):
    soft, hard = (
        XrayPairs(source, 16, geometry=VIEWS, energy_kev=kev)[0]["xrays"] for kev in (50.0, 100.0)
    )
    assert (
        torch.allclose(
            soft / hard.clamp(min=1e-6) * (hard > 0.1),
            (hard > 0.1) * soft.max() / hard.max(),
            atol=1e-3,
        )
        and soft.max() > 1.2 * hard.max()
    )


def test_labels_in_a_batch_only_when_all_have_them(source):
    bare = CTSource.from_list([chest(0)], 32, ids=["bare"])
    pairs = XrayPairs(source + bare, 16, geometry=VIEWS)
    assert collate([pairs[0], pairs[1]])["labels"].shape == (
        2,
        16,
        16,
        16,
    ) and "labels" not in collate([pairs[0], pairs[4]])


# ---------------------------------------------------------------- the same numbers, whoever
# computes them
def test_workers_change_nothing(source):
    pairs = everything(source)
    batch = next(iter(DataLoader(pairs, batch_size=4, collate_fn=collate, num_workers=2)))
    assert same(batch, collate([pairs[i] for i in range(4)])) and batch["geometry"].batch_shape == (
        4,
    )


def test_epochs_and_seeds_differ_and_repeat(source):
    pairs = everything(source)
    assert same(pairs.at(5, 2), everything(source).at(5, 2))
    for other in (pairs.at(6, 2), pairs.at(5, 1), everything(source, seed=4).at(5, 2)):
        assert not torch.equal(pairs.at(5, 2)["xrays"], other["xrays"])


def test_randomness_comes_in_separate_streams(source):
    "Turning the noise off leaves body and pose as they were."
    loud = everything(source).at(2, 1)
    still = everything(source, noise=XrayNoise()).at(2, 1)
    assert torch.equal(loud["hu"], still["hu"]) and torch.equal(
        loud["geometry"].source_mm, still["geometry"].source_mm
    )
    assert not torch.equal(loud["xrays"], still["xrays"])


def test_off_is_the_same_in_every_epoch(source):
    pairs = XrayPairs(source, 16, geometry=VIEWS)
    assert same(pairs.at(0, 1), pairs.at(9, 1))


def test_pairs_can_be_sent_to_a_process(source):
    assert same(pickle.loads(pickle.dumps(everything(source)))[1], everything(source)[1])


# ---------------------------------------------------------------- augmented X-rays are true
def test_augmented_xrays_are_those_of_the_augmented_body(source):
    pairs = everything(source, noise=XrayNoise(), pose=PoseNoise())
    hu, labels = augment(
        source[2].volume.tensor(),
        320.0,
        pairs.augmentation,
        seeded_generator(3, 4, 2, "volume"),
        torch.from_numpy(source[2].labels),
    )
    item = pairs.at(4, 2)
    assert torch.equal(
        item["xrays"], render_drr(hu, VIEWS.on(Grid.cube(32, 320.0)))
    ) and torch.allclose(item["hu"], hu.view(16, 2, 16, 2, 16, 2).mean((1, 3, 5)), atol=1e-3)
    # labels went along
    assert ((item["hu"] < -500) & (item["labels"] == 1)).sum() > 0.8 * (item["labels"] == 1).sum()


def test_jitter_is_recorded_and_miscalibration_is_not(source):
    hu = source[0].volume.tensor()
    jittered = everything(
        source,
        noise=XrayNoise(),
        augmentation=VolumeAugmentation(),
        pose=PoseNoise(jitter_rotation_deg=5, jitter_shift_mm=10),
    )[0]
    assert torch.equal(jittered["xrays"], render_drr(hu, jittered["geometry"])) and not torch.equal(
        jittered["geometry"].source_mm, VIEWS.source_mm
    )
    sagged = everything(
        source,
        noise=XrayNoise(),
        augmentation=VolumeAugmentation(),
        pose=PoseNoise(detector_shift_mm=10, detector_rotation_deg=3),
    )[0]
    assert torch.equal(
        sagged["geometry"].detector_center_mm, VIEWS.detector_center_mm
    ) and not torch.equal(sagged["xrays"], render_drr(hu, sagged["geometry"]))


@pytest.mark.parametrize("spacing", [40.0, 64.0, 100.0])
def test_the_largest_allowed_deformation_does_not_fold(spacing):
    VolumeAugmentation(elastic_mm=FOLDING_LIMIT * spacing, elastic_spacing_mm=spacing)
    with refused("elastic_mm"):
        VolumeAugmentation(elastic_mm=1.01 * FOLDING_LIMIT * spacing, elastic_spacing_mm=spacing)
    count = math.ceil(320 / spacing) + 3
    for seed in range(5):
        control = (
            FOLDING_LIMIT
            * spacing
            * torch.sign(
                torch.randn(3, count, count, count, generator=torch.Generator().manual_seed(seed))
            )
        )
        field = elastic_displacement(control, 64, 320.0, spacing)
        rows = [
            torch.stack(torch.gradient(field[..., c], spacing=5.0), -1).flip(-1) for c in range(3)
        ]
        assert torch.linalg.det(torch.eye(3) + torch.stack(rows, -2)).min() > 0


def test_flip_mirrors_xrays_and_exchanges_sides(source):
    named = CTSource.from_list(
        [chest(0)],
        32,
        labels=[(POINTS[..., 0] > 0).numpy().astype(np.uint8) + 1],
        label_names={1: "lung right", 2: "lung left"},
    )
    still, flipped = (
        XrayPairs(named, 16, geometry=VIEWS, augmentation=VolumeAugmentation(flip_probability=p))[0]
        for p in (0.0, 1.0)
    )
    assert torch.allclose(flipped["xrays"][0], still["xrays"][0].flip(-1), atol=0.02)
    assert torch.equal(flipped["labels"], still["labels"])  # the left lung is on the left again


@pytest.mark.parametrize(
    "config, settings, argument",
    [
        (VolumeAugmentation, dict(rotation_deg=-1), "rotation_deg"),
        (VolumeAugmentation, dict(flip_probability=2), "flip_probability"),
        (VolumeAugmentation, dict(scale=0.7), "scale"),
        (VolumeAugmentation, dict(lung_hu=200), "lung_hu"),
        (VolumeAugmentation, dict(shift_mm=math.nan), "shift_mm"),
        (XrayNoise, dict(photons_per_pixel=0), "photons_per_pixel"),
        (XrayNoise, dict(readout_photons=5), "readout_photons"),
        (XrayNoise, dict(photons_per_pixel=1e3, floor_photons=0), "floor_photons"),
        (XrayNoise, dict(exposure_sd=-0.1), "exposure_sd"),
        (PoseNoise, dict(detector_rotation_deg=90), "detector_rotation_deg"),
    ],
)
def test_configs_refuse_nonsense(config, settings, argument):
    with pytest.raises(ValueError) as caught:
        config(**settings)
    assert argument in str(caught.value)


# ---------------------------------------------------------------- noise
def test_noise_of_two_views_is_independent():
    seen = (
        add_xray_noise(
            torch.full((2, 100, 100), 2.0), XrayNoise(1e4), torch.Generator().manual_seed(0)
        )
        - 2
    )
    assert abs(np.corrcoef(seen.flatten(1).numpy())[0, 1]) < 0.04


def test_more_exposure_is_less_noise():
    "The error of the exposure acts on the photons, not on the finished image."
    generator = torch.Generator().manual_seed(1)
    views = add_xray_noise(
        torch.full((400, 40, 40), 3.0), XrayNoise(1e4, exposure_sd=0.5), generator
    )
    level, spread = 3 - views.mean((1, 2)), views.var((1, 2))
    assert (
        torch.allclose(torch.log(spread), math.log(math.exp(3) / 1e4) - level, atol=0.25)
        and abs(level.std() - 0.5) < 0.06
    )


def test_detector_rotation_has_the_right_sense():
    turned = move_detector(VIEWS, 0.0, 0.0, 90.0)
    assert torch.allclose(turned.column_step_mm, VIEWS.row_step_mm) and torch.allclose(
        turned.row_step_mm, -VIEWS.column_step_mm
    )
    shifted = move_detector(VIEWS, 7.0, [3.0, -3.0])
    moved = (shifted.detector_center_mm - VIEWS.detector_center_mm) / 20
    assert torch.allclose(
        (moved * VIEWS.column_step_mm).sum(-1), torch.full((2,), 7.0, dtype=torch.float64)
    )
    assert torch.allclose(
        (moved * VIEWS.row_step_mm).sum(-1), torch.tensor([3.0, -3.0], dtype=torch.float64)
    )


def test_pose_noise_has_the_spread_it_says():
    many = ConeBeam.orbit([0.0] * 4000, detector_shape=(2, 2))
    true, recorded = perturb_pose(
        many, PoseNoise(detector_shift_mm=4.0), torch.Generator().manual_seed(0)
    )
    moved = true.detector_center_mm - recorded.detector_center_mm
    # in the plane of an AP detector: x and z
    assert torch.allclose(
        moved.std(0), torch.tensor([4.0, 0.0, 4.0], dtype=torch.float64), atol=0.2
    )


def test_dead_blocks_stay_inside_and_leave_the_rest_alone():
    for seed in range(30):
        image = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(seed))
        dead = cut_out(image, VIEWS, 200.0, torch.Generator().manual_seed(seed))
        for before, after in zip(image, dead):
            rows, columns = (before != after).nonzero().unbind(1)
            assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 <= 10
            assert (
                len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                and len(set(after[rows, columns].tolist())) == 1
            )
    # larger than the detector
    assert torch.isfinite(cut_out(image, VIEWS, 1e4, torch.Generator().manual_seed(0))).all()


# ---------------------------------------------------------------- the cache
def test_cached_equals_rendered(source, tmp_path, monkeypatch):
    plain = [XrayPairs(source, 16, geometry=VIEWS)[i] for i in range(4)]
    for _ in range(2):
        assert all(
            same(a, b)
            for a, b in zip(plain, XrayPairs(source, 16, geometry=VIEWS, cache_dir=tmp_path))
        )
    monkeypatch.setattr(
        "ct_nb.data.xray_pairs.render_drr", lambda *a: pytest.fail("rendered again")
    )
    noisy = XrayPairs(source, 16, geometry=VIEWS, cache_dir=tmp_path, noise=XrayNoise.radiograph())
    assert torch.equal(noisy[0]["hu"], plain[0]["hu"]) and not torch.equal(
        noisy.at(0, 0)["xrays"], noisy.at(1, 0)["xrays"]
    )


def test_whatever_changes_has_another_name(source, tmp_path):
    "Volume, geometry, energy and sizes; each makes new entries and finds its own again."
    volume = source[0].volume
    lighter = CTSource.from_list([Volume(volume.hu - 1, volume.affine)], 32)
    variants = [
        lambda: XrayPairs(source.subset([0]), 16, geometry=VIEWS, cache_dir=tmp_path),
        lambda: XrayPairs(lighter, 16, geometry=VIEWS, cache_dir=tmp_path),
        lambda: XrayPairs(
            source.subset([0]), 16, geometry=translate(VIEWS, (0, 0, 0.1)), cache_dir=tmp_path
        ),
        lambda: XrayPairs(
            source.subset([0]), 16, geometry=VIEWS, energy_kev=61.0, cache_dir=tmp_path
        ),
        lambda: XrayPairs(source.subset([0]), 32, geometry=VIEWS, cache_dir=tmp_path),
        lambda: XrayPairs(source.subset([0]), 16, 16, geometry=VIEWS, cache_dir=tmp_path),
    ]
    for _ in range(2):
        for variant in variants:
            variant()[0]
    assert len(list(tmp_path.glob("*/*.entry"))) == len(variants)


def test_variants_repeat_with_noise_of_their_own_and_are_kept(source, tmp_path, monkeypatch):
    pairs = everything(source, variants=2, cache_dir=tmp_path)
    quiet = everything(source, variants=2, noise=XrayNoise(), cache_dir=tmp_path)
    first, second = (quiet.at(epoch, 1) for epoch in (0, 1))
    assert same(first, everything(source, noise=XrayNoise()).at(0, 1))
    assert not torch.equal(first["hu"], second["hu"])
    assert torch.equal(pairs.at(0, 1)["hu"], pairs.at(2, 1)["hu"])
    assert not torch.equal(pairs.at(0, 1)["xrays"], pairs.at(2, 1)["xrays"])
    monkeypatch.setattr(XrayPairs, "_arrays", None)  # nothing may be rendered again
    assert same(first, quiet.at(2, 1)) and same(second, quiet.at(5, 1))
    with refused("variants"):
        everything(source, variants=0)


def test_what_goes_beside_a_pair_sees_it_before_noise(source):
    def beside(item):
        return {"base": item["xrays"].mean() + len(item["patient"])}

    plain = XrayPairs(source, 16, geometry=VIEWS)
    noisy = XrayPairs(source, 16, geometry=VIEWS, noise=XrayNoise(1e3), beside=beside)
    for epoch in (0, 1):
        item = noisy.at(epoch, 2)
        assert item["base"] == beside(plain[2])["base"]
        assert not torch.equal(item["xrays"], plain[2]["xrays"])
    assert collate([noisy[0], noisy[1]])["base"].shape == (2,)
    assert "base" not in collate([noisy[0], plain[1]])


@pytest.mark.parametrize(
    "spoil", [lambda b: b[: len(b) // 2], lambda b: b[:-100] + bytes(100)], ids=["cut", "zeros"]
)
def test_torn_entries_are_rendered_again(source, tmp_path, spoil):
    pairs = XrayPairs(source, 16, geometry=VIEWS, cache_dir=tmp_path)
    before = pairs[0]
    (entry,) = tmp_path.glob("*/*.entry")
    entry.write_bytes(spoil(entry.read_bytes()))
    with pytest.warns(UserWarning, match="computed again"):
        assert same(pairs[0], before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(pairs[0], before)


def _render_all(pairs, start, results):
    torch.set_num_threads(1)
    start.wait()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cache entry")
        results.put([pair["xrays"].double().sum().item() for pair in pairs])


def test_two_processes_render_at_once(source, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    pairs = XrayPairs(source, 16, geometry=VIEWS, cache_dir=tmp_path)
    processes = [
        context.Process(target=_render_all, args=(pairs, start, results)) for _ in range(2)
    ]
    for p in processes:
        p.start()
    start.set()
    sums = [results.get(timeout=100) for _ in processes]
    for p in processes:
        p.join()
    assert (
        sums[0]
        == sums[1]
        == [pair["xrays"].double().sum().item() for pair in XrayPairs(source, 16, geometry=VIEWS)]
    )
    assert len(list(tmp_path.glob("*/*"))) == 4


def test_statistics_look_at_a_spread_of_cases(source):
    pairs = XrayPairs(source, 16, geometry=VIEWS)
    images = torch.stack([pairs[i]["xrays"] for i in (0, 3)]).double()
    found = xray_statistics(pairs, most=2)
    assert math.isclose(found["mean"], images.mean().item(), rel_tol=1e-6) and math.isclose(
        found["sd"], images.std(correction=0).item(), rel_tol=1e-6
    )


def test_the_xrays_of_a_short_scan_are_those_of_a_body_that_goes_on():
    "A scan of half the cube: beyond its ends a real X-ray shows a body and no air."
    from ct_nb.phantom.chest import phantom
    from ct_nb.physics.scanned import continue_ends

    size = 16
    grid = Grid.cube(size)
    hu = phantom(3, size).volume.hu.copy()
    scanned = np.ones(hu.shape, bool)
    scanned[:5] = scanned[12:] = False
    hu[~scanned] = -1000
    source = CTSource.from_list([Volume(hu, grid.affine, scanned=scanned)], size)
    item = XrayPairs(source, size=size)[0]
    continued = torch.as_tensor(continue_ends(hu, scanned)).float()
    geometry = item["geometry"]
    assert torch.allclose(item["xrays"], render_drr(continued, geometry), atol=0.01)
    assert item["xrays"].sum() > 1.3 * render_drr(torch.as_tensor(hu).float(), geometry).sum()
    assert torch.equal(item["scanned"], torch.as_tensor(scanned))
