"""Folders of image files: root/train/CLASS/FILE and root/val/CLASS/FILE."""

import os
import pathlib

import numpy as np

from gspn_jax.data import decoding
from gspn_jax.data.sources.protocol import Dataset, FileSource

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")


class ImageFolder(FileSource):
    """One split: the files of every class folder, in sorted order."""

    def __init__(self, folder: pathlib.Path, class_names: tuple[str, ...]):
        """Lists the files once. Names are kept as one array of bytes: a million of them pass quickly to workers."""
        files = [_image_files(folder / name) for name in class_names]
        self.folder = str(folder)
        self.files = np.array([file for names in files for file in names], dtype=np.bytes_)
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int, /) -> tuple[bytes, int]:
        return decoding.read_file(self.describe(index)), int(self.labels[index])

    def describe(self, index: int, /) -> str:
        return os.path.join(self.folder, self.class_names[self.labels[index]], os.fsdecode(bytes(self.files[index])))


def image_folder(path: str | None = None) -> Dataset:
    """Opens images of any size in root/train/CLASS/ and root/val/CLASS/; the classes are train's sorted folders.

    Files whose name starts with a dot or has no image extension (jpg, jpeg, png, webp, bmp, ppm, tif, tiff, gif, in
    any case) are left out. A class may be missing in val, because validation sets may be small, but not in train.
    Without a folder train the classes are those of val: enough to evaluate.

    Args:
        path: the root folder.

    Raises:
        ValueError: a missing or empty folder, a class without training images, a class that only val has.
    """
    if path is None:
        raise ValueError("path: expected a folder with train/CLASS/FILE and val/CLASS/FILE, got None")
    root = pathlib.Path(path)
    names = {"val": _class_names(root, "val")} if (root / "val").is_dir() else {}
    names["train"] = _class_names(root, "train") if (root / "train").is_dir() or not names else names["val"]
    names["val"] = names.get("val") or _class_names(root, "val")
    extra = sorted(set(names["val"]) - set(names["train"]))
    if extra:
        raise ValueError(
            f"{root}: expected the classes of val among those of train, got {len(extra)} others: {', '.join(extra[:5])}"
        )
    train, val = (ImageFolder(root / split, tuple(names["train"])) for split in ("train", "val"))
    counts = np.bincount(train.labels, minlength=len(names["train"]))
    if (root / "train").is_dir() and counts.min() == 0:
        empty = [name for name, count in zip(names["train"], counts, strict=True) if count == 0]
        raise ValueError(f"{root / 'train'}: expected images in every class folder, got none in {', '.join(empty[:5])}")
    if not len(val):
        raise ValueError(f"{root / 'val'}: expected at least one image, got none in {len(names['val'])} class folders")
    return Dataset(
        name="image_folder", num_classes=len(names["train"]), class_names=tuple(names["train"]), train=train, test=val
    )


def _class_names(root: pathlib.Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise ValueError(f"path: expected a folder with train/ and val/, got {str(root)!r}, where {split}/ is missing")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _is_class(entry) and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: expected one folder per class, got none")
    return names


def _image_files(folder: pathlib.Path) -> list[bytes]:
    """Returns the sorted names of the image files in a folder; empty if val lacks the class."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and _is_image(entry)
        ]
    return [os.fsencode(name) for name in sorted(names)]


def _is_class(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of symbolic links
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of symbolic links: a corrupt image, which the pipeline reports or drops
        return True
