"""Write the JSON Schemas of train.json and of optimizer files, for editors, and the page of every key.

`python scripts/export_schema.py` rewrites configs/schema/ and docs/keys.md; with --check it names the files
that are out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "schema"
REFERENCE = ROOT / "docs" / "keys.md"


def main(arguments: list[str]) -> int:
    """Write the files, or check them; return 1 if a checked file is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a file is out of date"
    )
    check = parser.parse_args(arguments).check
    stale = []
    for path, text in texts().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    return int(bool(check and stale))


def texts() -> dict[Path, str]:
    """Return the text of each file."""
    from trainer.config.export import key_reference

    found = {
        FOLDER / name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas().items()
    }
    return {**found, REFERENCE: key_reference()}


def schemas() -> dict[str, dict[str, Any]]:
    """Return both schemas by file name."""
    from trainer.config.export import optimizer_schema, train_schema

    return {"train.schema.json": train_schema(), "optimizer.schema.json": optimizer_schema()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
