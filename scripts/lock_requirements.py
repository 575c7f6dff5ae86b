"""Write requirements.lock: every package of requirements.txt at one version, with SHA-256 hashes.

    python scripts/lock_requirements.py

Run it after a change of requirements.txt. It needs a network and uv (`pip install uv`), which resolves for
Python 3.11 and later on all platforms at once. torch's files are PyPI's: with CUDA on Linux, without on
Windows and macOS. download.pytorch.org's CPU builds have other hashes; install them from requirements.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"

_HEADER = """\
# Made by scripts/lock_requirements.py from requirements.txt; do not edit. Install with
#   pip install --require-hashes -r requirements.lock
# torch is PyPI's: with CUDA on Linux. The CPU builds of download.pytorch.org have other hashes;
# install those from requirements.txt.
"""


def main() -> int:
    """Write the lock."""
    uv = shutil.which("uv")
    if uv is None:
        print("lock_requirements: uv is missing; install it with `pip install uv`.", file=sys.stderr)
        return 2
    options = [
        "--universal",
        "--generate-hashes",
        "--python-version",
        "3.11",
        "--no-header",
        "--no-annotate",
        "--quiet",
    ]
    index = ["--no-config", "--default-index", "https://pypi.org/simple"]
    made = subprocess.run(
        [uv, "pip", "compile", "requirements.txt", *options, *index],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if made.returncode:
        return made.returncode
    LOCK.write_text(_HEADER + made.stdout, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
