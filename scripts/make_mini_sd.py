"""Make the bundled model from nothing, on one CPU core, in resumable stages.

    python scripts/make_mini_sd.py                       every stage, then export and judge
    python scripts/make_mini_sd.py export                write the current weights as models/mini-sd
    python scripts/make_mini_sd.py judge --model FOLDER  print the figures of any Stable Diffusion folder

A killed stage resumes from its last saved state, at most two minutes old; a complete stage is skipped. `vae`
and `text` are independent and may run at the same time.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    pass

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "vae", "text", "latents", "unet", "export", "judge")


def main(argv: list[str] | None = None) -> int:
    """Run the named stages."""
    options = _parse(argv)
    _quieten()
    import torch

    torch.set_num_threads(options.threads)
    names = STAGES if options.stage == "all" else (options.stage,)
    for name in names:
        _run_stage(name, options)
    if options.stage == "all":
        _report_time(options.work)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES))
    parser.add_argument(
        "--work", type=Path, default=Path("build/mini-sd"), help="folder of intermediate state"
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "models" / "mini-sd", help="folder to write or to judge"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--seed", type=int, default=0, help="shifts the seed of every stage, or of the judged images"
    )
    parser.add_argument("--grid", type=Path, help="judge: also write the images as one sheet")
    return parser.parse_args(argv)


def _run_stage(name: str, options: argparse.Namespace) -> None:
    started = time.process_time()
    work, shift = options.work, 1000 * options.seed
    if name == "tokenizer":
        from mini_sd.tokenizer import build_tokenizer

        if not (work / "tokenizer" / "vocab.json").exists():
            build_tokenizer(work / "tokenizer")
    elif name == "vae":
        from mini_sd.vae import VaeOptions, train_vae

        train_vae(work, VaeOptions(seed=1 + shift))
    elif name == "text":
        from mini_sd.text import TextOptions, train_text

        train_text(work, TextOptions(seed=2 + shift))
    elif name == "latents":
        from mini_sd.unet import LatentOptions, encode_latents

        encode_latents(work, LatentOptions(seed=3 + shift))
    elif name == "unet":
        from mini_sd.unet import LatentOptions, UnetOptions, train_unet

        train_unet(work, UnetOptions(seed=4 + shift), LatentOptions(seed=3 + shift))
    elif name == "export":
        from mini_sd.folder import export, folder_bytes

        step = export(work, options.model)
        print(f"export: UNet step {step}, {folder_bytes(options.model) / 1e6:.1f} MB in {options.model}")
    else:
        _judge(options)
    print(f"stage {name}: {time.process_time() - started:.0f} CPU seconds in this process", flush=True)


def _judge(options: argparse.Namespace) -> None:
    from mini_sd.generate import Generator
    from mini_sd.judge import grid, judge_pipeline, self_check

    generator = Generator(options.model)
    print(f"judge itself, rendered scenes: {self_check(lambda images: images)}")
    print(f"judge itself, scenes through the autoencoder: {self_check(generator.reconstruct)}")
    figures, images = judge_pipeline(generator, options.seed)
    print(f"judge: held-out prompts, cfg 3, DDIM 20: {figures}")
    if options.grid:
        options.grid.parent.mkdir(parents=True, exist_ok=True)
        grid(images).save(options.grid)


def _report_time(work: Path) -> None:
    """Print the CPU time of each training stage over all of its processes."""
    import torch

    spent = {name: torch.load(work / f"{name}.pt", weights_only=True)["cpu_s"] for name in STAGES[1:5]}
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in spent.items())
    print(f"CPU minutes: {parts}; together {sum(spent.values()) / 60:.1f}")


def _quieten() -> None:
    """Silence the libraries' remarks about optional packages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
