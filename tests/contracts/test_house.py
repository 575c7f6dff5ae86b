"""The order of the house: special cases stay in the objects that were made for them."""

import re

import pytest

from tests.contracts.test_imports import sources

FAMILY = re.compile(
    r"(hidden_size|cross_attention_dim|text\.width)\W.*([=!]=|\bin\b)|([=!]=|\bin) \(?(768|1024)\b|-v2\b|\bSD[12]\b"
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
