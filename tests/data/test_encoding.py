"""Tests of encoding latents, by a cheap encoder: interruption, damage, two runs in one folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gspn_jax import data, folder_lock
from gspn_jax.data import encoding
from gspn_jax.data.encoding import encode_dataset
from tests.data.test_decoding import UPRIGHT, photograph

IMAGES = data.load("fake", image_size=8, num_classes=3, train_size=11, test_size=4)
OPTIONS: Any = dict(
    shape=(2, 2, 3), image_size=8, scale=0.5, origin={"autoencoder": {"sha256": "abc"}}, batch_size=3,
    images_per_shard=5, num_threads=0,
)  # fmt: skip


def encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns means of 4x4 pixels' quarters; the log variance is their negative."""
    means = images.reshape(len(images), 2, 4, 2, 4, 3).mean(axis=(2, 4)) / 256
    return means, -means


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert encode_dataset(IMAGES, encode, tmp_path / "latents", **OPTIONS) == 15
    return tmp_path / "latents"


def check(folder: Path) -> None:
    latents = data.load("latents", str(folder))
    assert len(latents.train) == 11 and len(latents.test) == 4 and latents.class_names == IMAGES.class_names
    for index in range(11):
        image, label = IMAGES.train[index]
        for copy in range(2):
            mean, log_variance, found = latents.train.latents(index, copy)
            want = encode((image[:, ::-1] if copy else image)[None])[0][0]
            np.testing.assert_allclose(mean, want, rtol=1e-3)
            np.testing.assert_array_equal(log_variance, -mean)
            assert found == label


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_call_continues(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check(folder)
    whole = contents(folder)
    assert set(whole) == {
        *(f"train/0000{number}-of-00003.array_record" for number in range(3)),
        *("test/00000-of-00001.array_record", "manifest.json"),
    }
    write = encoding._write

    def interrupted(file: Path, records: Iterator[bytes]) -> int:
        if file.name.startswith("00001"):
            next(records)
            raise KeyboardInterrupt
        return write(file, records)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(IMAGES, encode, other, **OPTIONS)
    with pytest.raises(
        ValueError, match="path: expected a finished folder of latents, got .*other', whose encoding was"
    ):
        data.load("latents", str(other))
    assert encode_dataset(IMAGES, encode, other, **OPTIONS) == 10  # 5 were left
    assert contents(other) == whole
    assert encode_dataset(IMAGES, encode, other, **OPTIONS) == 0


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "missing"])
def test_damaged_shards_are_made_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture):
    whole = contents(folder)
    file = folder / "train" / "00001-of-00003.array_record"
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-5], "changed": content, "empty": b""}[damage])
    with pytest.raises(ValueError, match="00001-of-00003.array_record.*the same encode_latents command"):
        latents = data.load("latents", str(folder))
        for index in range(len(latents.train)):
            latents.train.latents(index)
    assert encode_dataset(IMAGES, encode, folder, **OPTIONS) == 5
    assert ("00001-of-00003.array_record: damaged" in caplog.text) == (damage != "missing")
    assert contents(folder) == whole


def test_folders_of_the_version_without_checksums(folder: Path):
    manifest = json.loads((folder / "manifest.json").read_text())
    checksums = manifest.pop("files")
    del manifest["exif_rotation"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check(folder)
    file = folder / "train" / "00001-of-00003.array_record"
    file.write_bytes(file.read_bytes()[:-5])
    assert encode_dataset(IMAGES, encode, folder, **OPTIONS) == 5
    assert json.loads((folder / "manifest.json").read_text())["files"] == checksums
    check(folder)


def test_other_settings_are_refused(folder: Path):
    words = r"output: expected the settings that .*latents was made with \(copies=2\), got copies=1; use those settings"
    with pytest.raises(ValueError, match=words):
        encode_dataset(IMAGES, encode, folder, flip=False, **OPTIONS)
    with pytest.raises(ValueError, match=r"\(autoencoder=\{'sha256': 'abc'\}\), got autoencoder=\{'sha256': 'd'\}"):
        encode_dataset(IMAGES, encode, folder, **OPTIONS | {"origin": {"autoencoder": {"sha256": "d"}}})
    check(folder)


def test_a_failed_encoding_does_not_block_another(tmp_path: Path):
    def wrong(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means, log_variances = encode(images)
        means[1, 0, 0, 0] = np.nan
        return means, log_variances

    words = "latents of fake, seed 0, sample 1: moments: expected finite numbers, got NaN or Inf"
    with pytest.raises(ValueError, match=words):
        encode_dataset(IMAGES, wrong, tmp_path, flip=False, **OPTIONS)
    assert not list(tmp_path.rglob("*.array_record")) and not (tmp_path / "manifest.json").exists()
    assert encode_dataset(IMAGES, encode, tmp_path, **OPTIONS) == 15  # with another setting
    check(tmp_path)


def test_two_runs_in_one_folder(tmp_path: Path):
    with folder_lock.hold(tmp_path, "encoding latents"):
        with pytest.raises(folder_lock.FolderInUse, match="is in use for encoding latents by process"):
            encode_dataset(IMAGES, encode, tmp_path, **OPTIONS)
        assert not (tmp_path / "train").exists()


def test_photographs_are_turned_if_asked(tmp_path: Path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.jpg").write_bytes(photograph(6))
    photographs = data.load("image_folder", str(tmp_path))
    for turn in (False, True):
        options = OPTIONS | {"exif_rotation": turn}
        encode_dataset(photographs, encode, tmp_path / str(turn), **options)
        mean, _, _ = data.load("latents", str(tmp_path / str(turn))).train.latents(0)
        assert (mean[0, 1, 0] > mean[0, 0, 0] + 0.1) == turn  # red grows to the right of the upright image
    assert UPRIGHT[0, -1, 0] > UPRIGHT[0, 0, 0]


@pytest.mark.parametrize("change,words", [
    (dict(scale=0.0), "scale: expected a positive number, got 0.0"),
    (dict(scale=float("nan")), "scale: expected a positive number, got nan"),
    (dict(image_size=0), "image_size: expected at least 1, got 0"),
    (dict(batch_size=0), "batch_size: expected at least 1, got 0"),
    (dict(images_per_shard=0), "images_per_shard: expected at least 1, got 0"),
    (dict(stored="int8"), "dtype: expected float16 or float32, got 'int8'"),
    (dict(on_corrupt="ignore"), "on_corrupt: expected one of"),
    (dict(shape=(3, 2, 3)), r"latents of fake.*: moments: expected shape \(2, 2, 3, 2, 3\), got \(2, 2, 2, 2, 3\)"),
])  # fmt: skip
def test_bad_arguments(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        encode_dataset(IMAGES, encode, tmp_path, **OPTIONS | change)


def test_what_is_not_a_dataset_of_images_or_a_folder(folder: Path):
    with pytest.raises(ValueError, match="dataset: expected images, got latents"):
        encode_dataset(data.load("latents", str(folder)), encode, folder, **OPTIONS)
    with pytest.raises(ValueError, match="folder: expected a folder, got a file: .*manifest.json"):
        encode_dataset(IMAGES, encode, folder / "manifest.json", **OPTIONS)
