"""Data sources, one file per family; protocol.py defines their interface."""

import inspect
from collections.abc import Callable
from typing import Any

from gspn_jax.data.sources.arrays import digits, npz
from gspn_jax.data.sources.fake import fake
from gspn_jax.data.sources.fashion_mnist import fashion_mnist
from gspn_jax.data.sources.image_folder import image_folder
from gspn_jax.data.sources.latents import latents
from gspn_jax.data.sources.protocol import Dataset
from gspn_jax.data.sources.tfds import tfds

SOURCES: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fake": fake,
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
    "latents": latents,
    "npz": npz,
    "tfds": tfds,
}


def load(name: str, path: str | None = None, **options: Any) -> Dataset:
    """Opens a dataset by name.

    Args:
        name: one of SOURCES.
        path: a file for "npz", a folder for "image_folder", "latents", "tfds" and (optional) "fashion_mnist", None or
            "" for "digits" and "fake".
        options: further arguments of the source's function.

    Raises:
        ValueError: unknown name or option, missing path, or wrong data; the message is one line.
    """
    if name not in SOURCES:
        raise ValueError(f"name: expected one of {', '.join(sorted(SOURCES))}, got {name!r}")
    source = SOURCES[name]
    known = [option for option in inspect.signature(source).parameters if option != "path"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name}: expected options among {known}, got {unknown}")
    return source(str(path) if path else None, **options)
