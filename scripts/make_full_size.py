"""Make a full-size Stable Diffusion 1.5 with random weights, to test memory, speed and formats offline.

    python scripts/make_full_size.py --out /tmp/full-size

The folder is a complete diffusers model with CLIP's own tokenizer: 1.07 billion parameters, 2.1 GB in fp16.
Its samples are noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.errors import UserError
from trainer.models.quiet import quiet_libraries
from trainer.output import say


def main(argv: list[str] | None = None) -> int:
    """Write the folder."""
    options = _parse(argv)
    began = time.perf_counter()
    quiet_libraries()
    try:
        counts = make(options.out, options.seed, options.dtype)
    except UserError as error:
        say(*error.problems, stream=sys.stderr)
        return error.exit_code
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    parameters = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(
        f"{options.out}: {parameters} parameters; {size / 1e9:.2f} GB written in "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 0


def make(out: Path, seed: int, dtype: str) -> dict[str, int]:
    """Write the folder and return the parameters of each network.

    Args:
        out: must be empty or missing.
        seed: of the weights.
        dtype: on disk, "fp16" or "fp32".

    Raises:
        UserError: the folder is in use.
    """
    import torch

    from trainer.checkpoints.export import save_diffusers
    from trainer.models import sd15
    from trainer.models.family import SD1
    from trainer.models.networks import empty_models
    from trainer.models.tokenizer import clip_tokenizer

    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty; name a new folder.")
    generator = torch.Generator().manual_seed(seed)
    models = empty_models(SD1.default, clip_tokenizer(), f"random weights, seed {seed}")
    counts = {}
    for name, expected in sd15.PARAMETERS.items():
        network = getattr(models, name)
        fill_randomly(network, generator)
        counts[name] = sum(parameter.numel() for parameter in network.parameters())
        assert counts[name] == expected, f"{name} has {counts[name]} parameters, SD 1.5's has {expected}"
    save_diffusers(models, out, torch.float16 if dtype == "fp16" else torch.float32)
    return counts


def fill_randomly(network, generator) -> None:
    """Give a network on the meta device weights that keep activations of order one.

    Matrices and convolutions are normal with variance 1 / (3 fan-in), the variance of torch's own start;
    norms are the identity, biases zero, embeddings normal with deviation 0.02. They are made on the
    generator's device.
    """
    import torch

    from trainer.models.networks import fill

    weights = {}
    for name, empty in network.state_dict().items():
        if name.endswith("bias"):
            weights[name] = torch.zeros(empty.shape, device=generator.device)
        elif empty.ndim == 1:
            weights[name] = torch.ones(empty.shape, device=generator.device)
        else:
            deviation = 0.02 if "embedding.weight" in name else (3 * empty[0].numel()) ** -0.5
            made = torch.empty(empty.shape, device=generator.device)
            weights[name] = made.normal_(std=deviation, generator=generator)
    fill(network, weights)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="precision on disk")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
