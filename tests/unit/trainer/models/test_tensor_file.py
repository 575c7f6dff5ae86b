"""Tensor files: what is written is what the safetensors library reads, and damage has a name."""

import json
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from trainer.errors import UserError
from trainer.models.tensor_file import TensorFile, read_metadata, write_tensors


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a.positions": torch.arange(7).unsqueeze(0),
        "c.transposed": torch.randn(4, 6, generator=generator).T,
        "d.channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "e.scalar": torch.tensor(2.5),
        "f.half": torch.randn(3, generator=generator).half(),
        "g.parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_what_is_written(dtype, tmp_path):
    write_tensors(tmp_path / "x.safetensors", tensors(), dtype, {"format": "pt", "title": "ünï"})
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors())
    for name, tensor in tensors().items():
        expected = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        assert read[name].dtype == expected.dtype and torch.equal(read[name], expected), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "title": "ünï"}


def test_what_the_library_writes_is_read(tmp_path):
    written = {name: tensor.detach().contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(written, tmp_path / "x.safetensors", metadata={"k": "v"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    assert set(file) == set(written) and len(file) == len(written)
    for name, tensor in written.items():
        assert torch.equal(file[name], tensor) and file.shapes[name] == tuple(tensor.shape)
    with pytest.raises(KeyError):
        file["nothing"]


def test_large_tensors_start_at_whole_cache_lines_and_all_at_multiples_of_their_numbers(tmp_path):
    large = {
        "h.odd": torch.ones(5),
        "i.large": torch.ones(64, 3),
        "a.large": torch.arange(64),
        "j.large": torch.ones(32),
    }
    write_tensors(tmp_path / "x.safetensors", {**tensors(), **large}, torch.float16, {})
    content = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
    assert all(starts[name] % 64 == 0 for name in ("i.large", "a.large", "j.large"))
    assert all(starts[name] % {"I64": 8, "F16": 2}[entry["dtype"]] == 0 for name, entry in header.items())


@given(st.integers(min_value=0, max_value=10_000))
def test_every_truncation_is_noticed(cut):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors(), torch.float32, {})
        content = path.read_bytes()
        path.write_bytes(content[: cut % len(content)])
        with pytest.raises(UserError, match=r"cut short|not a \.safetensors file"):
            TensorFile(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n", "Git LFS pointer"),
        (b"", "not a .safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a .safetensors file"),
        (struct.pack("<Q", 14) + b'{"a":{"x": 1}}', "not a .safetensors file"),
        (struct.pack("<Q", 100) + b'{"a"', "cut short after 12 bytes"),
    ],
)
def test_other_files_are_named_for_what_they_are(content, said, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError) as caught:
        TensorFile(tmp_path / "x.safetensors")
    assert said in str(caught.value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def with_header(path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": ENTRY}, bytes(9), "the file is damaged: it holds 78 bytes instead of 77"),
        ({"a": ENTRY}, bytes(7), "the file is cut short: it holds 76 of 77 bytes"),
        ({"a": {**ENTRY, "dtype": "F99"}}, bytes(8), "the file is damaged"),
        ({"a": {**ENTRY, "dtype": "F64"}}, bytes(8), "the file is damaged"),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), "the file is damaged"),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), "the file is damaged"),
        ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8), "the file is damaged"),
        ({"a": {**ENTRY, "data_offsets": [4, 8]}}, bytes(8), "the file is damaged"),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "the file is damaged"),
        ({"a\ud800": ENTRY}, bytes(8), "the file is damaged"),
        (b'{"a\xff": 1}', bytes(8), "not a .safetensors file"),
        (json.dumps({"a": ENTRY}).encode("utf-16"), bytes(8), "the file is damaged"),
        ({"a": {key: ENTRY[key] for key in ("shape", "data_offsets")}}, bytes(8), "not a .safetensors file"),
        ({"a": {**ENTRY, "shape": None}}, bytes(8), "not a .safetensors file"),
        ({"a": {**ENTRY, "shape": "22"}}, bytes(8), "not a .safetensors file"),
        ({"a": {**ENTRY, "data_offsets": [8]}}, bytes(8), "not a .safetensors file"),
        ({"a": {**ENTRY, "data_offsets": [0, 8.0]}}, bytes(8), "not a .safetensors file"),
        ({"a": [ENTRY]}, bytes(8), "not a .safetensors file"),
        ({"a": ENTRY, "__metadata__": {"sd_dadapt.step": 3}}, bytes(8), "not a .safetensors file"),
        ({"a": ENTRY, "__metadata__": ["x"]}, bytes(8), "not a .safetensors file"),
        (b"[" * 100_000, b"", "not a .safetensors file"),
        (b'{"a":' * 100_000, b"", "not a .safetensors file"),
    ],
)
def test_headers_that_lie_are_refused(header, data, said, tmp_path):
    path = with_header(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


def test_metadata_that_is_null_is_none(tmp_path):
    path = with_header(tmp_path / "x.safetensors", {"a": ENTRY, "__metadata__": None})
    file = TensorFile(path)
    assert file.metadata == read_metadata(path) == {} and torch.equal(file["a"], torch.zeros(2))


@given(st.integers(min_value=0, max_value=100_000))
def test_a_flipped_bit_of_a_header_is_refused_or_changes_nothing_but_what_is_said(bit):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, tensors(), torch.float32, {"format": "pt"})
        content = bytearray(path.read_bytes())
        bit %= 8 * (8 + struct.unpack("<Q", content[:8])[0])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            file = TensorFile(path)
        except UserError:
            return
        assert all(file[name].shape == shape for name, shape in file.shapes.items())


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


STATE = {"weight": torch.ones(2, 3)}


def test_a_ckpt_gives_its_tensors(tmp_path):
    torch.save({"state_dict": STATE, "global_step": 3}, tmp_path / "wrapped.ckpt")
    torch.save(STATE, tmp_path / "bare.ckpt")
    torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("wrapped.ckpt", "bare.ckpt", "old.ckpt"):
        file = TensorFile(tmp_path / name)
        assert file.shapes == {"weight": (2, 3)} and torch.equal(file["weight"], STATE["weight"])
        assert file.global_step == (3 if name == "wrapped.ckpt" else None)


def test_what_lightning_saved_beside_the_weights_is_left_alone(tmp_path, monkeypatch):
    """As in the first Stable Diffusion files: a class of a missing library as a key, numpy numbers."""
    library = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        __module__ = library.__name__
        __qualname__ = "ModelCheckpoint"

        def __init__(self):
            self.monitor = "loss"

    library.ModelCheckpoint = ModelCheckpoint  # pyright: ignore[reportAttributeAccessIssue]
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, library.__name__, library)
        callbacks = {
            ModelCheckpoint: {"best": np.float64(0.5), "scores": np.ones(3)},
            "kept": ModelCheckpoint(),
        }
        torch.save({"state_dict": STATE, "callbacks": callbacks}, tmp_path / "x.ckpt")
    assert b"ModelCheckpoint" in (tmp_path / "x.ckpt").read_bytes()
    file = TensorFile(tmp_path / "x.ckpt")
    assert dict(file.shapes) == {"weight": (2, 3)} and torch.equal(file["weight"], STATE["weight"])
    assert library.__name__ not in sys.modules


@pytest.mark.parametrize(
    "content",
    [[STATE], {"state_dict": [1, 2]}, {"state_dict": None}, {1: STATE["weight"]}, {"state_dict": {2: 3}}, 5],
)
def test_a_ckpt_without_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"the \.ckpt file holds no tensors"):
        TensorFile(tmp_path / "x.ckpt")


def test_a_ckpt_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(UserError, match=r"its contents are compressed, which torch never does"):
        TensorFile(tmp_path / "x.ckpt")


def test_of_a_ckpt_only_plain_tensors_with_a_name_are_taken(tmp_path):
    odd = {
        3: torch.ones(1),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "complex": torch.ones(1) * 1j,
    }
    torch.save({"state_dict": {**STATE, **odd, "number": 1}, "global_step": "many"}, tmp_path / "x.ckpt")
    file = TensorFile(tmp_path / "x.ckpt")
    assert set(file) == {"weight"} and file.global_step is None


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_that_wants_to_run_something_is_refused_with_its_name_and_nothing_runs(
    tmp_path, capsys, zipped
):
    torch.save(
        {"state_dict": STATE, "callback": Evil()},
        tmp_path / "evil.ckpt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        UserError, match=r"evil\.ckpt: the \.ckpt file asks for (builtins\.)?print, .* nothing of it was run"
    ):
        TensorFile(tmp_path / "evil.ckpt")
    assert "ran" not in capsys.readouterr().out


def test_files_that_are_no_ckpt_are_named_for_what_they_are(tmp_path):
    torch.save(STATE, tmp_path / "good.ckpt")
    torch.save(STATE, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"step": 3}, tmp_path / "empty.ckpt")
    write_tensors(tmp_path / "good.safetensors", STATE, torch.float32, {})
    good, old = (tmp_path / "good.ckpt").read_bytes(), (tmp_path / "old.ckpt").read_bytes()
    cases = [
        ("x.ckpt", good[:-100], f"is cut short after {len(good) - 100:,} bytes"),
        ("x.ckpt", old[:-5], "cannot be read as plain tensors"),
        ("x.ckpt", (tmp_path / "empty.ckpt").read_bytes(), "holds no tensors"),
        (
            "x.ckpt",
            (tmp_path / "good.safetensors").read_bytes(),
            "this is a .safetensors file; give it that ending",
        ),
        ("x.ckpt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("x.ckpt", b"<!DOCTYPE html><html>", "this is a web page"),
        ("x.ckpt", b"", "this is not a .ckpt file"),
        ("x.ckpt", b"\x89PNG", "this is not a .ckpt file"),
        ("x.safetensors", good, "this is a .ckpt file; give it that ending"),
        ("x.safetensors", old, "this is a .ckpt file; give it that ending"),
        ("x.safetensors", b"<!DOCTYPE html><html>", "this is a web page"),
    ]
    for name, content, said in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            TensorFile(tmp_path / name)
        assert said in str(caught.value), name
