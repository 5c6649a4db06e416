"""Tests of reading datasets of TensorFlow Datasets, in its two usual file formats, without TensorFlow."""

import pathlib
import pickle
import struct
import sys
from typing import Any

import numpy as np
import pytest

from gspn_jax import data
from gspn_jax.data.sources.tfrecord import TFRecords
from tests.data import pictures

tfds: Any = pytest.importorskip("tensorflow_datasets")


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A dataset builder with six training and four validation pictures of three classes."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
                "file_name": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(6), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for number in range(count):
            image = pictures.jpeg(pictures.gradient(20 + number, 30, shade=20 * number))
            file = pathlib.Path(self.data_dir) / f"{count}_{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
            yield number, {"image": str(file), "label": number % 3, "file_name": f"{number}.jpg"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def contents(source: data.Source) -> dict[int, int]:
    """Returns {number: label} of all pictures and checks their pixels; a picture's height encodes its number."""
    found = {}
    for index in range(len(source)):
        image, label = source[index]
        number = image.shape[0] - 20
        expected = pictures.gradient(20 + number, 30, shade=20 * number)
        np.testing.assert_allclose(image.astype(int), expected, atol=6)
        found[number] = label
    return found


def crc32c(content: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def record(content: bytes) -> bytes:
    """Returns a record in TensorFlow's format, with its masked checksums."""

    def checksum(part: bytes) -> bytes:
        value = crc32c(part)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(content))
    return length + checksum(length) + content + checksum(content)


def test_array_record_is_read_without_tensorflow(prepared):
    dataset = data.load("tfds", str(prepared))
    assert (dataset.name, dataset.num_classes, dataset.class_names) == ("tiny", 3, ("ant", "bee", "cow"))
    assert contents(dataset.train) == {number: number % 3 for number in range(6)}
    assert contents(dataset.test) == {number: number % 3 for number in range(4)}
    assert isinstance(dataset.train, data.EncodedSource)
    assert dataset.train.describe(4) == f"{prepared}, split train, record 4"
    assert "tensorflow" not in sys.modules


def test_tfds_goes_through_the_pipeline_in_threads(prepared):
    train = data.load("tfds", str(prepared)).train
    runs = [
        data.training_batches(
            train, batch_size=4, image_size=12, augmentation=data.Augmentation(crop="resized"), num_threads=threads
        )
        for threads in (0, 2)
    ]
    for _ in range(6):
        first, second = (next(run) for run in runs)
        np.testing.assert_array_equal(first["image"], second["image"])


def test_folder_above_the_versions_takes_the_newest(prepared):
    assert len(data.load("tfds", str(prepared.parent), test_split="validation").test) == 4


@pytest.fixture(scope="module")
def as_tfrecord(prepared, tmp_path_factory) -> pathlib.Path:
    """Writes the same dataset as tfrecord files, with two shards of the training split."""
    folder = tmp_path_factory.mktemp("records") / "tiny" / "1.2.0"
    folder.mkdir(parents=True)
    dataset: Any = data.load("tfds", str(prepared))
    for name in ("features.json", "label.labels.txt"):
        (folder / name).write_bytes((prepared / name).read_bytes())
    info = (prepared / "dataset_info.json").read_text()
    info = info.replace('"array_record"', '"tfrecord"').replace('"6"', '"4",\n"2"')
    (folder / "dataset_info.json").write_text(info)
    parts = {
        "train.tfrecord-00000-of-00002": [dataset.train.records[i] for i in range(4)],
        "train.tfrecord-00001-of-00002": [dataset.train.records[i] for i in range(4, 6)],
        "validation.tfrecord-00000-of-00001": [dataset.test.records[i] for i in range(4)],
    }
    for name, records in parts.items():
        (folder / f"tiny-{name}").write_bytes(b"".join(record(content) for content in records))
    return folder


def test_tfrecord_gives_the_same_as_array_record(prepared, as_tfrecord):
    expected, got = data.load("tfds", str(prepared)), data.load("tfds", str(as_tfrecord))
    pairs: Any = ((expected.train, got.train), (expected.test, got.test))
    for first, second in pairs:
        assert len(first) == len(second) > 0
        for index in range(len(first)):
            assert first.encoded(index) == second.encoded(index)
        for source in (first, second):  # as worker processes get it
            assert pickle.loads(pickle.dumps(source)).encoded(3) == first.encoded(3)
    assert "tensorflow" not in sys.modules


def test_tfrecord_that_is_cut_off_is_named(as_tfrecord, tmp_path):
    whole = (as_tfrecord / "tiny-train.tfrecord-00000-of-00002").read_bytes()
    file = tmp_path / "part"
    for content, lengths in ((whole[:-1], 4), (whole, 5), (whole[:-700], 4), (b"\0" * 7, 1)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"part: expected {lengths} whole TFRecords, got"):
            TFRecords([str(file)], np.array([lengths]))


def test_labels_out_of_range_are_named(prepared):
    dataset: Any = data.load("tfds", str(prepared))
    dataset.train.num_classes = 2
    labels = []
    with pytest.raises(ValueError, match=r"split train, record \d: label: expected 0 to 1 \(num_classes=2\), got 2"):
        for index in range(6):
            labels.append(dataset.train[index][1])
    with pytest.raises(ValueError, match=r"label: expected 0 to 1 \(num_classes=2\), got 2"):
        next(data.training_batches(dataset.train, batch_size=6, image_size=8, on_corrupt="drop"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "all"}, r"expected a split 'all' with samples, got \{'train': 6, 'validation': 4\}"),
        ({"test_split": "test"}, "expected a split 'test' with samples"),
        ({"image_key": "picture"}, "expected a feature 'picture' of class Image"),
        ({"label_key": "file_name"}, "expected a feature 'file_name' of class ClassLabel"),
    ],
)
def test_faults_are_named(prepared, options, message):
    with pytest.raises(ValueError, match=message):
        data.load("tfds", str(prepared), **options)


def test_folder_without_a_dataset(tmp_path):
    with pytest.raises(ValueError, match="path: expected a prepared tfds dataset, got .*without a dataset_info.json"):
        data.load("tfds", str(tmp_path))
