"""The shipped vocabulary is CLIP's, and a tokenizer survives every form in which it is written."""

import json

import pytest

from tests.tiny import tiny_tokenizer
from trainer.errors import UserError
from trainer.models.tokenizer import (
    clip_tokenizer,
    is_clip_tokenizer,
    read_tokenizer,
    tokenizer_from_text,
    tokenizer_to_text,
    write_tokenizer,
)

TEXTS = (
    "",
    "a red circle on a blue background",
    "Ünïcödé, 東京 & emoji 🎨!",
    "don't  stop\n12345",
    "<|endoftext|>",
)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", [49406, 49407]),
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("Hello World", [49406, 3306, 1002, 49407]),
        (
            "a photo of an astronaut riding a horse on mars",
            [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407],
        ),
    ],
)
def test_the_shipped_vocabulary_gives_clips_published_numbers(text, numbers):
    assert clip_tokenizer()(text).input_ids == numbers


def test_the_shipped_tokenizer_is_sd15s():
    tokenizer = clip_tokenizer()
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert is_clip_tokenizer(tokenizer)
    assert not is_clip_tokenizer(tiny_tokenizer())
    assert not is_clip_tokenizer(tokenizer, "!")


def test_the_shipped_tokenizer_is_sd2s_with_another_padding():
    tokenizer = clip_tokenizer("!")
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        49408,
        49406,
        49407,
        0,
    )
    assert is_clip_tokenizer(tokenizer, "!") and not is_clip_tokenizer(tokenizer)
    assert tokenizer_from_text(tokenizer_to_text(tokenizer)).pad_token_id == 0


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json and merges.txt", "text"])
def test_every_form_tokenizes_alike(form, tmp_path):
    tokenizer = tiny_tokenizer()
    if form == "text":
        again = tokenizer_from_text(tokenizer_to_text(tokenizer))
    else:
        write_tokenizer(tokenizer, tmp_path)
        for name in ("vocab.json", "merges.txt") if form == "tokenizer.json" else ("tokenizer.json",):
            (tmp_path / name).unlink()
        again = read_tokenizer(tmp_path)
    assert again.model_max_length == 77
    for text in TEXTS:
        assert (
            again(text, padding="max_length", truncation=True).input_ids
            == tokenizer(text, padding="max_length", truncation=True).input_ids
        )


def test_a_tokenizer_that_names_no_length_gets_clips(tmp_path):
    write_tokenizer(tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(tmp_path).model_max_length == 77


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="the tokenizer is missing"):
        read_tokenizer(tmp_path)
    write_tokenizer(tiny_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match="cannot be read"):
        read_tokenizer(tmp_path)
