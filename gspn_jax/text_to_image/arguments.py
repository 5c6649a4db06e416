"""Checks of what a pipeline is called with."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from absl import logging

from gspn_jax.models.autoencoder import Autoencoder
from gspn_jax.text import Tokenizer


def prompts(
    prompt: str | Sequence[str], negative: str | Sequence[str] | None = None
) -> tuple[list[str], list[str] | None]:
    """Returns prompts and as many negative prompts, or None for these; ValueError for other numbers or kinds."""
    texts = _texts("prompt", prompt)
    if negative is None:
        return texts, None
    negatives = _texts("negative_prompt", negative)
    if len(negatives) not in (1, len(texts)):
        raise ValueError(f"negative_prompt: expected one text or {len(texts)}, got {len(negatives)}")
    return texts, negatives * (len(texts) // len(negatives))


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a text or several, got {value!r}")
    return texts


def warn_of_cut(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Warns of words that do not fit in the tokens that a model reads."""
    for text in dict.fromkeys(texts):
        cut = tokenizer.cut(text)
        if cut:
            most = tokenizer.length - 2
            logging.warning("the prompt %r has more than %d tokens; these words are cut: %s", text[:40], most, cut)


def images(image: Any, count: int, autoencoder: Autoencoder) -> np.ndarray:
    """Returns images or latents (count, H, W, 3 or 4) float32; one serves all. ValueError for other shapes."""
    array, channels, of_latents = np.asarray(image), autoencoder.channels, autoencoder.latent_channels
    array = (array[None] if array.ndim == 3 and array.shape[-1] == channels else array).astype(np.float32)
    if array.ndim != 4 or array.shape[-1] not in (channels, of_latents):
        raise ValueError(
            f"image: expected (H, W, {channels}), (B, H, W, {channels}) or latents (B, h, w, {of_latents}), "
            f"got {np.shape(image)}"
        )
    if len(array) not in (1, count):
        raise ValueError(f"image: expected 1 or {count}, as there are images to draw, got {len(array)}")
    if not np.isfinite(array).all() or (array.shape[-1] == channels and (array.min() < 0 or array.max() > 1)):
        raise ValueError(f"image: expected numbers from 0 to 1, got {array.min()} to {array.max()}")
    return np.broadcast_to(array, (count, *array.shape[1:]))


def latent_shape(
    autoencoder: Autoencoder,
    image: np.ndarray | None,
    noise: Any,
    height: int | None,
    width: int | None,
    *,
    default: tuple[int, int],
) -> tuple[int, int, int]:
    """Returns the shape (h, w, C) of latents.

    Args:
        autoencoder: gives factor and channels.
        image: images or latents to start from, as `images` returns them, or None.
        noise: (B, h, w, C) or None.
        height, width: in pixels; None: those of the images or the noise, else the default.
        default: (height, width) in pixels.

    Raises:
        ValueError: a side that is no multiple of the factor, or another one than that of the images.
    """
    factor, own = autoencoder.factor, None
    if image is not None:
        scale = 1 if image.shape[-1] == autoencoder.channels else factor
        own = (image.shape[1] * scale, image.shape[2] * scale)
    if np.ndim(noise) == 4:
        default = (np.shape(noise)[1] * factor, np.shape(noise)[2] * factor)
    sides = []
    for axis, (name, asked) in enumerate((("height", height), ("width", width))):
        side = (own or default)[axis] if asked is None else asked
        if not isinstance(side, Integral) or side < factor or side % factor:
            raise ValueError(f"{name}: expected a multiple of {factor}, got {side}")
        if own is not None and side != own[axis]:
            raise ValueError(f"{name}: expected {own[axis]}, as the image has, got {side}")
        sides.append(int(side) // factor)
    return sides[0], sides[1], autoencoder.latent_channels


def noise(array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns noise as float32; ValueError for another shape, NaN or Inf."""
    if np.shape(array) != shape:
        raise ValueError(f"noise: expected shape {shape}, got {np.shape(array)}")
    if not np.isfinite(array).all():
        raise ValueError("noise: expected finite numbers, got NaN or Inf")
    return np.asarray(array, np.float32)


def counts(**values: Any) -> None:
    """Raises ValueError for what is neither a whole number of at least 1 nor None."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of results; ValueError if it holds NaN or Inf."""
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf: dtype bfloat16 or float32 may help")
    return array


def sizes(
    pixels: tuple[int, int],
    original_size: Sequence[int] | None,
    crop: Sequence[int] | None,
    target_size: Sequence[int] | None,
    *,
    is_used: bool,
) -> tuple[int, ...]:
    """Returns SDXL's six numbers, or none for a model that does not use them.

    Args:
        pixels: (height, width) of the images, which stands for a missing original or target size.
        original_size, target_size: (height, width) in pixels.
        crop: (top, left) in pixels; None: (0, 0).
        is_used: whether the model takes them.

    Raises:
        ValueError: not two whole numbers of at least 0, or any if the model does not use them.
    """
    given = {"original_size": (original_size, pixels), "crop": (crop, (0, 0)), "target_size": (target_size, pixels)}
    found = []
    for name, (pair, default) in given.items():
        if pair is not None and not is_used:
            raise ValueError(f"{name}: expected None, since this model takes no sizes, got {pair}")
        values = np.asarray(default if pair is None else pair)
        if values.shape != (2,) or values.dtype.kind not in "iu" or values.min() < 0:
            raise ValueError(f"{name}: expected two whole numbers of at least 0, got {pair!r}")
        found += [int(value) for value in values]
    return tuple(found) if is_used else ()


def strength(value: float | None, num_steps: int, *, has_image: bool) -> float | None:
    """Returns the share of the steps that run, None without an image; ValueError for one out of range."""
    if not has_image:
        if value is not None:
            raise ValueError(f"strength: expected None without an image, got {value}")
        return None
    value = 0.8 if value is None else value
    if not 0 < value <= 1 or int(num_steps * value) < 1:
        raise ValueError(f"strength: expected at least 1 / {num_steps} and at most 1, got {value}")
    return value
