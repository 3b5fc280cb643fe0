"""What README shows of measurements: `python papers/measured.py` after training runs, then `make readme`.

Reads runs/drr2ct, runs/ct_encoder, runs/refinement, runs/refinement_sirt, runs/refinement_real, runs/cascade and runs/slices (or the same in the folder --runs) and keeps in papers/measured.json their figures and what they are of: the version, the day, the
fingerprint of the data. Draws README's pictures anew from runs/drr2ct and runs/cascade and keeps their digests. Writes the tables into nbs/index.ipynb between their marks. What is not there keeps its figures.

`python papers/measured.py --clone` measures first how long a newcomer waits: it clones this repository into a temporary folder, sets it up and runs `make demo` there, with empty caches.
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
FLOORS = {
    "atlas_consistent": "atlas, made consistent with the X-rays",
    "nearest_neighbour": "nearest neighbour in X-ray space",
    "mean_atlas": "mean atlas",
    "sirt": "SIRT",
    "minimum_norm": "minimum norm",
    "air": "air",
}


def drr2ct(run: Path) -> dict:
    m = _json(run / "metrics.json")
    floor = m["gain_over_best_floor"]["psnr"]
    return {
        "psnr": m["predictors"]["model"]["psnr"],
        "ssim": m["predictors"]["model"]["ssim"],
        "floor": floor["floor"],
        "floor_psnr": m["predictors"][floor["floor"]]["psnr"],
        "gain": floor["mean"],
        "interval": floor["interval_95"],
        "cases": m["cases"],
        "training_cases": len(_json(run / "config.json")["training"]["cases"]),
        "scores": {
            name: {
                metric: [m["predictors"][name][metric], m["sd"][name][metric]] for metric in SCORES
            }
            for name in ("model", *FLOORS)
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
    from ct_nb.physics.geometry import ConeBeam
    from ct_nb.data.read import read_volume

    name = re.sub(r"[^\w.-]+", "_", _json(run / "config.json")["validation"]["cases"][0])
    folder = run / "cases" / name
    return (
        np.load(folder / "xrays.npz")["line_integrals"],
        load_geometry(folder / "geometry.json"),
        read_volume(folder / "truth.nii.gz"),
        folder,
    )


def comparison(run: Path):
    """X-rays, CT, reconstruction, best floor and error, from the NIfTI of a run of system A; a
    matplotlib Figure.
    """
    from ct_nb.data.read import read_volume
    from ct_nb.viewer.figures import comparison_figure

    xrays, geometry, truth, folder = _case(run)
    floor = _json(run / "metrics.json")["gain_over_best_floor"]["psnr"]["floor"]
    return comparison_figure(
        xrays,
        geometry,
        truth,
        {
            "reconstruction": read_volume(folder / "model.nii.gz"),
            floor: read_volume(folder / f"{floor}.nii.gz"),
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
    found = reconstruct_sampled(
        xrays,
        geometry,
        load_cascade(run),
        samples=config["settings"]["samples"],
        steps=config["settings"]["sampling_steps"],
        seed=config["seed"],
    )
    draws = torch.stack([sample.tensor() for sample in found.samples])
    return uncertainty_figure(
        truth,
        summarize_samples(draws),
        draws[0],
        hallucination_map(draws, geometry.on(truth.grid).to(torch.float32)),
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
        said = []
        for line in running.stdout:
            said.append(line)
            if (
                step == "demo"
                and "first picture after" in line
                and (folder / "ct_nb" / "runs" / "drr2ct" / "first.png").is_file()
            ):
                seconds["first_picture"] = round(time.monotonic() - begin)
        if running.wait():
            sys.exit(f"{' '.join(command)} failed:\n{''.join(said[-30:])}")
        seconds[step] = round(time.monotonic() - begin)
        print(f"{seconds[step]} s: {' '.join(command)}", flush=True)
    if "first_picture" not in seconds:
        sys.exit("make demo drew no first picture")
    return {"seconds": seconds, "date": datetime.date.today().isoformat(), **about}


# ---------------------------------------------------------------- what README says
def systems(m: dict) -> str:
    "The five systems: a line and a command each, and what was measured."
    share = lambda x: f"{x:.0%}".replace("%", " %")
    a, b, c, d, e, c_sirt, c_real = (m.get(name) for name in RUNS)
    refined = lambda r, what: (
        f"{what} {r['coarse_psnr']:.2f} → {r['psnr']:.2f} dB, {r['gain']:+.2f}"
        f" [{r['interval'][0]:+.2f}, {r['interval'][1]:+.2f}]"
    )
    said = [
        a
        and f"{a['psnr']:.2f} dB, SSIM {a['ssim']:.3f}, on {a['cases']} phantoms; best floor {a['floor_psnr']:.2f} dB; better by {a['gain']:.2f} [{a['interval'][0]:.2f}, {a['interval'][1]:.2f}]",
        b
        and f"report → scan, recall at 1 {100 * b['recall_at_1']:.1f} % among {b['candidates']} phantoms with findings (chance {100 * b['chance']:.1f} %); given the map of regions, {share(b['sentence_place'])} of sentences look into theirs; present and absent told apart in {share(b['polarity'])}",
        "; ".join(
            refined(r, what) + f", on {r['cases']} {whom}"
            for r, what, whom in (
                (c_sirt, "with `-p coarse sirt`, SIRT's", "phantoms"),
                (c_real, "with `-p data CTS` as well, SIRT's", "patients left out"),
                (c, "A's answer", "phantoms"),
            )
            if r
        ),
        d
        and f"mean of {d['samples']} samples {d['psnr']:.2f} dB, where {'A' if d['start'] == 'drr2ct' else 'the linear start'} has {d['start_psnr']:.2f} on the same {d['cases']} phantoms; intervals of "
        + " / ".join(f"{100 * float(k):g}" for k in d["coverage"])
        + " % hold "
        + " / ".join(f"{100 * v:.1f}" for v in d["coverage"].values())
        + " %",
        e
        and f"{e['thick_mm']:g} mm → thin, {'one of the ' if e['cases'] == 1 and e['of'] == 'phantoms' else ''}"
        + (
            f"{e['cases']} {e['of']}"
            if e["cases"] > 1
            else "phantoms" if e["of"] == "phantoms" else "one patient, not trained on"
        )
        + f": {e['psnr']:.2f} dB, cubic {e['cubic_psnr']:.2f}, linear {e['linear_psnr']:.2f}"
        + ("; of one case no interval" if e["cases"] == 1 else ""),
    ]
    about = [
        ("A", "two X-rays → a latent → a CT", "train_drr2ct", "", "drr2ct"),
        (
            "B",
            "a CT encoder that reads reports and their reasoning",
            "train_ct_encoder",
            "",
            "ct_encoder",
        ),
        ("C", "a refiner that sharpens a coarse CT", "train_refinement", "", "refinement"),
        (
            "D",
            "a diffusion cascade: several CTs that explain the X-rays",
            "train_cascade",
            " -p coarse runs/drr2ct",
            "cascade",
        ),
        ("E", "thin slices from thick ones", "train_slices", " -p data THIN_CTS", "slices"),
    ]
    lines = [
        "| | system | command | measured, preset `cpu` | claims, limits |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| **{letter}** | [{what}]({recipe}.ipynb) | `papermill nbs/{recipe}.ipynb"
        f" runs/{recipe}.ipynb{more}` | {figures or 'not yet'} | [{page}](../papers/{page}.md) |"
        for (letter, what, recipe, more, page), figures in zip(about, said)
    ]
    return "\n".join(lines)


def provenance(m: dict, today: str | None = None) -> str:
    """Of which version and day the figures are, and which of them are old: of a run that did not
    say what it is of, or (A) of other phantoms than this version makes, whose fingerprint is
    `today`.
    """
    known, old = {}, []
    for letter, name in zip("ABCDECC", RUNS):
        if name not in m:
            continue
        of = m[name].get("made")
        if (
            of is None
            or name == "drr2ct"
            and of["data"] == "phantom"
            and today not in (None, of["fingerprint"])
        ):
            old.append(letter)
        else:
            known.setdefault(f"ct_nb {of['version']}, {of['date']}", []).append(letter)
    once = lambda letters: ", ".join(sorted(set(letters)))
    said = [f"{once(letters)}: {when}" for when, letters in known.items()] + (
        [f"{once(old)}: of an earlier state of the library"] if old else []
    )
    return (
        f"Two cores, no GPU, minutes each ({'; '.join(said)}); `python papers/measured.py` writes"
        " the table from what the runs leave."
    )


def scores(m: dict) -> str:
    "System A beside its floors, best first."
    a = m.get("drr2ct")
    if not a:
        return "Not yet: `make demo`, then `python papers/measured.py`."
    cell = lambda value, sd, form: form.format(value) + (f" ± {form.format(sd)}" if sd else "")
    rows = sorted(a["scores"], key=lambda name: (name != "model", -a["scores"][name]["psnr"][0]))
    lines = [
        (
            f"The figures of `make demo` (preset `cpu`, seed 0): {a['cases']} phantoms that nothing"
            " was fitted to, 64³ at 5 mm, mean ± sd. The floors use no network; the atlases and"
            f" the nearest neighbour know the {a['training_cases']} training phantoms."
        ),
        "",
        "| | " + " | ".join(label for label, _ in SCORES.values()) + " |",
        "|---|" + "---|" * len(SCORES),
    ]
    for name in rows:
        mark = "**" if name == "model" else ""
        lines.append(
            "| "
            + " | ".join(
                f"{mark}{text}{mark}"
                for text in (
                    FLOORS.get(name, name),
                    *(
                        cell(*a["scores"][name][metric], form)
                        for metric, (_, form) in SCORES.items()
                    ),
                )
            )
            + " |"
        )
    return "\n".join(lines)


def waiting(m: dict) -> str:
    "How long a newcomer waits."
    if "clone" not in m:
        return "How long that takes is measured by `python papers/measured.py --clone`."
    c = m["clone"]
    minutes = lambda seconds: f"{seconds / 60:.0f}"
    s = c["seconds"]
    return (
        f"From `git clone` to the first reconstruction: **{minutes(s['first_picture'])} minutes**,"
        f" {minutes(s['setup'])} of them for PyTorch and the rest of `.venv`; to the trained and"
        f" judged network: {minutes(s['demo'])} ({c['cores']} cores, {c['processor']}, {c['date']},"
        " `python papers/measured.py --clone`)."
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
    "Fingerprint of what `make demo` trains on, as this version makes it."
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
    said = blocks(measured, phantoms_today())
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        for name, new in said.items():
            if f"<!-- {name} -->" in text:
                text = put(text, name, new)
        cell["source"] = text.splitlines(keepends=True)
    INDEX.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*said.values(), sep="\n\n")


if __name__ == "__main__":
    main()
