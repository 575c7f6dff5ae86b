"""The store of latents: nothing stale, nothing half-written, the same in memory and on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data import contents as contents_module
from data import latents as latents_module
from data.atomic import appearing, clear_drafts
from data.contents import content_hashes
from data.dataset import shown_captions
from data.errors import FileError
from data.index import build_index
from data.latents import DiskLatents, MemoryLatents, MomentShape, View, views
from data.loader import StepLoader, read_crops, worker_count
from data.options import DataOptions

SHAPE = MomentShape(channels=4, factor=8)


@pytest.fixture
def folder(tmp_path):
    """Five images, three square, two wide, last written long ago."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (128, 128) if number < 3 else (256, 64), (40 * number, 9, 200)).save(
            images / f"{number}.png", compress_level=0
        )
        os.utime(images / f"{number}.png", (1e9, 1e9))
    return images


@pytest.fixture
def elapsed(monkeypatch):
    """Let files be old enough to be remembered though they were written just now."""
    monkeypatch.setattr(contents_module, "_CLOCK_GRAIN", 0)


def options_of(folder, **changes):
    return DataOptions(**{"data_root": str(folder), "resolution": 128, "num_workers": 0, **changes})


def moments(entry, value=None):
    value = entry.record + 10 * entry.flipped if value is None else value
    return torch.full(SHAPE.at(entry.bucket), float(value))


def disk(folder, images, memory=None):
    index = build_index(options_of(images))
    return DiskLatents(
        folder, SHAPE, content_hashes(index.records, memory or folder.parent / "contents.json")
    )


def filled(folder, images, **changes):
    wanted = views(build_index(options_of(images)), options_of(images, **changes))
    latents = disk(folder, images)
    for entry in latents.missing(wanted):
        latents.add(entry, moments(entry))
    latents.flush()
    return wanted


def test_what_is_encoded_is_what_can_be_shown(folder):
    (folder / "4.png").unlink()
    index = build_index(options_of(folder))
    square, wide = (128, 128), (256, 64)
    plain = [View(0, square, False), View(1, square, False), View(2, square, False), View(3, wide, False)]
    assert views(index, options_of(folder)) == plain
    mirrored = views(index, options_of(folder, flip_p=0.5))
    assert mirrored[:2] == [View(0, square, False), View(0, square, True)] and len(mirrored) == 8
    assert SHAPE.at(wide) == (8, 8, 32) and SHAPE.nbytes(plain) == 4 * 8 * (3 * 256 + 256)


def test_latents_on_disk_are_found_by_later_runs(folder, tmp_path):
    wanted = filled(tmp_path / "store", folder, flip_p=0.5)
    again = disk(tmp_path / "store", folder)
    assert not again.missing(wanted)
    for entry in wanted:
        assert torch.equal(again.read(entry), moments(entry))


def test_a_renamed_image_is_found_and_a_changed_one_is_not(folder, tmp_path, elapsed):
    filled(tmp_path / "store", folder)
    (folder / "0.png").rename(folder / "9.png")  # the order of records changes with it
    before = (folder / "1.png").stat()
    Image.new("RGB", (128, 128), (1, 9, 200)).save(folder / "1.png", compress_level=0)
    assert (folder / "1.png").stat().st_size == before.st_size
    os.utime(folder / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as careful editors do
    index = build_index(options_of(folder))
    again = disk(tmp_path / "store", folder)
    missing = again.missing(views(index, options_of(folder)))
    assert [index.records[entry.record].name for entry in missing] == ["1.png"]
    names = {record.name: place for place, record in enumerate(index.records)}
    assert torch.equal(again.read(View(names["9.png"], (128, 128), False)), torch.zeros(8, 16, 16))


def test_another_bucket_or_flip_is_another_latent(folder, tmp_path):
    filled(tmp_path / "store", folder)
    again = disk(tmp_path / "store", folder)
    others = [View(0, (192, 128), False), View(0, (128, 128), True)]
    assert again.missing(others) == others
    for entry in others:
        with pytest.raises(FileError, match="not computed"):
            again.read(entry)


def test_a_change_of_how_pixels_are_read_makes_all_latents_old(folder, tmp_path, monkeypatch):
    wanted = filled(tmp_path / "store", folder)
    monkeypatch.setattr(latents_module, "READING", latents_module.READING + 1)
    assert disk(tmp_path / "store", folder).missing(wanted) == wanted


def test_equal_images_are_encoded_once(folder, tmp_path):
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    index = build_index(options_of(folder))
    latents = disk(tmp_path / "store", folder)
    wanted = views(index, options_of(folder))
    assert [entry.record for entry in latents.missing(wanted)] == [0, 1, 2, 3, 4]
    latents.add(wanted[0], moments(wanted[0], 7))
    latents.flush()
    assert latents.read(wanted[5]).unique().tolist() == [7]


def test_files_are_written_by_size_and_by_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 2 * 4 * 8 * 256)
    filled(tmp_path / "store", folder)
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 3
    monkeypatch.setattr(latents_module, "PATIENCE", -1)
    filled(tmp_path / "other", folder)
    assert len(list((tmp_path / "other").glob("*.safetensors"))) == 5


def test_a_damaged_file_is_replaced_and_a_draft_is_not_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 1)  # one image a file
    store = tmp_path / "store"
    wanted = filled(store, folder)
    first, second, *_ = sorted(store.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"")
    (store / ".draft-1-x.safetensors").write_bytes(b"half")
    os.utime(store / ".draft-1-x.safetensors", (1, 1))
    again = disk(store, folder)
    assert len(again.missing(wanted)) == 2 and len(list(store.iterdir())) == 3
    filled(store, folder)
    assert not disk(store, folder).missing(wanted)


def test_a_file_with_a_flipped_bit_is_encoded_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 2 * 4 * 8 * 256)  # two images a file
    store = tmp_path / "store"
    wanted = filled(store, folder)
    spoilt = sorted(store.glob("*.safetensors"))[0]
    content = bytearray(spoilt.read_bytes())
    content[-1] ^= 64
    spoilt.write_bytes(content)
    (store / "0.safetensors").write_bytes(
        content
    )  # not named for its content, as earlier versions wrote them
    again = disk(store, folder)
    lost = again.missing(wanted)
    assert 1 <= len(lost) < len(wanted) and again.damaged == 1 and not spoilt.exists()
    filled(store, folder)
    sound = disk(store, folder)
    assert not sound.missing(wanted) and not sound.damaged
    for entry in wanted:
        assert torch.equal(sound.read(entry), moments(entry))


def test_moments_of_another_shape_cost_their_image_only(folder, tmp_path):
    (entry, *_) = wanted = views(build_index(options_of(folder)), options_of(folder))
    latents = disk(tmp_path / "store", folder)
    latents.add(entry, torch.zeros(8, 1, 1))
    latents.flush()
    again = disk(tmp_path / "store", folder)
    assert again.missing(wanted) == wanted[1:]
    with pytest.raises(FileError, match=r"have the shape \(8, 1, 1\)"):
        again.read(entry)


@pytest.mark.parametrize("facts", [5, ["x"], [1, 2, 3, 4], {}, None])
def test_a_memory_of_contents_that_holds_nonsense_is_as_good_as_none(folder, tmp_path, facts):
    records = build_index(options_of(folder)).records
    memory = tmp_path / "contents.json"
    memory.write_text(json.dumps({str(record.path): facts for record in records}))
    assert content_hashes(records, memory) == content_hashes(records, tmp_path / "other.json")


def test_a_vanished_file_costs_its_images_only(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 1)
    wanted = filled(tmp_path / "store", folder)
    latents = disk(tmp_path / "store", folder)
    for path in (tmp_path / "store").glob("*.safetensors"):
        path.unlink()
        break
    lost = 0
    for entry in wanted:
        try:
            latents.read(entry)
        except FileError as error:
            lost += 1
            assert "cannot be read any more" in error.reason
    assert lost == 1


WRITER = """
import sys, torch
from pathlib import Path
from data import latents as module
from data.latents import DiskLatents, MomentShape, View
module.SHARD = 1
contents = {number: f"{number:032d}" for number in range(100_000)}
latents = DiskLatents(Path(sys.argv[1]), MomentShape(4, 8), contents)
print("ready", flush=True)
for number in range(100_000):
    latents.add(View(number, (128, 128), False), torch.full((8, 16, 16), float(number)))
"""


def test_a_killed_writer_leaves_whole_files(tmp_path):
    found = 0
    for delay in (0.03, 0.1):
        store = tmp_path / f"store {delay}"
        with subprocess.Popen([sys.executable, "-c", WRITER, str(store)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
            while not list(store.glob("[!.]*.safetensors")):
                time.sleep(0.001)
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        for path in store.glob("[!.]*.safetensors"):  # a draft may be half written
            for key, tensor in load_file(path).items():
                assert tensor.unique().tolist() == [int(key.split("-")[0])]
                found += 1
    assert found


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(OSError, match="No space"), appearing(tmp_path / "x", shared=True) as draft:
        draft.write_text("half")
        raise OSError("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"


def test_drafts_of_the_living_are_left_alone(tmp_path):
    (tmp_path / ".draft-1-new").touch()
    (tmp_path / ".draft-2-old").touch()
    os.utime(tmp_path / ".draft-2-old", (1, 1))
    clear_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".draft-1-new"]


def test_what_was_hashed_is_not_read_again(folder, tmp_path, elapsed, monkeypatch):
    index, memory = build_index(options_of(folder)), tmp_path / "memory" / "contents.json"
    read = []
    real = contents_module.content_hash
    monkeypatch.setattr(contents_module, "content_hash", lambda path: read.append(path.name) or real(path))
    first = content_hashes(index.records, memory)
    assert sorted(read) == ["0.png", "1.png", "2.png", "3.png", "4.png"] and len(set(first.values())) == 5
    read.clear()
    assert content_hashes(index.records, memory) == first and not read
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes() + b"x")
    (folder / "3.png").unlink()
    changed = content_hashes(index.records, memory)
    assert read == ["2.png"] and changed.keys() == {0, 1, 2, 4} and changed[2] != first[2]
    memory.write_text("{not json")
    assert content_hashes(index.records, memory) == changed


@pytest.mark.skipif(sys.platform != "linux", reason="such names are for file systems of Linux")
def test_names_that_are_not_unicode(folder, tmp_path, elapsed, monkeypatch):
    (folder / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9\n.png"))
    index = build_index(options_of(folder))
    first = content_hashes(index.records, tmp_path / "contents.json")
    monkeypatch.setattr(contents_module, "content_hash", None)
    assert content_hashes(index.records, tmp_path / "contents.json") == first and len(first) == 5


def test_a_file_of_this_moment_is_hashed_again(folder, tmp_path):
    index = build_index(options_of(folder))
    content_hashes(index.records, tmp_path / "contents.json")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes() + b"x")
    remembered = (
        json.loads((tmp_path / "contents.json").read_text()) if (tmp_path / "contents.json").exists() else {}
    )
    assert str(folder / "0.png") not in remembered


def test_crops_are_read_once_for_both_flips(folder, monkeypatch):
    index, read = build_index(options_of(folder)), []
    from data import loader as loader_module

    real = loader_module.read_view
    monkeypatch.setattr(
        loader_module,
        "read_view",
        lambda record, size, **options: read.append(record.name) or real(record, size, **options),
    )
    half = Image.new("RGB", (128, 128))
    half.paste((255, 255, 255), (0, 0, 64, 128))
    half.save(folder / "0.png")
    (folder / "1.png").write_bytes(b"")
    crops = list(read_crops(index, options_of(folder), views(index, options_of(folder, flip_p=0.5))))
    assert read == ["0.png", "1.png", "2.png", "3.png", "4.png"] and len(crops) == 10
    plain, mirrored = crops[0].pixels_1CHW, crops[1].pixels_1CHW
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)
    assert [crop.bad for crop in crops[2:4]] == ["it is empty (0 bytes)"] * 2


def test_a_file_that_changes_between_hashing_and_reading_is_not_filed(folder):
    index = build_index(options_of(folder))
    wanted = views(index, options_of(folder))
    contents = {
        place: contents_module.content_hash(record.path) for place, record in enumerate(index.records)
    }
    Image.new("RGB", (128, 128), (7, 7, 7)).save(folder / "1.png")
    del contents[2]
    bad = [crop.bad for crop in read_crops(index, options_of(folder), wanted, contents)]
    assert bad == ["", "it changed while it was read", "it changed while it was read", "", ""]


def tokenize(captions):
    return torch.tensor([[len(caption)] for caption in captions])


@pytest.mark.parametrize(
    ("kind", "workers", "start"),
    [("memory", 2, None), ("disk", 0, None), ("disk", 2, None), ("disk", 1, "spawn")],
)
def test_batches_hold_the_latents_of_what_they_would_have_shown(folder, tmp_path, kind, workers, start):
    options = options_of(folder, batch_size=2, flip_p=0.5, num_workers=workers)
    index = build_index(options)
    wanted = filled(tmp_path / "store", folder, flip_p=0.5)
    latents = disk(tmp_path / "store", folder)
    if kind == "memory":
        latents = MemoryLatents(SHAPE)
        for entry in latents.missing(wanted):
            latents.add(entry, moments(entry))
        latents.flush()
    latents.bad[2] = "it is damaged"
    if kind == "memory":
        latents._moments = {entry: tensor for entry, tensor in latents._moments.items() if entry.record != 2}
    arguments = {"tokenize": tokenize, "seed": 3, "images_per_step": 2}
    plain = StepLoader(index, options_of(folder, batch_size=2, flip_p=0.5), **arguments)
    kept = StepLoader(index, options, **arguments, latents=latents, start_method=start)
    assert worker_count(index, options, latents) == (0 if kind == "memory" else workers)
    flips = set()
    for epoch in range(4):
        for pixels, encoded in zip(plain.steps(epoch), kept.steps(epoch), strict=True):
            shown = {record: place for place, record in enumerate(pixels[0].records)}
            for place, record in enumerate(encoded[0].records):
                if kind == "memory" and record == 2:
                    assert encoded[0].filler or record not in encoded[0].records
                    continue
                assert encoded[0].pixels_BCHW is None and encoded[0].moments_BCHW.dtype == torch.float32
                assert encoded[0].positions[place] == pixels[0].positions[shown[record]]
                value = encoded[0].moments_BCHW[place].unique().item()
                flipped = kept.images._flips(index.records[record], epoch, encoded[0].positions[place])
                flips.add(flipped)
                assert value == record + 10 * flipped
    assert flips == {False, True}
    assert [str(file) for file in kept.bad] == (["2.png: it is damaged"] if kind == "memory" else [])
    assert [batch.moments_BCHW.shape for batch in kept.images.plain([0, 3])] == [
        (1, 8, 16, 16),
        (1, 8, 8, 32),
    ]


def test_a_step_without_any_latents_is_a_filler(folder):
    options = options_of(folder, batch_size=2)
    loader = StepLoader(
        build_index(options),
        options,
        tokenize=tokenize,
        seed=3,
        images_per_step=2,
        latents=MemoryLatents(SHAPE),
    )
    (batch,) = next(iter(loader.steps(0)))
    assert batch.filler and batch.loss_scale_B.tolist() == [0.0] and batch.moments_BCHW.shape[:2] == (1, 8)


def test_the_captions_that_training_can_show(folder):
    for number in range(5):
        (folder / f"{number}.txt").write_text("a cat" if number < 3 else "a dog, big, old")
    index = build_index(options_of(folder))
    assert shown_captions(index, options_of(folder)) == ["a cat", "a dog, big, old", ""]
    assert shown_captions(index, options_of(folder, shuffle_tags=True)) is None
    assert shown_captions(index, options_of(folder, tag_dropout=0.1)) is None
    (folder / "0.txt").write_text("a {red|blue} cat")
    drawn = build_index(options_of(folder))
    assert shown_captions(drawn, options_of(folder, wildcards=True)) is None
    assert shown_captions(drawn, options_of(folder)) is not None
    assert shown_captions(index, options_of(folder, tag_dropout=0.1, keep_tags=2)) is not None
    assert shown_captions(index, options_of(folder, shuffle_tags=True, keep_tags=1)) == [
        "a cat",
        "a dog, big, old",
        "",
    ]


def test_splitting_and_hashing_need_no_trainer_and_no_torch():
    slow = "{'trainer', 'torch', 'safetensors'}"
    code = f"import sys, data.contents, data.split, data.index; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == "[]", done.stderr
