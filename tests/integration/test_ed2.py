"""The files of an EveryDream2 user run: every key of every file, at its default and away from it.

`tests/ed2_keys.json` holds the keys with EveryDream2's defaults. The tables below say of each what is
promised: it works (alone, or beside the keys that it needs), a note says why it does nothing, or an error
says what to do instead.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import train
from tests.runs import run_of
from tests.tiny import write_tiny_folder
from trainer.config import flattened, load_config
from trainer.config.sample_file import load_sample_prompts
from trainer.config.validation_file import load_validation
from trainer.errors import UserError

KEYS = json.loads((Path(__file__).parents[1] / "ed2_keys.json").read_text(encoding="utf-8"))
SHIPPED_DADAPT = KEYS["optimizer"]["shipped_optimizer_dadapt.json"]
BASE, OVERRIDES, FREEZING = "base", "text_encoder_overrides", "text_encoder_freezing"


@dataclass(frozen=True)
class To:
    """A value away from the default, and what becomes of it."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    """What else has to be set for it to act."""
    note: str = ""
    """Words of the note that it gets."""
    error: str = ""
    """Words of the error that it is."""


EMA = {"ema_decay_rate": 0.9}
TRAIN = {
    "amp": To(False),
    "attn_type": To("slice"),
    "batch_size": To(3),
    "ckpt_every_n_minutes": To(30),
    "clip_grad_norm": To(1.0),
    "clip_skip": To(2),
    "cond_dropout": To(0.5),
    "data_root": To("other"),
    "disable_amp": To(True),
    "disable_textenc_training": To(True),
    "disable_unet_training": To(True),
    "ema_decay_rate": To(0.9),
    "ema_device": To("cuda", EMA),
    "ema_resume_model": To("model", EMA),
    "ema_sample_ema_model": To(True, EMA),
    "ema_sample_nonema_model": To(True, {**EMA, "ema_sample_ema_model": True}),
    "ema_strength_target": To(0.5),
    "ema_update_interval": To(1, EMA),
    "embedding_perturbation": To(0.5),
    "enable_zero_terminal_snr": To(True),
    "flip_p": To(0.5),
    "gpuid": To(1),
    "grad_accum": To(2),
    "gradient_checkpointing": To(True),
    "keep_tags": To(1, {"shuffle_tags": True}),
    "load_settings_every_epoch": To(True, error='resume with "resume_ckpt": "findlast"'),
    "log_step": To(1),
    "logdir": To("elsewhere"),
    "loss_type": To("mse"),
    "lr": To(2e-6),
    "lr_decay_steps": To(1000, {"lr_scheduler": "cosine"}),
    "lr_scheduler": To("cosine"),
    "lr_warmup_steps": To(1, {"lr_scheduler": "cosine"}),
    "max_epochs": To(2),
    "min_snr_gamma": To(5.0),
    "no_prepend_last": To(True),
    "no_save_ckpt": To(True),
    "optimizer_config": To("dadapt.json"),
    "plugins": To(["plugins.accumulnator.Accumulnator"], error="plugins are not supported"),
    "project_name": To("mine"),
    "pyramid_noise_discount": To(0.03),
    "rated_dataset": To(True, error="use multiply for images that should count more"),
    "rated_dataset_target_dropout_percent": To(40, note="has no effect without rated_dataset"),
    "resolution": To(64),
    "resume_ckpt": To("velocity"),
    "run_name": To("second"),
    "sample_prompts": To("prompts.json"),
    "sample_steps": To(1),
    "save_ckpt_dir": To("checkpoints"),
    "save_ckpts_from_n_epochs": To(1, {"save_every_n_epochs": 1}),
    "save_every_n_epochs": To(1),
    "save_full_precision": To(True),
    "save_optimizer": To(True),
    "seed": To(-1),
    "shuffle_tags": To(True),
    "timestep_end": To(900),
    "timestep_start": To(100),
    "train_sampler": To("ddim", note="has no effect; training uses ddpm"),
    "validation_config": To("validation.json"),
    "wandb": To(True),
    "write_schedule": To(True, note="train.py --check prints the plan"),
    "zero_frequency_noise_ratio": To(0.1),
    **{
        name: To(True, note="an EveryDream2 key without effect")
        for name in KEYS["train_legacy_keys_ignored_at_head"]
    },
}
ADAPTING = {"optimizer": "dadapt_adam", "lr": 0.1}
SECTION = {
    "optimizer": To("adamw"),
    "lr": To(2e-6),
    "lr_scheduler": To("cosine"),
    "lr_decay_steps": To(1000, {"lr_scheduler": "cosine"}),
    "lr_warmup_steps": To(1, {"lr_scheduler": "cosine"}),
    "betas": To([0.8, 0.99]),
    "epsilon": To(1e-7),
    "weight_decay": To(0.1),
    "d0": To(1e-5, ADAPTING),
    "decouple": To(False, ADAPTING),
    "momentum": To(0.9, {"optimizer": "dadapt_sgd", "lr": 0.1}),
    "growth_rate": To(1.02, ADAPTING),
    "safeguard_warmup": To(False, {"optimizer": "prodigy", "lr": 1.0}),
    "no_prox": To(True, note="has no effect: adamw8bit does not use it"),
}
FREEZE = {
    "unfreeze_last_n_layers": To(2),
    "freeze_front_n_layers": To(1),
    "freeze_embeddings": To(True),
    "freeze_final_layer_norm": To(True),
}
TOP = {
    "apply_grad_scaler_step_tweaks": To(False),
    "log_grad_norm": To(False),
    "text_encoder_lr_scale": To(0.5),
}
VALIDATION = {
    "batch_size": To(3),
    "every_n_epochs": To(2),
    "seed": To(1),
    "validate_training": To(False, {"stabilize_training_loss": True}),
    "val_split_mode": To("manual", {"manual_data_root": "other"}),
    "auto_split_proportion": To(0.3),
    "manual_data_root": To("other", {"val_split_mode": "manual"}),
    "extra_manual_datasets": To({"others": "input"}),
    "stabilize_training_loss": To(True),
    "stabilize_split_proportion": To(0.5),
    "use_relative_loss": To(True, note="has no effect; EveryDream2 reads it and never uses it"),
    "val_data_root": To("other", {"val_split_mode": "manual"}),
    "val_split_proportion": To(0.3),
}
ITEM = {
    "prompt": To("a red circle"),
    "negative_prompt": To("blue"),
    "seed": To(4),
    "size": To([64, 128]),
    "aspect_ratio": To(2.0),
    "random_caption": To(True),
    "cfgs": To([3], note="has no effect; EveryDream2 ignores it too"),
}
PROMPTS = {
    "resolution": To(64),
    "seed": To(3),
    "cfgs": To([2, 1.01]),
    "batch_size": To(1),
    "scheduler": To("euler_a"),
    "num_inference_steps": To(2),
    "show_progress_bars": To(True),
    "generate_pretrain_samples": To(True),
    "generate_samples_every_n_steps": To(1),
    "samples": To([{"prompt": "a blue square"}]),
}


def _section(name):
    """Return a section with EveryDream2's defaults."""
    return {key: value for key, value in KEYS["optimizer"][name].items() if key in SECTION}


OPTIMIZER = {
    "doc": {"base": "text"},
    BASE: _section(BASE),
    OVERRIDES: _section(OVERRIDES),
    FREEZING: {key: None if value == "auto" else value for key, value in KEYS["optimizer"][FREEZING].items()},
    "apply_grad_scaler_step_tweaks": True,
    "log_grad_norm": True,
}
DEFAULTS = KEYS["train"] | {"resume_ckpt": "model"}  # there is no sd_v1-5_vae.ckpt here
VALIDATION_DEFAULTS = {
    key: value for key, value in KEYS["validation"].items() if not str(value).startswith("train ")
}
PROMPTS_DEFAULTS = {
    key: value
    for key, value in KEYS["sample_prompts"].items()
    if not str(value).startswith(("train ", "max("))
}
ITEM_DEFAULTS = {
    key: value for key, value in KEYS["sample_prompts_item"].items() if not str(value).startswith("top-level")
}
PROMPTS_DEFAULTS = {**PROMPTS_DEFAULTS, "samples": [ITEM_DEFAULTS]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("model", "velocity"):
        write_tiny_folder(folder / name)
    scheduler = folder / "velocity" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.fixture
def place(tmp_path, models, monkeypatch):
    """Return a folder with everything that the files name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("model", "velocity"):
        (tmp_path / name).symlink_to(models / name)
    for folder in ("input", "other"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            Image.new("RGB", (64, 64), (40 * number, 100, 200 if folder == "other" else 0)).save(
                tmp_path / folder / f"{number}.png"
            )
            (tmp_path / folder / f"{number}.txt").write_text(f"a red circle, tag {number}, another")
    (tmp_path / "sample_prompts.txt").write_text("a red circle\n")
    write(tmp_path, "dadapt.json", SHIPPED_DADAPT | {"doc": ""})
    write(tmp_path, "optimizer.json", OPTIMIZER)
    write(tmp_path, "validation.json", VALIDATION_DEFAULTS)
    write(tmp_path, "prompts.json", PROMPTS_DEFAULTS)
    write(tmp_path, "train.json", DEFAULTS)
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content, indent=1))


def loaded():
    """Return what the files in the working directory come to: every key, and the notes."""
    found = load_config([])
    samples = load_sample_prompts(Path(found.config.samples.sample_prompts or ""))
    validation = load_validation(Path(found.config.validation.validation_config or "validation.json"))
    return {**flattened(found.config), "prompts": samples, "validation": validation}, found.notes


def problems(place, name, defaults, changes, inside=None):
    """Return what is not as the table promises, each key changed by itself."""
    before, notes = loaded()
    wrong = []
    for key, to in changes.items():
        changed = {**to.beside, key: to.value}
        # ED2's earlier names stand instead of the new ones
        whole = {
            k: v
            for k, v in defaults.items()
            if KEYS["validation_legacy_aliases"].get(key) != k or inside or name != "validation.json"
        }
        if inside == "item":
            write(place, name, {**whole, "samples": [{**ITEM_DEFAULTS, **changed}]})
        else:
            write(
                place,
                name,
                {**whole, inside: {**whole[inside], **changed}} if inside else {**whole, **changed},
            )
        try:
            after, said = loaded()
        except UserError as error:
            after, said = None, tuple(error.problems)
        new = [sentence for sentence in said if sentence not in notes]
        if to.error:
            fits = after is None and len(new) == 1 and to.error in new[0] and key in new[0]
        elif to.note:
            fits = after == before and len(new) == 1 and to.note in new[0] and key in new[0]
        else:
            fits = after is not None and after != before and new == []
        if not fits:
            wrong.append((key, to.value, new, after == before))
    write(place, name, defaults)
    return wrong


def test_no_key_is_forgotten():
    assert set(TRAIN) == set(KEYS["train"]) | set(KEYS["train_legacy_keys_ignored_at_head"])
    assert set(SECTION) == set(OPTIMIZER[BASE]) == set(OPTIMIZER[OVERRIDES])
    assert set(FREEZE) == set(KEYS["optimizer"][FREEZING])
    assert set(TOP) == {"apply_grad_scaler_step_tweaks", "log_grad_norm", *KEYS["optimizer"]["ignored"]}
    assert set(VALIDATION) == set(KEYS["validation"]) | set(KEYS["validation_legacy_aliases"])
    assert set(PROMPTS) == set(KEYS["sample_prompts"])
    assert set(ITEM) == set(KEYS["sample_prompts_item"]) | set(KEYS["sample_prompts_item_ignored"])
    for table, defaults in (
        (TRAIN, KEYS["train"]),
        (SECTION, OPTIMIZER[BASE]),
        (VALIDATION, VALIDATION_DEFAULTS),
        (PROMPTS, PROMPTS_DEFAULTS),
    ):
        assert [key for key, to in table.items() if key in defaults and to.value == defaults[key]] == [], (
            "no default"
        )


def test_the_defaults_are_understood(place):
    _, notes = loaded()
    assert notes == ("optimizer.json:5: base.lr: no learning rate here nor in train.json; 1e-06 is used",)
    known = set(flattened(load_config([]).config))
    foreign = {key for key, to in TRAIN.items() if to.note or to.error} | {"amp"}
    assert set(KEYS["train"]) - foreign <= known


def test_every_key_of_train_json_is_as_promised(place):
    assert problems(place, "train.json", DEFAULTS, TRAIN) == []
    assert (
        problems(
            place,
            "train.json",
            DEFAULTS,
            {"attn_type": To("xformers", note="torch's own attention (sdp) takes its place")},
        )
        == []
    )
    for key, choices in KEYS["train_choices"].items():
        name = key.removesuffix("_cli").removesuffix("_json")
        for value in choices:
            write(place, "train.json", {**DEFAULTS, name: value})
            loaded()


def test_every_key_of_the_optimizer_file_is_as_promised(place):
    for inside, table in ((BASE, SECTION), (OVERRIDES, SECTION), (FREEZING, FREEZE)):
        assert problems(place, "optimizer.json", OPTIMIZER, table, inside) == [], inside
    assert problems(place, "optimizer.json", OPTIMIZER, TOP) == []
    never = {"coordinate_dowg", "scalar_dowg", "adacoor", "dadapt_adan"}
    for name in (*KEYS["optimizer"]["optimizer_names"], *KEYS["optimizer"]["optimizer_names_broken"]):
        lr = 0.1 if name.startswith("dadapt") else 1.0 if name == "prodigy" else 1e-6
        write(place, "optimizer.json", {**OPTIMIZER, BASE: {"optimizer": name, "lr": lr}})
        if name in never:
            with pytest.raises(UserError, match=f"{name} is not supported; use dadapt_adam"):
                loaded()
        else:
            assert loaded()[0]["base.optimizer"] == name


def test_every_key_of_the_validation_file_is_as_promised(place):
    write(place, "train.json", {**DEFAULTS, "validation_config": "validation.json"})
    assert problems(place, "validation.json", VALIDATION_DEFAULTS, VALIDATION) == []


def test_every_key_of_the_sample_prompts_is_as_promised(place):
    write(place, "train.json", {**DEFAULTS, "sample_prompts": "prompts.json"})
    assert problems(place, "prompts.json", PROMPTS_DEFAULTS, PROMPTS) == []
    assert problems(place, "prompts.json", PROMPTS_DEFAULTS, ITEM, "item") == []
    for scheduler in KEYS["sample_schedulers"]:
        write(place, "prompts.json", {**PROMPTS_DEFAULTS, "scheduler": scheduler})
        try:
            loaded()
        except UserError as error:
            assert scheduler == "lms" and "pip install scipy" in str(error)


TOGETHER = {
    key: to.value
    for key, to in TRAIN.items()
    if not (to.note or to.error)
    # which contradict others of these, name another model or ask for another machine; the run after this one
    # has them
    and key
    not in (
        "disable_textenc_training",
        "disable_unet_training",
        "ema_strength_target",
        "enable_zero_terminal_snr",
        "gpuid",
    )
    and key
    not in (
        "resume_ckpt",
        "optimizer_config",
        "attn_type",
        "no_save_ckpt",
        "timestep_end",
        "ema_resume_model",
    )
}
REST: dict[str, Any] = {
    "disable_textenc_training": True,
    "ema_strength_target": 0.5,
    "enable_zero_terminal_snr": True,
    "resume_ckpt": "velocity",
    "optimizer_config": "dadapt.json",
    "attn_type": "slice",
    "no_save_ckpt": True,
    "max_epochs": 2,
    "ema_update_interval": 1,
    "ema_resume_model": "velocity",
    "batch_size": 4,
}
TUNED = {
    BASE: {
        key: SECTION[key].value
        for key in ("betas", "epsilon", "weight_decay", "d0", "decouple", "growth_rate")
    }
    | ADAPTING,
    OVERRIDES: {
        "optimizer": "adamw",
        "lr": 1e-6,
        "lr_scheduler": "cosine",
        "lr_decay_steps": 1000,
        "lr_warmup_steps": 1,
    },
    FREEZING: {key: to.value for key, to in FREEZE.items() if key != "freeze_front_n_layers"},
    "apply_grad_scaler_step_tweaks": False,
    "log_grad_norm": False,
}


@pytest.mark.parametrize(
    ("settings", "optimizer", "validation"),
    [
        (KEYS["train"] | {"resume_ckpt": "model", "resolution": 64}, OPTIMIZER, VALIDATION_DEFAULTS),
        (
            KEYS["train_shipped_json_values"]
            | {"resume_ckpt": "model", "resolution": 64, "data_root": "input"},
            SHIPPED_DADAPT | {"doc": ""},
            VALIDATION_DEFAULTS,
        ),
        (
            DEFAULTS | TOGETHER,
            TUNED,
            {key: to.value for key, to in VALIDATION.items() if not key.startswith("val_") and not to.beside},
        ),
        (
            DEFAULTS | {"resolution": 64, "sample_prompts": "prompts.json"} | REST,
            OPTIMIZER,
            VALIDATION_DEFAULTS,
        ),
        (
            DEFAULTS
            | {"resolution": 64, "disable_unet_training": True, "timestep_end": 900, "batch_size": 3},
            KEYS["optimizer"]["shipped_optimizerSD21.json"] | {"doc": ""},
            VALIDATION_DEFAULTS,
        ),
    ],
    ids=["defaults", "as shipped", "all keys", "the other keys", "as shipped for SD 2.1"],
)
def test_such_files_train(place, capsys, settings, optimizer, validation):
    write(place, "train.json", settings)
    write(place, "optimizer.json", optimizer)
    write(place, "validation_default.json", validation)
    write(place, "validation.json", validation)
    prompts = {key: to.value for key, to in PROMPTS.items()} | {
        "samples": [{key: to.value for key, to in ITEM.items() if key != "cfgs"}]
    }
    write(place, "prompts.json", prompts)
    assert train.main(["--stop_after_steps", "2"]) == 0, capsys.readouterr().err
    run = run_of(place) if settings["logdir"] == "logs" else next((place / settings["logdir"]).iterdir())
    log = (run / "run.log").read_text()
    assert ": 2 steps, " in log
    if settings.get("sample_prompts", "").endswith(".json"):
        assert "could not be" not in log and list((run / "samples").glob("*.png"))
    if settings["seed"] == -1:
        assert json.loads((run / "train.json").read_text())["seed"] >= 0
