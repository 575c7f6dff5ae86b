"""Compare short trainings of this tree and of another commit, to the bit.

    python scripts/same_results.py --against 062bc76
    python scripts/same_results.py --against 062bc76 --only first lora across --out /tmp/same

The other commit is checked out into a git worktree. Both trees train the same runs on the CPU, one after the
other, each in its own process with one thread. Compared are the tensors of the last export and of the
optimizer state, and the steps, tags and values of loss/* in metrics.jsonl. The run `across` resumes the other
tree's checkpoint here; its counterpart is the other tree's unbroken run. Exit code 1: a part differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """A short training."""

    options: str
    """Command line of train.py; {inputs} is the folder of the files that this script writes."""
    processes: int = 1
    resumes: str = ""
    """The tree whose half run this one resumes: own or other; empty: a new run."""
    compared_with: str = ""
    """The other tree's run that must give the same result; empty: the run of the same name."""


# The same files for both trees, so that recorded paths and the data's identity agree.
_INPUTS = "--config train.json --data_root {root}/examples/faces --resume_ckpt {root}/models/mini-sd"
_SHORT = "--max_epochs 1 --sample_prompts {inputs}/no_samples.json --log_step 1 --fixed_loss_images 4"
_EMA = f"{_SHORT} --max_epochs 2 --batch_size 15 --ema_decay_rate 0.9 --ema_update_interval 2"
RUNS = {
    "first": Run("--stop_after_steps 60"),
    "adamw8bit": Run("--stop_after_steps 60 --optimizer_config optimizer.json"),
    "fused": Run(f"{_SHORT} --optimizer_config {{inputs}}/fused.json"),
    "lora": Run(f'{_SHORT} --lora {{{{"rank":4}}}}'),
    "ema": Run(_EMA),
    "processes": Run(f"{_SHORT} --batch_size 4", processes=2),
    "sd2": Run(f"{_SHORT} --resume_ckpt {{inputs}}/sd2 --optimizer_config optimizer.json"),
    "resumed": Run(_EMA, resumes="own", compared_with="ema"),
    "across": Run(_EMA, resumes="other", compared_with="ema"),
}
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
_HALF = Run(f"{_EMA} --stop_after_steps 3")
_FUSED = {"base": {"optimizer": "dadapt_adam8bit", "lr": 1.0, "d0": 1e-5, "fused_backward": True}}


class Trees:
    """Both trees and their runs."""

    def __init__(self, other: Path, out: Path) -> None:
        self._trees = {"this": ROOT, "other": other}
        self._out = out
        self._inputs = out / "inputs"

    def write_inputs(self) -> None:
        """Write the files that runs of both trees read."""
        self._inputs.mkdir(parents=True, exist_ok=True)
        samples = {"samples": [{"prompt": "a face"}], "generate_pretrain_samples": False}
        (self._inputs / "no_samples.json").write_text(json.dumps(samples))
        (self._inputs / "fused.json").write_text(json.dumps(_FUSED))
        if not (self._inputs / "sd2").exists():
            code = "import sys, pathlib; from tests.tiny import write_tiny_folder as write; "
            code += "write(pathlib.Path(sys.argv[1]), shape='sd2')"
            subprocess.run([sys.executable, "-c", code, self._inputs / "sd2"], cwd=ROOT, check=True)

    def result(self, tree: str, name: str) -> tuple[str, str, str]:
        """Return the digests of a run's three parts; train it first if it is missing."""
        logdir = self._logdir(tree, name)
        (run,) = (path.parent for path in logdir.glob("*/metrics.jsonl"))
        last = max(name for path in run.glob("ckpts/*") for name in re.findall(r"-gs\d{5}", path.name))
        paths = [file for path in run.glob(f"ckpts/*{last}*") for file in [path, *path.rglob("*")]]
        files = sorted(file for file in paths if file.suffix == ".safetensors")
        weights = [file for file in files if file.parent.name != "resume"]
        state = [file for file in files if file.parent.name == "resume"]
        return digest_of_tensors(weights, run), digest_of_tensors(state, run), digest_of_losses(run)

    def _logdir(self, tree: str, name: str) -> Path:
        logdir = self._out / tree / name
        if not (logdir / "done").exists():
            shutil.rmtree(logdir, ignore_errors=True)
            run = _HALF if name == "half" else RUNS[name]
            if run.resumes:
                source = tree if run.resumes == "own" else run.resumes
                shutil.copytree(self._logdir(source, "half"), logdir)
                (logdir / "done").unlink()
            self._train(tree, run, logdir)
            (logdir / "done").touch()
        return logdir

    def _train(self, tree: str, run: Run, logdir: Path) -> None:
        launcher = f"-m torch.distributed.run --nproc_per_node {run.processes}".split()
        command = [sys.executable, *(launcher if run.processes > 1 else []), "train.py"]
        options = f"{_INPUTS} {run.options}{' --resume_ckpt findlast' if run.resumes else ''}".split()
        command += [option.format(root=ROOT, inputs=self._inputs) for option in options]
        command += ["--logdir", str(logdir)]
        environment = {**os.environ, **_ENVIRONMENT}
        log = logdir.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.call(command, cwd=self._trees[tree], env=environment, stdout=file, stderr=file)
        if code:
            lines = "\n  ".join(log.read_text().splitlines()[-12:])
            raise SystemExit(
                f"same_results: train.py of {tree} tree ended with {code}: {' '.join(command)}\n  {lines}"
            )


def digest_of_tensors(files: list[Path], folder: Path) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the tensors of safetensors files."""
    lines = []
    for file in files:
        content = memoryview(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(bytes(content[8:start])).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                data = hashlib.sha256(content[start + first : start + last]).hexdigest()
                lines.append(f"{file.relative_to(folder)} {name} {entry['dtype']} {entry['shape']} {data}")
    return _digest(sorted(lines), f"tensors in the last export of {folder}")


def digest_of_losses(run: Path) -> str:
    """Return the SHA-256 of the steps, tags and values of all losses of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{row['step']} {tag} {row[tag]}" for row in rows for tag in row if tag.startswith("loss/")]
    return _digest(losses, f"losses in {run}")


def _digest(lines: list[str], what: str) -> str:
    if not lines:
        raise SystemExit(f"same_results: no {what}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Check a commit out into a new git worktree, and remove it at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--force", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main(argv: list[str] | None = None) -> int:
    """Train in both trees and print the comparison."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--against", required=True, help="the other commit")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs (default: all)")
    parser.add_argument("--out", type=Path, help="folder that keeps runs; the other tree's are not repeated")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary) / "runs").resolve()
        shutil.rmtree(out / "this", ignore_errors=True)
        with checkout(options.against, Path(temporary) / "tree") as other:
            return compare(Trees(other, out), options.only)


def compare(trees: Trees, names: list[str]) -> int:
    """Print a row for every run; return 1 if any of them differs."""
    trees.write_inputs()
    code = 0
    parts = ("weights", "optimizer state", "losses")
    print("{:10} {:16} {:16} {:16} seconds".format("run", *parts), flush=True)
    for name in names:
        began = time.monotonic()
        other = trees.result("other", RUNS[name].compared_with or name)
        this = trees.result("this", name)
        cells = ["equal" if ours == theirs else "DIFFERS" for ours, theirs in zip(this, other, strict=True)]
        print("{:10} {:16} {:16} {:16} {:.0f}".format(name, *cells, time.monotonic() - began), flush=True)
        for part, ours, theirs in zip(parts, this, other, strict=True):
            if ours != theirs:
                code = 1
                print(f"  {part}: {theirs} there, {ours} here", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
