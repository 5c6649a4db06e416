"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow.

Reproducible and resumable batches need random access. array_record files have an index; for tfrecord files (the
historical default of tfds) the source makes one at the start from the headers of the records.
"""

import pathlib
import re
from typing import Any

import numpy as np

from gspn_jax.data.sources import tfrecord
from gspn_jax.data.sources.protocol import Dataset, FileSource


class TfdsSource(FileSource):
    """One split. Records are tf.train.Example messages with the encoded image and the label."""

    def __init__(self, records: Any, *, name: str, num_classes: int, image_key: str, label_key: str):
        self.records = records
        self.name = name
        self.num_classes = num_classes
        self.image_key = image_key
        self.label_key = label_key

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, index: int, /) -> tuple[bytes, int]:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(self.records[index])  # pyright: ignore[reportAttributeAccessIssue]
        features = example.features.feature
        label = features[self.label_key].int64_list.value[0]
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{self.describe(index)}: label: expected 0 to {self.num_classes - 1} "
                f"(num_classes={self.num_classes}), got {label}"
            )
        return features[self.image_key].bytes_list.value[0], label

    def describe(self, index: int, /) -> str:
        return f"{self.name}, record {index}"


def tfds(
    path: str | None = None,
    *,
    image_key: str = "image",
    label_key: str = "label",
    train_split: str = "train",
    test_split: str | None = None,
) -> Dataset:
    """Opens a dataset prepared by TensorFlow Datasets, in array_record (best) or tfrecord files.

    Args:
        path: folder of the prepared dataset, with its dataset_info.json, such as DATA_DIR/imagenet2012/5.1.0;
            DATA_DIR/imagenet2012 takes the newest version in it.
        image_key: name of the image feature.
        label_key: name of the class label feature, which also gives the number of classes and their names.
        train_split: name of the training split.
        test_split: name of the held-out split; by default "validation" if the dataset has it, else "test".

    Raises:
        ValueError: no such folder, split or feature; an empty split; files of another format; truncated files.
    """
    builder = _open(path)
    features, splits = builder.info.features, builder.info.splits
    for key, kind in ((image_key, "Image"), (label_key, "ClassLabel")):
        if key not in features or type(features[key]).__name__ != kind:
            raise ValueError(f"{path}: expected a feature {key!r} of class {kind}, got {dict(features)}")
    if test_split is None:
        test_split = "validation" if "validation" in splits else "test"
    names = {"train": train_split, "test": test_split}
    for split in names.values():
        if split not in splits or not splits[split].num_examples:
            got = {name: splits[name].num_examples for name in splits}
            raise ValueError(f"{path}: expected a split {split!r} with samples, got {got}")
    label = features[label_key]
    sources: dict[str, Any] = {
        role: TfdsSource(
            _records(builder, split),
            name=f"{path}, split {split}",
            num_classes=label.num_classes,
            image_key=image_key,
            label_key=label_key,
        )
        for role, split in names.items()
    }
    return Dataset(name=builder.info.name, num_classes=label.num_classes, class_names=tuple(label.names), **sources)


def _open(path: str | None) -> Any:
    if path is None:
        raise ValueError("path: expected the folder of a dataset prepared by tfds, got None")
    folder = pathlib.Path(path)
    if not (folder / "dataset_info.json").is_file():
        versions = sorted(folder.glob("*/dataset_info.json"), key=lambda file: _version(file.parent.name))
        if not versions:
            raise ValueError(f"path: expected a prepared tfds dataset, got {path!r}, without a dataset_info.json")
        folder = versions[-1].parent
    import tensorflow_datasets

    return tensorflow_datasets.builder_from_directory(folder)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _records(builder: Any, split: str) -> Any:
    """Returns random access to the serialised examples of a split."""
    info = builder.info.splits[split]
    kind = str(getattr(builder.info.file_format, "value", builder.info.file_format))
    if kind == "array_record":
        from tensorflow_datasets import decode

        return builder.as_data_source(split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
    if kind == "tfrecord":
        return tfrecord.TFRecords([str(file) for file in info.filepaths], np.asarray(info.shard_lengths))
    raise ValueError(f"{builder.data_path}: expected array_record or tfrecord files, got {kind}")
