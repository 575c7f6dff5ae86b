import ast
import subprocess
import sys
from pathlib import Path

import pytest

import data

ALLOWED = {
    "numpy",
    "torch",
    "PIL",
    "pillow_heif",
    "pyarrow",
    "yaml",
    "annotated_types",
    "safetensors",
    "data",
}


def loaded_by(statement):
    """Names of the top-level modules in memory after a statement in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_everything_in_data_loads_without_the_trainer_and_its_libraries():
    modules = "data.loader, data.dataset, data.batch, data.index, data.plan, data.report"
    assert not loaded_by(f"import {modules}") & {
        "trainer",
        "diffusers",
        "transformers",
        "pydantic",
        "accelerate",
    }


@pytest.mark.parametrize(
    "statement", ["from data.options import DataOptions", "import data.index, data.plan, data.report"]
)
def test_options_index_plan_and_report_need_no_torch(statement):
    assert not loaded_by(statement) & {"torch", "trainer", "diffusers", "transformers", "pydantic"}


@pytest.mark.parametrize("path", sorted(Path(data.__path__[0]).rglob("*.py")), ids=lambda path: path.name)
def test_a_module_imports_only_the_bottom_layer(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) <= ALLOWED
