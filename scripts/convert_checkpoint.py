"""Convert a Stable Diffusion 1.x or 2.x model between a diffusers folder and one .safetensors file.

    python scripts/convert_checkpoint.py logs/run/ckpts/last-smile-ep10-gs00080 smile.safetensors
    python scripts/convert_checkpoint.py v1-5-pruned-emaonly.safetensors sd15/

The source is any model that train.py starts from: a folder, a checkpoint, a hub id, a .safetensors or .ckpt
file. The file has the original layout. Only hub ids need a network.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.errors import UserError
from trainer.output import say


def main(argv: list[str] | None = None) -> int:
    """Convert the named model."""
    options = _parse(argv)
    began = time.perf_counter()
    try:
        convert(options.source, options.target, vae=options.vae, full_precision=options.fp32)
    except UserError as error:
        say(*error.problems, stream=sys.stderr)
        return error.exit_code
    print(f"{options.target}: written in {time.perf_counter() - began:.1f} s")
    return 0


def convert(source: str, target: Path, *, vae: str | None = None, full_precision: bool = False) -> None:
    """Write `source` as a file if `target` ends in .safetensors, else as a diffusers folder, atomically.

    Args:
        source: a model, as in `resume_ckpt`.
        target: must not exist.
        vae: replaces the model's own.
        full_precision: fp32 instead of fp16.

    Raises:
        UserError: the source cannot be read or the target is taken.
    """
    if target.exists():
        raise UserError(f"{target} exists already; name a new file or folder.")
    if target.suffix.lower() in (".ckpt", ".pt", ".bin"):
        raise UserError(
            f"{target}: {target.suffix} files are not written; name a .safetensors file or a folder."
        )

    import torch

    from trainer.models.load import load_models
    from trainer.models.options import ModelOptions

    models = load_models(ModelOptions(resume_ckpt=source, vae=vae), key="source")
    for note in models.notes:
        say(f"Note: {note}", stream=sys.stderr)

    from data.atomic import appearing
    from trainer.checkpoints.export import save_diffusers, save_single_file

    dtype = torch.float32 if full_precision else torch.float16
    with appearing(target) as draft:
        if target.suffix.lower() == ".safetensors":
            save_single_file(models, draft, dtype, {"modelspec.title": target.stem})
        else:
            save_diffusers(models, draft, dtype)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", help="diffusers folder, checkpoint folder, hub id, .safetensors or .ckpt file"
    )
    parser.add_argument("target", type=Path, help="a .safetensors file or a folder to write; must not exist")
    parser.add_argument("--vae", help="a VAE to use instead of the model's own: folder, hub id or file")
    parser.add_argument("--fp32", action="store_true", help="write fp32 instead of fp16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
