"""Check the machine: Python, the packages, and a torch that fits the GPU and the other packages.

`check_environment` imports no third-party package, since one may be missing or broken: versions come from the
installed metadata, and the CUDA version of torch from the constants in its version.py.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from trainer.errors import UserError

_ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = _ROOT / "requirements.txt"
PROGRAM = _ROOT / "train.py"

CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
"""The index of torch's builds for CUDA 13.0, which PyPI has for Linux alone."""

OPTIONAL = frozenset({"bitsandbytes", "dadaptation", "peft", "prodigyopt", "triton-windows"})
"""Pinned packages that only some options need, which ask for them."""

COMPANIONS = ("torchvision", "torchaudio")
"""Packages that training does not need, but that diffusers and transformers import if they are installed."""


def check_environment() -> list[str]:
    """Return a warning for everything that will slow or surprise the run, before anything slow is imported.

    Raises:
        UserError: Python is too old, packages are missing, or one is installed that breaks the import of
        diffusers.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (older versions must be able to parse this file)
        raise UserError(f"Python {sys.version.split()[0]} is too old: Python 3.11 or newer is needed.")
    pins = _pins()
    installed = {name: _installed_version(name) for name in pins}
    problems = [*_missing(installed), *_broken_companions()]
    if problems:
        raise UserError(problems)
    return [*_torch_without_cuda(pins["torch"]), *_other_versions(pins, installed)]


def python_command() -> str:
    """Return the word that starts this Python in a shell: a name that PATH leads to it, or its path."""
    own = Path(sys.executable)
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and Path(found).parent == own.parent and Path(found).samefile(own):
            return name
    return str(own)


def check_cuda() -> list[str]:
    """Return a warning if nvidia-smi sees a GPU that a torch built for CUDA cannot use. Imports torch."""
    import torch

    gpus = visible_gpus()
    if not gpus or torch.version.cuda is None:
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return []
    reason = f" ({str(caught[0].message).splitlines()[0]})" if caught else ""
    return [
        f"nvidia-smi sees {', '.join(gpus)}, but torch {torch.__version__} cannot use CUDA "
        f"{torch.version.cuda} here{reason}: training would run on the CPU, many times slower; update the "
        "NVIDIA driver, or install a torch built for an older CUDA."
    ]


def visible_gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver reports, unless CUDA_VISIBLE_DEVICES hides all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return []  # hidden on purpose
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that does not answer offers no GPU
    return (
        [line.strip() for line in answer.stdout.splitlines() if line.strip()]
        if answer.returncode == 0
        else []
    )


def _pins() -> dict[str, str]:
    """Return the pinned versions of requirements.txt by package, without those for another system."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    pins = {}
    for requirement, _, marker in (line.partition(";") for line in lines):
        name, equal, version = requirement.strip().partition("==")
        if equal and marker.strip() in ("", f'sys_platform == "{sys.platform}"'):
            pins[name] = version
    return pins


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing(installed: dict[str, str | None]) -> list[str]:
    names = [name for name, version in installed.items() if version is None and name not in OPTIONAL]
    if not names:
        return []
    are = "package is" if len(names) == 1 else "packages are"
    return [
        f"{len(names)} {are} not installed: {', '.join(names)}; install with `pip install -r "
        "requirements.txt`."
    ]


def _other_versions(pins: dict[str, str], installed: dict[str, str | None]) -> list[str]:
    """Return a warning about packages whose versions are not the tested ones."""
    others = [
        f"{name} {version} (tested: {pins[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != pins[name]
    ]
    if not others:
        return []
    return [
        f"Other package versions than the tested ones: {', '.join(others)}; `pip install -r "
        "requirements.txt` installs those."
    ]


def _torch_without_cuda(pin: str) -> list[str]:
    build = _constants("torch")
    if build is None or build.get("cuda") is not None:
        return []
    gpus = visible_gpus()
    if not gpus:
        return []
    return [
        f"nvidia-smi sees {', '.join(gpus)}, but torch {build['__version__']} is built without CUDA: "
        "training would run on the CPU, many times slower; install the CUDA build with `pip install "
        f"torch=={pin}+cu130 --extra-index-url {CUDA_INDEX}`."
    ]


def _broken_companions() -> list[str]:
    """Return a problem for each companion that was built for another torch and does not import with this one.

    Metadata does not show whether a package loads, and importing each takes seconds. So only those whose
    metadata or build does not fit are imported, each in a process of its own.
    """
    torch = _constants("torch")
    if torch is None:
        return []
    problems = []
    for name in COMPANIONS:
        own = _constants(name)
        if own is None or _fits(name, str(own["__version__"]), torch):
            continue
        error = _import_error(name)
        if error is not None:
            problems.append(
                f"{name} {own['__version__']} does not load beside torch {torch['__version__']} ({error}), "
                f"which breaks diffusers and transformers; training does not need it: `pip uninstall {name}`."
            )
    return problems


def _fits(name: str, version: str, torch: dict[str, object]) -> bool:
    """Return whether a companion fits the installed torch, and its CUDA as far as its version shows."""
    torch_version = str(torch["__version__"]).partition("+")[0]
    for requirement in metadata.requires(name) or ():
        wanted = requirement.replace(" ", "").replace("(", "").partition(";")[0]
        if wanted.startswith("torch==") and wanted.removeprefix("torch==").rstrip(")") != torch_version:
            return False
    build = version.partition("+")[2]
    cuda = torch.get("cuda")
    return not build.startswith(("cu", "cpu")) or build == (f"cu{cuda}".replace(".", "") if cuda else "cpu")


def _import_error(name: str) -> str | None:
    """Return the last line of the error of importing `name` in a fresh interpreter; None if it imports."""
    # -P keeps the working directory off the path; -I would also hide packages installed with --user or by
    # PYTHONPATH.
    command = [sys.executable, "-P", "-c", f"import {name}"]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if answer.returncode == 0:
        return None
    lines = answer.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {answer.returncode}"


def _constants(name: str) -> dict[str, object] | None:
    """Return the constants of a package's version.py without importing the package; None if there is none."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    if not path.is_file():
        return None
    constants: dict[str, object] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                constants[target.id] = node.value.value
    return constants if "__version__" in constants else None
