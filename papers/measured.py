"""What README shows of measurements: `python papers/measured.py` after training runs, then
`make readme`.

Reads runs/drr2ct, runs/ct_encoder, runs/refinement, runs/refinement_sirt, runs/refinement_real,
runs/cascade and runs/slices (or the same in the folder --runs) and keeps in papers/measured.json
their figures and their origin: version, day, fingerprint of the data. Draws README's pictures from
runs/drr2ct and runs/cascade and keeps their digests. Writes the tables into nbs/index.ipynb between
their marks. A run that is not there keeps its figures.

`python papers/measured.py --clone` measures first how long a newcomer waits: it clones this
repository into a temporary folder, sets it up and runs `make demo` there, with empty caches.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "papers" / "measured.json"
INDEX = ROOT / "nbs" / "index.ipynb"
IMAGES = ROOT / "nbs" / "images"


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- what a run leaves
def made(run: Path) -> dict:
    "Of what a run's figures are, so that old ones are known as such."
    config = _json(run / "config.json")
    day = datetime.date.fromtimestamp((run / "metrics.json").stat().st_mtime).isoformat()
    return {
        "version": config["versions"]["ct_nb"],
        "date": day,
        "preset": config["preset"],
        "data": (
            str(config["data"]).split(":")[0]
            if str(config["data"]).startswith("phantom")
            else "real"
        ),
        "fingerprint": config["training"]["fingerprint"],
    }


SCORES = {
    "psnr": ("PSNR, dB ↑", "{:.2f}"),
    "ssim": ("SSIM ↑", "{:.3f}"),
    "mae_hu_body": ("MAE in the body, HU ↓", "{:.0f}"),
    "drr_error_held_out": ("DRR error on unseen angles ↓", "{:.3f}"),
}
BASELINES = {
    "atlas_consistent": "mean atlas with data consistency",
    "nearest_neighbour": "nearest neighbour in X-ray space",
    "mean_atlas": "mean atlas",
    "sirt": "SIRT",
    "minimum_norm": "minimum norm",
    "air": "air",
}


def drr2ct(run: Path) -> dict:
    m = _json(run / "metrics.json")
    gain = m["gain_over_best_baseline"]["psnr"]
    return {
        "psnr": m["predictors"]["model"]["psnr"],
        "ssim": m["predictors"]["model"]["ssim"],
        "baseline": gain["baseline"],
        "baseline_psnr": m["predictors"][gain["baseline"]]["psnr"],
        "gain": gain["mean"],
        "interval": gain["interval_95"],
        "cases": m["cases"],
        "training_cases": len(_json(run / "config.json")["training"]["cases"]),
        "scores": {
            name: {
                metric: [m["predictors"][name][metric], m["sd"][name][metric]] for metric in SCORES
            }
            for name in ("model", *BASELINES)
        },
    }


def ct_encoder(run: Path) -> dict:
    m = _json(run / "metrics.json")
    rows = [
        line.split(",") for line in (run / "retrieval.csv").read_text(encoding="utf-8").splitlines()
    ]
    table = [dict(zip(rows[0], row)) for row in rows[1:]]
    first = next(
        row
        for row in table
        if row["question"] == "abnormal"
        and row["direction"] == "text to image"
        and float(row["k"]) == 1
    )
    return {
        "recall_at_1": float(first["recall"]),
        "chance": float(first["chance"]),
        "candidates": int(float(first["candidates"])),
        "sentence_place": m["sentence_place"]["share"]["mean"],
        "polarity": m["polarity"]["balanced"]["mean"],
        "cases": m["cases"],
    }


def refinement(run: Path) -> dict:
    m = _json(run / "metrics.json")
    r = _json(run / "refinement.json")
    gain = r["gain_over"]["coarse"]["psnr"]
    return {
        "psnr": m["predictors"]["refined"]["psnr"],
        "coarse_psnr": m["predictors"]["coarse"]["psnr"],
        "gain": gain["mean"],
        "interval": [gain["low"], gain["high"]],
        "cases": m["cases"],
    }


def cascade(run: Path) -> dict:
    m = _json(run / "metrics.json")
    u = _json(run / "uncertainty.json")
    held = {}
    for row in u["intervals"]:
        if row["region"] == "body":
            held.setdefault(str(row["level"]), []).append(row["coverage"])
    start = "drr2ct" if "drr2ct" in m["predictors"] else "prior_start"
    return {
        "psnr": m["predictors"]["model"]["psnr"],
        "start": start,
        "start_psnr": m["predictors"][start]["psnr"],
        "samples": u["samples"],
        "coverage": {level: sum(values) / len(values) for level, values in held.items()},
        "cases": m["cases"],
    }


def slices(run: Path) -> dict:
    m = _json(run / "metrics.json")
    return {
        "psnr": m["predictors"]["regressor_consistent"]["psnr"],
        "cubic_psnr": m["predictors"]["cubic"]["psnr"],
        "linear_psnr": m["predictors"]["linear"]["psnr"],
        "thick_mm": m["thick_mm"],
        "cases": m["cases"],
        "of": "phantoms" if made(run)["data"] == "phantom" else "patients",
    }


RUNS = {
    "drr2ct": drr2ct,
    "ct_encoder": ct_encoder,
    "refinement": refinement,
    "cascade": cascade,
    "slices": slices,
    "refinement_sirt": refinement,
    "refinement_real": refinement,
}


# ---------------------------------------------------------------- pictures
def _case(run: Path) -> tuple:
    "X-rays, their geometry, the CT, and its folder, of the first case that a run was judged on."
    import numpy as np
    from ct_nb.data.read import read_volume
    from ct_nb.physics.geometry_io import load_geometry

    name = re.sub(r"[^\w.-]+", "_", _json(run / "config.json")["validation"]["cases"][0])
    folder = run / "cases" / name
    return (
        np.load(folder / "xrays.npz")["line_integrals"],
        load_geometry(folder / "geometry.json"),
        read_volume(folder / "truth.nii.gz"),
        folder,
    )


def comparison(run: Path):
    """X-rays, CT, reconstruction, best baseline and error, from the NIfTI of a run of drr2ct; a
    matplotlib Figure.
    """
    from ct_nb.data.read import read_volume
    from ct_nb.viewer.figures import comparison_figure

    xrays, geometry, truth, folder = _case(run)
    baseline = _json(run / "metrics.json")["gain_over_best_baseline"]["psnr"]["baseline"]
    return comparison_figure(
        xrays,
        geometry,
        truth,
        {
            "reconstruction": read_volume(folder / "model.nii.gz"),
            baseline: read_volume(folder / f"{baseline}.nii.gz"),
        },
    )


def samples(run: Path):
    """What the samples of a cascade agree and disagree about, drawn anew from its weights; a
    matplotlib Figure.
    """
    import torch
    from ct_nb.cascade.sample import reconstruct_sampled
    from ct_nb.cascade.train import load_cascade
    from ct_nb.evaluation.uncertainty import hallucination_map, summarize_samples
    from ct_nb.cascade.figures import uncertainty_figure

    xrays, geometry, truth, _ = _case(run)
    config = _json(run / "config.json")
    reconstruction = reconstruct_sampled(
        xrays,
        geometry,
        load_cascade(run),
        samples=config["settings"]["samples"],
        steps=config["settings"]["sampling_steps"],
        seed=config["seed"],
    )
    samples = torch.stack([sample.tensor() for sample in reconstruction.samples])
    return uncertainty_figure(
        truth,
        summarize_samples(samples),
        samples[0],
        hallucination_map(samples, geometry.on(truth.grid).to(torch.float32)),
    )


PICTURES = {"comparison.png": ("drr2ct", comparison), "samples.png": ("cascade", samples)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def redraw(name: str, runs: Path, images: Path = IMAGES) -> dict:
    "Draw one of README's pictures; what is kept of it."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    of, draw = PICTURES[name]
    figure = draw(runs / of)
    figure.savefig(images / name, dpi=100, facecolor="white")
    plt.close(figure)
    return {"sha256": digest(images / name), **made(runs / of)}


# ---------------------------------------------------------------- how long a newcomer waits
def machine() -> dict:
    "Cores and kind of processor, and how busy it was."
    try:
        model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        model = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "processor": model[1] if model else platform.processor(),
        "load_before": round(os.getloadavg()[0], 1),
    }


def clone(folder: Path) -> dict:
    """Seconds from `git clone` to the end of `make setup`, to the first picture and to the end of
    `make demo`, in an empty folder; SystemExit with the last lines of what fails.
    """
    about = machine()
    begin = time.monotonic()
    seconds = {}
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "MPLBACKEND", "OMP_NUM_THREADS")
    } | {"CT_NB_CACHE": str(folder / "cache"), "PIP_NO_CACHE_DIR": "1"}
    for step, command in (
        ("clone", ["git", "clone", "--quiet", str(ROOT), "ct_nb"]),
        ("setup", ["make", "setup"]),
        ("demo", ["make", "demo"]),
    ):
        running = subprocess.Popen(
            command,
            cwd=folder if step == "clone" else folder / "ct_nb",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = []
        for line in running.stdout:
            output.append(line)
            if (
                step == "demo"
                and "first picture after" in line
                and (folder / "ct_nb" / "runs" / "drr2ct" / "first.png").is_file()
            ):
                seconds["first_picture"] = round(time.monotonic() - begin)
        if running.wait():
            sys.exit(f"{' '.join(command)} failed:\n{''.join(output[-30:])}")
        seconds[step] = round(time.monotonic() - begin)
        print(f"{seconds[step]} s: {' '.join(command)}", flush=True)
    if "first_picture" not in seconds:
        sys.exit("make demo drew no first picture")
    return {"seconds": seconds, "date": datetime.date.today().isoformat(), **about}


# ---------------------------------------------------------------- what README says
def share(x: float) -> str:
    return f"{x:.0%}".replace("%", " %")


def gained(r: dict, start: str, whom: str) -> str:
    low, high = r["interval"]
    return (
        f"{start} {r['coarse_psnr']:.2f} → {r['psnr']:.2f} dB,"
        f" {r['gain']:+.2f} [{low:+.2f}, {high:+.2f}], {r['cases']} {whom}"
    )


def figures(m: dict) -> dict[str, str]:
    "System → what was measured, in a line."
    text = {}
    if r := m.get("drr2ct"):
        low, high = r["interval"]
        text["drr2ct"] = (
            f"{r['psnr']:.2f} dB, SSIM {r['ssim']:.3f}, {r['cases']} held-out phantoms; best"
            f" baseline {r['baseline_psnr']:.2f} dB; gain {r['gain']:.2f} [{low:.2f}, {high:.2f}] dB"
        )
    if r := m.get("cascade"):
        start = "drr2ct" if r["start"] == "drr2ct" else "the linear prior"
        levels = " / ".join(f"{100 * float(level):g}" for level in r["coverage"])
        coverage = " / ".join(f"{100 * value:.1f}" for value in r["coverage"].values())
        text["cascade"] = (
            f"mean of {r['samples']} samples {r['psnr']:.2f} dB, {start} {r['start_psnr']:.2f} dB"
            f" on the same {r['cases']} phantoms; intervals of {levels} % cover {coverage} %"
        )
    parts = [
        gained(m[name], start, whom)
        for name, start, whom in (
            ("refinement_sirt", "after SIRT (`-p coarse sirt`):", "phantoms"),
            ("refinement_real", "after SIRT, `-p data CTS`:", "held-out patients"),
            ("refinement", "after drr2ct:", "phantoms"),
        )
        if m.get(name)
    ]
    if parts:
        text["refine"] = "; ".join(parts)
    if r := m.get("ct_encoder"):
        text["ct_encoder"] = (
            f"report → scan: recall at 1 {100 * r['recall_at_1']:.1f} % of {r['candidates']}"
            f" phantoms with findings (chance {100 * r['chance']:.1f} %); sentence in its region"
            f" {share(r['sentence_place'])}; negation accuracy {share(r['polarity'])}"
        )
    if r := m.get("slices"):
        one = r["cases"] == 1
        whom = r["of"].removesuffix("s") if one else r["of"]
        text["slices"] = (
            f"{r['thick_mm']:g} mm → thin: {r['psnr']:.2f} dB, cubic {r['cubic_psnr']:.2f}, linear"
            f" {r['linear_psnr']:.2f}; {r['cases']} held-out {whom}"
            + (", no confidence interval" if one else "")
        )
    return text


SYSTEMS = {  # name → what it does, recipe, parameters of the command, page
    "drr2ct": ("two X-rays → a CT", "train_drr2ct", "", "drr2ct"),
    "cascade": (
        "diffusion cascade: samples of CTs consistent with the X-rays",
        "train_cascade",
        " -p coarse runs/drr2ct",
        "cascade",
    ),
    "refine": ("detail of a coarse CT", "train_refinement", "", "refinement"),
    "ct_encoder": ("CT encoder aligned with reports", "train_ct_encoder", "", "ct_encoder"),
    "slices": ("thick slices → thin slices", "train_slices", " -p data THIN_CTS", "slices"),
}


def systems(m: dict) -> str:
    "The five systems: a line and a command each, and what was measured."
    measured = figures(m)
    lines = [
        "| system | what it does | command | measured, preset `cpu` | claims, limits |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| **{name}** | [{what}]({recipe}.ipynb) | `papermill nbs/{recipe}.ipynb"
        f" runs/{recipe}.ipynb{more}` | {measured.get(name, 'not yet')} |"
        f" [{page}](../papers/{page}.md) |"
        for name, (what, recipe, more, page) in SYSTEMS.items()
    ]
    return "\n".join(lines)


def provenance(m: dict, today: str | None = None) -> str:
    """Of which version and day the figures are, and which of them are old: of a run that did not
    say what it is of, or (drr2ct) of other phantoms than this version makes, whose fingerprint is
    `today`.
    """
    by_version, old = {}, set()
    for name in RUNS:
        if name not in m:
            continue
        of = m[name].get("made")
        system = "refine" if name.startswith("refinement") else name
        other = name == "drr2ct" and of and of["data"] == "phantom"
        if of is None or other and today not in (None, of["fingerprint"]):
            old.add(system)
        else:
            by_version.setdefault(f"ct_nb {of['version']}, {of['date']}", set()).add(system)
    text = [f"{', '.join(sorted(names))}: {when}" for when, names in by_version.items()]
    if old:
        text.append(f"{', '.join(sorted(old))}: measured with an earlier version")
    return (
        f"Two cores, no GPU, minutes each ({'; '.join(text)}). `python papers/measured.py` writes"
        " the table from what the runs leave."
    )


def scores(m: dict) -> str:
    "drr2ct beside its baselines, best first."
    r = m.get("drr2ct")
    if not r:
        return "Not yet: `papermill nbs/train_drr2ct.ipynb`, then `python papers/measured.py`."
    rows = sorted(r["scores"], key=lambda name: (name != "model", -r["scores"][name]["psnr"][0]))
    lines = [
        (
            f"`papermill nbs/train_drr2ct.ipynb` (preset `cpu`, seed 0): {r['cases']} held-out phantoms, 64³ voxels of"
            " 5 mm, mean ± sd. The baselines use no network; the atlases and the nearest neighbour"
            f" know the {r['training_cases']} training phantoms."
        ),
        "",
        "| | " + " | ".join(label for label, _ in SCORES.values()) + " |",
        "|---|" + "---|" * len(SCORES),
    ]
    for name in rows:
        mark = "**" if name == "model" else ""
        cells = [BASELINES.get(name, name)]
        for metric, (_, form) in SCORES.items():
            value, sd = r["scores"][name][metric]
            cells.append(form.format(value) + (f" ± {form.format(sd)}" if sd else ""))
        lines.append("| " + " | ".join(f"{mark}{text}{mark}" for text in cells) + " |")
    return "\n".join(lines)


def waiting(m: dict) -> str:
    "How long a newcomer waits."
    if "clone" not in m:
        return "How long that takes is measured by `python papers/measured.py --clone`."
    c = m["clone"]
    minutes = {name: f"{seconds / 60:.0f}" for name, seconds in c["seconds"].items()}
    return (
        f"From `git clone` to the first reconstruction: **{minutes['first_picture']} minutes**,"
        f" {minutes['setup']} of them for PyTorch and the rest of `.venv`; to the trained and"
        f" evaluated network: {minutes['demo']} minutes ({c['cores']} cores, {c['processor']},"
        f" {c['date']}, `python papers/measured.py --clone`)."
    )


def blocks(m: dict, today: str | None = None) -> dict[str, str]:
    "Mark → what stands there."
    return {
        "systems": systems(m) + "\n\n" + provenance(m, today),
        "scores": scores(m),
        "waiting": waiting(m),
    }


def put(text: str, name: str, new: str) -> str:
    "`new` between the two marks of this name."
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if any(text.count(mark) != 1 for mark in (first, last)):
        raise ValueError(f"nbs/index.ipynb: expected one {first} and one {last}")
    before, rest = text.split(first)
    return f"{before}{first}\n{new}\n{last}{rest.split(last)[1]}"


def phantoms_today() -> str:
    "Fingerprint of what the recipe `train_drr2ct` trains on, as this version makes it."
    from ct_nb.drr2ct.train import DRR2CTRun

    return DRR2CTRun("cpu").open().training.source.fingerprint()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    parser.add_argument(
        "--clone", action="store_true", help="measure first how long a newcomer waits"
    )
    given = parser.parse_args()
    measured = _json(KEPT) if KEPT.is_file() else {}
    if given.clone:
        with tempfile.TemporaryDirectory() as folder:
            measured["clone"] = clone(Path(folder))
    for name, read in RUNS.items():
        folder = given.runs / name
        if (folder / "metrics.json").is_file():
            measured[name] = {**read(folder), "made": made(folder)}
        else:
            print(f"{folder}: no run there; its figures stay as they were", file=sys.stderr)
    for name, (of, _) in PICTURES.items():
        if (given.runs / of / "metrics.json").is_file():
            measured.setdefault("pictures", {})[name] = redraw(name, given.runs)
    KEPT.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    notebook = _json(INDEX)
    texts = blocks(measured, phantoms_today())
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        for name, new in texts.items():
            if f"<!-- {name} -->" in text:
                text = put(text, name, new)
        cell["source"] = text.splitlines(keepends=True)
    INDEX.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*texts.values(), sep="\n\n")


if __name__ == "__main__":
    main()
