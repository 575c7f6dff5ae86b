"""Problems of a machine are reported in sentences, before anything slow is imported.

The packages here are real ones to Python: folders with metadata at the front of the module path, no part of
the check replaced.
"""

import ast
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from trainer import environment
from trainer.environment import check_cuda, check_environment, python_command, visible_gpus
from trainer.errors import UserError

ROOT = environment.REQUIREMENTS.parent
GPU = "NVIDIA GeForce RTX 3060"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder whose packages hide the installed ones, here and in child processes."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """An nvidia-smi ahead of all others on the PATH, with the given script."""

    def install(body):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if sys.platform == "win32":
        pytest.skip("a shell script stands in for nvidia-smi")
    return install


def package(
    site: Path, name: str, version: str, *, version_py: str, requires: str = "", init: str = ""
) -> None:
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(init)
    (site / name / "version.py").write_text(version_py)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    requires_line = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires_line}"
    )


def torch_build(site: Path, *, version: str, cuda: str | None) -> None:
    text = f"from typing import Optional\n__version__ = '{version}'\n"
    text += f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    package(
        site,
        "torch",
        version.partition("+")[0],
        version_py=text,
        init="raise RuntimeError('torch must not be imported here')",
    )


def pinned(name: str) -> str:
    return environment._pins()[name]


def test_an_environment_as_pinned_has_nothing_to_say(nvidia_smi):
    nvidia_smi("exit 9")  # a machine with a driver and no device
    assert check_environment() == []


def test_every_pin_is_an_exact_version_of_an_installed_package():
    pins = environment._pins()
    lines = [
        line
        for line in environment.REQUIREMENTS.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    own = [line for line in lines if ";" not in line or sys.platform in line]
    assert len(pins) == len(own) > 10
    for name, version in pins.items():
        assert metadata.version(name).partition("+")[0] == version


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "version", "3.10.4 (main)")
    with pytest.raises(UserError, match=r"^Python 3\.10\.4 is too old: Python 3\.11 or newer is needed\.$"):
        check_environment()


def test_the_check_itself_compiles_on_pythons_that_it_refuses():
    """Whoever starts Python 3.8 must see the sentence, not a SyntaxError."""
    for name in (
        "train.py",
        "data/__init__.py",
        "data/errors.py",
        "trainer/__init__.py",
        "trainer/environment.py",
        "trainer/errors.py",
    ):
        ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_missing_packages_are_named_together(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# pins\ntorch=="
        + pinned("torch")
        + "\nno-such-thing==1.0\n\nnor-this-one==2.0  # why\nbitsandbytes-not-there==1\n"
    )
    monkeypatch.setattr(environment, "REQUIREMENTS", requirements)
    monkeypatch.setattr(environment, "OPTIONAL", frozenset({"bitsandbytes-not-there"}))
    with pytest.raises(UserError) as error:
        check_environment()
    assert error.value.problems == (
        "2 packages are not installed: no-such-thing, nor-this-one; install with `pip install -r "
        "requirements.txt`.",
    )
    assert error.value.exit_code == 2


def test_a_package_for_another_system_is_not_missing(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        f'torch=={pinned("torch")}\nno-such-thing==1.0; sys_platform == "another"  # why\n'
    )
    monkeypatch.setattr(environment, "REQUIREMENTS", requirements)
    assert check_environment() == []
    monkeypatch.setattr(sys, "platform", "another")
    with pytest.raises(UserError, match=r"^1 package is not installed: no-such-thing;"):
        check_environment()


def test_a_python_with_no_packages_at_all_gets_the_sentence():
    """The command itself, as after a clone: without its site module Python has the standard library alone."""
    answer = subprocess.run(
        [sys.executable, "-S", "-E", "train.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith(
        f"{len(environment._pins().keys() - environment.OPTIONAL)} packages are not installed: torch, "
        "diffusers, "
    )
    assert answer.stderr.count("\n") == 1 and answer.stdout == ""


def test_other_versions_than_the_tested_ones_are_noted(site):
    package(site, "tqdm", "1.2.3", version_py="__version__ = '1.2.3'")
    assert check_environment() == [
        f"Other package versions than the tested ones: tqdm 1.2.3 (tested: {pinned('tqdm')}); "
        "`pip install -r requirements.txt` installs those."
    ]


def test_a_gpu_beside_a_torch_without_cuda_is_noted_without_importing_torch(site, nvidia_smi):
    torch_build(site, version=f"{pinned('torch')}+cpu", cuda=None)
    nvidia_smi(f"echo '{GPU}'")
    (note,) = check_environment()
    assert note.startswith(f"nvidia-smi sees {GPU}, but torch {pinned('torch')}+cpu is built without CUDA")
    assert (
        f"`pip install torch=={pinned('torch')}+cu130 --extra-index-url "
        "https://download.pytorch.org/whl/cu130`" in note
    )


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_hidden_on_purpose_is_not_noted(site, nvidia_smi, monkeypatch, hidden):
    torch_build(site, version=f"{pinned('torch')}+cpu", cuda=None)
    nvidia_smi(f"echo '{GPU}'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert check_environment() == []


def test_a_torch_with_cuda_needs_no_note(site, nvidia_smi):
    torch_build(site, version=f"{pinned('torch')}+cu130", cuda="13.0")
    nvidia_smi(f"echo '{GPU}'")
    assert check_environment() == []


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("echo 'Tesla T4'; echo 'NVIDIA L4'", ["Tesla T4", "NVIDIA L4"]),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", []),
        ("true", []),
    ],
)
def test_what_nvidia_smi_answers(nvidia_smi, body, names):
    nvidia_smi(body)
    assert visible_gpus() == names


def test_no_nvidia_smi_is_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("name", "version", "requires"),
    [
        ("torchvision", "0.20.0+cu121", "torch (==2.5.0)"),  # another release
        ("torchvision", "0.28.0+cu118", "torch==2.13.0"),  # the same release, built for another CUDA
        ("torchaudio", "2.11.0+cu118", ""),  # names no release
    ],
)
def test_a_companion_of_another_torch_that_does_not_import_is_named(site, name, version, requires):
    package(
        site,
        name,
        version.partition("+")[0],
        version_py=f"__version__ = '{version}'",
        requires=requires,
        init=f"raise RuntimeError('operator {name}::nms does not exist')",
    )
    with pytest.raises(UserError) as error:
        check_environment()
    (problem,) = error.value.problems
    assert problem.startswith(f"{name} {version} does not load beside torch {pinned('torch')}")
    assert f"(RuntimeError: operator {name}::nms does not exist)" in problem
    assert problem.endswith(f"training does not need it: `pip uninstall {name}`.")


def test_a_companion_of_another_torch_that_imports_is_let_be(site):
    package(
        site, "torchvision", "0.20.0", version_py="__version__ = '0.20.0+cu121'", requires="torch (==2.5.0)"
    )
    assert check_environment() == []


def test_importing_a_companion_runs_no_file_of_the_working_directory(site, tmp_path, monkeypatch):
    package(
        site,
        "torchvision",
        "0.20.0",
        version_py="__version__ = '0.20.0+cu121'",
        requires="torch (==2.5.0)",
        init="import colorsys",
    )
    monkeypatch.chdir(tmp_path)
    for name in ("torchvision", "colorsys"):  # a module of the standard library would be hidden likewise
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert check_environment() == []
    assert not (tmp_path / "ran").exists()


def test_a_companion_that_fits_is_not_even_imported(site):
    build = str(environment._constants("torch")["__version__"]).partition("+")[2]
    package(
        site,
        "torchvision",
        "0.28.0",
        version_py=f"__version__ = '0.28.0+{build}'\nfrom torchvision.extension import nothing",
        requires=f"torch (=={pinned('torch')})",
        init="raise RuntimeError('imported')",
    )
    assert check_environment() == []


def test_nothing_third_party_is_imported_by_the_check():
    code = (
        "import sys; before = set(sys.modules); from trainer.environment import check_environment; "
        "check_environment();print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - "
        "sys.stdlib_module_names))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.strip() == "['data', 'trainer']"


def test_a_cuda_torch_that_cannot_reach_the_gpu_is_noted_with_its_reason(nvidia_smi, monkeypatch):
    import torch

    def unavailable():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version "
            "12020).\nPlease update.",
            stacklevel=2,
        )
        return False

    nvidia_smi(f"echo '{GPU}'")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    (note,) = check_cuda()
    assert note.startswith(
        f"nvidia-smi sees {GPU}, but torch {torch.__version__} cannot use CUDA 13.0 here (CUDA "
        "initialization: The NVIDIA driver"
    )
    assert "(found version 12020).)" in note and "Please" not in note
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_cuda() == []


def test_the_word_that_starts_this_python_does_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python_command() == sys.executable
    own = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([own, str(tmp_path)]))
    command = [python_command(), "-c", "import sys; print(sys.executable)"]
    assert not Path(command[0]).is_absolute()
    found = subprocess.run(command, capture_output=True, text=True)
    assert Path(found.stdout.strip()).parent == Path(own)
    other = tmp_path / ("python.exe" if os.name == "nt" else "python")  # another one, first on PATH
    other.write_text("")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python_command() == sys.executable
