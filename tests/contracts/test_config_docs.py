"""Help, schemas and tables are made of the keys of the checks, and checks import no training library."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.export_schema import FOLDER, REFERENCE, schemas, texts
from tests.contracts.config_cases import Case, read_cases
from trainer.config import ed2, load_config
from trainer.config.export import optimizer_schema, train_schema
from trainer.config.help import FIRST, example, help_text
from trainer.config.overrides import parse
from trainer.config.report import Report
from trainer.config.schema import (
    CommandOptions,
    FileOptions,
    FreezingOptions,
    OptimizerFileOptions,
    keys_of,
    optimizer_classes,
    optimizer_keys,
    plain,
    sections,
    train_keys,
)
from trainer.errors import UserError

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "train": [
        ROOT / "train.json",
        *sorted((ROOT / "configs").glob("sd15*.json")),
        ROOT / "configs" / "followfox" / "train.json",
    ],
    "optimizer": [
        *sorted(ROOT.glob("optimizer*.json")),
        *(
            path
            for folder in ("configs", "configs/followfox")
            for path in sorted((ROOT / folder).glob("optimizer*.json"))
        ),
    ],
}


def test_help_lists_every_key_with_its_range_default_and_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as stopped:
        load_config(["--zzz", "--help", "all"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for key in [*train_keys().values(), *keys_of(CommandOptions).values()]:
        assert sum(line.startswith(f"  --{key.name}: ") for line in lines) == 1, key.name
        assert " ".join(key.doc.split())[:40] in " ".join(text.split()), key.name
    for name in [*optimizer_keys(), *keys_of(FreezingOptions), *keys_of(OptimizerFileOptions)]:
        assert any(line.startswith(f"  {name}: ") for line in lines), name
    assert (
        "  --resolution: a whole number, at least 64, at most 8192, a multiple of 64, or a list of such; "
        "default 512" in lines
    )
    assert "  --resume_ckpt: text; required" in lines
    assert "  optimizer: text; default adamw8bit" in lines
    assert "lion, lion8bit, dadapt_lion: Share of the running mean" in " ".join(text.split())
    assert "Default [0.9, 0.99]." in " ".join(text.split()), (
        "defaults that differ between optimizers are named"
    )
    assert max(map(len, lines)) <= 140


def test_every_key_has_words_and_one_owner():
    owners = [*sections().values(), FileOptions]
    names = [entry.name for owner in owners for entry in dataclasses.fields(owner)]
    assert sorted(names) == sorted(set(names)), "a key stands in two sections"
    for owner in [
        *owners,
        CommandOptions,
        FreezingOptions,
        OptimizerFileOptions,
        *optimizer_classes().values(),
    ]:
        for key in keys_of(owner).values():
            assert key.doc.endswith("."), f"{owner.__name__}.{key.name} needs a docstring under the field"


def test_keys_that_have_arrived_are_no_longer_listed_as_missing():
    assert not set(ed2.foreign_schema()) & set(train_keys())
    assert not set(ed2.UNUSED_OPTIMIZER) & set(optimizer_keys())
    assert not set(ed2.NEVER_NAMES) & set(optimizer_classes())
    assert set(ed2.NEVER_NAMES.values()) <= set(optimizer_classes())


def test_the_schema_files_and_the_page_of_keys_are_up_to_date():
    for path, text in texts().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/export_schema.py"
    page = REFERENCE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in (*train_keys(), *optimizer_keys()) if name != "optimizer")


def test_the_schemas_are_schemas():
    for schema in schemas().values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("kind", ["train", "optimizer"])
def test_the_schemas_accept_the_shipped_files_which_name_them(kind: str):
    assert SHIPPED[kind]
    for path in SHIPPED[kind]:
        content = json.loads(path.read_text(encoding="utf-8"))
        jsonschema.validate(content, train_schema() if kind == "train" else optimizer_schema())
        assert next(iter(content)) == "$schema"
        assert (path.parent / content["$schema"]).resolve() == FOLDER / f"{kind}.schema.json"


def test_the_schemas_accept_what_the_checks_accept():
    files = {"train.json": train_schema(), "optimizer.json": optimizer_schema()}
    for case in read_cases(Path(__file__).parent / "good_configs" / "notes.txt"):
        if "Infinity" in case.files.get("optimizer.json", ""):
            continue  # no JSON, accepted for EveryDream2's sake
        for name, schema in files.items():
            if name in case.files:
                problems = jsonschema.Draft202012Validator(schema).iter_errors(json.loads(case.files[name]))
                assert [problem.message for problem in problems] == [], case.title


@pytest.mark.parametrize(
    ("schema", "content"),
    [
        (train_schema(), {"resume_ckpt": "model", "max_epoch": 3}),
        (train_schema(), {"resume_ckpt": "model", "resolution": 500}),
        (train_schema(), {"resume_ckpt": "model", "rated_dataset": True}),
        (train_schema(), {"max_epochs": 3}),
        (optimizer_schema(), {"base": {"optimizer": "dadpt_adam"}}),
        (optimizer_schema(), {"base": {"betas": [0.9, 1.0]}}),
        (optimizer_schema(), {"base": {}, "text_encoder_freezing": {"freeze": 3}}),
        (optimizer_schema(), {}),
    ],
)
def test_the_schemas_refuse_what_the_checks_refuse(schema, content):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "dadaptation", "prodigyopt"}


def run(folder: Path, program: str, *words: str) -> list[str]:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"
    program += f"; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [*done.stderr.splitlines(), *done.stdout.splitlines()]


def test_reading_a_configuration_imports_no_library_that_trains(tmp_path: Path):
    Case("").write(tmp_path)
    assert run(tmp_path, "from trainer.config import load_config; load_config(sys.argv[1:])") == ["[]"]


def test_the_program_refuses_a_configuration_before_importing_one(tmp_path: Path):
    Case("", files={"train.json": '{"resume_ckpt": "model", "max_epoch": 3}'}).write(tmp_path)
    assert run(tmp_path, "import train; print(train.main(sys.argv[1:]))", "--batch_size", "0") == [
        "--batch_size: must be at least 1, got 0",
        "train.json:1: max_epoch: unknown key; did you mean 'max_epochs'?",
        "2",
        "[]",
    ]


def test_help_ends_with_the_optimizer_files_keys():
    text = help_text("all")
    assert text.index("--max_epochs") < text.index("Keys of the optimizer file")


def test_the_short_help_has_the_fifteen_keys_that_people_use_first():
    lines = help_text().splitlines()
    assert tuple(line[4:].split(":")[0] for line in lines if line.startswith("  --")) == FIRST
    assert len(FIRST) == 15 and len(lines) < 50
    assert "--help KEY" in lines[-1] and "--help all" in lines[-1]


def test_every_key_has_a_help_with_an_example_that_works():
    for name, key in train_keys().items():
        text = help_text(f"--{name.replace('_', '-')}")
        assert text.startswith(f"  --{name}: "), name
        lines = {line.partition(":")[0]: line.partition(":")[2].strip() for line in text.splitlines()}
        assert json.loads("{" + lines["in train.json"] + "}") == {name: example(key)}
        report = Report()
        parsed = parse(shlex.split(lines["on the command line"]), report)
        assert report.errors == () and parsed.values[name].value == example(key), name
    for options in (CommandOptions, FreezingOptions, OptimizerFileOptions):
        assert all(f"{name}: " in help_text(name) for name in keys_of(options))
    for name, users in optimizer_keys().items():
        text = help_text(name)
        assert "In the optimizer file's base and text_encoder_overrides:" in text and f"  {name}: " in text
        if name != "optimizer":
            first = next(iter(users.values()))
            first.validate(example(first))


def test_an_example_shows_what_a_key_changes_and_is_a_value_that_people_use():
    optimizer = {name: next(iter(users.values())) for name, users in optimizer_keys().items()}
    owners = (CommandOptions, FreezingOptions, OptimizerFileOptions)
    for key in [
        *train_keys().values(),
        *optimizer.values(),
        *(k for o in owners for k in keys_of(o).values()),
    ]:
        if key.name != "optimizer":
            assert key.required or example(key) != plain(key.default), f"{key.name} shows its default"
    for rate in ("rate_max", "d_max"):
        assert example(optimizer[rate]) < 1e-3, "people copy examples"
    assert example(optimizer["growth_rate"]) < 2


def test_help_of_the_optimizer_file_s_sections_and_of_its_optimizers():
    for section in ("base", "text_encoder_overrides"):
        assert help_text(section).startswith(f"{section}: a section of the optimizer file. Its keys: lr, ")
    assert "Its keys: freeze_front_n_layers, " in help_text("text_encoder_freezing", 200)
    text = " ".join(help_text("optimizer").split())
    assert "prodigy; or a class path" in text and '"base": {"optimizer": "dadapt_adam8bit"}' in text
    assert text.startswith("In the optimizer file's"), "no empty line in front"


def test_help_of_another_name_and_of_no_key(capsys: pytest.CaptureFixture[str]):
    assert help_text("base_model") == help_text("resume_ckpt")
    for name, hint in (("max_epoch", "did you mean --help max_epochs?"), ("zzz", "--help all lists them.")):
        with pytest.raises(UserError, match=re.escape(f"--help {name}: there is no such key; {hint}")):
            load_config(["--help", name])


def test_the_help_fits_a_narrow_terminal():
    for topic in ("", "all", "lora"):
        assert max(map(len, help_text(topic, 79).splitlines())) <= 79
