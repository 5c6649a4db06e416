"""Datasets that fit in memory: scikit-learn's digits, and .npz files."""

import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from gspn_jax.data.sources.protocol import MAX_CLASSES, ArraySource, Dataset, check_class_names

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def digits(path: str | None = None) -> Dataset:
    """Opens scikit-learn's 1,797 digits: uint8 (8, 8, 3), 10 classes; a stratified random fifth is held out."""
    if path is not None:
        raise ValueError(f"path: expected None, because the digits come with scikit-learn, got {path!r}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the file has 17 grey levels, 0 to 16
    numbers = train_test_split(np.arange(len(images)), test_size=0.2, stratify=bunch.target, random_state=0)
    train, test = (
        ArraySource(images[chosen], bunch.target[chosen], name=f"digits, split {split}", num_classes=10)
        for split, chosen in zip(("train", "test"), numbers, strict=True)
    )
    return Dataset(name="digits", num_classes=10, class_names=check_class_names(None, 10), train=train, test=test)


def npz(
    path: str | None = None, *, num_classes: int | None = None, class_names: Sequence[str] | None = None
) -> Dataset:
    """Opens the arrays x_train, y_train, x_test, y_test of one .npz file.

    Args:
        path: the file. Images uint8 (N, H, W, 3) or (N, H, W); labels integers (N,) or (N, 1).
        num_classes: by default the largest training label plus one.
        class_names: by default "0", "1", ...

    Raises:
        ValueError: no such file, not an .npz file, a missing array, labels that ask for more than MAX_CLASSES classes,
            or arrays that `ArraySource` refuses.
    """
    if path is None:
        raise ValueError("path: expected an .npz file with x_train, y_train, x_test, y_test, got None")
    arrays = _read(pathlib.Path(path))
    for key in ("y_train", "y_test"):
        if arrays[key].ndim == 2 and arrays[key].shape[1] == 1:
            arrays[key] = arrays[key][:, 0]
    if num_classes is None:
        labels = arrays["y_train"]
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{path}: y_train: expected integers (N,), got {labels.dtype} {labels.shape}")
        largest = int(labels.argmax())
        num_classes = int(labels[largest]) + 1
        if num_classes > MAX_CLASSES:
            got = f"{labels[largest]:,} at sample {largest}"
            raise ValueError(f"{path}: y_train: expected labels below {MAX_CLASSES:,}, got {got}")
    names = check_class_names(class_names, num_classes)
    splits: dict[str, Any] = {
        split: ArraySource(
            arrays[f"x_{split}"], arrays[f"y_{split}"], name=f"{path}, split {split}", num_classes=num_classes
        )
        for split in ("train", "test")
    }
    return Dataset(
        name=pathlib.Path(path).stem,
        num_classes=num_classes,
        class_names=names,
        **splits,
    )


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"path: expected an .npz file, got {str(path)!r}, which is not a file")
    try:
        with path.open("rb") as file:
            saved = np.load(file, allow_pickle=False)
            if isinstance(saved, np.ndarray):
                raise ValueError("a single array")
            missing = [key for key in _KEYS if key not in saved]
            if missing:
                raise ValueError(f"arrays {sorted(saved)}, without {', '.join(missing)}")
            return {key: saved[key] for key in _KEYS}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"path: expected an .npz file with {', '.join(_KEYS)}, got {str(path)!r}: {error}") from error
