import gzip
import pathlib
import struct
from typing import Any

import numpy as np
import pytest

from gspn_jax import data


def write_npz(path: pathlib.Path, **changed) -> str:
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (12, 5, 4, 3), np.uint8),
        "y_train": np.arange(12, dtype=np.int64) % 4,
        "x_test": rng.integers(0, 256, (6, 5, 4, 3), np.uint8),
        "y_test": np.arange(6, dtype=np.int64) % 4,
    }
    arrays.update(changed)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def write_idx(folder: pathlib.Path, name: str, array: np.ndarray, *, zipped: bool) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if zipped:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)


def write_fashion(folder: pathlib.Path, *, zipped: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (10, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(10).astype(np.uint8),
    }
    for name, array in arrays.items():
        write_idx(folder, name, array, zipped=zipped)
    return arrays


def test_digits_are_all_there_once_and_balanced():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    train, test = digits.train, digits.test
    assert (len(train), len(test), digits.num_classes) == (1437, 360, 10)
    test_counts = np.bincount([test[i][1] for i in range(360)])
    assert test_counts.tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    train_counts = np.bincount([train[i][1] for i in range(1437)])
    assert (train_counts + test_counts).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    images = np.stack([split[i][0] for split in (train, test) for i in range(len(split))])
    assert images.shape == (1797, 8, 8, 3) and images.dtype == np.uint8
    assert np.all(images[..., :1] == images)
    bunch: Any = load_digits()
    original = np.round(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in images[..., 0]) == sorted(image.tobytes() for image in original)
    assert images.max() == 255


def test_digits_split_is_the_same_every_time():
    first, second = data.load("digits"), data.load("digits", "")
    assert all(np.array_equal(first.test[i][0], second.test[i][0]) for i in range(360))


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist_reads_idx_files(tmp_path, zipped):
    arrays = write_fashion(tmp_path, zipped=zipped)
    fashion = data.load("fashion_mnist", str(tmp_path))
    assert (len(fashion.train), len(fashion.test), fashion.num_classes) == (20, 10, 10)
    assert fashion.class_names[7] == "Sneaker"
    image, label = fashion.train[13]
    np.testing.assert_array_equal(image, np.stack([arrays["train-images-idx3-ubyte"][13]] * 3, axis=2))
    assert label == 3


def test_fashion_mnist_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a folder of Fashion-MNIST.*nowhere"):
        data.load("fashion_mnist", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="expected train-images-idx3-ubyte or train-images-idx3-ubyte.gz"):
        data.load("fashion_mnist", str(tmp_path))
    write_fashion(tmp_path, zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: expected a readable idx file, got "):
        data.load("fashion_mnist", str(tmp_path))
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(ValueError, match=r"\(10, 28, 28\) = 7840 bytes of data, got 7839"):
        data.load("fashion_mnist", str(tmp_path))
    path.write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match="expected an idx file of 3 axes"):
        data.load("fashion_mnist", str(tmp_path))


def test_npz_gives_what_was_saved(tmp_path):
    path = write_npz(tmp_path / "tiny.npz", y_test=np.array([[3], [2], [1], [0], [3], [2]], np.uint8))
    dataset = data.load("npz", path, class_names=("a", "b", "c", "d"))
    assert (dataset.name, dataset.num_classes, dataset.class_names) == ("tiny", 4, ("a", "b", "c", "d"))
    assert [dataset.test[i][1] for i in range(6)] == [3, 2, 1, 0, 3, 2]
    np.testing.assert_array_equal(dataset.train[7][0], np.load(path)["x_train"][7])
    assert dataset.train.describe(7) == f"{path}, split train, sample 7"


def test_npz_repeats_grey_to_rgb(tmp_path):
    grey = np.arange(12 * 20, dtype=np.uint8).reshape(12, 5, 4)
    dataset = data.load("npz", write_npz(tmp_path / "grey.npz", x_train=grey, x_test=grey[:6, ..., None]))
    for source in (dataset.train, dataset.test):
        np.testing.assert_array_equal(source[2][0], np.stack([grey[2]] * 3, axis=2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": None}, r"expected an .npz file with x_train, y_train, x_test, y_test, got .*without x_train"),
        ({"x_test": np.zeros((6, 5, 4, 3), np.float32)}, "split test: images: expected dtype uint8.*got float32"),
        ({"x_test": np.zeros((6, 5, 4, 2), np.uint8)}, r"images: expected shape .* got \(6, 5, 4, 2\)"),
        ({"y_test": np.zeros(5, np.int32)}, r"split test: labels: expected shape \(6,\), one per image, got \(5,\)"),
        ({"y_test": np.zeros(6, np.float32)}, "split test: labels: expected integers, got dtype float32"),
        ({"y_train": np.zeros(12, np.float32)}, "y_train: expected integers"),
        (
            {"y_test": np.array([0, 1, 4, 1, 9, 0])},
            r"split test: labels: expected 0 to 3 \(num_classes=4\), got 4 at sample 2 \(2 such labels\)",
        ),
        ({"y_train": np.array([-1, *range(11)])}, r"split train: labels: expected 0 to 10 .* got -1 at sample 0"),
        ({"x_test": np.zeros((0, 5, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, "split test: .*got an empty split"),
        ({"y_train": np.array([object()] * 12)}, r"expected an .npz file with"),
        (
            {"y_train": np.array([0, 1, 10**12, *range(9)])},
            "bad.npz: y_train: expected labels below 1,048,576, got 1,000,000,000,000 at sample 2",
        ),
        ({"y_train": np.full(12, -5)}, "num_classes: expected 1 to 1,048,576, got -4"),
        ({"y_train": np.zeros((12, 2), int)}, r"y_train: expected integers \(N,\), got int64 \(12, 2\)"),
        (
            {"x_train": np.zeros((12, 0, 4, 3), np.uint8)},
            r"split train: images: expected at least one row and one column, got \(12, 0, 4, 3\)",
        ),
    ],
)
def test_npz_faults_are_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        data.load("npz", write_npz(tmp_path / "bad.npz", **changed))


def test_files_that_are_not_npz(tmp_path):
    with pytest.raises(ValueError, match="nowhere.npz', which is not a file"):
        data.load("npz", str(tmp_path / "nowhere.npz"))
    (tmp_path / "text.npz").write_text("no array")
    with pytest.raises(ValueError, match=r"path: expected an .npz file with .*text.npz"):
        data.load("npz", str(tmp_path / "text.npz"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="one.npy.*a single array"):
        data.load("npz", str(tmp_path / "one.npy"))
    whole = pathlib.Path(write_npz(tmp_path / "cut.npz"))
    whole.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"path: expected an .npz file with .*cut.npz"):
        data.load("npz", str(whole))


def test_fake_is_repeatable_and_its_classes_differ():
    dataset = data.load("fake", image_size=(12, 20), num_classes=5, train_size=200, test_size=100)
    image, label = dataset.train[13]
    assert image.shape == (12, 20, 3) and image.dtype == np.uint8 and label == 3
    np.testing.assert_array_equal(image, dataset.train[13][0])
    assert not np.array_equal(image, dataset.train[18][0]) and dataset.train[18][1] == 3
    assert not np.array_equal(dataset.train[0][0], dataset.test[0][0])
    # The classes are learnable: the nearest mean colour of the training images classifies held-out images.
    colours = np.stack([dataset.train[i][0].mean(axis=(0, 1)) for i in range(200)])
    centres = np.stack([colours[label::5].mean(axis=0) for label in range(5)])
    found = [np.argmin(np.abs(dataset.test[i][0].mean(axis=(0, 1)) - centres).sum(axis=1)) for i in range(100)]
    assert np.mean(np.array(found) == np.arange(100) % 5) > 0.9


@pytest.mark.parametrize(
    ("name", "path", "options", "message"),
    [
        ("imagenet", None, {}, "name: expected one of digits, fake, .* got 'imagenet'"),
        ("digits", "somewhere", {}, "path: expected None.*got 'somewhere'"),
        ("fake", "somewhere", {}, "path: expected None.*got 'somewhere'"),
        ("npz", None, {}, "path: expected an .npz file.*got None"),
        ("image_folder", "", {}, "path: expected a folder.*got None"),
        ("tfds", None, {}, "path: expected the folder.*got None"),
        ("fake", None, {"size": 3}, r"fake: expected options among \['image_size', .*got \['size'\]"),
        ("fake", None, {"train_size": 0}, "train_size: expected at least 1, got 0"),
        ("fake", None, {"image_size": 0}, "image_size: expected a positive side or .*, got 0"),
        ("fake", None, {"image_size": (8, 8, 8)}, r"image_size: expected a positive side or .*, got \(8, 8, 8\)"),
        ("fake", None, {"num_classes": 10**12}, "num_classes: expected 1 to 1,048,576, got 1,000,000,000,000"),
        ("fake", None, {"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_load_names_what_is_wrong(name, path, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, path, **options)
