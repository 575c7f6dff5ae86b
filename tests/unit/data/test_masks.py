"""Masks: found beside images and read with their geometry; never images of their own."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.contents import content_hashes
from data.dataset import Images
from data.index import build_index
from data.latents import DiskLatents, MomentShape, View
from data.loader import read_crops
from data.masked import read_view
from data.options import DataOptions

BLACK, WHITE = 0, 255


def paint(path, box=None, size=(128, 128), mode="RGB", back=BLACK, front=WHITE):
    """Write an image of one colour with a box of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, back)
    if box:
        image.paste(front, box)
    image.convert(mode).save(path)
    return path


def index_of(folder, **options):
    return build_index(DataOptions(data_root=str(folder), resolution=64, **options))


def masks(index):
    return {record.name: record.mask for record in index.records}


@pytest.fixture
def images(tmp_path):
    """Three images of which two have masks."""
    root = tmp_path / "images"
    for name in ("a", "b", "c"):
        paint(root / f"{name}.png", (0, 0, 64, 64))
    paint(root / "a.mask.png", (0, 0, 64, 64), mode="L")
    paint(root / "masks/b.jpg", (64, 0, 128, 128))
    return root


def test_masks_are_found_beside_images_and_are_no_images(images):
    assert masks(index_of(images)) == {"a.png": "a.mask.png", "b.png": "masks/b.jpg", "c.png": ""}
    (images / "list.jsonl").write_text('{"image": "b.png"}\n{"image": "c.png"}\n')
    assert masks(index_of(images / "list.jsonl")) == {"b.png": "masks/b.jpg", "c.png": ""}


def test_a_folder_named_masks_without_a_mask_holds_images(tmp_path):
    paint(tmp_path / "cat.png")
    paint(tmp_path / "masks/venice.png")
    assert masks(index_of(tmp_path)) == {"cat.png": "", "masks/venice.png": ""}


def test_masks_without_their_image_are_remarked(images):
    (images / "a.png").unlink()
    paint(images / "masks/z.png", (0, 0, 9, 9))
    paint(images / "masks/deeper/y.png", (0, 0, 9, 9))
    index = index_of(images)
    assert [record.name for record in index.records] == ["b.png", "c.png"]
    assert [str(notice) for notice in index.notices] == [
        "masks/z.png, a.mask.png: it is a mask, and its image is not there"
    ]


def test_a_mask_of_another_shape_or_that_is_no_image_costs_its_image(images):
    paint(images / "a.mask.png", (0, 0, 9, 9), size=(128, 100))
    (images / "masks/b.jpg").write_bytes(b"no image")
    assert [str(file) for file in index_of(images).bad] == [
        "a.png: its mask a.mask.png cannot be used: it is 128 x 100 and the image 128 x 128, another shape; "
        "save it in the image's size",
        "b.png: its mask masks/b.jpg cannot be used: it is not an image in one of the formats JPEG, PNG, "
        "BMP, WEBP, GIF, AVIF, TIFF",
    ]


@pytest.mark.parametrize("size", [(64, 64), (300, 300), (43, 43)])
def test_a_mask_of_another_size_is_scaled(images, size):
    paint(images / "a.mask.png", (0, 0, size[0] // 2, size[1]), size=size)
    record = index_of(images).records[0]
    mask = read_view(record, (64, 64), masked=True)[:, :, 3]
    assert (mask[:, :30] == WHITE).all() and (mask[:, 34:] == BLACK).all()


def test_a_black_mask_costs_its_image_when_it_is_read(images):
    paint(images / "a.mask.png")
    reader = Images(index_of(images), DataOptions(resolution=64), tokenize=lambda _: None, seed=0)
    assert [len(batch.names) for batch in reader.plain([0, 1])] == [1]
    assert [str(file) for file in reader.bad.values()] == [
        "a.png: its mask a.mask.png cannot be used: it is black everywhere, which leaves nothing to train"
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.2), (1.0, 0.9)])
def test_a_mask_is_turned_cropped_and_mirrored_as_its_image(tmp_path, orientation, flip, crop):
    """The image is white exactly where its mask is; the mask is stored upright, the image is not always."""
    upright = Image.new("L", (200, 120))
    upright.paste(255, (20, 10, 90, 60))
    upright.paste(255, (120, 80, 180, 110))
    upright.save(tmp_path / "a.mask.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    stored.convert("RGB").save(tmp_path / "a.png", exif=exif)
    (record,) = index_of(tmp_path).records
    view = read_view(record, (64, 64), masked=True, flip=flip, crop=crop).astype(int)
    assert np.abs(view[:, :, 0] - view[:, :, 3]).mean() < 6, "edges differ by the filter alone"


def test_transparency_is_a_mask_where_it_is_asked_for(tmp_path):
    image = Image.new("RGBA", (128, 128), (200, 0, 0, 255))
    image.paste((0, 0, 200, 0), (64, 0, 128, 128))
    image.save(tmp_path / "clear.png")
    paint(tmp_path / "plain.png", (0, 0, 64, 64))
    paint(tmp_path / "named.png", mode="LA", back=WHITE)
    paint(tmp_path / "named.mask.png", (0, 0, 128, 64))
    assert not any(record.mask == record.file for record in index_of(tmp_path).records)
    index = index_of(tmp_path, alpha_mask=True)
    assert masks(index) == {"clear.png": "clear.png", "named.png": "named.mask.png", "plain.png": ""}
    clear, named, plain = (read_view(record, (64, 64), masked=True)[:, :, 3] for record in index.records)
    assert (clear[:, :30] == WHITE).all() and (clear[:, 34:] == BLACK).all()
    assert (named[:30] == WHITE).all() and (named[34:] == BLACK).all() and (plain == WHITE).all()


def test_a_mask_painted_on_transparency_is_white_where_it_is_painted(images):
    painted = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 128, 64))
    painted.save(images / "a.mask.png")
    mask = read_view(index_of(images).records[0], (64, 64), masked=True)[:, :, 3]
    assert (mask[:30] == WHITE).all() and (mask[34:] == BLACK).all()


def test_only_data_with_masks_is_read_with_a_fourth_channel(images):
    def channels(index):
        reader = Images(index, DataOptions(resolution=64), tokenize=lambda _: None, seed=0)
        return [batch.pixels_BCHW.shape[1] for batch in reader.plain(range(len(index.records)))]

    assert channels(index_of(images)) == [4, 4, 4]
    (images / "a.mask.png").unlink()
    (images / "masks/b.jpg").unlink()
    assert channels(index_of(images)) == [3, 3, 3]


def test_latents_are_cached_with_their_mask_and_stale_ones_are_not_found(images, tmp_path):
    store, memory = tmp_path / "store", tmp_path / "contents.json"
    store.mkdir()
    views = [View(record, (64, 64), flipped) for record in range(3) for flipped in (False, True)]

    def missing():
        index = index_of(images)
        contents = content_hashes(index.records, memory, masked=index.masked)
        latents = DiskLatents(store, MomentShape(4, 8, index.masked), contents)
        wanted = latents.missing(views)
        for crop in read_crops(index, DataOptions(num_workers=0), wanted, contents):
            assert crop.pixels_1CHW is not None, crop.bad
            latents.add(crop.view, crop.pixels_1CHW[0].new_zeros(latents.shape.at((64, 64))))
        latents.flush()
        return [view.record for view in wanted]

    assert missing() == [0, 0, 1, 1, 2, 2] and missing() == []
    paint(images / "a.mask.png", (0, 0, 30, 64), mode="L")
    assert missing() == [0, 0]
    paint(images / "masks/c.png", (0, 0, 30, 64))
    assert missing() == [2, 2]
    for mask in (images / "a.mask.png", *(images / "masks").iterdir()):
        mask.unlink()
    assert missing() == [0, 0], "unmasked moments have no weights; the three images are equal"


def test_the_fingerprint_knows_masks(images):
    before = index_of(images).fingerprint()
    (images / "a.mask.png").unlink()
    assert index_of(images).fingerprint() != before
