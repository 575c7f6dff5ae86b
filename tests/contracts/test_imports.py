"""Imports point one way, and libraries stay in their modules: docs/code.md, read from the source."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (  # top to bottom: a module imports from its own layer and from those below it
    ("train", "scripts"),
    ("trainer.run",),
    ("trainer.planning",),
    ("trainer.config",),
    ("trainer.training",),
    ("trainer.evaluation",),
    ("trainer.reporting",),
    ("trainer.checkpoints",),
    ("trainer.models",),
    ("trainer.optim",),
    ("trainer.diffusion",),
    ("trainer",),  # what all packages use: errors, output, files of state
    ("data",),
)

DIFFUSION = (
    "trainer.models",
    "trainer.diffusion.schedule",
    "trainer.optim.schedules",
    "trainer.evaluation.sampling",
    "trainer.evaluation.schedulers",
    "trainer.checkpoints.export",
    "trainer.reporting.console",  # to quieten them
)
LIBRARIES = {  # which modules may import a library; the scripts may import all, and others are free
    "diffusers": DIFFUSION,
    "transformers": DIFFUSION,
    "accelerate": ("trainer.training.launch",),
    "peft": ("trainer.models.lora",),
    "pydantic": ("trainer.config", "trainer.state_file"),
    "bitsandbytes": ("trainer.optim",),
    "dadaptation": ("trainer.optim",),
    "prodigyopt": ("trainer.optim",),
    "triton": ("trainer.optim.dadapt.triton_kernel", "trainer.optim.dadapt.device"),
    "tensorboard": ("trainer.reporting",),
    "tqdm": ("trainer.reporting",),
    "wandb": ("trainer.reporting",),
}

ALL_IMPORTS = {  # everything that a package may import besides the standard library and itself
    "data": ("numpy", "torch", "PIL", "pillow_heif", "pyarrow", "yaml", "annotated_types", "safetensors"),
    "trainer.optim": (
        "torch",
        "diffusers",
        "bitsandbytes",
        "dadaptation",
        "prodigyopt",
        "triton",
        "annotated_types",
        "trainer.errors",
        "trainer.state_file",
        "trainer.transfer",
    ),
    "trainer.errors": ("data.errors",),
}

SLOW = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "dadaptation", "prodigyopt",
    "tensorboard",
    "matplotlib", "safetensors", "wandb",
)  # fmt: skip
"""Libraries that take seconds to import together: a configuration error is shown before any of them is."""

SHAPELESS = ("utils", "util", "helpers", "helper", "manager", "common", "misc")


@dataclass(frozen=True)
class Import:
    """One imported name: its line, its module, and whether it runs when the importing module does."""

    line: int
    target: str
    name: str
    at_start: bool


Tree = dict[str, list[Import]]


def test_modules_import_downwards_only(tree):
    problems = upward(tree)
    assert not problems, "\n".join(problems)


def test_libraries_stay_in_their_modules(tree):
    problems = strayed(tree)
    assert not problems, "\n".join(problems)


def test_the_schema_imports_option_classes_only(tree):
    problems = not_options(tree)
    assert not problems, "\n".join(problems)


def test_modules_that_hold_options_import_nothing_slow(tree):
    problems = slow_starts(tree, option_modules())
    assert not problems, "\n".join(problems)


def test_importing_the_configuration_loads_nothing_slow():
    """The same from outside: modules that Python has loaded after everything before the models."""
    modules = sorted(name for name in sources() if name.startswith("trainer.config"))
    assert "trainer.config" in modules
    code = (
        f"import sys, trainer.environment, {', '.join(modules)}; print(sorted({set(SLOW)!r} & "
        "set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (answer.stdout.strip(), answer.stderr) == ("[]", "")


def test_the_packages_import_by_full_names():
    """A relative import would pass the other rules unseen."""
    relative = [
        name
        for name, text in sources().items()
        if not name.startswith("scripts") and re.search(r"^\s*from \.", text, re.MULTILINE)
    ]
    assert relative == []


def test_text_leaves_in_one_place():
    """Elsewhere a file's name or a key could steer the terminal."""
    printing = [
        name
        for name, text in sources().items()
        if not name.startswith("scripts") and re.search(r"\bprint\(|sys\.std\w+\.", text)
    ]
    assert printing == ["trainer.output"]


def test_modules_are_named_for_what_they_hold():
    assert [name for name in sources() if name.rpartition(".")[2].strip("_") in SHAPELESS] == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("data.plan", "from trainer.errors import UserError", "upward"),
        ("trainer.reporting.metrics", "def f():\n    import trainer.run.build", "upward"),
        (
            "trainer.diffusion.loss",
            "if TYPE_CHECKING:\n    from trainer.models.pipeline import Models",
            "upward",
        ),
        ("trainer.training.step", "from trainer.run import build", "upward"),
        ("trainer.evaluation.sampling", "from scripts.grid import draw", "upward"),
        ("trainer.training.loop", "import diffusers.models", "strayed"),
        ("trainer.reporting.metrics", "from accelerate import Accelerator", "strayed"),
        ("trainer.training.precision", "from pydantic import BaseModel", "strayed"),
        ("data.image", "from tqdm import tqdm", "strayed"),
        ("data.image", "import requests", "strayed"),
        ("trainer.optim.adamw", "from trainer.reporting.metrics import Meter", "strayed"),
        ("trainer.config.schema", "from trainer.training.loop import run", "not_options"),
        ("trainer.config.schema", "import trainer.training.loop", "not_options"),
        ("trainer.training.options", "import torch", "slow_starts"),
        ("trainer.training.options", "from data.middle import thing", "slow_starts"),
        (
            "trainer.training.options",
            "try:\n    import torch.nn\nexcept ImportError:\n    pass",
            "slow_starts",
        ),
    ],
)
def test_each_rule_sees_what_it_forbids(module, source, rule):
    planted = {
        "trainer.training.options": [],
        "data": [],
        "data.middle": read_imports("from data import deep", {"data.deep"}),
        "data.deep": read_imports("import torch", set()),
    }
    planted[module] = read_imports(source, {"data.deep", "data.middle", "trainer.training.loop"})
    found = {
        "upward": upward(planted),
        "strayed": strayed(planted),
        "not_options": not_options(planted),
        "slow_starts": slow_starts(planted, {"trainer.training.options"}),
    }
    assert len(found[rule]) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.training.options", "def f():\n    import torch"),
        ("trainer.training.options", "if TYPE_CHECKING:\n    import torch"),
        ("trainer.config.schema", "from trainer.training.options import LoopOptions"),
        ("trainer.models.load", "from diffusers import DDPMScheduler"),
        ("scripts.grid", "import diffusers, trainer.run.build"),
    ],
)
def test_no_rule_forbids_what_is_meant(module, source):
    planted = {
        "trainer.training.options": [],
        module: read_imports(source, {"trainer.training.loop", "trainer.run.build"}),
    }
    assert [
        *upward(planted),
        *strayed(planted),
        *not_options(planted),
        *slow_starts(planted, {"trainer.training.options"}),
    ] == []


@pytest.fixture(scope="module")
def tree() -> Tree:
    texts = sources()
    assert {"trainer.errors", "data.rng", "trainer.training.loop"} <= set(texts)
    return {name: read_imports(text, set(texts)) for name, text in texts.items()}


def upward(tree: Tree) -> list[str]:
    return [
        f"{module}:{found.line}: imports {found.target}, which is above it"
        for module, imports in tree.items()
        for found in imports
        if is_ours(found.target) and layer(found.target) < layer(module)
    ]


def strayed(tree: Tree) -> list[str]:
    problems = []
    for module, imports in tree.items():
        allowed = [names for package, names in ALL_IMPORTS.items() if inside(module, (package,))]
        for found in imports:
            library = found.target.partition(".")[0]
            if library in LIBRARIES and not inside(module, ("scripts", *LIBRARIES[library])):
                problems.append(
                    f"{module}:{found.line}: imports {library}, which belongs to "
                    f"{', '.join(LIBRARIES[library])}"
                )
            elif library not in sys.stdlib_module_names and not all(
                inside(
                    found.target,
                    (*names, *(package for package in ALL_IMPORTS if inside(module, (package,)))),
                )
                for names in allowed
            ):
                problems.append(
                    f"{module}:{found.line}: imports {found.target}, which is not among what its package "
                    "may import"
                )
    return problems


def not_options(tree: Tree) -> list[str]:
    return [
        f"trainer.config.schema:{found.line}: imports {found.name or found.target}, "
        "which is no class of options"
        for found in tree.get("trainer.config.schema", [])
        if is_ours(found.target)
        and not inside(found.target, ("trainer.config", "trainer.errors"))
        and not found.name.endswith("Options")
    ]


def slow_starts(tree: Tree, modules: set[str]) -> list[str]:
    """Follow what importing each of `modules` imports, and name the way to the first slow library on each."""
    problems = []
    for start in sorted(modules):
        ways, seen = [(start,)], {start}
        for way in ways:  # grows while it is walked
            for found in (found for found in tree.get(way[-1], []) if found.at_start):
                if found.target.partition(".")[0] in SLOW:
                    problems.append(
                        f"{' -> '.join(way)}:{found.line}: imports {found.target} before it is needed"
                    )
                for step in ancestry(found.target):
                    if step in tree and step not in seen:
                        seen.add(step)
                        ways.append((*way, step))
    return problems


def option_modules() -> set[str]:
    """Return the modules that define options, the packages of their imports, and the configuration."""
    texts = sources()
    holding = {
        name
        for name, text in texts.items()
        if name.startswith(("trainer.config", "trainer.environment"))
        or (
            not name.startswith("scripts")
            and any(
                isinstance(node, ast.ClassDef) and node.name.endswith("Options")
                for node in ast.parse(text).body
            )
        )
    }
    assert {"trainer.training.options", "data.options", "trainer.optim.dadapt.options"} <= holding
    return {step for name in holding for step in ancestry(name) if step in texts}


def sources() -> dict[str, str]:
    """Return the source of every module of the program, by its dotted name."""
    paths = [
        ROOT / "train.py",
        *(path for package in ("trainer", "data", "scripts") for path in (ROOT / package).rglob("*.py")),
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
            encoding="utf-8"
        )
        for path in sorted(paths)
        if path.is_file()
    }


def read_imports(source: str, modules: set[str]) -> list[Import]:
    """Return the imports of a source text; `modules` are those that `from package import module` may name."""
    found: list[Import] = []

    def visit(node: ast.AST, at_start: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, "", at_start) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append(
                    Import(node.lineno, full, "", at_start)
                    if full in modules
                    else Import(node.lineno, node.module, alias.name, at_start)
                )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_start)
        else:
            inner = at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, inner)

    visit(ast.parse(source), True)
    return found


def is_ours(target: str) -> bool:
    return target.partition(".")[0] in ("train", "trainer", "data", "scripts")


def layer(module: str) -> int:
    """Return the layer of a module: the one that names it, or else its closest package."""
    for name in reversed(ancestry(module)):
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"{module} is in no layer")


def inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(name in packages for name in ancestry(module))


def ancestry(module: str) -> list[str]:
    """Return a module's packages and itself: a, a.b, a.b.c."""
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
