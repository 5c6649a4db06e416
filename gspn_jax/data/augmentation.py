"""Augments training images on the host. Normalisation, mixup and cutmix happen on the device."""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance

from gspn_jax.data import crops
from gspn_jax.data.arguments import check_bool, check_integer, check_number
from gspn_jax.data.randaugment import MAX_LEVEL, randaugment

# Red, green and blue of ImageNet's training images, on the scale 0..255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

_CROPS = ("none", "resized", "padded")
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 3.3)
_ERASING_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings of the augmentation; the defaults change nothing.

    A recipe for ImageNet sets crop="resized", flip=True, randaugment_magnitude=9 and erasing=0.25.

    Attributes:
        crop: "resized": a random box, resampled to the image size; "padded": the image moved by up to `crop_padding`
            pixels, with black borders; "none": the centre, as in evaluation.
        crop_scale: smallest and largest area of a "resized" crop, as shares of the image.
        crop_padding: pixels, for "padded".
        flip: mirror half of the images, left to right.
        randaugment_magnitude: mean level of RandAugment, 0 to 10; 0 switches it off.
        randaugment_std: standard deviation of the level.
        randaugment_increasing: the variant in which a higher level is always a stronger change.
        randaugment_ops: number of operations for each image.
        color_jitter: brightness, contrast and saturation change by factors from 1 - x to 1 + x; only if RandAugment
            is off.
        erasing: probability that noise replaces a random box (2% to 33% of the area).

    Raises:
        ValueError: a value out of range; the message names it.
    """

    crop: str = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_padding: int = 4
    flip: bool = False
    randaugment_magnitude: float = 0.0
    randaugment_std: float = 0.5
    randaugment_increasing: bool = True
    randaugment_ops: int = 2
    color_jitter: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.crop not in _CROPS:
            raise ValueError(f"crop: expected one of {_CROPS}, got {self.crop!r}")
        scale = self.crop_scale
        is_pair = isinstance(scale, tuple | list) and len(scale) == 2 and all(isinstance(x, int | float) for x in scale)
        if not is_pair or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crop_scale: expected 0 < smallest <= largest <= 1, got {scale!r}")
        for name, most in (
            ("randaugment_magnitude", MAX_LEVEL),
            ("randaugment_std", math.inf),
            ("color_jitter", math.inf),
            ("erasing", 1),
        ):
            check_number(name, getattr(self, name), 0, most)
        for name in ("crop_padding", "randaugment_ops"):
            check_integer(name, getattr(self, name), 0)
        for name in ("flip", "randaugment_increasing"):
            check_bool(name, getattr(self, name))

    @property
    def needs_pillow(self) -> bool:
        """Whether an array of the right size must become a Pillow image."""
        return self.crop == "resized" or self.randaugment_magnitude > 0 or self.color_jitter > 0


def augment(
    picture: Image.Image | np.ndarray,
    image_size: crops.Size,
    augmentation: Augmentation,
    rng: np.random.Generator,
    out: np.ndarray,
) -> None:
    """Crops and augments one training image and writes it into `out`.

    Args:
        picture: an image of any size: a uint8 array (h, w, 3), or a Pillow image of any mode, decoded or not.
        image_size: (H, W) of the result.
        augmentation: which changes.
        rng: the only source of random numbers.
        out: uint8 (H, W, 3), written.

    Raises:
        CorruptImage: the image cannot be decoded.
    """
    if isinstance(picture, np.ndarray):
        if picture.shape[:2] == image_size and not augmentation.needs_pillow:
            _augment_array(picture, augmentation, rng, out)
            return
        picture = Image.fromarray(picture)
    image = _crop(picture, image_size, augmentation, rng)
    if augmentation.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation.randaugment_magnitude > 0:
        image = randaugment(
            image,
            rng,
            magnitude=augmentation.randaugment_magnitude,
            std=augmentation.randaugment_std,
            increasing=augmentation.randaugment_increasing,
            operations=augmentation.randaugment_ops,
        )
    elif augmentation.color_jitter > 0:
        image = color_jitter(image, augmentation.color_jitter, rng)
    out[:] = np.asarray(image)
    _maybe_erase(out, augmentation, rng)


def _crop(
    picture: Image.Image, image_size: crops.Size, augmentation: Augmentation, rng: np.random.Generator
) -> Image.Image:
    shape = (picture.height, picture.width)
    if augmentation.crop == "resized":
        return crops.resample(picture, crops.random_box(shape, augmentation.crop_scale, rng), image_size)
    image = crops.resample(picture, crops.centre_box(shape, image_size), image_size)
    if augmentation.crop == "padded":
        left, top = crops.random_shift(augmentation.crop_padding, rng)
        return image.crop((left, top, left + image.width, top + image.height))  # black outside
    return image


def _augment_array(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator, out: np.ndarray) -> None:
    """Augments an array like the rest of `augment`, but several times faster for small images, without Pillow."""
    if augmentation.crop == "padded":
        left, top = crops.random_shift(augmentation.crop_padding, rng)
        image = crops.shifted(image, left, top)
    flip = augmentation.flip and rng.random() < 0.5
    out[:] = image[:, ::-1] if flip else image
    _maybe_erase(out, augmentation, rng)


def _maybe_erase(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> None:
    if augmentation.erasing > 0 and rng.random() < augmentation.erasing:
        erase(image, rng)


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast and saturation, in random order, by factors from 1 - strength to 1 + strength."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=3)
    for number in rng.permutation(3):
        image = enhancers[number](image).enhance(factors[number])
    return image


def erase(image: np.ndarray, rng: np.random.Generator) -> None:
    """Overwrites a random box of a uint8 (H, W, 3) image by noise with ImageNet's mean and standard deviation.

    Its area is 2% to 33% of the image, its aspect ratio 0.3 to 3.3 (log-uniform). If ten boxes in a row do not fit into
    the image, it stays as it is.
    """
    height, width, _ = image.shape
    for _ in range(_ERASING_ATTEMPTS):
        area = height * width * rng.uniform(*_ERASED_AREA)
        aspect = math.exp(rng.uniform(math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            noise = rng.standard_normal((rows, columns, 3), dtype=np.float32)
            noise = noise * np.array(IMAGENET_STD, np.float32) + np.array(IMAGENET_MEAN, np.float32)
            image[top : top + rows, left : left + columns] = np.clip(np.round(noise), 0, 255).astype(np.uint8)
            return
