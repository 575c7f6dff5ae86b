r"""Draw the same prompts with several models side by side, or merge checkpoints into one.

    python scripts/grid.py logs/mini_faces-... --prompts examples/sample_prompts.json --out faces.png
    python scripts/grid.py a.safetensors b.safetensors --base models/mini-sd \
        --prompts "a red heart" "a blue face" --seeds 1 2 --cfgs 3 7
    python scripts/grid.py --blend a.safetensors b.safetensors --weights 0.7 0.3 --out c.safetensors

A run stands for all its checkpoints. The base, which a run records or --base names, is the first column;
--against adds other models after the last. The axes are checkpoints, prompts, seeds, cfgs and steps: one
along the rows (--x), one down the columns (--y), and a panel for every combination of the other three. The
grid is written as a PNG and as a page beside it. Prompts are read as the first run reads those of its
samples: with its clip_skip, max_tokens and wildcards.

--blend merges .safetensors or .ckpt files: with --weights into the sum of each times its number; with
--add_difference W and three files A, B and C into A + W (B - C). The new file's header records its sources.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.grids.draw import AXES
from trainer.errors import UserError
from trainer.output import say

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Draw a grid, or merge files."""
    options = _parse(argv)
    try:
        if options.blend:
            return merge(options)
        return draw_grid(options)
    except UserError as error:
        say(*error.problems, stream=sys.stderr)
        return error.exit_code


def draw_grid(options: argparse.Namespace) -> int:
    """Write the grid and its page.

    Raises:
        UserError: a model, file or option cannot be used.
    """
    from data.atomic import appearing
    from scripts.grids.columns import find_columns, find_reading
    from scripts.grids.draw import draw, page_body, picture_of, read_prompts
    from scripts.web_page import document

    if options.weights or options.add_difference is not None:
        raise UserError("--weights and --add_difference merge files; name the files with --blend.")
    target = options.out or Path("grid.png")
    if target.suffix.lower() != ".png":
        raise UserError(
            f"--out: {target} does not end in .png, the format of the picture; rename it. "
            "The page beside it gets the same name in .html."
        )
    columns = find_columns(options.checkpoints, base=options.base, against=options.against)
    grid = draw(
        columns,
        read_prompts(options.prompts),
        reading=find_reading(options.checkpoints),
        seeds=options.seeds,
        cfgs=options.cfgs,
        steps=options.steps,
        resolution=options.resolution,
        x=options.x,
        y=options.y,
        say=print,
    )
    page = target.with_suffix(".html")
    with appearing(target) as draft:
        picture_of(grid, target.stem).save(draft, "PNG")
    with appearing(page) as draft:
        draft.write_text(document(target.stem, page_body(grid)), encoding="utf-8")
    print(f"{target}, {page}: {len(grid.cells)} samples")
    return 0


def merge(options: argparse.Namespace) -> int:
    """Write the blend.

    Raises:
        UserError: the files do not fit together, or the arguments do not.
    """
    from trainer.models.quiet import quiet_libraries

    quiet_libraries()
    from scripts.grids.blend import add_difference, weighted_sum

    if options.out is None:
        raise UserError("--out: name the .safetensors file to write.")
    if options.checkpoints or options.against:
        raise UserError("--blend only merges; draw its result with another command.")
    if (options.weights is None) == (options.add_difference is None):
        raise UserError(
            "--blend: give --weights with a number for each file, or --add_difference with one for three "
            "files A + w (B - C)."
        )
    if options.weights is not None:
        weighted_sum(options.blend, options.weights, options.out)
    else:
        add_difference(options.blend, options.add_difference, options.out)
    print(
        f"{options.out}: written. Draw with it:  python scripts/grid.py {options.out} --base "
        f"{options.blend[0]} --prompts PROMPTS"
    )
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        help="runs, checkpoints, diffusers folders, hub ids, single files, LoRA files",
    )
    parser.add_argument(
        "--base", help="the first column: a model, or none (default: the start of the first run)"
    )
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="MODEL", help="further models, shown last"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        default=[str(ROOT / "examples" / "sample_prompts.json")],
        help=(
            "a .json or .txt file as for sample_prompts, or the prompts themselves (default: "
            "examples/sample_prompts.json)"
        ),
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="draw every prompt with each of these seeds (default: the file's)",
    )
    parser.add_argument("--cfgs", type=float, nargs="+", help="guidance scales (default: the file's, or 7)")
    parser.add_argument(
        "--steps", type=int, nargs="+", help="the sampler's steps (default: the file's, or 30)"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help="the side of a square sample (default: the file's, or the model's own)",
    )
    parser.add_argument("--x", choices=AXES, default="checkpoints", help="along the rows (checkpoints)")
    parser.add_argument("--y", choices=AXES, default="prompts", help="down the columns (prompts)")
    parser.add_argument(
        "--out", type=Path, help="the PNG to write (grid.png), or the merged .safetensors file"
    )
    parser.add_argument(
        "--blend", type=Path, nargs="+", metavar="FILE", help="merge these files instead of drawing"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", help="with --blend: a number for each file; they add up to 1"
    )
    parser.add_argument("--add_difference", type=float, metavar="W", help="with --blend A B C: A + W (B - C)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
