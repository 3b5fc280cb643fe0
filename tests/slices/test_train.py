"""Training on slices: crops, a run and its scoreboard, and what is refused. That a killed run resumes is in tests/training/test_resume.py."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from ct_files import body, pair_members, zipped
from refusals import refused

import ct_nb.slices.train as training
import ct_nb.slices.vae_train as vae_training
from ct_nb.physics.volume import Volume
from ct_nb.slices.crops import CachedStacks, SliceCrops, resample_thin
from ct_nb.slices.figures import slices_cut_figure
from ct_nb.slices.models import SliceDiffusion, SliceRegressor
from ct_nb.slices.open import open_stacks
from ct_nb.slices.prepared import prepare_stacks
from ct_nb.slices.rplhr_ct import rplhr, rplhr_scores
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    StackPairs,
    ThickSliceRange,
    average_slices,
    collate_stacks,
    slice_profile_matrix,
    to_unit,
)
from ct_nb.slices.thin_ct_files import interpolate_file
from ct_nb.slices.train import (
    SLICES_PRESETS,
    SliceModels,
    SlicesRun,
    _Learner,
    load_slices,
)
from ct_nb.slices.vae_train import VAERun
from ct_nb.training.checkpoints import WeightsError
from ct_nb.viewer.figures import training_figure


@pytest.fixture(scope="module")
def pairs():
    return StackPairs(
        CachedStacks(open_stacks("phantom:2", size=64, side_mm=192)),
        ThickSliceRange((9.0, 12.0), (0.8, 1.2), (0.0, 1.0), ("rectangular", "gaussian")),
        32,
        3,
    )


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    "The run of the preset micro, evaluated with a picture."
    out = tmp_path_factory.mktemp("run") / "slices"
    shutil.copytree(trained("slices"), out)
    run = SlicesRun.load(out)
    return run, run.history, run.evaluate(picture=slices_cut_figure, progress=False)


def test_padding_in_a_batch_teaches_nothing(pairs):
    items = [resample_thin(pairs.at(3, 0), 4.0), pairs.at(3, 0)]
    batch = collate_stacks(items)
    assert not batch["mask"].all()
    torch.manual_seed(0)
    model = SliceRegressor(training.SliceRegressorConfig.preset("smoke"))
    given = lambda b: [
        b[key] for key in ("thin", "thick", "thick_axis", "thin_axis", "profile", "mask")
    ]
    spoilt = dict(batch, thin=torch.where(batch["mask"][..., None, None], batch["thin"], 900.0))
    assert (
        model.loss(*given(batch))[0]
        == model.loss(*given(spoilt))[0]
        != model.loss(*given(spoilt)[:-1])[0]
    )


def test_a_step_draws_the_same_again(pairs):
    batch = collate_stacks([SliceCrops(pairs).at(0, 0)])
    torch.manual_seed(0)
    learner = _Learner(SliceDiffusion(training.SliceDiffusionConfig.preset("smoke")), 3)
    losses = [learner(batch, step)[1]["diffusion"] for step in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_both_are_of_one_size():
    for name, preset in SLICES_PRESETS.items():
        with torch.device("meta"):
            sizes = [
                sum(
                    p.numel()
                    for n, p in kind(config(preset.network)).network.named_parameters()
                    if "time" not in n
                )
                for kind, config in (
                    (SliceRegressor, training.SliceRegressorConfig),
                    (SliceDiffusion, training.SliceDiffusionConfig),
                )
            ]
        assert abs(sizes[0] / sizes[1] - 1) < 0.06, (name, sizes)


def test_the_run_leaves_what_it_promises(done):
    run, history, board = done
    out = run.out
    for name in (
        "model.safetensors",
        "config.json",
        "scoreboard.csv",
        "metrics.json",
        "scoreboard.png",
        "cuts.png",
        "stages/regressor/history.jsonl",
        "stages/diffusion/model.safetensors",
        "vae/model.safetensors",
    ):
        assert (out / name).is_file(), name
    assert not list(out.rglob("training_state.pt"))
    config = json.loads((out / "config.json").read_text())
    assert (
        config["system"] == "slices"
        and config["versions"]["torch"]
        and config["training"]["fingerprint"] != config["validation"]["fingerprint"]
    )
    assert config["seen"]["thick_mm"] == pytest.approx([16.0, 24.0])
    assert config["seen"]["thin_mm"] == pytest.approx([7.5, 11.25])
    assert not set(config["training"]["cases"]) & set(config["validation"]["cases"]) and not set(
        run.training.patients
    ) & set(run.validation.patients)
    assert [row["step"] for row in history] == [1, 2, 3, 4] and training_figure(history)


def test_the_board_holds_networks_floors_and_ceilings(done):
    run, _, board = done
    assert board.models == [
        "regressor_consistent",
        "regressor",
        "diffusion_sample",
        "diffusion_sample_free",
        "diffusion_mean",
    ]
    assert board.baselines == ["nearest", "linear", "cubic", "back_projection"] and {
        "upper_bound_vae",
        "upper_bound_residual",
    } <= set(board.predictors)
    for name in ("regressor_consistent", "diffusion_mean", "diffusion_sample"):
        assert board.mean(name, "reaveraged_worst_hu") < 1
    assert board.mean("diffusion_sample_free", "reaveraged_worst_hu") > 1
    assert board.mean("upper_bound_residual", "psnr") >= board.mean("back_projection", "psnr") - 0.5
    assert set(board.patients) == {run.validation.patients[0]} and board.about["thick_mm"] == 20


def test_weights_are_read_as_they_were(done):
    run = done[0]
    again = load_slices(run.out)
    assert not again.training and all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), run.slices.state_dict().values())
    )
    assert (
        again.about["preset"] == "micro"
        and float(again.diffusion.residual_scale.min()) > 0
        and not torch.equal(again.diffusion.residual_scale, torch.ones(1, 4, 1, 1, 1))
    )
    with pytest.raises(WeightsError, match="slice_vae"):
        load_slices(run.out / "vae")


def test_one_of_the_two_alone(done, tmp_path):
    run = done[0]
    alone = SlicesRun("micro", out=tmp_path, vae=str(run.out / "vae"), model="regressor").open()
    alone.fit(progress=False)
    assert alone.slices.diffusion is None and load_slices(tmp_path).diffusion is None
    board = alone.evaluate(progress=False)
    assert (
        board.models == ["regressor_consistent", "regressor"]
        and "upper_bound_vae" not in board.predictors
        and not (tmp_path / "cuts.png").exists()
    )
    other = SlicesRun("micro", out=tmp_path, vae=str(run.out / "vae"), model="diffusion").open()
    other.fit(progress=False)
    # the one that was there was taken
    assert other.slices.regressor is not None and other.slices.diffusion is not None


def test_bad_settings_get_a_sentence(done, tmp_path):
    with refused("model"):
        SlicesRun("smoke", model="gan")
    with pytest.raises(ValueError, match="needs a regressor"):
        SliceModels()
    with pytest.raises(WeightsError, match="no such file"):
        SlicesRun("micro", out=tmp_path, vae=str(tmp_path / "none")).open()
    shutil.copytree(done[0].out / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    # another scan of a patient who is evaluated here: no case is the same
    config["training"]["patients"] += config["validation"]["patients"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on phantom-.*, which would be evaluated here"):
        SlicesRun("micro", out=tmp_path / "run", vae=str(tmp_path / "vae")).open()
    # of a run that did not write down its patients
    config["training"] = {"cases": config["training"]["cases"] + config["validation"]["cases"]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="would be evaluated here"):
        SlicesRun("micro", out=tmp_path / "run", vae=str(tmp_path / "vae")).open()


def test_steps_and_spacing_are_taken():
    run = SlicesRun("cpu", steps=10, thick_mm=3.0, seed=4)
    assert (
        run.settings.regressor.steps == run.settings.diffusion.steps == 10
        and run.settings.regressor.warmup_steps == 2
        and run.settings.thick_mm == 3
        and run.settings.diffusion.seed == 4
    )
    assert SlicesRun("cpu").settings.thick_mm == 5


# ---------------------------------------------------------------- measured slices, in three sides
@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    "A PE archive of four patients, and what preparing it gives."
    root = tmp_path_factory.mktemp("pe")
    for n in range(4):
        zipped(root / "archive" / "APE" / f"{n}.zip", pair_members(body((60, 32, 32), seed=n)))
    prepare_stacks(open_stacks(f"pe:{root / 'archive'}"), root / "prepared", workers=0)
    return root


@pytest.fixture(scope="module")
def measured(archive, tmp_path_factory):
    "A short run on it, watched as it goes; and who was looked at while it was."
    watched, own = [], CachedStacks.__getitem__

    def looking(validate):
        def told(self, learner, **more):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(
                    CachedStacks,
                    "__getitem__",
                    lambda kept, index: watched.append(kept.patients[index]) or own(kept, index),
                )
                return validate(self, learner, **more)

        return told

    often = lambda trainer: replace(trainer, validate_every=2)
    preset = SLICES_PRESETS["smoke"]
    small = vae_training.VAE_PRESETS["smoke"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(VAERun, "_validate", looking(VAERun._validate))
        patched.setattr(SlicesRun, "_validate", looking(SlicesRun._validate))
        patched.setattr(vae_training, "LATENT_SCALE_CROPS", 8)
        patched.setitem(
            vae_training.VAE_PRESETS,
            "smoke",
            replace(small, trainer=replace(small.trainer, steps=4, validate_every=2)),
        )
        run = SlicesRun(
            "smoke",
            str(archive / "prepared"),
            tmp_path_factory.mktemp("measured"),
            steps=2,
            settings=replace(
                preset, regressor=often(preset.regressor), diffusion=often(preset.diffusion)
            ),
        ).open()
        said = run.describe()
        run.fit(progress=False)
    return run, said, watched


def test_test_patients_are_not_read_before_the_evaluation(measured):
    run, said, watched = measured
    sides = [set(side.patients) for side in (run.training, run.validation, run.test)]
    assert [len(side) for side in sides] == [2, 1, 1] and len(set.union(*sides)) == 4
    assert set(watched) == sides[1] and len(watched) > 6
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "trained on",
        "validated on",
        "evaluated on",
        "thick",
        "thin",
    ]
    config = json.loads((run.out / "config.json").read_text())
    assert [config[side]["patients"] for side in ("training", "validation", "test")] == [
        sorted(side) for side in sides
    ] and len({config[side]["fingerprint"] for side in ("training", "validation", "test")}) == 3
    vae = json.loads((run.out / "vae" / "config.json").read_text())
    assert vae["training"]["patients"] == sorted(sides[0]) and vae["test"]["patients"] == sorted(
        sides[2]
    )


def test_prepared_scans_stay_on_disk(measured):
    run = measured[0]
    assert all(
        isinstance(run.training[n].thin, np.memmap) and isinstance(run.training[n].thick, np.memmap)
        for n in range(len(run.training))
    )
    assert {row["stage"] for row in run.history} == {"regressor", "diffusion"} and (
        run.out / "model.safetensors"
    ).is_file()


def test_a_pe_archive_is_split_as_it_is_when_prepared(archive):
    zips, prepared = (
        VAERun("smoke", data).open()
        for data in (f"pe:{archive / 'archive'}", str(archive / "prepared"))
    )
    assert [side.patients for side in (zips.training, zips.validation, zips.test)] == [
        side.patients for side in (prepared.training, prepared.validation, prepared.test)
    ]


def test_slices_that_were_measured_are_what_was_seen(measured, tmp_path):
    "The preset would simulate 12 mm; 5 mm is what there was, and what a scan is held against."
    run, said, _ = measured
    assert (
        run.slices.about["seen"]
        == {
            "thick_mm": [5.0, 5.0],
            "width": [1.0, 1.0],
            "thin_mm": [1.0, 1.5],
        }
        and "thick:        5 to 5 mm to learn from, 5 mm to be evaluated on" in said
    )
    for spacing in (5.0, 8.0, 12.0):
        Volume(body((8, 32, 40)), np.diag([2.0, 2, spacing, 1])).save(
            tmp_path / f"{spacing:g}.nii.gz"
        )
    go = lambda spacing: interpolate_file(
        tmp_path / f"{spacing}.nii.gz",
        tmp_path / "thin.nii.gz",
        run.out,
        1.0,
        model="regressor",
        progress=False,
    )
    found = go(5)
    assert found.thin_axis.count == 40 and not any("trained on" in note for note in found.notes)
    for spacing in (8, 12):
        with pytest.raises(
            ValueError,
            match=(
                f"{spacing}.nii.gz: its slices are {spacing} mm apart, the model was trained on 5 to 5"
                " mm; train on thicker"
            ),
        ):
            go(spacing)


# ---------------------------------------------------------------- RPLHR-CT
def test_rplhr_is_also_evaluated_by_its_own_rules(tmp_path, capsys):
    centres = SliceAxis(0.0, 5.0, 10)
    fine = SliceAxis(0.0, 1.0, 46)
    matrix = slice_profile_matrix(fine, centres, SliceProfile(5.0))
    for n, side in enumerate(("train", "val", "test")):
        thin = to_unit(body((46, 32, 40), seed=n)).astype(np.float32)
        thick = average_slices(thin, matrix).clip(0, 1)
        for width, hu, spacing in (("1mm", thin, 1.0), ("5mm", thick, 5.0)):
            Volume(hu, np.diag([2.0, 2, spacing, 1])).save(
                tmp_path / "set" / side / width / f"{side}.nii.gz"
            )
    flags = {"preset": "smoke", "data": f"rplhr:{tmp_path / 'set'}", "out": tmp_path / "run"}
    flags |= {"model": "regressor", "steps": 1}
    training.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "trained on:   train\nvalidated on: val\nevaluated on: test" in said and (
        metrics["thick_mm"],
        metrics["measured"],
    ) == (5, True)
    assert {
        row.split(",")[1]
        for row in (tmp_path / "run" / "scoreboard.csv").read_text().splitlines()[1:]
    } == {"test"}
    stack = rplhr(tmp_path / "set")[2]
    model = load_slices(tmp_path / "run").regressor
    with torch.no_grad():
        hu = model(
            torch.from_numpy(stack.thick).float()[None],
            stack.thick_axis,
            stack.thin_axis,
            stack.profile,
            consistent=True,
        )[0]
    # all ten thick slices; the board's own case has eight of them
    by_hand = rplhr_scores(to_unit(hu), to_unit(stack.thin))
    assert (
        stack.thick.shape[0] == 10
        and metrics["rplhr"]["regressor_consistent"]["psnr"]
        == pytest.approx(by_hand["psnr"], abs=1e-3)
        and metrics["rplhr"]["regressor_consistent"]["ssim"]
        == pytest.approx(by_hand["ssim"], abs=1e-4)
    )
    assert "RPLHR-CT evaluator" in said and f"{by_hand['psnr']:.2f}" in said
    assert {"cubic", "back_projection", "regressor"} <= set(metrics["rplhr"])


# ---------------------------------------------------------------- bad data
def test_a_scan_that_cannot_be_used_does_not_end_the_run(tmp_path):
    affine = lambda spacing: np.diag([2.0, 2, spacing, 1])
    for n in range(3):
        Volume(body((90, 32, 40), seed=n), affine(1.25)).save(tmp_path / "cts" / f"good{n}.nii.gz")
    Volume(body((30, 32, 40)), affine(4.0)).save(tmp_path / "cts" / "thick.nii.gz")
    Volume(body((20, 32, 40)), affine(1.0)).save(tmp_path / "cts" / "short.nii.gz")
    Volume(body((90, 16, 40)), affine(1.0)).save(tmp_path / "cts" / "narrow.nii.gz")
    (tmp_path / "cts" / "broken.nii.gz").write_bytes(
        (tmp_path / "cts" / "good0.nii.gz").read_bytes()[:5000]
    )
    run = SlicesRun("smoke", str(tmp_path / "cts"), tmp_path / "run").open()
    assert sorted(run.training.ids + run.test.ids) == ["good0", "good1", "good2"]
    reasons = dict(reason.split(": ", 1) for reason in run.left_out)
    assert (
        set(reasons) == {"thick", "short", "narrow", "broken"}
        and len([line for line in run.describe().splitlines() if line.startswith("left out:")]) == 4
    )
    for name, words in (
        ("thick", "4 mm apart, at most 1.5 mm"),
        ("short", "20 mm long"),
        ("narrow", "crop of 4×32×32 does not fit"),
        ("broken", "cut short"),
    ):
        assert words in reasons[name], reasons[name]


@pytest.mark.parametrize("module", [training, vae_training])
def test_a_folder_without_a_usable_scan_gets_one_sentence(module, tmp_path):
    Volume(body((12, 32, 40)), np.diag([2.0, 2, 5, 1])).save(tmp_path / "cts" / "thick.nii.gz")
    (tmp_path / "cts" / "broken.nii.gz").write_bytes(b"\x1f\x8b")
    for data, words in (
        (tmp_path / "cts", "none of its 2 scans can be used"),
        (tmp_path / "nowhere", "neither 'phantom:COUNT'"),
        ("phantom:1", "leave at least one on each side"),
    ):
        with pytest.raises(SystemExit) as ended:
            module.main(
                ["--preset", "smoke", "--data", str(data), "--out", str(tmp_path / "run")]
            )
        assert (
            isinstance(ended.value.code, str)
            and ended.value.code.startswith(f"{module.__name__}: ")
            and words in ended.value.code
            and "\n" not in ended.value.code
        )
