"""Draw the example data set: 60 captioned images of a concept that the bundled model has never seen.

    python scripts/make_examples.py
    python scripts/make_examples.py --concept umbrella --out umbrellas

The first writes smiling faces: `examples/faces/*.png` with `.txt` captions beside them. The same seed gives
the same files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mini_sd.drawing import CONCEPTS, FACE
from mini_sd.examples import write_examples

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Write the images and their captions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "faces", help="the folder")
    parser.add_argument("--concept", choices=CONCEPTS, default=FACE)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--size", type=int, default=128, help="side in pixels; the model's own is 64")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(argv)
    write_examples(options.out, options.concept, options.count, options.size, options.seed)
    print(f"{options.count} images in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
