"""Rounds of the benchmarks: turns, ratios within a round, tables and JSON."""

import json
import mmap
import re

import pytest
import torch

from scripts.bench.machine import forget_peak, held, machine, peak
from scripts.bench.rounds import Rounds, parser, table, timed, write_json
from trainer.optim.dadapt.choice import cpu_model


def test_contenders_take_turns_and_warm_rounds_do_not_count():
    calls = []

    def contender(name, seconds):
        def measure():
            calls.append(name)
            return {"seconds": seconds[calls.count(name) - 1]}

        return measure

    rounds = Rounds()
    rounds.run({"a": contender("a", [9, 1, 2, 6]), "b": contender("b", [9, 2, 1, 2])}, 3)
    assert calls == ["a", "b"] * 4
    assert rounds.median("a", "seconds") == 2 and rounds.median("b", "seconds") == 2
    assert rounds.ratio("a", "b", "seconds") == (2, 0.5, 3), "the median of ratios, not the ratio of medians"
    assert str(rounds.ratio("a", "b", "seconds")) == "2.000 (0.500 to 3.000)"


def test_a_contender_that_missed_a_round_has_no_ratio():
    rounds = Rounds()
    for name in ("a", "b", "a"):
        rounds.add(name, {"seconds": 1.0})
    with pytest.raises(ValueError):
        rounds.ratio("a", "b", "seconds")


def test_a_table_is_aligned():
    assert table(("", "ms"), [("one", "2.0"), ("longer", "10.0")]).splitlines() == [
        "          ms",
        "one      2.0",
        "longer  10.0",
    ]


def test_json_has_every_figure(tmp_path):
    rounds = Rounds()
    rounds.add("a", {"ms": 1.5})
    options = parser("doc", rounds=4).parse_args(["--json", str(tmp_path / "found.json")])
    assert options.rounds == 4
    write_json(options.json, "a machine", {"1 thread": rounds})
    write_json(None, "", {})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"machine": "a machine", "1 thread": {"a": [{"ms": 1.5}]}}


def test_a_call_is_timed_and_its_memory_counted():
    times = timed(lambda: sum(range(10**6)))
    assert times["host"] > 0 and times["wall"] > 0
    if not forget_peak():
        pytest.skip("the system does not count a peak")
    before = held()
    with mmap.mmap(-1, 2**27) as content:  # not by malloc, which may have kept as much
        content.write(bytes(2**20) * 2**7)
    assert peak() - before > 2**26


def test_the_machine_is_named():
    words = machine()
    assert f"torch {torch.__version__}" in words and cpu_model() in words
    assert re.search(r"; (gcc|clang|no compiler|.*C\+\+)", words)
