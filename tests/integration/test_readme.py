"""Every command of the documentation: run, checked as far as possible here, or listed with a reason.

A command is a line of an `sh` or `powershell` block, a line with ! or % of a `python` block (Colab's), or a
piece of code in the text that starts a program. Each must stand in exactly one of the tables below, and each
entry of them in the documentation.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import train
from trainer.planning.memory import Estimate

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "configs/followfox/README.md",
        "models/mini-sd/README.md",
    ),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]

RUN = [
    "python train.py --help all",
    "python scripts/export_schema.py",
]
"""Run as they are, in a copy of the repository, in this process."""

COPIED = "cp configs/sd15.json mydog.json"
"""Run once, in that copy, before all others."""

_DRIVE = (
    "--data_root /content/drive/MyDrive/pictures --logdir /content/drive/MyDrive/sd-dadapt "
    "--save_format diffusers --keep_last_n 1"
)
_DOCKER = (
    'docker run --rm --gpus all --shm-size 2g -v "$PWD/input:/app/input" -v "$PWD/logs:/app/logs" '
    '-v "$PWD/cache:/cache" sd-dadapt'
)
_FOLLOWFOX = "python train.py --config configs/followfox/train.json --data_root YOUR_IMAGES"
CHECKED = [
    "python train.py --config configs/sd15.json --vram 12 --check",
    "python train.py --config configs/sd15.json --contact_sheets sheets --check",
    "python train.py --config configs/sd15.json --data_root YOUR_IMAGES --check",
    "python train.py --config mydog.json --vram 12 --check",
    "python train.py --config mydog.json",
    "python train.py --config configs/sd15_lora.json --data_root YOUR_IMAGES",
    "python train.py --config YOUR_TRAIN.json --check",
    "python train.py --config train.json",
    "python train.py --config train.json --optimizer_config optimizer.json",
    "python train.py --config train.json --sample_steps 50 --validation_config validation.json",
    "python train.py --config train.json --ema_decay_rate 0.99 --ema_update_interval 10 "
    "--ema_sample_ema_model",
    "python train.py --config train.json --stop_after_steps 8",
    _FOLLOWFOX,
    f"{_FOLLOWFOX} --optimizer_config configs/followfox/optimizer_adamw8bit.json",
    f"python train.py --config configs/sd15_t4.json {_DRIVE}",
    f"{_DOCKER} --config configs/sd15.json",
]
"""Run with --check for a card of 24 GiB, with folders that are here, and without the estimate of memory,
which takes half a minute and has tests of its own: training itself takes minutes, or a GPU and a model from
the hub."""

CHECKS: set[tuple[Path | str, ...]] = set()

_GRID = "python scripts/grid.py"
_FACES = f"{_GRID} logs/mini_faces-... --prompts examples/sample_prompts.json"
_TWO_MODELS = f"{_GRID} a.safetensors b.safetensors --base models/mini-sd --against other.safetensors"
_BLEND = f"{_GRID} --blend a.safetensors b.safetensors"
_TRAIN = "train.py --config train.json"
_TWO_HOSTS = "torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint host0:29500"
_WHEELS = "https://download.pytorch.org/whl/cu130"
_UPLOADED = "YOUR_NAME/faces logs/RUN/ckpts/CHECKPOINT ."
_COMPARE = (
    "python scripts/compare_optimizers.py --config train.json optimizer.json optimizer_dadapt.json "
    "--out compare --seeds 1 2"
)
_TORTURE = (
    "python scripts/torture.py --out ... --kills 200 --config train.json --max_epochs 4 --batch_size 12 "
    "--save_every_n_epochs 1 --keep_last_n 2 --sample_steps 1000 --sample_prompts null"
)
_TWO_GPUS = (
    "train.py --config configs/sd15.json --data_root examples/faces --optimizer_config optimizer_dadapt.json "
    "--batch_size 4 --stop_after_steps 40 --log_step 10 --no_save_ckpt"
)
HELPED = {
    "python scripts/bench_memory.py --cards 8 12 16 24": "traces the five set-ups for minutes",
    "python scripts/bench_optimizer.py": "takes minutes on an idle machine",
    "python scripts/bench_optimizer.py --threads 1 --rounds 5": "takes minutes too",
    "python scripts/bench_optimizer.py --network mini": "takes minutes; test_bench_optimizer.py steps each",
    "python scripts/bench_optimizer.py --network mini --threads 1": "takes as long",
    "python train.py --config configs/sd15.json --batch_size N --vram 80 --check": "stands for four numbers",
    "scripts/bench_optimizer.py --device cuda --network both --every 1 --rounds 5 --threads 1": "needs a GPU",
    "python scripts/gpu_report.py --out gpu-report": "needs a GPU; test_gpu_report.py runs it on the CPU",
    "scripts/bench_memory.py --networks unet": "takes an hour; test_footprint.py runs one of its rows",
    "python scripts/bench_data.py pixels --rounds 7": "takes minutes; test_bench_data.py runs it with less",
    "scripts/bench_data.py scan --rounds 1": "writes 100 000 files; test_bench_data.py runs it with less",
    "scripts/bench_data.py latents --rounds 40": "takes minutes; test_bench_data.py runs it with less",
    _COMPARE: "trains four times; test_compare.py does on a tiny model",
    f"{_FACES} --seeds 1 2 --cfgs 3 7 --out faces.png": "needs a run; test_grid.py draws a tiny one",
    f'{_TWO_MODELS} --prompts "a red heart"': "needs users' models; test_grid.py draws tiny ones",
    f"{_BLEND} --weights 0.7 0.3 --out c.safetensors": "needs such models; test_grid.py merges some",
    f"{_BLEND} base.safetensors --add_difference 0.5 --out c.safetensors": "needs such models too",
    f"{_GRID} logs/RUN --prompts YOUR_PROMPTS --out grid.png": "needs a user's run; test_grid.py draws one",
    "python scripts/same_results.py --against 062bc76": "trains nine runs in each of two commits",
    "python scripts/mini_sd_sweep.py --out sweep --seeds 1 2 3": "trains 54 times",
    _TORTURE: "takes an hour; test_signals.py kills a run five times",
    "python scripts/make_mini_sd.py judge": "draws hundreds of pictures; test_mini_sd.py tests the judge",
}
"""Run with --help, which fails if a choice in the words before it does not exist; why not as they are."""

LONG = [
    "python train.py --config mydog.json --vram 12 --check",
    "python train.py --config train.json",
    "python train.py --config train.json --resume_ckpt findlast",
]
"""Run as they are, in a process of their own, in this order, behind `slow`."""

ELSEWHERE = {
    "python -m pytest -n 2": "is this",
    "python scripts/make_examples.py --concept umbrella --out umbrellas": "is a script of the folder of its "
    "modules; test_mini_sd.py draws some",
    "pytest tests/integration/test_processes.py": "is a test",
    "pytest -m slow": "is the slow part of this",
    "pytest -m gpu tests/numerics/test_triton_kernel.py": "needs a GPU",
    "torchrun --shutdown-timeout 300": "is the beginning of a command; needs GPUs",
    "python3 -m venv .venv": "makes an environment, as .ci/run does",
    "py -m venv .venv": "is for Windows",
    ".venv\\Scripts\\activate": "is for Windows",
    "tensorboard --logdir logs": "serves until it is stopped",
    "tensorboard --logdir compare/runs": "serves until it is stopped",
    "wandb sync": "needs an account",
    "python train.py --config YOUR_TRAIN.json --resume_ckpt logs/RUN --resume_weights_only": "needs a run; "
    "test_first_d.py starts such ones",
    "python train.py --config mydog.json --resume_ckpt findlast": "needs such a run; LONG resumes one",
    f"torchrun --nproc_per_node 2 {_TWO_GPUS}": "needs two GPUs; test_processes.py launches on CPUs",
    "python -m pytest -m slow": "is the slow part of this",
    "python -m pytest -m gpu": "needs a GPU",
    "python -m pytest -m slow -s tests/integration/test_first_run.py": "is a test",
    "python -m pytest -m slow -s tests/integration/test_eight_bits.py": "is a test",
    "python -m pytest -m slow tests/integration/test_fuzz_models.py": "is a test",
    "ruff check": "is a step of .ci/run",
    "ruff format --check": "is a step of .ci/run",
    "pyright": "is a step of .ci/run",
    "bash .ci/run": "runs this",
    "PYTHON=python3.12 bash .ci/run": "runs this",
    ". .venv/bin/activate": "belongs to a shell",
    "pre-commit install": "changes the clone",
    "pip install -r requirements.txt": "installs; .ci/run does so",
    "pip install -r requirements-dev.txt": "installs; .ci/run does so",
    "pip install -q -r requirements.txt": "installs; .ci/run does so",
    "pip install --require-hashes -r requirements.lock": "downloads torch for CUDA; test_lock.py reads it",
    "python scripts/lock_requirements.py": "needs uv and the package index",
    f"pip install -r requirements.txt --extra-index-url {_WHEELS}": "is for Windows",
    "pip install pillow-heif": "installs what is optional",
    "pip install wandb": "installs what is optional",
    f"accelerate launch --multi_gpu --num_processes 2 {_TRAIN}": "needs GPUs; test_processes.py uses CPUs",
    f"torchrun --nproc_per_node 2 {_TRAIN}": "takes minutes; test_processes.py launches a tiny run",
    f"{_TWO_HOSTS} {_TRAIN}": "needs machines",
    "pip uninstall -q -y torchvision torchaudio": "is for Colab",
    "git clone REPOSITORY sd-dadapt": "needs the network",
    "cd sd-dadapt": "belongs to a shell",
    "%cd sd-dadapt": "is for Colab",
    "%load_ext tensorboard": "is for Colab",
    "%tensorboard --logdir /content/drive/MyDrive/sd-dadapt": "is for Colab",
    f"python train.py --config configs/sd15_t4.json {_DRIVE} --resume_ckpt findlast": "needs a run",
    "docker build -t sd-dadapt .": "needs a container engine; test_container.py tests what it copies",
    "hf auth login": "needs an account",
    f'hf upload {_UPLOADED} --exclude "resume/*"': "needs the hub; tested below without",
}
"""What cannot run here, or is a test itself, with the reason."""

PROGRAM = re.compile(
    r"`!?((?:python3? |pip |hf |docker |bash |tensorboard |torchrun |pytest |wandb sync|[A-Z]+=\S+ bash "
    r"|scripts/[\w.]+ )[^`]*)`"
)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the commands of a document, those that && joins one by one."""
    found = [" ".join(command.split()) for command in PROGRAM.findall(FENCE.sub("", text))]
    for language, body in FENCE.findall(text):
        lines = [line.partition("  #")[0].strip() for line in body.splitlines()]
        if language == "sh":
            found += lines
        elif language == "powershell":
            found += [part.strip() for line in lines for part in line.split(";")]
        elif language == "python":
            found += [line.removeprefix("!") for line in lines if line.startswith(("!", "%"))]
    return [part.strip() for line in found for part in line.split("&&") if part.strip()]


def test_every_command_is_run_or_has_a_reason_and_no_other():
    said = {command for name in DOCUMENTS for command in commands((ROOT / name).read_text(encoding="utf-8"))}
    tables = [
        COPIED,
        *RUN,
        *CHECKED,
        *HELPED,
        *(command for command in LONG if command not in CHECKED),
        *ELSEWHERE,
    ]
    assert len(tables) == len(set(tables)), "a command stands in two tables"
    assert sorted(said - set(tables)) == [], "new commands: run them, or say why not"
    assert sorted(set(tables) - said) == [], "entries that no document names any more"


def test_every_document_is_read():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert sorted(DOCUMENTS) == sorted(listed.stdout.split())


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Return a copy of what the documentation speaks of, with a folder of images as a user has one."""
    folder = tmp_path_factory.mktemp("clone") / "sd-dadapt"
    ignored = shutil.ignore_patterns(
        ".git", ".ci", ".venv", "logs", "input", "build", "__pycache__", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copytree(ROOT / "examples" / "faces", folder / "input")
    shutil.copytree(ROOT / "examples" / "faces", folder / "drive" / "pictures")
    (folder / "validation.json").write_text("{}")
    subprocess.run(shlex.split(COPIED), cwd=folder, check=True)
    return folder


def here(command: str, copy: Path) -> list[str]:
    """Return the words of a command with folders that exist."""
    after = (
        command.removeprefix(_DOCKER).strip()
        if command.startswith("docker")
        else command.removeprefix("python ")
    )
    words = after if command.startswith("python ") or command.startswith("scripts/") else f"train.py {after}"
    return shlex.split(
        words.replace("/content/drive/MyDrive", str(copy / "drive"))
        .replace("YOUR_IMAGES", "input")
        .replace("YOUR_TRAIN.json", "train.json")
    )


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*.json")}
    start(here(command, copy), monkeypatch)
    assert ("--data_root" in capsys.readouterr().out) == command.endswith("--help all")
    assert {path: path.read_bytes() for path in copy.rglob("*.json")} == before, "the schemas are up to date"


@pytest.mark.parametrize("command", CHECKED)
def test_a_training_command_passes_its_check(command, copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    monkeypatch.setattr("trainer.planning.plan.estimate", lambda *_, **__: Estimate([], "cpu", 0, None))
    monkeypatch.setattr(Estimate, "lines", lambda _: [])
    program, *arguments = here(command.replace(" --vram 12", "").removesuffix(" --check"), copy)
    if (copy, *arguments) in CHECKS:
        return  # was the same run
    CHECKS.add((copy, *arguments))
    assert program == "train.py" and train.main([*arguments, "--check", "--vram", "24"]) == 0
    images = 47 if "--validation_config" in arguments else 60
    assert f"images: {images} in" in capsys.readouterr().out


@pytest.mark.parametrize("command", HELPED)
def test_a_measuring_command_is_understood(command, copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    start([*here(command, copy), "--help"], monkeypatch)
    assert "usage: " in capsys.readouterr().out


def start(words: list[str], monkeypatch) -> None:
    """Run a Python program with these arguments; it must end with 0."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert ended.code in (0, None)


def test_the_models_page_draws_a_picture(copy, monkeypatch):
    monkeypatch.chdir(copy)
    for language, body in FENCE.findall(
        (ROOT / "models" / "mini-sd" / "README.md").read_text(encoding="utf-8")
    ):
        assert language == "python"
        *lines, last = body.strip().replace("num_inference_steps=20", "num_inference_steps=2").splitlines()
        space: dict = {}
        exec("\n".join(lines), space)
        assert eval(last, space).size == (64, 64)


def test_the_line_that_publishes_uploads_the_model_and_its_page_alone(tmp_path, monkeypatch):
    """The hub's own command line, up to the call that would go over the network."""
    import click
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    command = next(command for command in ELSEWHERE if command.startswith("hf upload"))
    checkpoint = tmp_path / "logs" / "RUN" / "ckpts" / "CHECKPOINT"
    for name in (
        "README.md",
        "curves.png",
        "unet/config.json",
        "base.json",
        "resume/state.json",
        "resume/deep/training.json",
    ):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text("")
    monkeypatch.chdir(tmp_path)
    taken: dict = {}
    monkeypatch.setattr(
        HfApi, "create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "YOUR_NAME/faces"})()
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **arguments: taken.update(arguments))
    from huggingface_hub.cli.hf import app

    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with suppress(SystemExit, click.exceptions.Exit):
        app(standalone_mode=False)
    assert (taken["repo_id"], taken["path_in_repo"]) == ("YOUR_NAME/faces", ".")
    assert Path(taken["folder_path"]).resolve() == checkpoint
    files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    sent = filter_repo_objects(
        files, allow_patterns=taken["allow_patterns"], ignore_patterns=taken["ignore_patterns"]
    )
    assert sorted(sent) == ["README.md", "base.json", "curves.png", "unet/config.json"]


@pytest.mark.slow
def test_the_first_run_and_going_on_with_it(copy):
    for command in LONG:
        done = subprocess.run(
            [sys.executable, *here(command, copy)],
            cwd=copy,
            env={**os.environ},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not (command.endswith("--check") and done.stderr), "libraries have something to say"
    (run,) = (path for path in (copy / "logs").iterdir() if path.name != "cache")
    assert (run / "optimizer.found.json").is_file() and (
        next((run / "ckpts").glob("last-*/curves.png"))
    ).is_file()
