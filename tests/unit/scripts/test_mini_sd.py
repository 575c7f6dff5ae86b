"""The bundled model: reproducible images, a judge that sees them, stages that survive being killed."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from scripts.mini_sd.drawing import COLOURS, FACE, PALETTE, SHAPES, UMBRELLA, render
from scripts.mini_sd.examples import write_examples
from scripts.mini_sd.judge import judge, judge_concept, judge_prompts
from scripts.mini_sd.scenes import (
    Combination,
    caption,
    combinations,
    held_out,
    sample_concept,
    sample_scene,
    scene_of,
)
from scripts.mini_sd.textures import sample_texture

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "mini-sd"
MEGABYTE = 1_000_000

needs_model = pytest.mark.skipif(not MODEL.exists(), reason="models/mini-sd has not been made")


def test_the_same_seed_draws_the_same_picture_and_caption():
    def draw(seed):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        return (
            render(scene).tobytes(),
            caption(scene, rng),
            sample_texture(rng).tobytes(),
            sample_concept(rng, FACE),
        )

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_training_scenes_never_show_a_held_out_combination_or_a_face():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(3000)]
    seen = {Combination(i.colour, i.shape, s.background) for s in scenes for i in s.items}
    assert not seen & set(held_out())
    assert {c.shape for c in seen} == set(SHAPES)
    assert len(seen) == len(combinations()) - len(held_out())


def test_the_held_out_prompts_are_a_hundred_and_cover_every_colour_and_shape():
    chosen = held_out()
    assert len({c.prompt for c in chosen}) == 100
    assert {c.shape for c in chosen} == set(SHAPES)
    assert {c.colour for c in chosen} == set(COLOURS) == {c.background for c in chosen}
    assert Combination("red", "circle", "blue").prompt == "a red circle on a blue background"
    assert Combination("orange", "circle", "orange").prompt == "an orange circle on an orange background"


@pytest.mark.parametrize("blur", [0.0, 1.5])
def test_the_judge_reads_rendered_scenes(blur):
    rng = np.random.default_rng(1)
    wanted = combinations()[::3]
    images = [render(scene_of(c, rng)).filter(ImageFilter.GaussianBlur(blur)) for c in wanted]
    figures = judge_prompts(images, wanted)
    assert figures.background == 1.0
    assert figures.colour > 0.98
    assert figures.shape > 0.98


def test_the_judge_tells_faces_from_shapes():
    rng = np.random.default_rng(2)
    scenes = [sample_concept(rng, FACE)[0] for _ in range(40)]
    faces = [render(s, 128) for s in scenes]
    wanted = held_out()[:40]
    figures = judge_concept(
        faces,
        [(s.items[0].colour, s.background) for s in scenes],
        [render(scene_of(c, rng)) for c in wanted],
        wanted,
    )
    assert figures.faces == 1.0 and figures.leaked == 0.0
    assert figures.face_colour > 0.95 and figures.face_background == 1.0
    assert figures.kept_background == 1.0 and figures.kept_shape > 0.95


def test_an_empty_picture_has_no_object():
    blank = render(replace(sample_scene(np.random.default_rng(0)), items=()))
    assert judge(blank).shape == "" and not judge(blank).is_face


def test_the_shipped_examples_are_what_the_script_draws(tmp_path):
    write_examples(tmp_path / "faces", FACE, count=2, size=128, seed=7)
    for name in ("face_00.txt", "face_01.txt"):
        assert (tmp_path / "faces" / name).read_bytes() == (ROOT / "examples" / "faces" / name).read_bytes()
    assert len(list((ROOT / "examples" / "faces").glob("*.png"))) == 60
    assert len(list((ROOT / "examples" / "faces").glob("*.txt"))) == 60


def test_another_concept_is_drawn_in_its_colours(tmp_path):
    write_examples(tmp_path, UMBRELLA, count=8, size=64, seed=7)
    captions = [path.read_text() for path in sorted(tmp_path.glob("umbrella_*.txt"))]
    assert len(captions) == 8 and all("umbrella" in words and "black" not in words for words in captions)
    rng = np.random.default_rng((7, 0))
    scene, words = sample_concept(rng, UMBRELLA)
    colours = {colour for _, colour in render(scene).getcolors(4096) or []}
    wanted = {PALETTE[scene.background], PALETTE[scene.items[0].colour], PALETTE["black"]}
    assert wanted <= colours and words + "\n" == captions[0]


def test_the_tokenizer_knows_the_words_and_is_reproducible(tmp_path):
    from scripts.mini_sd.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(tmp_path)
    assert len(tokenizer) == 779
    assert tokenizer.tokenize("a yellow smiling face") == ["a</w>", "yellow</w>", "smiling</w>", "face</w>"]
    assert tokenizer.eos_token_id == 778 == tokenizer.pad_token_id
    rng = np.random.default_rng(0)
    longest = max(len(tokenizer(caption(sample_scene(rng), rng)).input_ids) for _ in range(300))
    assert longest <= 28


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with tokenizer, VAE, text encoder and latents made in a handful of steps."""
    from scripts.mini_sd.text import TextOptions, train_text
    from scripts.mini_sd.tokenizer import build_tokenizer
    from scripts.mini_sd.unet import LatentOptions, encode_latents
    from scripts.mini_sd.vae import VaeOptions, train_vae

    folder = tmp_path_factory.mktemp("mini_sd")
    build_tokenizer(folder / "tokenizer")
    assert train_vae(folder, VaeOptions(steps=2, batch=2))
    assert train_text(folder, TextOptions(steps=2, batch=2))
    encode_latents(folder, LatentOptions(scenes=16, batch=8))
    return folder


def test_a_stage_goes_on_after_an_interruption_as_if_nothing_had_happened(work, tmp_path):
    from scripts.mini_sd.unet import LatentOptions, UnetOptions, train_unet

    results = []
    for stops in ([None], [2, None]):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        for name in ("tokenizer", "text.pt", "latents.pt"):
            (folder / name).symlink_to(work / name)
        done = [
            train_unet(folder, UnetOptions(steps=4, batch=2), LatentOptions(scenes=16), stop)
            for stop in stops
        ]
        assert done[-1] and not any(done[:-1])
        results.append(torch.load(folder / "unet.pt", weights_only=True))
    straight, interrupted = (r["parts"] for r in results)
    for part in ("unet", "text", "average"):
        assert all(torch.equal(v, interrupted[part][k]) for k, v in straight[part].items())
    assert results[0]["step"] == results[1]["step"] == 4


def test_the_autoencoder_stage_resumes_too(work, tmp_path):
    from scripts.mini_sd.vae import VaeOptions, train_vae

    options = VaeOptions(steps=2, batch=2)
    assert not train_vae(tmp_path, options, stop_at=1)
    assert train_vae(tmp_path, options)
    straight, resumed = (
        torch.load(f / "vae.pt", weights_only=True)["parts"]["vae"] for f in (work, tmp_path)
    )
    assert all(torch.equal(v, resumed[k]) for k, v in straight.items())


@needs_model
def test_the_model_folder_is_small_and_complete():
    from scripts.mini_sd.folder import folder_bytes

    assert folder_bytes(MODEL) <= 15 * MEGABYTE
    for name in ("vocab.json", "merges.txt"):
        assert (MODEL / "tokenizer" / name).exists()


@needs_model
def test_the_model_loads_with_the_classes_and_schedule_of_sd_1_5():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    names = [
        type(part).__name__
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pipeline.vae)
    ]
    assert names == ["UNet2DConditionModel", "CLIPTextModel", "CLIPTokenizer", "AutoencoderKL"]
    assert pipeline.text_encoder.config.num_hidden_layers == 12
    assert pipeline.safety_checker is None
    schedule = pipeline.scheduler.config
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (1000, "epsilon")
    assert schedule["clip_sample"] is False  # DDIM made from this configuration would clip latents otherwise
    assert pipeline.unet.dtype == torch.float32
    state = pipeline.unet.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


def test_the_script_stands_alone():
    spec = importlib.util.spec_from_file_location("make_mini_sd", ROOT / "scripts" / "make_mini_sd.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as exit_:
        module.main(["no-such-stage"])
    assert exit_.value.code == 2
