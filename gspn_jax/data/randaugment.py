"""RandAugment: a few randomly chosen operations on each image, at one strength for all of them.

The operations and ranges are those of the recipe "rand-m9-mstd0.5-inc1" with which most ImageNet classifiers are
trained. A level runs from 0 to 10. In the "increasing" variant a higher level always means a stronger change; without
it, posterize and solarize weaken as the level grows, and colour, contrast, brightness and sharpness go from 0.1 to 1.9.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10.0
_PROBABILITY = 0.5  # that a chosen operation is applied
FILL = (124, 116, 104)  # colour beyond the edges: the mean colour of ImageNet
_BICUBIC = Image.Resampling.BICUBIC


def _affine(image: Image.Image, coefficients: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _BICUBIC, fillcolor=FILL)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotates counter-clockwise about the centre."""
    return image.rotate(degrees, _BICUBIC, fillcolor=FILL)


def shear_x(image: Image.Image, slope: float) -> Image.Image:
    """Row y moves left by slope * y."""
    return _affine(image, (1, slope, 0, 0, 1, 0))


def shear_y(image: Image.Image, slope: float) -> Image.Image:
    """Column x moves up by slope * x."""
    return _affine(image, (1, 0, 0, slope, 1, 0))


def translate_x(image: Image.Image, share: float) -> Image.Image:
    """Moves left by a share of the width."""
    return _affine(image, (1, 0, share * image.width, 0, 1, 0))


def translate_y(image: Image.Image, share: float) -> Image.Image:
    """Moves up by a share of the height."""
    return _affine(image, (1, 0, 0, 0, 1, share * image.height))


def posterize(image: Image.Image, bits: float) -> Image.Image:
    """Keeps the highest bits of each value; 8 keeps them all."""
    mask = 0xFF & ~(0xFF >> int(bits))
    return image.point([value & mask for value in range(256)] * 3)


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    """Inverts values >= threshold; 256 changes nothing."""
    return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)


def solarize_add(image: Image.Image, amount: float) -> Image.Image:
    """Adds `amount` to values below 128."""
    return image.point([min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3)


def colour(image: Image.Image, factor: float) -> Image.Image:
    """Changes saturation: 0 gives grey, 1 the image, more gives stronger colours."""
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Changes contrast: 0 gives the mean grey, 1 the image."""
    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Changes brightness: 0 gives black, 1 the image."""
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Changes sharpness: 0 smooths, 1 gives the image, 2 sharpens."""
    return ImageEnhance.Sharpness(image).enhance(factor)


_FIXED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
}
_GRADED: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "colour": colour,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}
OPERATIONS = (*_FIXED, *_GRADED)
_GEOMETRY = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}


def amount(operation: str, level: float, *, increasing: bool, negative: bool) -> float:
    """Returns the argument of a graded operation at a level (0 to 10).

    Its unit is that of the operation's function: degrees, slopes, shares of the side, bits, thresholds or factors.
    `negative` reverses the direction of operations that have one.
    """
    share = level / MAX_LEVEL
    sign = -1.0 if negative else 1.0
    if operation in _GEOMETRY:
        return sign * share * _GEOMETRY[operation]
    if operation == "posterize":
        return 4 - int(share * 4) if increasing else int(share * 4)
    if operation == "solarize":
        return 256 - min(256, int(share * 256)) if increasing else min(256, int(share * 256))
    if operation == "solarize_add":
        return min(128, int(share * 110))
    return max(0.1, 1.0 + sign * 0.9 * share) if increasing else 0.1 + 1.8 * share


def apply(image: Image.Image, operation: str, level: float, *, increasing: bool, negative: bool) -> Image.Image:
    """Applies one operation of OPERATIONS to an RGB image."""
    if operation in _FIXED:
        return _FIXED[operation](image)
    return _GRADED[operation](image, amount(operation, level, increasing=increasing, negative=negative))


def randaugment(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    magnitude: float,
    std: float,
    increasing: bool,
    operations: int,
) -> Image.Image:
    """Chooses `operations` operations, with repetition, and applies each with probability 1/2.

    Args:
        image: RGB.
        rng: chooses operations, levels (normal about `magnitude`, clipped to 0..10) and directions.
        magnitude: mean level, 0 to 10.
        std: standard deviation of the level.
        increasing: the variant in which a higher level is always a stronger change.
        operations: number of operations.
    """
    for choice in rng.integers(len(OPERATIONS), size=operations):
        if rng.random() >= _PROBABILITY:
            continue
        level = min(MAX_LEVEL, max(0.0, rng.normal(magnitude, std)))
        image = apply(image, OPERATIONS[choice], level, increasing=increasing, negative=rng.random() < 0.5)
    return image
