"""The order of the house: special cases stay in their objects, and functions and files stay short."""

import ast
import re

import pytest

from tests.contracts.test_imports import read_imports, sources

FAMILY = re.compile(
    r"(hidden_size|cross_attention_dim|text\.width)\W.*([=!]=|\bin\b)|([=!]=|\bin) \(?(768|1024)\b"
    r"|-v2\b|\bSD[12]\b"
)
"""A comparison of families: by the width of their text, by name or by record."""


def compares_families(text: str) -> list[str]:
    return [line for line in text.splitlines() if FAMILY.search(line)]


def test_families_are_compared_in_the_models_alone():
    found = {
        name: lines
        for name, text in sources().items()
        if name.startswith("trainer.") and not name.startswith("trainer.models.")
        if (lines := compares_families(text))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "second = models.text_encoder.config.hidden_size != 768",
        'if config["cross_attention_dim"] == WIDE:',
        'v2 = "-v2" in architecture(models)',
        "if models.family is SD2:",
    ],
)
def test_a_comparison_of_families_is_seen(line):
    assert compares_families(line) == [line]


LONGEST_FUNCTION, LONGEST_FILE = 60, 350

LONG_FUNCTIONS = {
    "trainer.run.build.build": "one call that names every part of a run",
    "trainer.optim.dadapt.triton_kernel._advance": "one kernel, which cannot be cut",
    "trainer.planning.prepare.prepare": "the decisions of a run in their order",
}
LONG_FILES: dict[str, str] = {}
"""Exceptions and their reasons; the lists may only get shorter."""


def functions(name: str, text: str) -> dict[str, int]:
    """Return the lines of every function of a module by its dotted name."""
    found = {}

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = above
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = f"{above}.{child.name}"
                if not isinstance(child, ast.ClassDef):
                    found[inside] = (child.end_lineno or child.lineno) - child.lineno + 1
            visit(child, inside)

    visit(ast.parse(text), name)
    return found


def test_functions_fit_a_screen():
    lengths = {
        name: lines for module, text in sources().items() for name, lines in functions(module, text).items()
    }
    long = {name for name, lines in lengths.items() if lines > LONGEST_FUNCTION}
    assert long == set(LONG_FUNCTIONS)


def test_files_stay_short():
    assert {name for name, text in sources().items() if text.count("\n") > LONGEST_FILE} == set(LONG_FILES)


def circles(edges: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Return the ways along which a module imports itself, one for each circle that is met first."""
    done: set[str] = set()

    def circle(name: str, way: tuple[str, ...]) -> tuple[str, ...]:
        if name in way:
            return (*way[way.index(name) :], name)
        if name in done:
            return ()
        for target in sorted(edges[name]):
            if found := circle(target, (*way, name)):
                return found
        done.add(name)
        return ()

    return [found for name in sorted(edges) if (found := circle(name, ()))]


def test_no_import_goes_round_among_files():
    """Imports for types count too: a circle means that two files are one."""
    tree = {name: read_imports(text, set(sources())) for name, text in sources().items()}
    edges = {
        name: {found.target for found in imports if found.target in tree} for name, imports in tree.items()
    }
    assert circles(edges) == []


def test_a_long_function_and_a_circle_are_seen():
    assert functions("m", "class A:\n    def f(self):\n        pass\n") == {"m.A.f": 2}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})[0] == ("b", "c", "b")
