"""requirements.lock pins what requirements.txt asks for, with hashes; checked without a network."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def entries(text: str) -> dict[str, str]:
    """Return the lines of a requirements file by package, continued ones joined, without comments."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [
        line.partition(" #")[0].strip()
        for line in joined.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return {re.split(r"[=<>;\s]", line)[0].replace("_", "-").lower(): line for line in lines}


def test_the_lock_is_that_of_the_requirements():
    asked = entries((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    locked = entries((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert len(locked) > len(asked) > 15
    for name, line in asked.items():
        pin, _, marker = (part.strip() for part in line.partition(";"))
        assert name in locked, f"{name} is not locked; run scripts/lock_requirements.py"
        found, _, rest = locked[name].partition(" ")
        assert found.replace("_", "-") == pin.replace("_", "-"), (
            f"{pin} is locked as {found}; run scripts/lock_requirements.py"
        )
        assert not marker or marker.replace('"', "'") in rest


def test_every_locked_package_has_one_version_and_hashes_and_comes_from_the_index():
    for line in entries((ROOT / "requirements.lock").read_text(encoding="utf-8")).values():
        assert re.match(r"[a-z0-9.-]+==\S+ (; .*? )?--hash=sha256:[0-9a-f]{64}\b", line), line
        assert "://" not in line and "+cpu" not in line and not line.startswith("-")
