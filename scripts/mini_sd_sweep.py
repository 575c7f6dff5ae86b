"""Fixed rates against D-Adaptation on the bundled model: 18 optimizers, judged by their samples.

    python scripts/mini_sd_sweep.py --out /tmp/sweep --seeds 1 2 3

AdamW with state in 32 and 8 bits at five rates, the text encoder at half of each, and D-Adaptation in both at
four values of lr. Every run is 24 epochs of train.json's data with a validation split. The judge reads
samples of its last checkpoint. The table (results.md, results.json) is rewritten after every run. A finished
run is not repeated, so the sweep may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.compare.drift import tone
from scripts.compare.runs import Finished, Planned, finished, plan_runs, train
from trainer.errors import UserError
from trainer.output import say

ROOT = Path(__file__).resolve().parent.parent

RATES = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")
FACTORS = ("1", "0.3", "0.1", "0.03")
SETTINGS = [
    *("--max_epochs", "24", "--save_format", "diffusers", "--log_step", "6", "--save_every_n_epochs", "null"),
    *("--sample_steps", "1000000"),
]
FACES = [
    *(("yellow", "blue"), ("white", "green"), ("orange", "purple"), ("red", "black")),
    *(("yellow", "purple"), ("white", "blue"), ("orange", "black"), ("red", "green")),
]
UNRELATED = 18
"""Number of prompts of combinations that the bundled model has never seen; the six shapes in turn."""


def main(argv: list[str] | None = None) -> int:
    """Start or resume the sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of each setting (1 2 3)"
    )
    options, changes = parser.parse_known_args(argv)
    try:
        runs = plan_runs(
            ROOT / "train.json",
            write_optimizers(options.out),
            options.out,
            options.seeds,
            [*settings(options.out), *changes],
        )
        runs.sort(key=lambda run: lateness(run, options.seeds[0]))
        rows = [base_row(options.out)]
        for number, run in enumerate(runs, start=1):
            end = finished(run)
            if end is None:
                print(f"{number}/{len(runs)}: {run.label}, seed {run.seed}", flush=True)
                end = train(run)
            rows.append(row_of(end))
            (options.out / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
            (options.out / "results.md").write_text(table(rows), encoding="utf-8")
    except UserError as error:
        say(*error.problems, stream=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.", file=sys.stderr)
        return 130
    print(table(rows))
    return 0


def lateness(run: Planned, first: int) -> int:
    """Return a run's place in the order; lower comes first.

    The first seed of all but D-Adaptation in 8 bits, which behaves as in 32; then middle rates in 32 bits.
    """
    if run.seed == first and not run.label.startswith("dadapt_adam8bit"):
        return 0
    return (
        1 + any(run.label.endswith(rate) for rate in (" 1e-5", " 3e-5", " 1e-3")) + 2 * ("8bit" in run.label)
    )


def write_optimizers(out: Path) -> list[Path]:
    """Write the optimizer files into `out`, and return them."""
    fixed = json.loads((ROOT / "optimizer.json").read_text(encoding="utf-8"))
    found = json.loads((ROOT / "optimizer_dadapt.json").read_text(encoding="utf-8"))
    documents: dict[str, Any] = {}
    for name in ("adamw", "adamw8bit"):
        for rate in RATES:
            documents[f"{name} {rate}"] = {
                **fixed,
                "base": {**fixed["base"], "optimizer": name, "lr": float(rate)},
            }
            # The same parameters are trained as with D-Adaptation: only the optimizer differs.
            documents[f"{name} {rate}"]["text_encoder_freezing"] = found["text_encoder_freezing"]
    for name in ("dadapt_adam", "dadapt_adam8bit"):
        for factor in FACTORS:
            change = {"optimizer": name, "lr": float(factor)}
            sections = {key: {**found[key], **change} for key in ("base", "text_encoder_overrides")}
            documents[f"{name} {factor}"] = {**found, **sections}
    folder = out / "optimizers"
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        del document["$schema"], document["doc"]
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return [folder / f"{name}.json" for name in documents]


def settings(out: Path) -> list[str]:
    """Write the files that the runs share, and return their arguments."""
    validation, prompts = out / "validation.json", out / "prompts.json"
    validation.write_text(json.dumps({"auto_split_proportion": 0.15, "every_n_epochs": 6}), encoding="utf-8")
    one = {"cfgs": [3], "num_inference_steps": 20, "seed": 1, "generate_pretrain_samples": False}
    prompts.write_text(
        json.dumps({**one, "samples": [{"prompt": "a yellow smiling face on a blue background"}]}),
        encoding="utf-8",
    )
    return [*SETTINGS, "--validation_config", str(validation), "--sample_prompts", str(prompts)]


def base_row(out: Path) -> dict[str, Any]:
    """Return the row of the model before training."""
    kept = out / "base.json"
    if not kept.exists():
        kept.write_text(
            json.dumps({"label": "base", **judged(ROOT / "models/mini-sd", out / "base.png")}, indent=1),
            encoding="utf-8",
        )
    return json.loads(kept.read_text(encoding="utf-8"))


def row_of(end: Finished) -> dict[str, Any]:
    """Return a run's row; its samples are drawn and judged once, and the row kept beside the run."""
    kept = end.planned.logdir / "row.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    run = end.planned
    row: dict[str, Any] = {"label": run.label, "seed": run.seed, "code": end.code, "reason": end.reason}
    if end.folder is not None:
        row |= curves(end)
    if end.code == 0 and end.folder is not None:
        row |= judged(
            next((end.folder / "ckpts").glob("last-*/model_index.json")).parent, run.logdir / "pictures.png"
        )
    kept.write_text(json.dumps(row, indent=1), encoding="utf-8")
    return row


def curves(end: Finished) -> dict[str, Any]:
    """Return the curves of a run by tag, each as steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(end.folder), size_guidance={"scalars": 0}).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return {"curves": found, "peak": end.peak}


def judged(checkpoint: Path, sheet: Path) -> dict[str, float]:
    """Return the judge's shares for a checkpoint and the tone of unrelated samples; write them to `sheet`."""
    from scripts.mini_sd.generate import Generator
    from scripts.mini_sd.judge import grid, judge_concept
    from scripts.mini_sd.scenes import article, held_out

    generate = Generator(checkpoint)
    faces = generate(
        [
            f"{article(face)} {face} smiling face on {article(ground)} {ground} background"
            for face, ground in FACES
        ],
        1,
    )
    unrelated = list(held_out())[:UNRELATED]
    pictures = generate([each.prompt for each in unrelated], 2)
    grid([*faces, *pictures], columns=13).save(sheet)
    return {**asdict(judge_concept(faces, FACES, pictures, unrelated)), **tone(pictures)._asdict()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table: a row for each setting, mean (lowest to highest) over its seeds."""
    fixed, validation = "loss/stabilize-train", "loss/val"
    heads = (
        "",
        "seeds",
        "fixed-noise loss",
        "validation loss",
        "rate at the end, UNet",
        "faces",
        "kept: background / shape / colour",
    )
    heads = (*heads, "became a face", "saturation, contrast to the base")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    base = rows[0]
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        whole = [row for row in own if row.get("code", 0) == 0]
        failed = f", {len(own) - len(whole)} failed" if len(whole) < len(own) else ""
        curves = [row["curves"] for row in whole if "curves" in row]
        rates = [each["lr/unet"][-1][1] for each in curves]
        kept = " / ".join(_share(whole, f"kept_{what}") for what in ("background", "shape", "colour"))
        tones = ", ".join(
            f"{100 * (_mean([row[key] for row in whole]) / base[key] - 1):+.0f}%"
            for key in ("saturation", "contrast")
            if whole
        )
        cells = [
            label, f"{len(whole) if label != 'base' else ''}{failed}",
            *(_span([each[tag][-1][1] for each in curves], ".4f") for tag in (fixed, validation)),
            _span(rates, ".1e"), _share(whole, "faces"), kept, _share(whole, "leaked"), tones,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _share(rows: Sequence[dict[str, Any]], key: str) -> str:
    return f"{_mean([row[key] for row in rows]):.2f}" if rows else ""


def _span(values: Sequence[float], form: str) -> str:
    if len(values) < 2 or min(values) == max(values):
        return f"{values[0]:{form}}" if values else ""
    return f"{_mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(main())
