"""Image sets: every layout made by hand in miniature, every fault, the cache.

Where VQSTUDY_DATA is set, the real sets too.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from vqstudy import data
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
    with fails(FileNotFoundError, "pets/test"):
        images("pets", "test")
    monkeypatch.setenv("VQSTUDY_DATA", str(root / "nowhere"))
    with fails(FileNotFoundError, "no such folder"):
        images("pets", "train")
    monkeypatch.delenv("VQSTUDY_DATA")
    with fails(FileNotFoundError, "pets needs files: set VQSTUDY_DATA"):
        images("pets", "train")


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


def test_truncated_file(root):
    file = pets(root)
    file.write_bytes(file.read_bytes()[:-20])
    with fails(ValueError, file, "truncated or is no Parquet"):
        images("pets", "train")
    file.write_bytes(b"")
    with fails(ValueError, file, "truncated or is no Parquet"):
        images("pets", "train")
    assert cached(root) == []


@pytest.mark.parametrize("level", ["pets", "."])
def test_wrong_checksum(root, level, monkeypatch):
    file, sums = pets(root), root / level / "SHA256SUMS"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(f"{digest}  {file.relative_to(root / level)}\n{'0' * 64}  other.bin\n")
    images("pets", "train")
    checked = []
    monkeypatch.setattr(data, "verify", checked.append)
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
SIXTEEN_BITS = BytesIO()
Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(SIXTEEN_BITS, "PNG")
UNDECODABLE = [b"", b"no image", encode(LARGE)[:700], encode(LARGE, "JPEG")[:500], None]


@pytest.mark.parametrize(
    "written, words",
    [
        *((([*GOOD, broken],), "row 3: the image cannot be decoded") for broken in UNDECODABLE),
        (([SIXTEEN_BITS.getvalue()],), "row 0.*I;16 pixels do not fit into bytes"),
        (([GOOD[0], encode(pixels(1, 10, 8)[0])],), "row 1 is .*10, 8.*give a size"),
        ((GOOD, [0, 2, 1]), "row 1: label 2 is out of range: 0 to 1"),
        ((GOOD, [0, -1, 1]), "row 1: label -1 is out of range"),
        ((GOOD, [0, None, 1]), "row 1: the label is missing"),
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


def test_files_must_be_complete_and_agree(root):
    first = write(root / "a/train-00000-of-00002.parquet", map(encode, pixels(2)), [0, 1])
    with fails(ValueError, "1 files train-\\*.parquet, but their names say 2"):
        images("a", "train")
    second = root / "a/train-00001-of-00002.parquet"
    write(second, map(encode, pixels(2)), [0, 1], names=("dog", "cat"))
    with fails(ValueError, second, "other columns or classes than", first):
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
    assert len(images("cifar10", "train", limit=3)) == 3
    put("data_batch_3", part(0))
    with fails(ValueError, "data_batch_3 is missing or has a wrong checksum"):
        images("cifar10", "train")
    (folder / "data_batch_3").unlink()
    with fails(FileNotFoundError, "data_batch_3"):
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
    with fails(FileNotFoundError, "000002.png"):
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
    with fails(ValueError, "bugs/test/wasp: the training folder has no such class"):
        images("bugs", "test")


def test_class_folders_name_a_broken_file(root):
    folders(root)
    (root / "bugs/train/bee/2.png").write_bytes(b"x")
    with fails(ValueError, root / "bugs/train/bee/2.png", "cannot be decoded"):
        images("bugs", "train")


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


def test_an_error_leaves_no_half_cache(root, monkeypatch):
    pets(root)

    def full(stream, **arrays):
        stream.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.np, "savez", full)
    with fails(OSError, "No space left"):
        images("pets", "train")
    assert cached(root) == []


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
