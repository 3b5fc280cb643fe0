"""What the training runs measured, as the table in README: `python papers/measured.py` after them.

Reads runs/drr2ct, runs/ct_encoder, runs/refinement, runs/cascade and runs/slices_real (or the folders named by --runs), keeps the figures in papers/measured.json, and writes the table
into nbs/index.ipynb between its two marks; `make readme` then makes README. A run that is not there keeps the figures of papers/measured.json."""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "papers" / "measured.json"
INDEX = ROOT / "nbs" / "index.ipynb"
MARKS = ("<!-- measured -->\n", "\n<!-- /measured -->")


def _json(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def drr2ct(run: Path) -> dict:
    m = _json(run / "metrics.json")
    floor = m["gain_over_best_floor"]["psnr"]
    return {"psnr": m["predictors"]["model"]["psnr"], "ssim": m["predictors"]["model"]["ssim"], "floor": floor["floor"], "floor_psnr": m["predictors"][floor["floor"]]["psnr"], "gain": floor["mean"], "interval": floor["interval_95"], "cases": m["cases"]}


def ct_encoder(run: Path) -> dict:
    m = _json(run / "metrics.json")
    rows = [line.split(",") for line in (run / "retrieval.csv").read_text(encoding="utf-8").splitlines()]
    table = [dict(zip(rows[0], row)) for row in rows[1:]]
    first = next(row for row in table if row["question"] == "abnormal" and row["direction"] == "text to image" and float(row["k"]) == 1)
    return {"recall_at_1": float(first["recall"]), "chance": float(first["chance"]), "candidates": int(float(first["candidates"])), "sentence_place": m["sentence_place"]["share"]["mean"],
            "polarity": m["polarity"]["balanced"]["mean"], "cases": m["cases"]}


def refinement(run: Path) -> dict:
    m, r = _json(run / "metrics.json"), _json(run / "refinement.json")
    gain = r["gain_over"]["coarse"]["psnr"]
    return {"psnr": m["predictors"]["refined"]["psnr"], "coarse_psnr": m["predictors"]["coarse"]["psnr"], "gain": gain["mean"], "interval": [gain["low"], gain["high"]], "cases": m["cases"]}


def cascade(run: Path) -> dict:
    m, u = _json(run / "metrics.json"), _json(run / "uncertainty.json")
    held = {}
    for row in u["intervals"]:
        if row["region"] == "body": held.setdefault(str(row["level"]), []).append(row["coverage"])
    return {"psnr": m["predictors"]["model"]["psnr"], "system_a_psnr": m["predictors"]["drr2ct"]["psnr"], "samples": u["samples"], "coverage": {level: sum(values) / len(values) for level, values in held.items()}, "cases": m["cases"]}


def slices(run: Path) -> dict:
    m = _json(run / "metrics.json")
    return {"psnr": m["predictors"]["regressor_consistent"]["psnr"], "cubic_psnr": m["predictors"]["cubic"]["psnr"], "linear_psnr": m["predictors"]["linear"]["psnr"], "thick_mm": m["thick_mm"], "cases": m["cases"]}


RUNS = {"drr2ct": drr2ct, "ct_encoder": ct_encoder, "refinement": refinement, "cascade": cascade, "slices_real": slices}


def table(measured: dict) -> str:
    "The five systems: a line and a command each, and what was measured."
    m = measured
    share = lambda x: f"{x:.0%}".replace("%", " %")
    a, b, c, d, e = (m.get(name) for name in RUNS)
    said = [
        a and f"{a['psnr']:.2f} dB, SSIM {a['ssim']:.3f}, on {a['cases']} phantoms; best floor {a['floor_psnr']:.2f} dB; better by {a['gain']:.2f} [{a['interval'][0]:.2f}, {a['interval'][1]:.2f}]",
        b and f"report → scan, recall at 1 {100 * b['recall_at_1']:.1f} % among {b['candidates']} phantoms with findings (chance {100 * b['chance']:.1f} %); {share(b['sentence_place'])} of sentences find their region; present and absent told apart in {share(b['polarity'])}",
        c and f"{c['coarse_psnr']:.2f} → {c['psnr']:.2f} dB on {c['cases']} phantoms, {c['gain']:+.2f} [{c['interval'][0]:+.2f}, {c['interval'][1]:+.2f}]",
        d and f"mean of {d['samples']} samples {d['psnr']:.2f} dB where A has {d['system_a_psnr']:.2f}, {d['cases']} phantoms; intervals of " + " / ".join(f"{100 * float(k):g}" for k in d["coverage"]) + " % hold " + " / ".join(f"{100 * v:.1f}" for v in d["coverage"].values()) + " %",
        e and f"{e['thick_mm']:g} mm → thin, a patient left out: {e['psnr']:.2f} dB, cubic {e['cubic_psnr']:.2f}, linear {e['linear_psnr']:.2f}",
    ]
    systems = [("A", "two X-rays → a latent → a CT", "papermill nbs/train_drr2ct.ipynb runs/train_drr2ct.ipynb", "drr2ct"), ("B", "a CT encoder that reads reports and their reasoning", "papermill nbs/train_ct_encoder.ipynb runs/train_ct_encoder.ipynb", "ct_encoder"),
               ("C", "a refiner that sharpens a coarse CT", "papermill nbs/train_refinement.ipynb runs/train_refinement.ipynb", "refinement"), ("D", "a diffusion cascade: several CTs that explain the X-rays", "papermill nbs/train_cascade.ipynb runs/train_cascade.ipynb -p coarse runs/drr2ct", "cascade"),
               ("E", "thin slices from thick ones", "papermill nbs/train_slices.ipynb runs/train_slices.ipynb -p data THIN_CTS -p out runs/slices_real", "slices")]
    lines = ["| | system | command | measured, preset `cpu` | more |", "|---|---|---|---|---|"]
    lines += [f"| **{letter}** | {what} | `{command}` | {figures or 'not yet'} | `papers/{page}.md` |" for (letter, what, command, page), figures in zip(systems, said)]
    return "\n".join(lines)


def put(text: str, new: str) -> str:
    "`new` between the two marks of a text."
    if any(text.count(mark) != 1 for mark in MARKS): raise ValueError(f"nbs/index.ipynb: expected one {MARKS[0].strip()} and one {MARKS[1].strip()}")
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + new + MARKS[1] + rest.split(MARKS[1])[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the runs")
    measured = _json(KEPT) if KEPT.is_file() else {}
    for name, read in RUNS.items():
        folder = parser.parse_args().runs / name
        if (folder / "metrics.json").is_file(): measured[name] = read(folder)
        else: print(f"{folder}: no run there; its figures stay as they were", file=sys.stderr)
    KEPT.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    notebook = _json(INDEX)
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if MARKS[0] in text: cell["source"] = put(text, table(measured)).splitlines(keepends=True)
    INDEX.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(measured))


if __name__ == "__main__": main()
