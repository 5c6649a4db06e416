"""Tests of latents: records and batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gspn_jax import data
from gspn_jax.data.sources.latent_manifest import shard_files
from gspn_jax.data.sources.latents import LatentRecord

SHAPE = (2, 3, 4)
COUNTS = {"train": 5, "test": 2}


def moments(index: int) -> np.ndarray:
    """Returns moments of image `index` and its mirror image: integers, which float16 represents exactly."""
    return (
        np.arange(48, dtype=np.float32).reshape(1, 2, *SHAPE) + 100 * index + np.array([0, 1000]).reshape(2, 1, 1, 1, 1)
    )


def write(folder: Path, *, copies: int = 2) -> str:
    manifest = {
        "shape": SHAPE, "dtype": "float16", "copies": copies, "class_names": ["ant", "bee", "cow"], "image_size": 24,
        "scale": 0.5, "autoencoder": {"sha256": "abc"}, "shards": {"train": 3, "test": 1},
        "images": COUNTS, "on_corrupt": "stop",
    }  # fmt: skip
    layout = LatentRecord(SHAPE, "float16", copies)
    for split, count in COUNTS.items():
        (folder / split).mkdir()
        files = shard_files(folder, split, manifest["shards"][split])
        for file, indices in zip(files, np.array_split(np.arange(count), len(files)), strict=True):
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for index in indices:
                writer.write(layout.packed(moments(int(index))[:copies], int(index) % 3))
            writer.close()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def test_images_keep_their_order_over_shards(tmp_path: Path):
    dataset = data.load("latents", write(tmp_path))
    assert dataset.class_names == ("ant", "bee", "cow") and len(dataset.train) == 5 and len(dataset.test) == 2
    assert dataset.latents == data.LatentSpace(SHAPE, 0.5, "abc")
    for index in range(5):
        for copy in range(2):
            mean, log_variance, label = dataset.train.latents(index, copy)
            np.testing.assert_array_equal([mean, log_variance], moments(index)[copy])
            assert label == index % 3


def test_training_batches_mirror_half_of_the_images(tmp_path: Path):
    source = data.load("latents", write(tmp_path)).train
    options: Any = dict(batch_size=4, image_size=24, num_threads=0)
    batches = data.training_batches(source, augmentation=data.Augmentation(flip=True), **options)
    mirrored = []
    for _ in range(50):
        batch = next(batches)
        assert batch["mean"].shape == batch["log_variance"].shape == (4, *SHAPE) and batch["replaced"] == 0
        index, copy = np.divmod(batch["mean"][:, 0, 0, 0], 100)[0] % 10, batch["mean"][:, 0, 0, 0] >= 1000
        np.testing.assert_array_equal(batch["label"], index % 3)
        for row in range(4):
            np.testing.assert_array_equal(batch["log_variance"][row], moments(int(index[row]))[int(copy[row]), 1])
        mirrored += list(copy)
    assert 0.4 < np.mean(mirrored) < 0.6
    plain = next(data.training_batches(source, **options))
    assert np.all(plain["mean"] < 1000)
    state, after = batches.state(), next(batches)
    batches.restore(state)
    np.testing.assert_array_equal(next(batches)["mean"], after["mean"])


def test_evaluation_batches_are_masked(tmp_path: Path):
    source = data.load("latents", write(tmp_path)).train
    batches = list(data.evaluation_batches(source, batch_size=3, image_size=24))
    np.testing.assert_array_equal([batch["mask"] for batch in batches], [[True] * 3, [True, True, False]])
    np.testing.assert_array_equal(
        np.concatenate([b["mean"] for b in batches])[:5], [moments(n)[0, 0] for n in range(5)]
    )


@pytest.mark.parametrize("augmentation,size,words", [
    (dict(flip=True), 24, "augmentation.flip: expected False, because these latents were encoded without mirror"),
    (dict(crop="padded"), 24, "augmentation: expected flip only, because these are latents"),
    ({}, 32, r"image_size: expected 24, as the images that were encoded, got \(32, 32\)"),
])  # fmt: skip
def test_options_that_latents_do_not_support(tmp_path: Path, augmentation: dict[str, Any], size: int, words: str):
    source = data.load("latents", write(tmp_path, copies=1)).train
    with pytest.raises(ValueError, match=words):
        data.training_batches(source, batch_size=2, image_size=size, augmentation=data.Augmentation(**augmentation))


def test_missing_shards_and_manifests(tmp_path: Path):
    with pytest.raises(ValueError, match="path: expected a folder of latents, got None"):
        data.load("latents")
    with pytest.raises(ValueError, match=r"path: expected a folder of latents with manifest.json, got "):
        data.load("latents", str(tmp_path))
    write(tmp_path)
    shard_files(tmp_path, "train", 3)[1].unlink()
    with pytest.raises(ValueError, match=r"3 shards of split train, but 1 are missing, such as .*00001-of-00003"):
        data.load("latents", str(tmp_path))


def test_images_that_are_missing(tmp_path: Path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"images": {"train": 6, "test": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="path: expected 6 images in split train of .*, got 5"):
        data.load("latents", str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"on_corrupt": "drop"}))
    assert len(data.load("latents", str(tmp_path)).train) == 5


@pytest.mark.parametrize("change,words", [
    ("[]", "expected a JSON object, got list"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "maximum recursion depth"),
    ({"shape": [2, 3]}, r"shape: expected three integers >= 1, got \[2, 3\]"),
    ({"shape": "2, 3, 4"}, "shape: expected three integers >= 1, got 2, 3, 4"),
    ({"dtype": 3}, "dtype: expected float16 or float32, got 3"),
    ({"copies": 0}, "copies: expected 1 or 2, got 0"),
    ({"class_names": []}, r"class_names: expected a list of names, got \[\]"),
    ({"shards": {"train": 10**12, "test": 1}}, "shards: expected 1 to 99999 for train and test, got "),
    ({"shards": 3}, "shards: expected 1 to 99999 for train and test, got 3"),
    ({"images": {"train": 5}}, "images: expected numbers of images for train and test, got "),
    ({"scale": float("nan")}, "scale: expected a positive number, got nan"),
    ({"autoencoder": "abc"}, "autoencoder: expected an object with sha256, got abc"),
    ({"on_corrupt": None}, "on_corrupt: expected stop or drop, got None"),
    ({"files": {"train/a": 3}}, "files: expected bytes and sha256 of each shard, got "),
])  # fmt: skip
def test_malformed_manifests(tmp_path: Path, change: Any, words: str):
    write(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"^path: expected a folder of latents with manifest.json, got .*: {words}"):
        data.load("latents", str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path):
    write(tmp_path)
    file = shard_files(tmp_path, "train", 3)[1]
    whole = file.read_bytes()
    used = [place for place in range(0, len(whole), 16) if any(whole[place : place + 16])]  # the rest is padding
    assert len(used) > 20
    named = 0
    for place in used:
        file.write_bytes(whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 16]) + whole[place + 16 :])
        try:
            source = data.load("latents", str(tmp_path)).train
            for index in range(5):
                mean, _, _ = source.latents(index)
                np.testing.assert_array_equal(mean, moments(index)[0, 0])  # never a wrong value
        except ValueError as error:
            assert "train/00001-of-00003.array_record" in str(error) and "damaged" in str(error), error
            named += 1
    assert named > len(used) / 2


def test_records_of_another_form():
    layout = LatentRecord(SHAPE, "float16")
    with pytest.raises(ValueError, match="moments: expected numbers within float16, got 1e.06"):
        layout.packed(np.full((1, 2, *SHAPE), 1e6), 0)
    with pytest.raises(ValueError, match="moments: expected finite numbers, got NaN or Inf"):
        layout.packed(np.full((1, 2, *SHAPE), np.nan), 0)
    with pytest.raises(ValueError, match=r"moments: expected shape \(1, 2, 2, 3, 4\), got \(2, 2, 2, 3, 4\)"):
        layout.packed(moments(0), 0)
    with pytest.raises(ValueError, match="record: expected 100 bytes, got 3"):
        layout.unpacked(b"abc")
    with pytest.raises(ValueError, match="dtype: expected float16 or float32, got 'bfloat16'"):
        LatentRecord(SHAPE, "bfloat16")
