"""Measure on a GPU what only a GPU can show, in ten minutes or fewer, and write a report that can be posted.

    python scripts/gpu_report.py --out gpu-report                   every step, the most telling first
    python scripts/gpu_report.py --out gpu-report --minutes 3       the steps that fit three minutes
    python scripts/gpu_report.py --out gpu-report --only profile    one step; results of other steps in the folder are kept
    python scripts/gpu_report.py --out /tmp/try --device cpu --tiny tries the report out on the CPU with the bundled model

The folder gets report.md, report.json and comparison.png, written anew after every result, and an output.log for each step. A step
runs in a process of its own with a time limit. The weights of the full-size model are random and made on the GPU: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.gpu.job import Job
from scripts.gpu.worker import Workers

OPTIMIZERS = ("adamw8bit", "dadapt_adam8bit+fused", "dadapt_adam_reference", "dadapt_adam8bit+fused+bf16")


@dataclass(frozen=True)
class Planned:
    """A step of the report."""

    name: str
    function: str
    limit: int
    """Seconds."""
    argument: str = ""


STEPS = (
    Planned("environment", "scripts.gpu.environment:environment", 60),
    *(Planned(f"training {name}", "scripts.gpu.training:training", 75, name) for name in OPTIMIZERS),
    Planned("profile", "scripts.gpu.profiling:profile_step", 90),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the steps in turn until the time is over and write the report after each result."""
    options = _parse(argv)
    began = time.monotonic()
    report = _begin(options)
    chosen = [step for step in STEPS if not options.only or step.name in options.only or step.name.split()[0] in options.only]
    workers = Workers(options.device)
    try:
        for number, step in enumerate(chosen):
            left = 60 * options.minutes - (time.monotonic() - began)
            if left < 5:
                report["steps"][step.name] = {"status": "not run", "reason": "no time was left", "seconds": 0.0, "results": []}
                continue
            _take(step, workers, report, options, left, last=number == len(chosen) - 1)
    finally:
        workers.close()
        write(report, options.out)
    print(f"{options.out / 'report.md'}: {time.monotonic() - began:.0f} s in all")
    return 0 if all(report["steps"][step.name]["status"] in ("ok", "not run") for step in chosen) else 1


def _take(step: Planned, workers: Workers, report: dict[str, Any], options: argparse.Namespace, left: float, *, last: bool) -> None:
    started = time.monotonic()
    found: dict[str, Any] = {"status": "stopped", "reason": "", "seconds": 0.0, "results": []}
    report["steps"][step.name] = found

    def tell(result: dict[str, Any]) -> None:
        found["results"].append(result)
        found["seconds"] = round(time.monotonic() - started, 1)
        print(f"[{step.name}] {found['seconds']:.0f} s: {_short(result)}", flush=True)
        write(report, options.out, picture=False)

    job = Job(step.name, options.device, options.tiny, options.out / "steps" / step.name.replace(" ", "-"), step.argument)
    found["status"], found["reason"] = workers.run(step.function, job, min(left, step.limit), tell, last=last)
    found["seconds"] = round(time.monotonic() - started, 1)
    print(f"[{step.name}] {found['status']} after {found['seconds']:.0f} s {found['reason']}", flush=True)


def write(report: dict[str, Any], out: Path, *, picture: bool = True) -> None:
    """Write what has been found so far."""
    from scripts.gpu.page import page

    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (out / "report.md").write_text(page(report), encoding="utf-8")


def _begin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report in the folder, or an empty one."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "report.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.exists() else {}
    return {"date": str(date.today()), "device": options.device, "tiny": options.tiny, "steps": earlier}


def _short(result: dict[str, Any]) -> str:
    """Return a result's numbers in one line."""
    plain = {key: value for key, value in result.items() if not isinstance(value, list)}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=10, help="time for all steps together")
    names = list(dict.fromkeys(word for step in STEPS for word in (step.name.split()[0], step.name)))
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"take these steps: {', '.join(names)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="use the bundled model and few steps: tries the report out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
