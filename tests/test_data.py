"""Image sets: every layout made by hand in miniature, every fault, the cache.

Where VQSTUDY_DATA is set, the real sets too.
"""

import errno
import hashlib
import json
import os
import pickle
import pwd
import re
import resource
import shlex
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms
from vqstudy import data, sources
from vqstudy.data import FACE, ImageSet, decode_image, images, patches

REAL = os.environ.get("VQSTUDY_DATA")
real = pytest.mark.skipif(not REAL, reason="VQSTUDY_DATA is not set")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VQSTUDY_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets"


def pixels(n, h=8, w=8):
    return np.random.RandomState(n).randint(0, 256, (n, h, w, 3), dtype=np.uint8)


def encode(array, form="PNG", mode="RGB"):
    file = BytesIO()
    Image.fromarray(array).convert(mode).save(file, form)
    return file.getvalue()


def write(file, encoded, labels=None, names=("cat", "dog"), column="image", **options):
    "A Parquet file in the hub's layout; None among the encoded images is a missing one."
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if data is None else {"bytes": data, "path": None} for data in encoded]
    columns = {column: pa.array(rows, kind)}
    about = {}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        if names:
            about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, **options)
    return file


def pets(root, n=5, **options):
    file = root / "pets/train-00000-of-00001.parquet"
    return write(file, map(encode, pixels(n)), [i % 2 for i in range(n)], **options)


def flip(file, place, bit=1):
    "Flip one bit of a byte."
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


def cached(root):
    return sorted(p.name for p in (root.parent / "cache").glob("*"))


def fails(kind, *words):
    return pytest.raises(kind, match="(?s)" + ".*".join(map(str, words)))


# photos


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("name", data.PHOTOS)
def test_photos_train_and_test_share_no_pixel(name, size):
    height, width, _ = data.photograph(name).shape
    position = np.stack(np.mgrid[:height, :width], -1)
    seen = {split: np.zeros((height, width), bool) for split in ("train", "test")}
    for split, mask in seen.items():
        cut = patches(position, split, size, data.PATCHES_PER_PHOTO[split])
        assert len(cut) == data.PATCHES_PER_PHOTO[split]
        assert len(np.unique(cut[:, 0, 0], axis=0)) == len(cut)
        mask[tuple(cut.reshape(-1, 2).T)] = True
    assert not (seen["train"] & seen["test"]).any()
    # nor across sizes: what is tested at one size is not trained on at another
    other = patches(position, "train", 96 - size, 200).reshape(-1, 2)
    assert not seen["test"][tuple(other.T)].any()


def test_photos_are_balanced_deterministic_and_need_no_files(monkeypatch):
    monkeypatch.delenv("VQSTUDY_DATA", raising=False)
    train, test = images("photos", "train"), images("photos", "test")
    assert train.x.shape == (2240, 3, 32, 32) and test.x.shape == (448, 3, 32, 32)
    assert train.x.dtype == torch.uint8 and train.y.dtype == torch.int64 and train.x.is_contiguous()
    assert (train.y.bincount() == 320).all() and (test.y.bincount() == 64).all()
    assert train.classes == tuple(data.PHOTOS) and len(train.classes) == 7
    for limit in (1, 7, 50, 500):
        counts = images("photos", "train", limit=limit).y.bincount(minlength=7)
        assert counts.sum() == limit and counts.max() - counts.min() <= 1
    assert torch.equal(images("photos", "train", limit=100).x, train.x[:100])


def test_everybody_has_the_same_photos():
    train = images("photos", "train")
    for i, name in enumerate(train.classes):
        own = patches(data.photograph(name), "train", 32, 320).transpose(0, 3, 1, 2)
        assert np.array_equal(train.x[train.y == i], own)
    position = np.stack(np.mgrid[:400, :600], -1)
    train_corners = [[60, 528], [328, 500], [304, 160]]
    test_corners = [[16, 116], [144, 316], [168, 344]]
    for split, corners in (("train", train_corners), ("test", test_corners)):
        count = data.PATCHES_PER_PHOTO[split]
        assert patches(position, split, 32, count)[:3, 0, 0].tolist() == corners


def test_another_split_of_photos_is_refused():
    for read in (lambda: data.photos("valid"), lambda: data.blocks(400, 600, "valid")):
        with fails(ValueError, "split must be 'train' or 'test', got 'valid'"):
            read()


# arguments


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("photos", "valid"), ValueError, "split must be 'train' or 'test', got 'valid'"),
        (("photos", 3), TypeError, "split must be 'train' or 'test', got 3"),
        ((None, "train"), TypeError, "name must be a string"),
        (("", "train"), ValueError, "name '' is no set"),
        (("../x", "train"), ValueError, "name '../x' is no set: 'photos' is one"),
        (("photos", "train", 65), ValueError, "size of photos must be at most 64, got 65"),
        (("photos", "train", 7), ValueError, "size of photos must be at least 8, got 7"),
        (("photos", "train", 0), ValueError, "size must be at least 1, got 0"),
        (("photos", "train", 32.0), TypeError, "size must be an int, got 32.0"),
        (("photos", "train", 32, True), TypeError, "limit must be an int, got True"),
        (("photos", "train", 32, -1), ValueError, "limit must be at least 1, got -1"),
        (("photos", "train", 32, 9, "no"), TypeError, "download must be True or False, got 'no'"),
        (("photos", "test", 32, 449), ValueError, "limit = 449 is too many: photos/test holds 448"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with fails(error, words.replace("'../", r"'\.\./")):
        images(*arguments)


# where a set is looked for


def test_missing_set_says_where_and_how(root, monkeypatch):
    pets(root)
    places = ("cifar10/", "test.valid", "parquet", "cifar-10-batches-py", "<class>")
    command = r"images\('cifar10', 'test', download=True\)"
    sets = "There are: photos, pets"
    with fails(FileNotFoundError, "cifar10/test is not under", *places, command, sets):
        images("cifar10", "test")
    places = ("celeba/img_align_celeba", "list_eval_partition.txt", "celeba10k")
    with fails(FileNotFoundError, *places):
        images("celeba", "train")
    with fails(FileNotFoundError, "hf download OWNER/SET --repo-type dataset --local-dir"):
        images("imagenet100", "train")
    with fails(FileNotFoundError, "pets/test", "pets/ holds: train-00000-of-00001.parquet\n"):
        images("pets", "test")
    monkeypatch.setenv("VQSTUDY_DATA", str(root / "nowhere"))
    with fails(FileNotFoundError, "no such folder"):
        images("pets", "train")
    monkeypatch.setenv("VQSTUDY_DATA", "~nobody-of-that-name/sets")
    with fails(FileNotFoundError, "no such folder as ~nobody-of-that-name/sets"):
        images("pets", "train")
    monkeypatch.delenv("VQSTUDY_DATA")
    with fails(FileNotFoundError, "pets needs files: set VQSTUDY_DATA"):
        images("pets", "train")


def test_the_command_that_gets_a_set_is_one_that_a_shell_takes(root, monkeypatch):
    (root / "my sets").mkdir()
    monkeypatch.setenv("VQSTUDY_DATA", str(root / "my sets"))
    with pytest.raises(FileNotFoundError) as raised:
        images("mnist", "test")
    command = re.search("(?m)^To get it: (hf .*), where", str(raised.value))[1]
    assert shlex.split(command)[-2:] == ["--local-dir", str(root / "my sets/mnist")]
    assert "CONFIGURATION" in str(raised.value) and "There are: photos" in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [URLError("no network"), PermissionError(13, "Permission denied"), RuntimeError("gdown")],
)
def test_a_download_that_fails_says_of_what(root, monkeypatch, error):
    import torchvision.datasets

    def fetch(folder, download):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    words = ("could not download cifar10 to", root, type(error).__name__, re.escape(str(error)))
    with fails(FileNotFoundError, *words):
        images("cifar10", "test", download=True)


def test_download_only_where_asked(root, monkeypatch):
    import torchvision.datasets

    asked = []

    def fetch(folder, download):
        asked.append(download)
        write(Path(folder) / "cifar10/test-0.parquet", map(encode, pixels(2)))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fetch)
    with fails(FileNotFoundError, "cifar10/test"):
        images("cifar10", "test")
    assert not asked
    assert len(images("cifar10", "test", download=True)) == 2 and asked == [True]
    images("cifar10", "test", download=True)
    assert len(asked) == 1
    with fails(FileNotFoundError, "imagenet100/train"):
        images("imagenet100", "train", download=True)


@pytest.mark.parametrize(
    "given, found",
    [(["valid", "validation"], "valid"), (["test", "valid"], "test"), (["val"], "val")],
)
def test_evaluation_split(root, given, found):
    for word in given:
        write(root / f"pets/{word}-0.parquet", map(encode, pixels(len(word))))
    got = images("pets", "test")
    assert got.split == found and len(got) == len(found)


# Parquet


@pytest.mark.parametrize("column, folder", [("image", "pets"), ("img", "pets/data")])
def test_parquet_in_two_files(root, column, folder):
    x = pixels(5)
    first, second = (root / folder / f"train-0000{i}-of-00002.parquet" for i in range(2))
    write(first, map(encode, x[:3]), [0, 1, 1], column=column, row_group_size=2)
    write(second, map(encode, x[3:]), [1, 0], column=column)
    got = images("pets", "train")
    assert np.array_equal(got.x.permute(0, 2, 3, 1), x)
    assert got.y.tolist() == [0, 1, 1, 1, 0]
    assert got.classes == ("cat", "dog")
    assert (got.name, got.split, len(got)) == ("pets", "train", 5)
    assert got.y.dtype == torch.int64 and "5 images of 8x8, 2 classes" in repr(got)
    part = images("pets", "train", limit=4)
    assert torch.equal(part.x, got.x[:4]) and torch.equal(part.y, got.y[:4])


def test_no_labels_and_no_names(root):
    write(root / "a/train-0.parquet", map(encode, pixels(3)))
    assert images("a", "train").y is None and images("a", "train").classes == ()
    write(root / "b/train-0.parquet", map(encode, pixels(3)), [0, 7, 2], names=None)
    assert images("b", "train").y.tolist() == [0, 7, 2] and images("b", "train").classes == ()


@pytest.mark.parametrize(
    "mode, form",
    [(mode, "PNG") for mode in ("L", "LA", "P", "RGBA", "1")] + [("CMYK", "JPEG"), ("L", "WEBP")],
)
def test_every_mode_becomes_rgb(root, mode, form):
    write(root / "a/train-0.parquet", [encode(pixels(1)[0], form, mode)])
    assert images("a", "train").x.shape == (1, 3, 8, 8)


def test_gray_and_transparent_values():
    gray = decode_image(encode(pixels(1)[0], mode="L"))
    assert (gray[0] == gray[1]).all() and (gray[0] == gray[2]).all()
    opaque = decode_image(encode(pixels(1)[0], mode="RGBA"))
    assert np.array_equal(opaque, pixels(1)[0].transpose(2, 0, 1))


# decoding: what a viewer shows


def stored(image, form="PNG", **options):
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(depth, colour, values, *chunks):
    "A PNG file of one row: `values` of `depth` bits, colour type `colour`, further (name, bytes)."
    packed = "".join(f"{value:0{depth}b}" for value in values)
    packed += "0" * (-len(packed) % 8)
    row = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    width = len(values) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    for name, data in parts:
        file += struct.pack(">I", len(data)) + name + data
        file += struct.pack(">I", zlib.crc32(name + data))
    return file


def row_of(data):
    "The pixels of the first row of an image file."
    return decode_image(data)[:, 0].T.tolist()


WHITE, CLEAR = [255, 255, 255], (10, 20, 30, 0)


def transparent(mode):
    "Two pixels, (200, 100, 50) or its grey and a transparent one, in `mode`."
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), CLEAR)
    return image.convert(mode)


@pytest.mark.parametrize(
    "data, colour",
    [
        (stored(transparent("RGBA")), [200, 100, 50]),
        (stored(transparent("RGBA"), "WEBP", lossless=True), [200, 100, 50]),
        (stored(transparent("RGBA"), "TIFF"), [200, 100, 50]),
        (stored(transparent("LA")), [124, 124, 124]),
        (stored(transparent("LA"), "TIFF"), [124, 124, 124]),
        (stored(transparent("RGBA").quantize(2)), [200, 100, 50]),
        (stored(transparent("RGBA"), "GIF"), [200, 100, 50]),
        (png(8, 3, [0, 1], (b"PLTE", bytes([9, 8, 7, 1, 2, 3])), (b"tRNS", b"\xff\0")), [9, 8, 7]),
        (png(8, 2, [9, 8, 7, 1, 2, 3], (b"tRNS", bytes([0, 1, 0, 2, 0, 3]))), [9, 8, 7]),
        (png(8, 0, [9, 1], (b"tRNS", b"\0\1")), [9, 9, 9]),
        (png(4, 0, [3, 2], (b"tRNS", b"\0\2")), [51, 51, 51]),
        (png(2, 0, [1, 2], (b"tRNS", b"\0\2")), [85, 85, 85]),
        (png(1, 0, [0, 1], (b"tRNS", b"\0\1")), [0, 0, 0]),
        (png(16, 0, [0x3001, 0x1234], (b"tRNS", b"\x12\x34")), [48, 48, 48]),
        (png(16, 4, [0x3001, 0xFFFF, 0x1234, 0]), [48, 48, 48]),
        (png(16, 2, [0x901, 0x802, 0x703, 256, 512, 768], (b"tRNS", b"\1\0\2\0\3\0")), [9, 8, 7]),
        (png(16, 6, [0x900, 0x800, 0x700, 0xFFFF, 1, 2, 3, 0]), [9, 8, 7]),
    ],
)
def test_what_is_transparent_is_white(data, colour):
    assert row_of(data) == [colour, WHITE]


def test_what_is_half_transparent_is_mixed():
    half = Image.new("RGBA", (1, 1), (200, 0, 100, 51))  # a fifth
    assert row_of(stored(half)) == [[244, 204, 224]]
    assert row_of(stored(Image.new("LA", (1, 1), (0, 51)))) == [[204] * 3]
    palette = png(8, 3, [0], (b"PLTE", bytes([200, 0, 100])), (b"tRNS", bytes([51])))
    assert row_of(palette) == [[244, 204, 224]]


def test_every_opaque_value_stays():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.stack([values, values.T, values[::-1]], -1)
    assert np.array_equal(decode_image(encode(colours, mode="RGBA")).transpose(1, 2, 0), colours)
    with_alpha = Image.fromarray(values).convert("LA")
    assert np.array_equal(decode_image(stored(with_alpha))[1], values)
    assert np.array_equal(decode_image(stored(Image.fromarray(values)))[1], values)


DEEP = np.array([[0, 255, 256, 1000, 0x8000, 65535]], np.uint16)
EIGHT = [0, 0, 1, 3, 128, 255]


def tiff(bits, photometric, values, order="<"):
    "A TIFF file of one row of 12- or 16-bit grey values; photometric 0: 0 is white."
    pixels = np.array(values, f"{order}u2").tobytes()
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values)
        pixels = int(packed, 2).to_bytes(len(packed) // 8)
    tags = [(256, len(values)), (257, 1), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(pixels))]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return head + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory


@pytest.mark.parametrize(
    "data",
    [
        stored(Image.fromarray(DEEP)),
        stored(Image.fromarray(DEEP), "TIFF"),
        tiff(16, 1, DEEP[0], ">"),
        stored(Image.fromarray(DEEP), "PPM"),
        png(16, 0, DEEP[0].tolist()),
        tiff(16, 1, DEEP[0]),
        tiff(16, 0, 65535 - DEEP[0]),
        tiff(12, 1, DEEP[0] >> 4),
        b"P2 6 1 65535 " + b" ".join(b"%d" % value for value in DEEP[0]),
        png(16, 2, np.repeat(DEEP[0], 3).tolist()),  # colour: as Pillow does it
    ],
)
def test_sixteen_bits_are_scaled_not_clipped(data):
    assert row_of(data) == [[value] * 3 for value in EIGHT]


@pytest.mark.parametrize(
    "data, values",
    [
        (png(1, 0, [0, 1, 1]), [0, 255, 255]),
        (png(2, 0, [0, 1, 2, 3]), [0, 85, 170, 255]),
        (png(4, 0, [0, 1, 15]), [0, 17, 255]),
        (png(1, 3, [1, 0], (b"PLTE", bytes([9, 9, 9, 7, 7, 7]))), [7, 9]),
        (b"P1 2 1 0 1", [255, 0]),  # 1 is black
        (b"P2 3 1 15 0 1 15", [0, 17, 255]),
        (b"P5 2 1 100 \0\x64", [0, 255]),
        (stored(Image.new("1", (2, 1), 1), "TIFF"), [255, 255]),
    ],
)
def test_few_bits_are_scaled(data, values):
    assert row_of(data) == [[value] * 3 for value in values]


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_cmyk_is_what_it_prints(form):
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decode_image(stored(flat, form))[:, 4, 4].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3


CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :12] = 255, 0, 0
CORNERS[:8, 12:] = 0, 255, 0
CORNERS[8:, :12] = 0, 0, 255


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_its_metadata_say(form, orientation):
    # what has to be stored for a viewer to show CORNERS
    turn = {
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.transpose(1, 0, 2),
        6: np.rot90(CORNERS),
        7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(CORNERS, -1),
    }
    exif = Image.Exif()
    exif[274] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = Image.fromarray(np.ascontiguousarray(turn.get(orientation, CORNERS)))
    data = stored(image, form, exif=exif, **options.get(form, {}))
    got = decode_image(data).transpose(1, 2, 0).astype(int)
    assert got.shape == CORNERS.shape and np.abs(got - CORNERS).max() <= 3
    # turned before it is cropped
    square = decode_image(data, 16).transpose(1, 2, 0).astype(int)
    assert np.abs(square - CORNERS[:, 4:20]).max() <= 3


def test_a_turned_image_may_be_transparent_or_deep():
    exif = Image.Exif()
    exif[274] = 3
    assert row_of(stored(transparent("RGBA"), exif=exif)) == [WHITE, [200, 100, 50]]
    assert row_of(stored(transparent("RGBA").quantize(2), exif=exif)) == [WHITE, [200, 100, 50]]
    deep = stored(Image.fromarray(DEEP), exif=exif)
    assert row_of(deep) == [[value] * 3 for value in EIGHT[::-1]]


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff", b"no metadata at all"])
def test_damaged_metadata_turn_nothing(exif):
    data = stored(Image.fromarray(CORNERS), "WEBP", lossless=True, exif=exif)
    assert np.array_equal(decode_image(data).transpose(1, 2, 0), CORNERS)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_read(form):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    first, *rest = (Image.new("RGB", (4, 4), colour) for colour in colours)
    options = {"WEBP": {"lossless": True}}
    data = stored(first, form, save_all=True, append_images=rest, **options.get(form, {}))
    with Image.open(BytesIO(data)) as image:
        assert image.n_frames == 3
    assert (decode_image(data) == np.array([255, 0, 0])[:, None, None]).all()


def test_a_transparent_first_frame():
    first, second = transparent("RGBA"), Image.new("RGBA", (2, 1), (0, 0, 255, 255))
    for form in ("GIF", "WEBP", "PNG"):
        options = {"WEBP": {"lossless": True}}.get(form, {})
        data = stored(first, form, save_all=True, append_images=[second], **options)
        assert row_of(data) == [[200, 100, 50], WHITE], form


def test_profile_and_gamma_are_ignored():
    plain = pixels(1)[0]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    got = decode_image(stored(Image.fromarray(plain), icc_profile=profile))
    assert np.array_equal(got.transpose(1, 2, 0), plain)
    linear = (b"gAMA", struct.pack(">I", 10**5))
    assert row_of(png(8, 0, [0, 100], linear)) == [[0] * 3, [100] * 3]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(mode):
    data = stored(Image.fromarray(pixels(1)[0]).convert(mode), "TIFF")
    with fails(ValueError, f"{mode} pixels do not fit into bytes.*8 or 16 bits"):
        decode_image(data)


def test_an_unknown_file_shows_how_it_begins():
    with fails(ValueError, "no image in a format that Pillow knows; they begin with b'<html>"):
        decode_image(b"<html>not found</html>")


def test_truncated_file(root):
    file = pets(root)
    file.write_bytes(file.read_bytes()[:-20])
    with fails(ValueError, file, "truncated or is no Parquet"):
        images("pets", "train")
    file.write_bytes(b"")
    with fails(ValueError, file, "truncated or is no Parquet"):
        images("pets", "train")
    assert cached(root) == []


def test_a_pointer_of_git_lfs_says_what_to_do(root):
    file = pets(root)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with fails(ValueError, file, "truncated or is no Parquet", "run git lfs pull"):
        images("pets", "train")


def test_a_folder_that_is_called_as_a_file(root):
    folder = root / "pets/train-0.parquet"
    folder.mkdir(parents=True)
    with fails(ValueError, folder, "is no Parquet file"):
        images("pets", "train")


def test_a_file_that_may_not_be_read(root, monkeypatch):
    file = pets(root)

    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pq, "ParquetFile", forbidden)
    with fails(PermissionError, file, "cannot be read", "Permission denied"):
        images("pets", "train")


def test_a_set_that_memory_does_not_hold(root, monkeypatch):
    pets(root)

    def full(shape, kind):
        raise MemoryError

    monkeypatch.setattr(data.np, "empty", full)
    with fails(MemoryError, "pets/train: 5 images of 8x8 take 0.0 GB; give a smaller size"):
        images("pets", "train")


@pytest.mark.parametrize("level", ["pets", "."])
def test_wrong_checksum(root, level, monkeypatch):
    file, sums = pets(root), root / level / "SHA256SUMS"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(f"{digest}  {file.relative_to(root / level)}\n{'0' * 64}  other.bin\n")
    images("pets", "train")
    checked = []
    monkeypatch.setattr(sources, "verify", checked.append)
    images("pets", "train")
    assert not checked  # once only, at the first decoding
    monkeypatch.undo()
    monkeypatch.setenv("VQSTUDY_DATA", str(root))
    monkeypatch.setenv("VQSTUDY_CACHE", str(root.parent / "cache2"))
    flip(file, 200)
    with fails(ValueError, file, "another checksum than", sums):
        images("pets", "train")
    assert not (root.parent / "cache2").exists()


def test_damaged_pages_name_file_and_row(root):
    file = pets(root, write_page_checksum=True)
    flip(file, 200)
    with fails(ValueError, file, "damaged at or after row 0"):
        images("pets", "train")


def test_a_column_of_another_type(root):
    (root / "b").mkdir()
    pq.write_table(pa.table({"image": [1, 2]}), root / "b/train-0.parquet")
    with fails(ValueError, "b/train-0.parquet", "column image must be a struct", "int64"):
        images("b", "train")


GOOD = [encode(p) for p in pixels(3)]
LARGE = pixels(1, 32, 32)[0]
FLOATS = stored(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
UNDECODABLE = [b"", b"no image", encode(LARGE)[:700], encode(LARGE, "JPEG")[:500], None]


@pytest.mark.parametrize(
    "written, words",
    [
        *((([*GOOD, broken],), "row 3: the image cannot be decoded") for broken in UNDECODABLE),
        (([FLOATS],), "row 0.*F pixels do not fit into bytes"),
        (([GOOD[0], encode(pixels(1, 10, 8)[0])],), "row 1 is .*10, 8.*give a size"),
        ((GOOD, [0, 2, 1]), "row 1: label 2 is out of range: 0 to 1"),
        ((GOOD, [0, -2, 1]), "row 1: label -2 is out of range: 0 to 1 are the classes"),
        ((GOOD, [0, -2, 1], None), "row 1: label -2 is out of range: classes count from 0"),
        ((GOOD, [0, -1, 1]), r"row 1: the label is missing or -1.*1 of the 3 rows read \(row 1\)"),
        ((GOOD, [0, None, 1]), r"row 1: the label is missing or -1.*1 of the 3 rows read \(row 1\)"),
        ((GOOD, [-1, 1, None]), r"row 0: the label is missing.*2 of the 3 .*\(row 0, row 2\)"),
        ((GOOD, [0, 1, 1], None, "pixels"), "has no column image or img; it has pixels, label"),
        (([],), "a/train holds no image"),
    ],
)
def test_a_faulty_set_is_named_and_not_cached(root, written, words):
    file = write(root / "a/train-0.parquet", *written)
    place = [] if "holds no" in words else [file]
    with fails(ValueError, *place, words):
        images("a", "train")
    assert cached(root) == []


def test_the_rows_before_a_fault_are_read(root):
    write(root / "a/train-00000-of-00002.parquet", GOOD)
    file = write(root / "a/train-00001-of-00002.parquet", [*GOOD[:2], b"no image"])
    with fails(ValueError, file, "row 2: the image cannot be decoded"):
        images("a", "train")
    assert cached(root) == []
    assert len(images("a", "train", limit=5)) == 5


def test_images_of_mixed_sizes_are_read_at_one(root):
    write(root / "a/train-0.parquet", [GOOD[0], encode(pixels(1, 10, 8)[0])])
    assert images("a", "train", 8).x.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("labels", [[-1, -1, -1], [None, None, None], [-1, None, -1]])
def test_a_set_without_any_label_has_none(root, labels):
    write(root / "a/test-0.parquet", GOOD, labels)
    for _ in range(2):  # decoded, then from the cache
        got = images("a", "test")
        assert got.y is None and got.classes == ("cat", "dog") and len(got) == 3
    assert images("a", "test", limit=2).y is None


def test_many_rows_without_label_are_counted(root):
    write(root / "a/train-0.parquet", GOOD * 5, [0] + [-1] * 14)
    shown = ", ".join(f"row {i}" for i in range(1, 11))
    with fails(ValueError, "row 1: the label is missing", "14 of the 15", rf"\({shown}, ...\)"):
        images("a", "train")


def table(file, features=None, **columns):
    "A Parquet file of three images with these further columns."
    column = pa.array([{"bytes": data, "path": None} for data in GOOD])
    about = json.dumps({"info": {"features": features or {}}})
    whole = pa.table({"image": column, **columns}).replace_schema_metadata({"huggingface": about})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(whole, file)
    return file


TWO = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize("name", data.LABELS)
def test_label_columns_of_other_names(root, name):
    features = {"image": {"_type": "Image"}, name: TWO}
    table(root / "a/train-0.parquet", features, **{name: [1, 0, 1]})
    got = images("a", "train")
    assert got.y.tolist() == [1, 0, 1] and got.classes == ("cat", "dog")


@pytest.mark.parametrize(
    "columns, taken",
    [
        (("coarse_label", "fine_label"), "fine_label"),
        (("class", "label"), "label"),
        (("labels", "target", "label"), "label"),
        (("species", "text"), "species"),  # a ClassLabel
        (("text",), None),
    ],
)
def test_which_column_holds_the_labels(root, columns, taken):
    labels = {name: [1, 0, 1] if name == taken else [0, 0, 0] for name in columns}
    table(root / "a/train-0.parquet", {"species": TWO}, **labels)
    got = images("a", "train")
    assert got.y is None if taken is None else got.y.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "features, columns, words",
    [
        ({}, ("class", "target"), "labels could be class or target .it has image, class, target"),
        ({}, ("labels", "fine_label"), "labels could be labels or fine_label"),
        ({}, ("fine_label", "coarse_label", "target"), "fine_label or coarse_label or target"),
        ({"kind": TWO, "breed": TWO}, ("kind", "breed"), "could be kind or breed .*rename"),
    ],
)
def test_labels_that_could_be_either(root, features, columns, words):
    file = table(root / "a/train-0.parquet", features, **{name: [1, 0, 1] for name in columns})
    with fails(ValueError, file, words):
        images("a", "train")


@pytest.mark.parametrize(
    "labels, kind",
    [(["a", "b", "a"], "string"), ([0.0, 1.0, 1.0], "double"), ([[0], [1], [0, 1]], "list<")],
)
@pytest.mark.parametrize("name", ["label", "class"])
def test_labels_that_are_no_class_indices(root, labels, kind, name):
    file = table(root / "a/train-0.parquet", **{name: labels})
    with fails(ValueError, file, f"column {name} holds {kind}", "class indices"):
        images("a", "train")


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.bool_()])
def test_labels_are_int64_whatever_they_were(root, kind):
    table(root / "a/train-0.parquet", label=pa.array([1, 0, 1], pa.int8()).cast(kind))
    got = images("a", "train")
    assert got.y.dtype == torch.int64 and got.y.tolist() == [1, 0, 1]


def test_metadata_that_cannot_be_read_name_the_file(root):
    file = pets(root)
    for about in ("{", "[]"):
        damaged = pq.read_table(file).replace_schema_metadata({"huggingface": about})
        pq.write_table(damaged, file)
        with fails(ValueError, file, "its metadata 'huggingface' cannot be read"):
            images("pets", "train")


@pytest.mark.parametrize("folder", ["mnist", "plain_text", "data/default"])
def test_a_set_in_a_configuration_folder(root, folder):
    "After `hf download ylecun/mnist --repo-type dataset --local-dir ROOT/mnist`."
    for split in ("train", "test"):
        name = f"mnist/{folder}/{split}-00000-of-00001.parquet"
        write(root / name, map(encode, pixels(len(split))), [0] * len(split))
    notes = root / "mnist/.cache/huggingface/download" / folder / "test-00000-of-00001.parquet.lock"
    notes.parent.mkdir(parents=True)
    notes.touch()
    (root / "mnist/README.md").write_text("---\n")
    assert len(images("mnist", "train")) == 5 and len(images("mnist", "test")) == 4
    assert images("mnist", "test").source == f"parquet mnist/{folder}/test"


def test_two_configurations_are_not_chosen_from(root):
    write(root / "svhn/cropped/train-00000-of-00001.parquet", GOOD)
    assert len(images("svhn", "train")) == 3
    # even where only one of them has the split
    write(root / "svhn/full/test-00000-of-00001.parquet", GOOD[:2])
    for split in ("train", "test"):
        with fails(ValueError, root / "svhn", "2 configurations, cropped and full", "svhn_cropped"):
            images("svhn", split)
    with pytest.raises(ValueError) as raised:
        images("svhn", "train")
    (command,) = re.findall("'(mv .*?)'", str(raised.value))
    subprocess.run(command, shell=True, check=True)
    assert len(images("svhn_cropped", "train")) == 3
    assert len(images("svhn", "test")) == 2


def test_a_folder_per_split_is_no_configuration(root):
    write(root / "a/train/train-0.parquet", GOOD)
    write(root / "a/test/test-0.parquet", GOOD[:2])
    assert len(images("a", "train")) == 3
    assert images("a", "test").source == "parquet a/test/test"


def test_a_set_of_ones_own(root):
    data.write_parquet(root / "a/train-0.parquet", GOOD, [1, 0, 1], ["cat", "dog"])
    data.write_parquet(root / "a/test-0.parquet", GOOD[:2], column="img")
    got = images("a", "train")
    assert got.y.tolist() == [1, 0, 1] and got.classes == ("cat", "dog")
    assert images("a", "test").y is None


def test_files_beside_a_configuration_come_first(root):
    write(root / "a/train-0.parquet", GOOD)
    write(root / "a/other/train-0.parquet", GOOD[:1])
    write(root / "a/third/train-0.parquet", GOOD[:1])
    assert len(images("a", "train")) == 3


def test_files_of_two_downloads_are_not_mixed(root):
    write(root / "a/train-00000-of-00002.parquet", GOOD)
    write(root / "a/train-00001-of-00003.parquet", GOOD)
    with fails(ValueError, "2 files train-", "but their names say 2 and 3; download the set again"):
        images("a", "train")


def test_files_must_be_complete_and_agree(root):
    first = write(root / "a/train-00000-of-00002.parquet", map(encode, pixels(2)), [0, 1])
    with fails(ValueError, "1 files train-\\*.parquet, but their names say 2"):
        images("a", "train")
    second = root / "a/train-00001-of-00002.parquet"
    write(second, map(encode, pixels(2)), [0, 1], names=("dog", "cat"))
    words = "other columns or classes than"
    with fails(ValueError, second, words, first, ".class names.", "get both again"):
        images("a", "train")
    write(second, map(encode, pixels(2)), column="img")
    with fails(ValueError, second, words, first, "image column and label column and class names"):
        images("a", "train")


def test_limit(root):
    pets(root)
    with fails(ValueError, "limit = 6 is too many: pets/train holds 5 images"):
        images("pets", "train", limit=6)
    assert cached(root) == []
    assert len(images("pets", "train", limit=5)) == 5
    assert len(images("pets", "train", limit=1)) == 1
    images("pets", "train")
    with fails(ValueError, "limit = 6 is too many: pets/train holds 5 images"):
        images("pets", "train", limit=6)


# sizes


def test_native_size_may_be_oblong_and_same_size_is_not_resampled(root):
    x = pixels(2, 9, 12)
    write(root / "a/train-0.parquet", map(encode, x))
    assert np.array_equal(images("a", "train").x.permute(0, 2, 3, 1), x)
    assert np.array_equal(images("a", "train", 9).x.permute(0, 2, 3, 1), x[:, :, 1:10])


@pytest.mark.parametrize(
    "h, w, share, crop", [(218, 178, FACE, 140), (60, 60, None, 60), (40, 64, None, 40)]
)
def test_an_image_is_torchvisions_centre_crop_and_resize(h, w, share, crop):
    from torchvision.transforms import CenterCrop, Compose, Resize

    smooth = Image.fromarray(pixels(1, 7, 7)[0]).resize((w, h), Image.Resampling.BICUBIC)
    wanted = Compose([CenterCrop(crop), Resize((32, 32))])(smooth)
    got = decode_image(encode(np.asarray(smooth)), 32, share)
    assert np.array_equal(got.transpose(1, 2, 0), wanted)


def test_both_sizes_of_celeba_show_the_same_section():
    "In an image of positions the crop of the half-size set shows what that of the full one shows."
    full = np.zeros((218, 178, 3), np.uint8)
    full[..., 0] = np.linspace(0, 255, 218)[:, None]
    full[..., 1] = np.linspace(0, 255, 178)
    half = full.reshape(109, 2, 89, 2, 3).mean((1, 3)).round().astype(np.uint8)
    a, b = (decode_image(encode(p), 64, FACE).astype(float) for p in (full, half))
    assert np.abs(a - b).max() <= 1.5
    assert abs(a[1, 0, 0] - 255 * 19.6 / 177) < 1
    assert abs(a[0, 0, 0] - 255 * 39.6 / 217) < 1


# torchvision's layouts


def test_cifar10_batches(root, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    x = pixels(12, 32, 32)

    def part(i):
        rows = x[2 * i : 2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        return {"data": rows, "labels": [i, 9]}

    sums = [[f"data_batch_{i + 1}", put(f"data_batch_{i + 1}", part(i))] for i in range(5)]
    names = list("abcdefghij")
    digest = put("batches.meta", {"label_names": names})
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digest}
    monkeypatch.setattr(CIFAR10, "train_list", sums)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", put("test_batch", part(5))]])
    monkeypatch.setattr(CIFAR10, "meta", meta)
    train, test = images("cifar10", "train"), images("cifar10", "test")
    assert np.array_equal(train.x.permute(0, 2, 3, 1), x[:10])
    assert np.array_equal(test.x.permute(0, 2, 3, 1), x[10:])
    assert train.y.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test.y.tolist() == [5, 9]
    assert train.classes == tuple(names)
    assert train.source == test.source == "torchvision cifar-10-batches-py"
    assert len(images("cifar10", "train", limit=3)) == 3
    put("data_batch_3", part(0))
    with fails(ValueError, "data_batch_3 is missing or has a wrong checksum"):
        images("cifar10", "train")
    (folder / "data_batch_3").unlink()
    with fails(FileNotFoundError, "data_batch_3 is missing", "get the set again"):
        images("cifar10", "train")


def celeba(root):
    "Six faces: three for training, one for validation, two for testing."
    folder = root / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    for i, p in enumerate(pixels(6, 218, 178)):
        (folder / f"{i + 1:06}.png").write_bytes(encode(p))
    lines = [f"{i + 1:06}.png {part}\n" for i, part in enumerate((0, 0, 1, 2, 2, 0))]
    (root / "celeba/list_eval_partition.txt").write_text("".join(lines))
    return folder


def test_celeba_files(root):
    folder = celeba(root)
    train, test = images("celeba", "train"), images("celeba", "test", 32)
    assert train.x.shape == (3, 3, 64, 64) and test.x.shape == (2, 3, 32, 32)
    assert train.y is None and train.name == "celeba"
    last = (folder / "000006.png").read_bytes()
    assert np.array_equal(train.x[2], decode_image(last, 64, FACE))


def test_faults_of_celeba_files_are_named(root):
    folder = celeba(root)
    (folder / "000002.png").write_bytes(b"nothing")
    with fails(ValueError, folder / "000002.png", "cannot be decoded"):
        images("celeba", "train")
    (folder / "000002.png").unlink()
    missing = "is missing, of 3 files of torchvision celeba/img_align_celeba; get the set again"
    with fails(FileNotFoundError, folder / "000002.png", missing):
        images("celeba", "train")
    (root / "celeba/list_eval_partition.txt").write_text("000001.png 0\n000002.png\n")
    with fails(ValueError, "list_eval_partition.txt, line 2: expected a file name and 0, 1 or 2"):
        images("celeba", "train")


def test_celeba_falls_back_to_the_half_size_set(root):
    write(root / "celeba10k/train-0.parquet", map(encode, pixels(2, 109, 89)))
    half = images("celeba", "train")
    assert half.name == "celeba10k" and half.x.shape == (2, 3, 64, 64)
    assert torch.equal(half.x, images("celeba10k", "train").x)
    celeba(root)
    assert images("celeba", "train").name == "celeba"


def folders(root, split="train", classes=("ant", "bee"), n=4):
    for c in classes:
        (root / "bugs" / split / c).mkdir(parents=True)
        for i, p in enumerate(pixels(n)):
            (root / "bugs" / split / c / f"{i}.png").write_bytes(encode(p))


def test_class_folders(root):
    folders(root)
    folders(root, "val", ("bee",))
    (root / "bugs/train/ant/notes.txt").write_text("no image")
    train, test = images("bugs", "train"), images("bugs", "test")
    assert train.classes == test.classes == ("ant", "bee") and test.split == "val"
    assert train.y.bincount().tolist() == [4, 4] and test.y.tolist() == [1] * 4
    first = images("bugs", "train", limit=4)
    assert len(first.y.unique()) == 2 and torch.equal(first.x, train.x[:4])
    folders(root, "test", ("wasp",))
    with fails(ValueError, "bugs/test/wasp", "training folder has no such class; it has ant, bee"):
        images("bugs", "test")


def test_hidden_folders_are_no_classes(root):
    folders(root)
    for hidden in (".ipynb_checkpoints", "ant/.ipynb_checkpoints", ".git"):
        (root / "bugs/train" / hidden).mkdir()
        (root / "bugs/train" / hidden / "0-checkpoint.png").write_bytes(b"x")
    got = images("bugs", "train")
    assert got.classes == ("ant", "bee") and got.y.bincount().tolist() == [4, 4]


@pytest.mark.parametrize("form, suffix", [("GIF", "gif"), ("JPEG2000", "jp2"), ("PPM", "PNM")])
def test_images_of_every_kind_in_class_folders(root, form, suffix):
    folders(root)
    (root / f"bugs/train/ant/more.{suffix}").write_bytes(encode(pixels(1)[0], form))
    assert len(images("bugs", "train")) == 9


def test_class_folders_name_a_broken_file(root):
    folders(root)
    (root / "bugs/train/bee/2.png").write_bytes(b"x")
    with fails(ValueError, root / "bugs/train/bee/2.png", "cannot be decoded"):
        images("bugs", "train")


def test_the_source_says_what_was_read(root):
    assert images("photos", "test").source == "photographs of scikit-image and scikit-learn"
    folders(root, "val", ("bee",))
    assert images("bugs", "test").source == "folders bugs/val"
    write(root / "bugs/data/valid-0.parquet", GOOD)
    celeba(root)
    said = "torchvision celeba/img_align_celeba"
    for limit in (None, 2):  # from the cache, and a part of it
        assert images("bugs", "test", limit=limit).source == "parquet bugs/data/valid"
        assert images("celeba", "train", limit=limit).source == said
    write(root / "celeba10k/train-0.parquet", map(encode, pixels(2, 109, 89)))
    (root / "celeba/list_eval_partition.txt").unlink()
    assert images("celeba", "train").source == "parquet celeba10k/train"
    assert ImageSet(torch.zeros(1, 3, 8, 8), None, ()).source == ""


def test_order_of_layouts(root):
    folders(root)
    write(root / "bugs/train-0.parquet", map(encode, pixels(2)))
    assert len(images("bugs", "train")) == 2


# the cache


@pytest.fixture
def decoded(monkeypatch):
    "The calls of `decode`."
    calls, real_decode = [], data.decode

    def decode(*arguments):
        calls.append(arguments)
        return real_decode(*arguments)

    monkeypatch.setattr(data, "decode", decode)
    return calls


def test_second_call_reads_the_cache(root, decoded):
    pets(root)
    first, again = images("pets", "train"), images("pets", "train")
    assert len(decoded) == 1 and torch.equal(first.x, again.x) and torch.equal(first.y, again.y)
    assert again.classes == first.classes and (again.name, again.split) == ("pets", "train")
    assert len(images("pets", "train", limit=2)) == 2
    assert len(decoded) == 1  # the whole set serves a part of it
    assert len(cached(root)) == 1


def test_the_key_covers_all_that_matters(root, decoded, monkeypatch):
    file = pets(root)
    for arguments in ((None, 2), (None, 3), (4, 2), (4, None), (None, None)):
        images("pets", "train", *arguments)
    assert len(decoded) == 5
    os.utime(file, ns=(1, 1))
    images("pets", "train")
    assert len(decoded) == 6
    pets(root, n=6)
    assert len(images("pets", "train")) == 6
    monkeypatch.setattr(data, "CACHE_FORMAT", data.CACHE_FORMAT + 1)
    images("pets", "train")
    assert len(decoded) == 8


def test_a_damaged_cache_is_made_again(root, decoded):
    pets(root, n=40)
    whole = images("pets", "train")
    (file,) = (root.parent / "cache").glob("*.npz")
    sound = file.read_bytes()
    damages = [sound[:keep] for keep in (0, 10, len(sound) // 2, len(sound) - 1)]
    for place in (200, 700, len(sound) // 2, len(sound) - 700):
        file.write_bytes(sound)
        flip(file, place, 4)
        damages.append(file.read_bytes())
    for damaged in damages:
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged and will be made again"):
            assert torch.equal(images("pets", "train").x, whole.x)
    assert len(decoded) == 9 and len(cached(root)) == 1
    file.write_bytes(sound[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        assert len(images("pets", "train", limit=2)) == 2
    assert not file.exists()  # or it would be complained about at every start


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("labels", [None, [0, 1, 0]])
def test_no_flipped_bit_is_believed(tmp_path, labels):
    "Every byte of a small cache file in turn: what is read back is whole, or nothing."
    x = torch.from_numpy(pixels(3, 2, 2)).permute(0, 3, 1, 2).contiguous()
    y = None if labels is None else torch.tensor(labels)
    file = tmp_path / "a.npz"
    data.save(file, ImageSet(x, y, ("a", "b"), "n", "s"))
    sound = file.read_bytes()
    for place in range(len(sound)):
        file.write_bytes(sound)
        flip(file, place, 1 << place % 8)
        got = data.load(file)
        if got is not None:
            assert torch.equal(got.x, x)
            assert (got.classes, got.name, got.split) == (("a", "b"), "n", "s")
            assert got.y is None if labels is None else got.y.tolist() == labels


def broken(monkeypatch, owner, name, number, after=lambda *arguments: None):
    "Let a function that writes to the cache fail with this errno, after a part of its work."
    intact = getattr(owner, name)

    def fail(first, *arguments, **options):
        place = first if isinstance(first, Path) else first.name
        if "cache" not in str(place) or (name == "open" and arguments != ("wb",)):
            return intact(first, *arguments, **options)
        after(first)
        raise OSError(number, os.strerror(number), str(place))

    monkeypatch.setattr(owner, name, fail)


CACHE_FAULTS = {
    "mkdir, read-only": (Path, "mkdir", errno.EROFS),
    "mkdir, forbidden": (Path, "mkdir", errno.EACCES),
    "open, forbidden": (Path, "open", errno.EACCES),
    "save, disk full": (np, "savez", errno.ENOSPC, lambda stream: stream.write(b"some of it")),
    "save, quota": (np, "savez", errno.EDQUOT, lambda stream: stream.write(b"some of it")),
    "save, hardware": (np, "savez", errno.EIO),
    "replace, forbidden": (Path, "replace", errno.EPERM),
    "replace, folder gone": (Path, "replace", errno.ENOENT),
}


def warned_once(root, *words):
    "Both calls give the set, and together one warning, which has these words."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, again = images("pets", "train"), images("pets", "train", limit=3)
    (warning,) = caught
    assert re.search("(?s)" + ".*".join(map(re.escape, map(str, words))), str(warning.message))
    assert np.array_equal(first.x.permute(0, 2, 3, 1), pixels(len(first)))
    assert first.y.tolist()[:3] == again.y.tolist() == [0, 1, 0]
    assert not list(root.parent.glob("**/*.part"))


@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_a_cache_that_cannot_be_written_is_done_without(root, monkeypatch, fault):
    owner, name, number, *after = CACHE_FAULTS[fault]
    pets(root)
    broken(monkeypatch, owner, name, number, *after)
    folder = root.parent / "cache"
    warned_once(root, f"the cache {folder} cannot be written", os.strerror(number), "VQSTUDY_CACHE")
    assert cached(root) == []
    monkeypatch.undo()
    monkeypatch.setenv("VQSTUDY_DATA", str(root))
    monkeypatch.setenv("VQSTUDY_CACHE", str(folder))
    images("pets", "train")
    assert len(cached(root)) == 1  # it is tried again each time


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_cache_folder_where_a_file_is(root, monkeypatch, below):
    pets(root)
    (root.parent / "occupied").touch()
    folder = root.parent / "occupied" / below
    monkeypatch.setenv("VQSTUDY_CACHE", str(folder))
    warned_once(root, f"the cache {folder} cannot be written", "occupied")


def test_a_disk_that_is_really_full(root):
    "The system refuses to write more than a megabyte to a file."
    pets(root, n=6000)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        warned_once(root, "cannot be written", os.strerror(errno.EFBIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert len(cached(root)) <= 1  # the part of three images has room


def test_a_home_folder_that_cannot_be_written(root, monkeypatch):
    pets(root)
    monkeypatch.delenv("VQSTUDY_CACHE")
    monkeypatch.chdir(root)
    (root.parent / "nobody").touch()
    monkeypatch.setenv("HOME", str(root.parent / "nobody"))
    warned_once(root, root.parent / "nobody/.cache/vqstudy", "Not a directory")


def test_a_home_folder_that_nobody_knows(root, monkeypatch):
    pets(root)
    monkeypatch.delenv("VQSTUDY_CACHE")
    monkeypatch.chdir(root)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(data, "gettempdir", lambda: str(root.parent / "tmp"))

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert len(images("pets", "train")) == 5
    assert len(list((root.parent / "tmp/vqstudy").glob("*.npz"))) == 1


def test_a_cache_that_cannot_be_read(root, monkeypatch, decoded):
    pets(root)
    images("pets", "train")
    real_load = np.load

    def forbidden(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(data.np, "load", forbidden)
    warned_once(root, f"the cache {root.parent / 'cache'} cannot be read", "Permission denied")
    monkeypatch.setattr(data.np, "load", real_load)
    images("pets", "train")
    assert len(decoded) == 3  # what could not be read is not thrown away


def test_a_damaged_cache_that_cannot_be_removed(root, monkeypatch):
    pets(root)
    whole = images("pets", "train")
    (file,) = (root.parent / "cache").glob("*.npz")
    file.write_bytes(b"")
    for name in ("unlink", "open"):
        broken(monkeypatch, Path, name, errno.EROFS)
    with pytest.warns(UserWarning) as caught:
        assert torch.equal(images("pets", "train").x, whole.x)
    assert "is damaged" in str(caught[0].message)
    assert "cannot be written" in str(caught[1].message) and len(caught) == 2


def test_settings_of_another_encoding_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.delenv("VQSTUDY_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_bytes("author = Jürgen".encode("latin-1"))
    assert data.cache_folder() == tmp_path / "home/.cache/vqstudy"


def test_a_reader_never_sees_half_a_file(tmp_path):
    kept = ImageSet(torch.zeros(500, 3, 32, 32, dtype=torch.uint8), None, (), "n", "s")
    data.save(tmp_path / "a.npz", kept)
    with ThreadPoolExecutor(1) as writer, warnings.catch_warnings():
        warnings.simplefilter("error")
        save_often = lambda: [data.save(tmp_path / "a.npz", kept) for _ in range(40)]
        work = writer.submit(save_often)
        while not work.done():
            assert len(data.load(tmp_path / "a.npz")) == 500
        work.result()


READER = """
import hashlib
import pathlib
import sys
import time
from vqstudy import data

decode, ready = data.decode, pathlib.Path(sys.argv[1])


def wait(*arguments):  # until both have found no cache
    (ready / sys.argv[2]).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.01)
    return decode(*arguments)


data.decode = wait
pets = data.images("pets", "train", 24)
print(len(pets), hashlib.sha256(pets.x.numpy()).hexdigest())
"""


def test_two_processes_at_once(root):
    pets(root, n=300)
    ready = root.parent / "ready"
    ready.mkdir()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-W", "error", "-c", READER, ready]
    both = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert all(process.returncode == 0 for process in both), outputs
    digest = hashlib.sha256(images("pets", "train", 24).x.numpy()).hexdigest()
    assert outputs[0][0] == outputs[1][0] == f"300 {digest}\n"
    assert len(cached(root)) == 1 and cached(root)[0].endswith(".npz")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("VQSTUDY_CACHE", raising=False)
    (tmp_path / "repo/nbs/lib").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "repo/nbs/lib")
    assert data.cache_folder() == tmp_path / "home/.cache/vqstudy"
    (tmp_path / "repo/settings.ini").write_text("[DEFAULT]\nlib_name = vqstudy_other\n")
    assert data.cache_folder() == tmp_path / "home/.cache/vqstudy"
    (tmp_path / "repo/settings.ini").write_text("[DEFAULT]\nlib_name = vqstudy\n")
    assert data.cache_folder() == tmp_path / "repo/data/cache"
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "chosen"))
    assert data.cache_folder() == tmp_path / "chosen"


# the real sets


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@real
def test_cifar10(cache, monkeypatch):
    monkeypatch.setenv("VQSTUDY_CACHE", str(cache))
    train = images("cifar10", "train", 32)
    means = np.array([train.x[:, c].numpy().mean(dtype=np.float64) / 255 for c in range(3)])
    assert train.x.shape == (50000, 3, 32, 32)
    assert np.abs(means - [0.4914, 0.4822, 0.4465]).max() < 5e-5
    assert (train.y.bincount() == 5000).all()
    assert train.classes[:2] == ("airplane", "automobile") and len(train.classes) == 10
    assert torch.equal(images("cifar10", "train", 32, limit=100).x, train.x[:100])


@real
def test_celeba_and_tiny_imagenet(cache, monkeypatch):
    monkeypatch.setenv("VQSTUDY_CACHE", str(cache))
    faces = images("celeba", "test")
    assert faces.x.shape[1:] == (3, 64, 64) and faces.y is None
    tiny = images("tiny_imagenet100", "test", limit=500)
    assert tiny.split == "valid" and tiny.x.shape == (500, 3, 64, 64)
    assert len(tiny.classes) == 100 and tiny.y.max() < 100
    with fails(ValueError, "limit = 6000 is too many: tiny_imagenet100/valid holds 5000 images"):
        images("tiny_imagenet100", "test", limit=6000)
