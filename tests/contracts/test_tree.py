"""What is in the repository: nothing of one machine and nothing large."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 12_000_000  # bytes; the bundled model's UNet is the largest file
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|root|home/\w+|Users/\w+)/")


@pytest.fixture(scope="module")
def files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_file_is_large(files):
    assert [(path.name, path.stat().st_size) for path in files if path.stat().st_size > LARGEST] == []


def test_the_text_names_no_machine_paths(files):
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue  # a picture or weights
        lines = content.decode("utf-8").splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "\n".join(found)


def test_links_between_the_documents_lead_somewhere(files):
    dead = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in files
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not dead, "\n".join(dead)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model = '/home/" + "ada/sd15'", True),
        ("cp -r /root" + "/x .", True),
        ("/Users" + "/ada/pictures", True),
        ("https://huggingface.co/home/x/y", False),
        ("see docs/work/flow.md", False),
        ("the images/root/ folder", False),
    ],
)
def test_what_counts_as_a_machine_path(text, named):
    assert bool(MACHINE_PATH.search(text)) is named


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (
        "Apache License" in text
        and "Version 2.0, January 2004" in text
        and "END OF TERMS AND CONDITIONS" in text
    )
