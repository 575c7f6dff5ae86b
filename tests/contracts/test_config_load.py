"""The configuration that is loaded: precedence, inheritance, paths, and writing it again."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contracts.config_cases import Case
from trainer.config import Loaded, TrainConfig, check_rates, ed2, load_config, write_resolved
from trainer.config.paths import CONFIGS
from trainer.config.resolved import flattened
from trainer.config.schema import OptimizerFileOptions, keys_of, optimizer_keys, train_keys
from trainer.errors import UserError
from trainer.optim import AdamW8bitOptions, AdamWOptions, DAdaptAdam8bitOptions, DAdaptAdamOptions

ROOT = Path(__file__).resolve().parents[2]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "adamw", "model", "..", "x/y"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["lr", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)
TRAIN_NAMES = [*train_keys(), *ed2.foreign_schema(), "zzz", "_note", "", "base"]
SECTION_NAMES = [*optimizer_keys(), *ed2.UNUSED_OPTIMIZER, "freeze_embeddings", "zzz"]
TOP_NAMES = [
    "base",
    "text_encoder_overrides",
    "text_encoder_freezing",
    *keys_of(OptimizerFileOptions),
    "lr",
    "zzz",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Case("").write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(
    train: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, *command_line: str
) -> Loaded:
    Path("train.json").write_text(json.dumps({"resume_ckpt": "model", **(train or {})}))
    if optimizer is not None:
        Path("optimizer.json").write_text(json.dumps(optimizer))
    return load_config(command_line)


def test_null_is_the_default_everywhere(folder: Path):
    from trainer.config.schema import keys_of, train_keys
    from trainer.models.options import FreezingOptions

    nulls = {name: None for name, key in train_keys().items() if not key.required}
    section = dict.fromkeys(keys_of(DAdaptAdamOptions))
    plain = load({}, {"base": {}}).config
    everything = {
        "base": section,
        "text_encoder_overrides": section,
        "text_encoder_freezing": dict.fromkeys(keys_of(FreezingOptions)),
    }
    assert load(nulls, everything).config == plain
    assert (
        load({"max_epochs": 5, "vae": "model"}, {"base": {}}, "--max_epochs", "null", "--vae=null").config
        == plain
    )


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(folder: Path):
    loaded = load(
        {"max_epochs": 5, "batch_size": 4, "shuffle_tags": True},
        None,
        "--max_epochs",
        "7",
        "--no-shuffle_tags",
        "--lr=1e-5",
    )
    assert (loaded.config.loop.max_epochs, loaded.config.data.batch_size, loaded.config.loop.grad_accum) == (
        7,
        4,
        1,
    )
    assert loaded.config.data.shuffle_tags is False
    assert loaded.config.rates.lr == 1e-5


@pytest.mark.parametrize(
    ("train", "words", "found"),
    [
        ({"save_format": "single"}, ["--no_save_ckpt"], ("saving", "save_format", "diffusers")),
        ({"no_save_ckpt": True}, ["--save_format", "both"], ("saving", "save_format", "both")),
        ({"save_format": "single"}, ["--no_save_ckpt", "false"], ("saving", "save_format", "single")),
        ({"mixed_precision": "bf16"}, ["--disable_amp"], ("precision", "mixed_precision", "no")),
        ({"disable_amp": True}, ["--mixed_precision", "bf16"], ("precision", "mixed_precision", "bf16")),
        ({}, ["--no-amp"], ("precision", "mixed_precision", "no")),
        (
            {"resume_ckpt": "other"},
            ["--base_model", "someone/some-model"],
            ("model", "resume_ckpt", "someone/some-model"),
        ),
        ({"amp": False}, ["--mixed_precision", "fp16"], ("precision", "mixed_precision", "fp16")),
        ({"ema_decay_rate": 0.9}, ["--ema_strength_target", "0.1"], ("ema", "ema_decay_rate", None)),
        ({"ema_strength_target": 0.1}, ["--ema_decay_rate", "0.9"], ("ema", "ema_strength_target", None)),
    ],
)
def test_the_command_line_wins_over_what_the_file_says_by_another_key(
    folder: Path, train: dict[str, Any], words: list[str], found: Any
):
    section, key, value = found
    assert getattr(getattr(load(train, None, *words).config, section), key) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--no_save_ckpt"], True),
        (["--no-save-ckpt"], True),
        (["--no_save_ckpt", "true"], True),
        (["--no_save_ckpt", "False"], False),
        (["--save_ckpt"], False),
        (["--no-no_save_ckpt"], False),
        (["--no_save_ckpt=null"], False),
    ],
)
def test_switches_of_the_command_line(folder: Path, words: list[str], value: bool):
    assert load({}, None, *words).config.saving.no_save_ckpt is value


def test_values_of_the_command_line(folder: Path):
    config = load(
        {},
        None,
        "--seed",
        "-1",
        "--data_root",
        '["input", "pictures"]',
        "--run_name",
        "12",
        "--mixed-precision",
        "no",
    ).config
    assert config.loop.seed == -1
    assert config.data.data_root == (str(folder / "input"), str(folder / "pictures"))
    assert config.logging.run_name == "12"
    assert config.precision.mixed_precision == "no"


def test_the_check_is_an_option_with_a_form(folder: Path):
    def form(*words: str) -> tuple[str | None, str | None]:
        command = load({}, None, *words).command
        return command.check, command.contact_sheets

    assert form() == form("--check", "null") == (None, None)
    assert form("--check") == form("--check", "--lr", "1e-6") == ("text", None)
    assert form("--check=json") == ("json", None)
    assert form("--check", "json", "--contact_sheets", "sheets") == ("json", "sheets")


def test_input_paths_are_looked_for_beside_the_file_and_then_in_the_working_directory(folder: Path):
    (folder / "configs" / "input").mkdir(parents=True)
    (folder / "configs" / "train.json").write_text(
        '{"resume_ckpt": "model", "sample_prompts": "prompts.txt", "save_ckpt_dir": "out"}'
    )
    config = load_config(["--config", "configs/train.json", "--optimizer_config", "optimizer.json"]).config
    assert config.data.data_root == str(folder / "configs" / "input"), "beside the file"
    assert config.model.resume_ckpt == str(folder / "model"), "in the working directory"
    assert config.samples.sample_prompts == str(folder / "prompts.txt")
    assert config.optimizer_source == folder / "optimizer.json"
    assert (config.logging.logdir, config.saving.save_ckpt_dir) == ("logs", "out"), (
        "outputs stay relative to the working directory"
    )
    there = load_config(
        ["--config", "configs/train.json", "--data_root", "input", "--optimizer_config", "optimizer.json"]
    ).config
    assert there.data.data_root == str(folder / "input"), "the command line knows the working directory only"


@pytest.mark.parametrize(
    "name", ["findlast", "stable-diffusion-v1-5/stable-diffusion-v1-5", "someone/v1.5_tuned"]
)
def test_models_that_are_no_path_stay_as_they_are(folder: Path, name: str):
    assert load({"resume_ckpt": name}).config.model.resume_ckpt == name


@pytest.mark.parametrize("inside", ["model_index.json", "ckpts", "resume"])
def test_models_runs_and_checkpoints_are_recognised(folder: Path, inside: str):
    (folder / "thing").mkdir()
    (folder / "thing" / inside).mkdir()
    assert load({"resume_ckpt": "thing"}).config.model.resume_ckpt == str(folder / "thing")


@pytest.mark.parametrize("name", ["v1-5.safetensors", "old.ckpt"])
def test_a_single_file_is_a_model(folder: Path, name: str):
    (folder / name).write_bytes(b"")
    model = load({"resume_ckpt": name, "vae": name}).config.model
    assert (model.resume_ckpt, model.vae) == (str(folder / name), str(folder / name))


def test_absent_and_null_inherit_while_zero_and_false_are_values(folder: Path):
    base = {
        "optimizer": "dadapt_adam",
        "lr": 0.1,
        "weight_decay": 0.8,
        "decouple": True,
        "growth_rate": 1.02,
        "d0": 1e-5,
        "lr_warmup_steps": 10,
    }
    own = {"weight_decay": 0, "decouple": False, "growth_rate": None, "lr_warmup_steps": 0}
    optimizers = load({}, {"base": base, "text_encoder_overrides": own}).config.optimizers
    unet, text_encoder = optimizers.unet, optimizers.text_encoder
    assert isinstance(unet, DAdaptAdamOptions) and isinstance(text_encoder, DAdaptAdamOptions)
    assert (unet.weight_decay, unet.decouple, unet.lr_warmup_steps) == (0.8, True, 10)
    assert (text_encoder.weight_decay, text_encoder.decouple, text_encoder.lr_warmup_steps) == (0, False, 0)
    assert (text_encoder.growth_rate, text_encoder.d0, text_encoder.lr) == (1.02, 1e-5, 0.1)


def test_no_optimizer_named_is_adamw8bit(folder: Path):
    optimizers = load({"lr": 1e-6}, {"base": {}}).config.optimizers
    assert isinstance(optimizers.unet, AdamW8bitOptions) and isinstance(
        optimizers.text_encoder, AdamW8bitOptions
    )


@pytest.mark.parametrize(
    ("train", "optimizer", "unet", "text_encoder"),
    [
        ({}, {"base": {"lr": 2e-6}}, 2e-6, 2e-6),
        ({"lr": 4e-6}, {"base": {}}, 4e-6, 4e-6),
        ({"lr": 4e-6}, {"base": {"lr": 2e-6}}, 2e-6, 2e-6),
        ({}, {"base": {}}, 1e-6, 1e-6),
        ({"lr": 4e-6}, {"base": {}, "text_encoder_lr_scale": 0.5}, 4e-6, 2e-6),
        ({}, {"base": {"lr": 2e-6}, "text_encoder_lr_scale": 0.5}, 2e-6, 1e-6),
        (
            {},
            {"base": {"lr": 2e-6}, "text_encoder_overrides": {"lr": 3e-6}, "text_encoder_lr_scale": 0.5},
            2e-6,
            3e-6,
        ),
        ({"lr": 4e-6}, {"base": {"optimizer": "dadapt_adam"}}, 1.0, 1.0),
        (
            {"lr": 4e-6},
            {"base": {"optimizer": "dadapt_adam", "lr": 0.1}, "text_encoder_lr_scale": 0.5},
            0.1,
            0.05,
        ),
        (
            {"lr": 4e-6},
            {
                "base": {"optimizer": "dadapt_adam", "lr": 0.1},
                "text_encoder_overrides": {"optimizer": "adamw"},
            },
            0.1,
            4e-6,
        ),
        ({}, {"base": {"lr": 2e-6}, "text_encoder_overrides": {"optimizer": "dadapt_adam"}}, 2e-6, 1.0),
    ],
)
def test_where_a_rate_comes_from(
    folder: Path, train: dict[str, Any], optimizer: dict[str, Any], unet: float, text_encoder: float
):
    optimizers = load(train, optimizer).config.optimizers
    assert (optimizers.unet.lr, optimizers.text_encoder.lr) == (
        pytest.approx(unet),
        pytest.approx(text_encoder),
    )


def test_schedules_come_from_the_section_then_base_then_train_json(folder: Path):
    train = {"lr": 1e-6, "lr_scheduler": "cosine", "lr_warmup_steps": 7, "lr_decay_steps": 0}
    optimizers = load(
        train, {"base": {}, "text_encoder_overrides": {"lr_scheduler": "linear", "lr_decay_steps": 50}}
    ).config.optimizers
    assert (
        optimizers.unet.lr_scheduler,
        optimizers.unet.lr_warmup_steps,
        optimizers.unet.lr_decay_steps,
    ) == ("cosine", 7, None)
    text = optimizers.text_encoder
    assert (text.lr_scheduler, text.lr_warmup_steps, text.lr_decay_steps) == ("linear", 7, 50)


@pytest.mark.parametrize("spelled", ["Infinity", "inf", math.inf, None])
def test_no_limit_of_the_growth_of_d(folder: Path, spelled: Any):
    unet = load({}, {"base": {"optimizer": "dadapt_adam", "growth_rate": spelled}}).config.optimizers.unet
    assert isinstance(unet, DAdaptAdamOptions) and unet.growth_rate == math.inf


@pytest.mark.parametrize("words", [{"amp": False}, {"disable_amp": True}, {"mixed_precision": "no"}])
def test_mixed_precision_off_in_every_wording(folder: Path, words: dict[str, Any]):
    assert load(words).config.precision.mixed_precision == "no"


def test_keys_that_repeat_another_are_applied_to_it(folder: Path):
    config = load({"no_save_ckpt": True, "attn_type": "xformers", "lr_decay_steps": 0}).config
    assert (config.saving.save_format, config.parts.attn_type, config.rates.lr_decay_steps) == (
        "diffusers",
        "sdp",
        None,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        {
            "base": {"optimizer": "dadapt_adam", "lr": 0.1, "lr_warmup_steps": 3, "lr_scheduler": "cosine"},
            "text_encoder_freezing": {"freeze_front_n_layers": 3},
        },
        {
            "base": {"optimizer": "adamw8bit"},
            "text_encoder_overrides": {"optimizer": "dadapt_adam", "growth_rate": 1.02},
            "log_grad_norm": False,
        },
        {
            "base": {"optimizer": "dadapt_adam", "weight_decay": 0.8},
            "text_encoder_overrides": {"optimizer": "adamw"},
            "text_encoder_lr_scale": 0.1,
        },
    ],
)
def test_a_configuration_written_down_is_the_same_configuration(
    folder: Path, optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    train = {
        "data_root": ["input", "pictures"],
        "lr": 1e-4,
        "min_snr_gamma": 5,
        "disable_amp": True,
        "sample_prompts": "prompts.txt",
        "seed": 3,
    }
    first = load(train, optimizer).config
    (folder / "other" / "run").mkdir()
    write_resolved(first, folder / "other" / "run")
    monkeypatch.chdir(folder / "other")
    second = load_config(["--config", "run/train.json"]).config
    assert second == first
    assert second.optimizer_source == folder / "other" / "run" / "optimizer.json"


@given(
    st.dictionaries(st.sampled_from(TRAIN_NAMES), ANYTHING, max_size=4),
    st.dictionaries(
        st.sampled_from(TOP_NAMES),
        ANYTHING | st.dictionaries(st.sampled_from(SECTION_NAMES), ANYTHING, max_size=4),
        max_size=4,
    ),
    st.lists(
        st.sampled_from([f"--{name}" for name in TRAIN_NAMES])
        | st.sampled_from(["5", "[1]", "true", "{", "-x", "é"]),
        max_size=3,
    ),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_accepted_or_refused_in_words(
    folder: Path, train: dict[str, Any], optimizer: dict[str, Any], words: list[str]
):
    try:
        loaded = load(train, optimizer, *words)
    except UserError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)
    else:
        assert loaded.config.optimizers.unet.lr


def with_rates(unet: Any, text_encoder: Any, **train: Any) -> TrainConfig:
    sections = {"base": unet, "text_encoder_overrides": text_encoder}
    return load(train, sections).config


def test_a_high_rate_on_a_full_size_model_is_refused(folder: Path):
    config = with_rates({"optimizer": "adamw", "lr": 1e-4}, {"lr": 5e-6})
    with pytest.raises(UserError) as error:
        check_rates(config, {"unet": 859_520_964, "text encoder": 123_060_480})
    assert error.value.problems == (
        "optimizer.json: base.lr: adamw at 0.0001 ruins a model of this size (983 million trained "
        "parameters); set lr to 1e-05 or less (1e-6 is usual) there or in train.json, or set allow_high_lr "
        "to true",
    )


def test_the_text_encoders_rate_counts_too(folder: Path):
    config = with_rates({"optimizer": "dadapt_adam", "lr": 1.0}, {"optimizer": "adamw8bit", "lr": 2e-5})
    with pytest.raises(UserError, match=r"text_encoder_overrides\.lr: adamw8bit at 2e-05"):
        check_rates(config, {"unet": 859_520_964, "text encoder": 123_060_480})


@pytest.mark.parametrize(
    ("unet", "train", "parameters"),
    [
        ({"optimizer": "adamw", "lr": 1e-4}, {}, {"unet": 5_000_000, "text encoder": 600_000}),
        ({"optimizer": "adamw", "lr": 1e-4}, {"allow_high_lr": True}, {"unet": 859_520_964}),
        ({"optimizer": "adamw", "lr": 1e-5}, {}, {"unet": 859_520_964}),
        ({"optimizer": "dadapt_adam", "lr": 1.0}, {}, {"unet": 859_520_964}),
        ({"optimizer": "adamw", "lr": 1e-4}, {}, {"unet": 0, "text encoder": 123_060_480}),
    ],
    ids=["small model", "allowed", "at the limit", "D-Adaptation", "text encoder alone"],
)
def test_rates_that_are_fine(folder: Path, unet: Any, train: dict[str, Any], parameters: dict[str, int]):
    check_rates(with_rates(unet, {}, **train), parameters)


SHIPPED = [
    *itertools.product(["train.json", "configs/sd15.json"], ["optimizer.json", "optimizer_dadapt.json"]),
    ("configs/sd15.json", "configs/optimizer_dadapt_sd15.json"),
    ("configs/sd15.json", "configs/optimizer_dadapt_te_only.json"),
    ("configs/sd15_t4.json", "configs/optimizer_dadapt_t4.json"),
    ("configs/sd15_8gb.json", "configs/optimizer_dadapt_sd15.json"),
    ("configs/sd15_16gb.json", "configs/optimizer_dadapt_sd15.json"),
    ("configs/sd15_lora.json", "configs/optimizer_dadapt_lora.json"),
    *(
        ("configs/followfox/train.json", f"configs/followfox/optimizer_{name}.json")
        for name in ("dadapt", "adamw", "adamw8bit")
    ),
]


def test_no_shipped_configuration_is_forgotten():
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "configs").rglob("*.json")
        if path.parent.name != "schema"
    }
    assert there == {name for pair in SHIPPED for name in pair if name.startswith("configs/")}


def test_the_post_s_configurations_are_the_post_s(folder: Path):
    def loaded(optimizer: str) -> TrainConfig:
        post = ROOT / "configs/followfox"
        return load_config(
            [
                "--config",
                str(post / "train.json"),
                "--optimizer_config",
                str(post / optimizer),
                "--data_root",
                "input",
            ]
        ).config

    config = loaded("optimizer_dadapt.json")
    given = DAdaptAdamOptions(
        lr=0.1,
        lr_scheduler="constant",
        weight_decay=0.8,
        d0=1e-6,
        decouple=True,
        epsilon=1e-8,
        betas=(0.9, 0.999),
    )
    assert (
        config.optimizers.unet == config.optimizers.text_encoder == given
        and config.optimizers.freezing.freeze_front_n_layers == 3
    )
    assert (config.loop.max_epochs, config.saving.save_every_n_epochs) == (100, 25)
    for name in ("adamw", "adamw8bit"):
        by_hand = loaded(f"optimizer_{name}.json").optimizers
        assert (by_hand.unet.optimizer, by_hand.text_encoder.optimizer) == (name, name)
        assert (by_hand.unet.lr, by_hand.text_encoder.lr) == (5e-8, 1.5e-7)


@pytest.mark.parametrize(("name", "optimizer"), SHIPPED)
def test_every_shipped_configuration_loads(folder: Path, name: str, optimizer: str):
    command_line = [
        "--config",
        str(ROOT / name),
        "--optimizer_config",
        str(ROOT / optimizer),
        "--resume_ckpt",
        "model",
    ]
    loaded = load_config([*command_line, "--data_root", "input"])
    assert loaded.notes == ()


ADAPTING = ("sd15", "t4", "te_only", "lora")


@pytest.mark.parametrize("name", ADAPTING)
def test_every_preset_with_d_adaptation_has_the_post_s_factor_and_lets_d_go_on(folder: Path, name: str):
    source = str(ROOT / f"configs/optimizer_dadapt_{name}.json")
    optimizers = load_config(["--optimizer_config", source]).config.optimizers
    own = [found for found in (optimizers.unet, optimizers.text_encoder) if found.adapts]
    scale = 100 if name == "lora" else 1
    for found in own:
        assert isinstance(found, DAdaptAdamOptions)
        assert (found.lr, found.weight_decay) == (0.1, 0.01) and found.d0 == pytest.approx(scale * 1e-6)
        assert (found.growth_rate, found.d_max) == (math.inf, math.inf), "nothing stops d"
    assert [found.rate_max for found in own] == pytest.approx([scale * 1e-5, scale * 5e-6][-len(own) :])


def test_presets_by_gpu_size_differ_in_what_the_size_asks_for(folder: Path):
    def flat(name: str) -> dict[str, Any]:
        return flattened(load_config(["--config", str(ROOT / "configs" / f"{name}.json")]).config)

    sd15 = flat("sd15")

    def differing(name: str) -> set[str]:
        own = flat(name)
        return {key for key in own.keys() | sd15.keys() if own.get(key) != sd15.get(key)} - {"project_name"}

    assert differing("sd15_8gb") == {"weights_dtype", "cache_latents"}
    assert differing("sd15_16gb") == {"gradient_checkpointing"}
    optimizers = {f"{section}.{key}" for section in ("base", "text_encoder_overrides")
                  for key in ("optimizer", "d0", "rate_max", "fused_backward")}  # fmt: skip
    assert differing("sd15_lora") == {"lora", "lr", "save_every_n_epochs", *optimizers}


@pytest.mark.parametrize("name", ["sd15.json", "sd15_t4.json"])
@pytest.mark.parametrize("place", [".", "elsewhere"])
def test_a_copy_of_a_shipped_configuration_works_anywhere(folder: Path, name: str, place: str):
    (folder / place).mkdir(exist_ok=True)
    copy = Path(shutil.copy(ROOT / "configs" / name, folder / place / "mydog.json"))
    config = load_config(["--config", str(copy)]).config
    original = load_config(["--config", str(ROOT / "configs" / name)]).config
    assert (config.optimizers, config.optimizer_source) == (original.optimizers, original.optimizer_source)
    assert (
        load_config(["--optimizer_config", "optimizer_dadapt_t4.json"]).config.optimizer_source.parent
        == CONFIGS
    )


def test_a_file_beside_the_copy_wins_over_the_program_s(folder: Path):
    shutil.copy(ROOT / "configs/sd15.json", folder / "mydog.json")
    own = Path(shutil.copy(ROOT / "optimizer.json", folder / "optimizer_dadapt_sd15.json"))
    assert load_config(["--config", "mydog.json"]).config.optimizer_source == own


@pytest.mark.parametrize(
    ("written", "suggested"),
    [
        ("optimizer_dadapt_sd16.json", None),
        ("optimizer_dadapt_sd15_mine.json", None),
        ("optimizer_dadapt8bit.json", None),
        ("optimizer_adamw.json", None),
        ("optimizer_dadpt_sd15.json", "optimizer_dadapt_sd15.json"),
        ("optimizer_dadpt.json", "optimizer_dadapt.json"),
    ],
)
def test_no_suggestion_names_an_optimizer_file_for_another_gpu(
    folder: Path, written: str, suggested: str | None
):
    shutil.copy(ROOT / "optimizer_dadapt.json", folder)
    with pytest.raises(UserError) as refused:
        load_config(["--optimizer_config", written])
    (problem,) = refused.value.problems
    looked = (
        f"--optimizer_config: optimizer file not found: {written} (relative to the working directory and to "
        "the program's configs)"
    )
    assert problem == looked + (f"; did you mean '{suggested}'?" if suggested else "")


def test_the_shipped_configurations_say_what_the_readme_says(folder: Path):
    mini = load_config(
        ["--config", str(ROOT / "train.json"), "--resume_ckpt", "model", "--data_root", "input"]
    ).config
    assert mini.optimizer_source == ROOT / "optimizer_dadapt.json"
    unet, text_encoder, freezing = (
        mini.optimizers.unet,
        mini.optimizers.text_encoder,
        mini.optimizers.freezing,
    )
    post = DAdaptAdamOptions(
        lr=0.1,
        lr_scheduler="constant",
        weight_decay=0.8,
        d0=1e-6,
        decouple=True,
        epsilon=1e-8,
        betas=(0.9, 0.999),
    )
    assert unet == post and text_encoder == post and freezing.freeze_front_n_layers == 3

    sd15 = load_config(["--config", str(ROOT / "configs/sd15.json"), "--data_root", "input"]).config
    assert sd15.model.resume_ckpt == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    unet, text_encoder = sd15.optimizers.unet, sd15.optimizers.text_encoder
    assert isinstance(unet, DAdaptAdam8bitOptions) and isinstance(text_encoder, DAdaptAdam8bitOptions)
    assert unet.fused_backward and text_encoder.fused_backward
    assert (unet.rate_max, text_encoder.rate_max) == (1e-5, 5e-6) and unet.weight_decay == 0.01
    assert sd15.optimizers.freezing.freeze_embeddings is True

    by_hand = load_config(
        [
            "--config",
            str(ROOT / "configs/sd15.json"),
            "--optimizer_config",
            str(ROOT / "optimizer.json"),
            "--data_root",
            "input",
        ]
    ).config
    assert (by_hand.optimizers.unet.lr, by_hand.optimizers.text_encoder.lr) == (1e-6, 5e-7)

    split = load_config(
        [
            *("--config", str(ROOT / "configs/sd15.json"), "--data_root", "input"),
            *("--optimizer_config", str(ROOT / "configs/optimizer_dadapt_te_only.json")),
        ]
    ).config.optimizers
    assert isinstance(split.unet, AdamW8bitOptions) and split.unet.lr == 1e-6
    assert isinstance(split.text_encoder, DAdaptAdam8bitOptions) and split.text_encoder.lr == 0.1
    check_rates(sd15, {"unet": 859_520_964, "text encoder": 123_060_480})
    demo = load_config(
        [
            *("--config", str(ROOT / "train.json"), "--optimizer_config", str(ROOT / "optimizer.json")),
            *("--resume_ckpt", "model", "--data_root", "input"),
        ]
    ).config
    assert isinstance(demo.optimizers.unet, AdamW8bitOptions) and not isinstance(
        demo.optimizers.unet, AdamWOptions
    )
    with pytest.raises(UserError, match="allow_high_lr"):
        check_rates(demo, {"unet": 859_520_964, "text encoder": 123_060_480})
