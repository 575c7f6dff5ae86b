"""Measure speed, memory and correctness on a GPU in at most ten minutes, and write a report.

    python scripts/gpu_report.py --out gpu-report                 every step, the most informative first
    python scripts/gpu_report.py --out gpu-report --minutes 3     the steps that fit three minutes
    python scripts/gpu_report.py --out gpu-report --only profile  one step; the folder keeps other results
    python scripts/gpu_report.py --out try --device cpu --tiny    tests the report on the CPU

The folder gets report.md, report.json and comparison.png, rewritten after every result, and an output.log for
each step. A step runs in its own process with a time limit. The weights of the full-size model are random and
made on the GPU: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.gpu.job import Job
from scripts.gpu.worker import Workers

PICTURE = "comparison.png"
OPTIMIZERS = (
    "adamw8bit",
    "dadapt_adam8bit+fused",
    "dadapt_adam_reference",
    "dadapt_adam8bit+fused+bf16",
    "dadapt_adam8bit",
)
"""The most informative first. 8-bit state has the second moment of every element; none is factored."""


@dataclass(frozen=True)
class Planned:
    """A step of the report."""

    name: str
    function: str
    limit: int
    """Seconds."""
    argument: str = ""
    aside: bool = False
    """Run beside the other steps, on the CPU."""


STEPS = (
    Planned("estimates", "scripts.gpu.training:estimates", 300, " ".join(OPTIMIZERS), aside=True),
    Planned("environment", "scripts.gpu.environment:environment", 60),
    Planned("agreement", "scripts.gpu.correctness:agreement", 60),
    *(Planned(f"training {name}", "scripts.gpu.training:training", 60, name) for name in OPTIMIZERS[:2]),
    *(Planned(f"epochs {name}", "scripts.gpu.epochs:epochs", 60, name) for name in OPTIMIZERS[:2]),
    *(Planned(f"training {name}", "scripts.gpu.training:training", 60, name) for name in OPTIMIZERS[2:]),
    Planned("alone", "scripts.gpu.alone:alone", 60),
    Planned("profile", "scripts.gpu.profiling:profile_step", 90),
    Planned("resumed", "scripts.gpu.runs:resumed", 90),
    Planned("first run", "scripts.gpu.runs:first_run", 120),
    Planned("tests", "scripts.gpu.correctness:gpu_tests", 180),
    *(Planned(f"largest {name}", "scripts.gpu.training:largest", 90, name) for name in OPTIMIZERS),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps in turn until the time is over; write the report after each result."""
    options = _parse(argv)
    began = time.monotonic()
    report = _begin(options)
    only = options.only
    chosen = [step for step in STEPS if not only or step.name in only or step.name.split()[0] in only]
    ends = began + 60 * options.minutes
    take = _Runner(report, options, ends)
    asides = [threading.Thread(target=take, args=([step],), daemon=True) for step in chosen if step.aside]
    try:
        for aside in asides:
            aside.start()
        take([step for step in chosen if not step.aside])
        for aside in asides:
            aside.join()
    finally:
        take.close()
        write(report, options.out)
    print(f"{options.out / 'report.md'}: {time.monotonic() - began:.0f} s in all")
    return 0 if all(report["steps"][step.name]["status"] in ("ok", "not run") for step in chosen) else 1


class _Runner:
    """Runs steps one after the other until the time is over, and writes the report after every result."""

    def __init__(self, report: dict[str, Any], options: argparse.Namespace, ends: float) -> None:
        self._report, self._options, self._ends = report, options, ends
        self._lock = threading.Lock()
        self._workers: list[Workers] = []

    def close(self) -> None:
        """End all processes."""
        for workers in self._workers:
            workers.close()

    def __call__(self, steps: Sequence[Planned]) -> None:
        if not steps:
            return
        workers = Workers(self._options.device)
        self._workers.append(workers)
        for number, step in enumerate(steps):
            left = self._ends - time.monotonic()
            if left < 5:
                found = {"status": "not run", "reason": "no time was left", "seconds": 0.0, "results": []}
                self._report["steps"].setdefault(step.name, found)
            else:
                self._take(step, workers, left, last=number == len(steps) - 1)

    def _take(self, step: Planned, workers: Workers, left: float, *, last: bool) -> None:
        options, started = self._options, time.monotonic()
        found: dict[str, Any] = {"status": "stopped", "reason": "", "seconds": 0.0, "results": []}
        with self._lock:
            self._report["steps"][step.name] = found

        def tell(result: dict[str, Any]) -> None:
            with self._lock:
                found["results"].append(result)
                found["seconds"] = round(time.monotonic() - started, 1)
                print(f"[{step.name}] {found['seconds']:.0f} s: {_short(result)}", flush=True)
                write(self._report, options.out, picture=False)

        folder = options.out / "steps" / step.name.replace(" ", "-")
        device, argument = (
            ("cpu", f"{options.device} {step.argument}") if step.aside else (options.device, step.argument)
        )
        job = Job(step.name, device, options.tiny, folder.resolve(), argument)
        found["status"], found["reason"] = workers.run(
            step.function, job, min(left, step.limit), tell, last=last
        )
        found["seconds"] = round(time.monotonic() - started, 1)
        print(f"[{step.name}] {found['status']} after {found['seconds']:.0f} s {found['reason']}", flush=True)


def write(report: dict[str, Any], out: Path, *, picture: bool = True) -> None:
    """Write the results so far."""
    from scripts.gpu.page import page
    from scripts.gpu.picture import draw

    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = page(report)
    if picture and draw(report, out / PICTURE):
        text += f"\n![Time and memory of each optimizer]({PICTURE})\n"
    (out / "report.md").write_text(text, encoding="utf-8")


def _begin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report in the folder, or an empty one."""
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "report.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.exists() else {}
    return {"date": str(date.today()), "device": options.device, "tiny": options.tiny, "steps": earlier}


def _short(result: dict[str, Any]) -> str:
    """Return a result's numbers in one line."""
    plain = {key: value for key, value in result.items() if not isinstance(value, list)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=10, help="time for all steps together")
    names = list(dict.fromkeys(word for step in STEPS for word in (step.name.split()[0], step.name)))
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STEP", help=f"run these steps: {', '.join(names)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="use the bundled model and few steps: a test of the report"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
