"""Sample pictures: what is asked for, what is drawn, and that training does not notice."""

from __future__ import annotations

import copy
import json
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from tests.tiny import tiny_models, tiny_scheduler
from trainer.config.report import Report
from trainer.config.sample_file import load_sample_prompts, read_sample_prompts
from trainer.diffusion.schedule import with_zero_terminal_snr
from trainer.errors import UserError
from trainer.evaluation.image_grid import labelled_row, tiled
from trainer.evaluation.options import SamplePrompt, SamplePrompts, Scheduler
from trainer.evaluation.sampling import UNRELATED, Sampler, Samples
from trainer.evaluation.schedulers import check_scheduler

QUICK = SamplePrompts(
    num_inference_steps=2,
    cfgs=(3.0,),
    samples=(SamplePrompt(prompt="a red circle"), SamplePrompt(prompt="a blue square")),
)


@pytest.fixture(scope="module")
def models() -> Any:
    return tiny_models()


def sampler(prompts: SamplePrompts = QUICK, **kwargs: Any) -> Sampler:
    return Sampler(prompts, **{"resolution": 64, "seed": 7, "batch_size": 4, **kwargs})


def draw(models: Any, prompts: SamplePrompts = QUICK, step: int = 100, **kwargs: Any) -> Samples:
    return run(models, sampler(prompts, **kwargs), step)


def run(models: Any, drawer: Sampler, step: int = 100, autocast: Any = nullcontext) -> Samples:
    return drawer.draw(models, step=step, device=torch.device("cpu"), autocast=autocast)


def pixels(samples: Samples) -> list[bytes]:
    return [row.tobytes() for _, row in samples.rows]


# What is asked for


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_wildcard_of_a_prompt_is_drawn_once_for_the_run(models: Any):
    prompts = SamplePrompts(
        num_inference_steps=1,
        cfgs=(1.0,),
        samples=tuple(SamplePrompt(prompt="a {red|blue} circle {{x}}") for _ in range(8)),
    )

    def texts(step: int, **kwargs: Any) -> list[str]:
        return [tag.split(" ", 1)[1] for tag, _ in draw(models, prompts, step, **kwargs).rows]

    chosen = texts(100, wildcards=True)
    assert chosen == texts(200, wildcards=True) and len(chosen) == 8
    assert set(chosen) == {"a red circle {x}", "a blue circle {x}"}
    assert chosen != texts(100, wildcards=True, seed=8)
    assert set(texts(100)) == {"a {red|blue} circle {{x}}"}


def test_a_text_file_is_one_prompt_a_line(tmp_path: Path):
    path = write(tmp_path / "p.txt", "\ufeffa red circle\r\n\n  # a comment\n  ein Bär, groß  \n")
    prompts = load_sample_prompts(path)
    assert prompts == SamplePrompts(
        samples=(SamplePrompt(prompt="a red circle"), SamplePrompt(prompt="ein Bär, groß"))
    )
    assert prompts.cfgs == (7.0, 4.0, 1.01) and (prompts.scheduler, prompts.num_inference_steps) == (
        "ddim",
        30,
    )


def test_kohyas_options_in_a_line_are_a_note_of_the_first(tmp_path: Path):
    report = Report()
    lines = "# a dog --w 5 --h 5\na red circle -- round\na dog --n bad --w 512\na cat --d 3\n"
    prompts = read_sample_prompts(write(tmp_path / "p.txt", lines), report)
    assert prompts is not None and len(prompts.samples) == 3
    (note,) = report.notes
    assert "p.txt:3: options such as --w 512 are drawn as words; a .json file has" in str(note)


def test_every_key_of_everydream2_is_read(tmp_path: Path):
    content = {
        "doc": "for readers",
        "resolution": 512,
        "seed": 3,
        "cfgs": [7, 1.01],
        "batch_size": 2,
        "scheduler": "dpm++_2m_sde_k",
        "num_inference_steps": 20,
        "show_progress_bars": True,
        "generate_pretrain_samples": False,
        "generate_samples_every_n_steps": 50,
        "samples": [
            {"prompt": "a", "negative_prompt": "b", "seed": 4, "size": [640, 384]},
            {"aspect_ratio": 1.5, "random_caption": True, "seed": None},
        ],
    }
    assert load_sample_prompts(write(tmp_path / "p.json", content)) == SamplePrompts(
        resolution=512,
        seed=3,
        cfgs=(7.0, 1.01),
        batch_size=2,
        scheduler="dpm++_2m_sde_k",
        num_inference_steps=20,
        show_progress_bars=True,
        generate_pretrain_samples=False,
        generate_samples_every_n_steps=50,
        samples=(
            SamplePrompt(prompt="a", negative_prompt="b", seed=4, size=(640, 384)),
            SamplePrompt(aspect_ratio=1.5, random_caption=True),
        ),
    )


def test_null_is_the_default(tmp_path: Path):
    keys = (
        "resolution",
        "seed",
        "cfgs",
        "batch_size",
        "scheduler",
        "num_inference_steps",
        "show_progress_bars",
        "samples",
    )
    prompts = load_sample_prompts(write(tmp_path / "p.json", dict.fromkeys(keys)))
    assert replace(prompts, samples=None) == SamplePrompts() == load_sample_prompts(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sed": 1}', ":1: sed: unknown key; did you mean 'seed'?"),
        (
            '{\n"samples": [\n{"prompt": "a"},\n{"promt": "a"}]}',
            ":4: samples[1].promt: unknown key; did you mean 'prompt'?",
        ),
        ('{"scheduler": "dim"}', ":1: scheduler: unknown value 'dim'; did you mean 'ddim'?"),
        (
            '{"resolution": 100}',
            ":1: resolution: must be a multiple of 8, got 100; the nearest are 96 and 104",
        ),
        ('{"cfgs": [7, 0.5]}', ":1: cfgs[1]: must be at least 1, got 0.5"),
        ('{"cfgs": []}', ":1: cfgs: is an empty list"),
        ('{"samples": [{"size": [64, 60]}]}', ":1: samples[0].size[1]: must be a multiple of 8, got 60"),
        ('{"samples": [{"size": [64]}]}', ":1: samples[0].size"),
        ('{"samples": [{"seed": -2}]}', ":1: samples[0].seed: must be at least -1, got -2"),
        ('{"samples": ["a red circle"]}', ":1: samples[0]: must be an object such as"),
        ('{"samples": "a red circle"}', ":1: samples: must be a list of objects"),
        ('{"num_inference_steps": 0}', ":1: num_inference_steps: must be at least 1, got 0"),
        ('{"show_progress_bars": "false"}', ":1: show_progress_bars: must be true or false"),
        ('{\n"seed": 1,\n}', ":2:10: the comma after the last entry must go"),
        ("[]", "must hold an object"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError) as caught:
        load_sample_prompts(write(tmp_path / "p.json", text))
    (problem,) = caught.value.problems
    assert problem.startswith(str(tmp_path / "p.json")) and message in problem


def test_all_mistakes_come_together(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_sample_prompts(write(tmp_path / "p.json", {"sed": 1, "cfgs": 7, "samples": [{"seed": 1.5}, 3]}))
    assert len(caught.value.problems) == 4


def test_a_text_file_of_another_encoding_is_an_error(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes(b"ok\nB\xe4r\n")
    with pytest.raises(UserError, match=r"p\.txt:2: byte 0xe4 is not UTF-8"):
        load_sample_prompts(tmp_path / "p.txt")


def test_a_scheduler_whose_package_is_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scipy"):
        load_sample_prompts(write(tmp_path / "p.json", {"scheduler": "lms"}))


@pytest.mark.parametrize(
    ("name", "content"), [("p.txt", "# nothing\n"), ("p.json", "{}"), ("p.json", '{"samples": []}')]
)
def test_a_file_without_prompts_says_that_captions_are_taken(tmp_path: Path, name: str, content: str):
    report = Report()
    read_sample_prompts(write(tmp_path / name, content), report)
    assert len(report.notes) == 1 and "two captions" in report.notes[0]


def test_a_key_that_has_no_effect_is_a_note(tmp_path: Path):
    report = Report()
    read_sample_prompts(write(tmp_path / "p.json", {"samples": [{"prompt": "a", "cfgs": [3]}]}), report)
    assert report.errors == () and "samples[0].cfgs: has no effect" in report.notes[0]


def test_without_prompts_two_captions_of_the_data_and_two_others_are_drawn():
    for captions, own in (
        ([f"caption {number // 2}" for number in range(20)], ["caption 0", "caption 5"]),
        (["one", "one", " "], ["one"]),
        ([], [""]),
    ):
        chosen = [prompt.prompt for prompt in sampler(SamplePrompts(), captions=captions).prompts]
        assert chosen == [*own, *UNRELATED] and len(UNRELATED) == 2


# What is drawn


def test_the_same_weights_draw_the_same_pictures(models: Any):
    assert pixels(draw(models, step=1)) == pixels(draw(models, step=2))


def test_a_picture_does_not_depend_on_its_neighbours(models: Any):
    """To rounding: the matrix products of a larger batch may add up in another order."""
    alone = draw(models, replace(QUICK, samples=(SamplePrompt(prompt="a blue square"),)))
    together = draw(models)
    difference = np.asarray(alone.rows[0][1]).astype(int) - np.asarray(together.rows[1][1])
    assert np.abs(difference).max() <= 2


def test_seeds_go_from_the_prompt_to_the_file_to_the_run(models: Any):
    def picture(own: int | None, file: int | None, run: int, step: int = 1) -> bytes:
        return pixels(
            draw(
                models,
                replace(QUICK, seed=file, samples=(SamplePrompt(prompt="a", seed=own),)),
                step=step,
                seed=run,
            )
        )[0]

    assert picture(1, 2, 3) == picture(1, 4, 5) == picture(None, 1, 5) == picture(None, None, 1)
    assert picture(1, 2, 3) != picture(None, 2, 3) != picture(None, None, 3)
    assert picture(-1, None, 3, step=1) == picture(-1, None, 3, step=1) != picture(-1, None, 3, step=2)


def test_the_negative_prompt_and_the_guidance_act(models: Any):
    def picture(cfg: float, negative: str) -> bytes:
        return pixels(
            draw(
                models,
                replace(QUICK, cfgs=(cfg,), samples=(SamplePrompt(prompt="a", negative_prompt=negative),)),
            )
        )[0]

    assert picture(3, "") != picture(3, "blue") and picture(3, "") != picture(5, "")
    assert picture(1, "") == picture(1, "blue")


def test_clip_skip_acts(models: Any):
    assert pixels(draw(models)) != pixels(draw(models, clip_skip=2))


def test_words_beyond_the_first_window_are_drawn_with_further_windows(models: Any):
    prompts = replace(
        QUICK,
        samples=tuple(SamplePrompt(prompt="a " * 80 + words) for words in ("red circle", "blue square")),
    )

    def pictures(**more: Any) -> tuple[list[Any], tuple[str, ...]]:
        samples = draw(models, prompts, **more)
        return [
            row.crop((0, 0, 256, 256)).tobytes() for _, row in samples.rows
        ], samples.problems  # without the caption below

    (red, blue), problems = pictures()
    assert red == blue and len(problems) == 2 and "has 82 tokens and the text encoder reads 75" in problems[0]
    (red, blue), problems = pictures(chunks=2)
    assert red != blue and problems == ()


def test_sizes(models: Any):
    prompts = replace(
        QUICK,
        samples=(
            SamplePrompt(prompt="a"),
            SamplePrompt(prompt="b", size=(96, 40)),
            SamplePrompt(prompt="c", aspect_ratio=2.0),
            SamplePrompt(prompt="d"),
        ),
    )
    samples = draw(models, prompts)
    assert samples.problems == ()
    widths = [
        row.width for _, row in samples.rows
    ]  # enlarged to at least 256 on the shorter side: by 4, 7, 6 and 4
    assert widths == [4 * 64, 7 * 96, 6 * 88, 4 * 64]
    assert draw(models, replace(prompts, resolution=128)).rows[0][1].width == 2 * 128


def test_a_random_caption_is_another_one_each_time_and_the_same_again(models: Any):
    prompts = replace(QUICK, samples=(SamplePrompt(random_caption=True),))
    captions = [f"a {word}" for word in ("red", "blue", "circle", "square", "photo", "background")]
    by_step = [pixels(draw(models, prompts, step=step, captions=captions))[0] for step in (1, 2, 3, 4, 1)]
    assert len(set(by_step)) > 1 and by_step[0] == by_step[-1]
    assert draw(models, prompts, captions=captions).rows[0][0] == "sample_prompts/0 random caption"


@pytest.mark.parametrize("scheduler", [name for name in get_args(Scheduler) if name != "lms"])
def test_every_scheduler_draws_without_touching_the_runs_random_numbers(models: Any, scheduler: Any):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())
    first = draw(models, replace(QUICK, scheduler=scheduler, num_inference_steps=4))
    assert (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert first.problems == ()
    torch.manual_seed(2)
    assert pixels(draw(models, replace(QUICK, scheduler=scheduler, num_inference_steps=4))) == pixels(first)


def test_lms_draws_where_scipy_is_installed(models: Any):
    pytest.importorskip("scipy")
    assert draw(models, replace(QUICK, scheduler="lms")).problems == ()


def test_the_models_own_schedule_is_kept(models: Any):
    other = {**models.scheduler_config, "prediction_type": "v_prediction"}
    assert pixels(draw(models)) != pixels(draw(replace(models, scheduler_config=other)))


def test_ddim_does_not_clip_latents_of_a_model_saved_with_another_scheduler(models: Any):
    """PNDM's configuration has no clip_sample, whose default in DDIM is to clip."""
    assert "clip_sample" not in models.scheduler_config
    explicit = {**models.scheduler_config, "clip_sample": False, "set_alpha_to_one": False}
    assert pixels(draw(models)) == pixels(draw(replace(models, scheduler_config=explicit)))


ZERO_TERMINAL = with_zero_terminal_snr(
    {**dict(tiny_scheduler().config), "prediction_type": "v_prediction"}, "tiny"
)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler", "euler_a", "dpm++", "dpm++_2m_sde_k"])
def test_a_schedule_that_ends_in_noise_alone_is_drawn_with(models: Any, scheduler: Any):
    check_scheduler(replace(QUICK, scheduler=scheduler), ZERO_TERMINAL)
    drawn = draw(
        replace(models, scheduler_config=ZERO_TERMINAL),
        replace(QUICK, scheduler=scheduler, num_inference_steps=4),
    )
    assert drawn.problems == ()


def test_a_schedule_that_ends_in_noise_alone_is_sampled_from_its_end_with_rescaled_guidance(
    models: Any, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[float, int]] = []
    forward = StableDiffusionPipeline.__call__

    def record(self: Any, **arguments: Any) -> Any:
        result = forward(self, **arguments)
        seen.append((arguments["guidance_rescale"], int(self.scheduler.timesteps[0])))
        return result

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", record)
    draw(models)
    draw(replace(models, scheduler_config=ZERO_TERMINAL))
    assert seen[0][0] == 0.0 and seen[0][1] < 999
    assert seen[-1] == (0.7, 999)


@pytest.mark.parametrize("scheduler", ["pndm", "lms", "kdpm2", "dpm++_2s", "dpm++_sde_k"])
def test_a_sampler_that_does_not_know_such_a_schedule_is_refused(scheduler: Any):
    prompts = SamplePrompts(scheduler=scheduler)
    check_scheduler(prompts, tiny_scheduler().config)
    with pytest.raises(
        UserError, match=f"scheduler {re.escape(scheduler)} does not know .* use one of ddim, ddpm"
    ):
        check_scheduler(prompts, ZERO_TERMINAL)


# Training does not notice


def test_modes_gradients_and_weights_are_left_alone():
    models = tiny_models(seed=1)
    models.unet.train()
    models.text_encoder.train()
    frozen = next(models.text_encoder.children())
    frozen.eval()
    models.vae.requires_grad_(False)
    networks = (models.unet, models.text_encoder, models.vae)
    weights = [copy.deepcopy(network.state_dict()) for network in networks]
    state = [
        [(module.training, [p.requires_grad for p in module.parameters()]) for module in network.modules()]
        for network in networks
    ]
    seen: list[bool] = []
    hook = models.unet.register_forward_hook(
        lambda *_: seen.append(models.unet.training or torch.is_grad_enabled())
    )
    draw(models)
    hook.remove()
    assert seen and not any(seen)
    after = [
        [(module.training, [p.requires_grad for p in module.parameters()]) for module in network.modules()]
        for network in networks
    ]
    assert after == state and not frozen.training and models.unet.training
    assert all(p.grad is None for network in networks for p in network.parameters())
    for network, before in zip(networks, weights, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_is_the_same_to_the_bit_with_and_without_samples():
    def train(sampled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        models = tiny_models(seed=1)
        models.unet.train()
        optimizer = torch.optim.AdamW(models.unet.parameters(), lr=1e-2)
        for step in range(3):
            if sampled:
                draw(models, step=step)
            noise = torch.randn(2, 4, 8, 8)  # from the global generator, which samples must not touch
            loss = (
                (models.unet(noise, torch.tensor([10, 500]), torch.zeros(2, 77, 16)).sample - noise)
                .square()
                .mean()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(models.unet.parameters())

    for with_samples, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_samples, without)


def test_autocast_is_used(models: Any):
    seen: list[bool] = []
    hook = models.unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    samples = run(models, sampler(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    hook.remove()
    assert samples.problems == () and seen and all(seen)


# What goes wrong


def test_a_failing_prompt_is_a_problem_and_the_others_are_drawn(models: Any, monkeypatch: pytest.MonkeyPatch):
    encode = models.text_encoder.forward

    def failing(tokens: torch.Tensor, **kwargs: Any) -> Any:
        text = models.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        if any("circle" in one for one in text):
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
        return encode(tokens, **kwargs)

    whole = draw(models)
    monkeypatch.setattr(models.text_encoder, "forward", failing)
    samples = draw(models)
    assert len(samples.problems) == 1
    assert (
        samples.problems[0]
        == "sample 'a red circle' at cfg 3 could not be drawn: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert len(samples.rows) == 2
    difference = np.asarray(samples.rows[1][1]).astype(int) - np.asarray(whole.rows[1][1])
    assert np.abs(difference).max() <= 2


def test_a_model_that_draws_nan_is_a_problem():
    models = tiny_models(seed=2)
    with torch.no_grad():
        models.unet.conv_out.weight.fill_(torch.nan)
    samples = draw(models)
    assert len(samples.problems) == 2 and "NaN" in samples.problems[0]


def test_ctrl_c_is_not_swallowed(models: Any, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    models.unet.train()
    monkeypatch.setattr(models.unet, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(models)
    assert models.unet.training


def test_a_prompt_that_is_too_long_is_said_once(models: Any):
    drawer = sampler(replace(QUICK, samples=(SamplePrompt(prompt="circle " * 100),)))
    assert "has 100 tokens and the text encoder reads 75" in run(models, drawer).problems[0]
    assert run(models, drawer).problems == ()


def test_sampling_is_quiet(models: Any, capfd: pytest.CaptureFixture[str]):
    draw(models)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


# Grids


def test_files_and_tags(models: Any, tmp_path: Path):
    samples = draw(models)
    path = samples.save(tmp_path / "samples", 100)
    assert path == tmp_path / "samples" / "gs00100.png"
    assert Image.open(path).tobytes() == samples.grid.tobytes()
    assert [tag for tag, _ in samples.rows] == [
        "sample_prompts/0 a red circle",
        "sample_prompts/1 a blue square",
    ]


SIDE = 256  # what 64 px pictures are enlarged to


def test_three_scales_make_three_columns_and_one_makes_a_wall(models: Any):
    three = draw(models, replace(QUICK, cfgs=(7.0, 4.0, 1.01)))
    one = draw(models, replace(QUICK, samples=tuple(SamplePrompt(prompt="ab"[i % 2]) for i in range(5))))
    assert three.rows[0][1].width > 3 * SIDE and three.grid.height > 2 * SIDE
    assert 4 * SIDE < one.grid.width < 5 * SIDE and one.grid.height > 2 * SIDE


RED, BLUE = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 255))


def test_pictures_are_enlarged_and_stand_in_order():
    row = labelled_row([RED, BLUE], ["", ""], "two")
    assert row.getpixel((128, 128)) == (255, 0, 0) and row.getpixel((row.width - 128, 128)) == (0, 0, 255)
    assert row.width == 2 * SIDE + 5


def test_a_large_picture_is_not_resized():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 320, 3), dtype=np.uint8))
    row = labelled_row([noise], [""], "noise")
    assert row.crop((0, 0, 320, 256)).tobytes() == noise.tobytes()


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> int:
    return int((np.asarray(picture.crop(box).convert("L")) < 128).sum())


def test_captions_are_written_and_wrapped():
    short, long = (
        labelled_row([RED], [""], "a red square"),
        labelled_row([RED], [""], "a very long caption " * 6),
    )
    longest = labelled_row([RED], [""], "a very long caption " * 60)
    assert ink(short, (0, SIDE, SIDE, short.height)) > 50
    assert short.height < long.height <= longest.height < SIDE + 100
    unbroken = labelled_row([RED], [""], "x" * 200)
    assert unbroken.width == SIDE and unbroken.height > short.height


def test_letters_beyond_ascii_have_shapes_of_their_own():
    rows = [labelled_row([RED], [""], text).tobytes() for text in ("é", "ß", "Ж", "Ω", "□")]
    assert len(set(rows)) == len(rows)
    labelled_row([RED], [""], "中 🙂 \u0000 \u200f")  # without a shape, and without an error


def test_a_reason_stands_in_the_place_of_a_picture():
    row = labelled_row([RED, "out of memory: " + "x" * 300], ["cfg 7", "cfg 4"], "a")
    assert ink(row, (SIDE, 20, row.width, SIDE)) > 50
    alone = labelled_row(["out of memory"], [""], "a")
    assert ink(alone, (0, 0, SIDE, SIDE)) > 50


def test_rows_of_different_widths_share_a_grid():
    grid = tiled(
        [labelled_row([RED], [""], "a"), labelled_row([RED, BLUE], ["", ""], "b")], columns=1, title="step 1"
    )
    assert grid.width >= 2 * SIDE and ink(grid, (0, 0, grid.width, 30)) > 20
