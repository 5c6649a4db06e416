"""From the bytes of an image file to RGB pixels, at no more than the resolution that is needed."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow raises on damaged files. File system errors are not among them: files are read before they are decoded.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_DECODER_ERRORS = (*_DECODER_ERRORS, Image.DecompressionBombError)

# The JPEG decoder can halve an image up to three times at almost no cost. It is allowed to while this many decoded
# pixels remain for each pixel of the result: the bicubic filter then still does the last reduction.
_PIXELS_KEPT = 2.0


class CorruptImage(ValueError):
    """A picture that cannot be decoded; the message names it."""


def open_picture(data: bytes) -> Image.Image:
    """Reads the header of an image file; pixels are decoded by `decode`. CorruptImage when it is no image."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its text holds an address that differs at each try
        raise CorruptImage("not a readable image") from error
    except _DECODER_ERRORS as error:
        raise CorruptImage(f"not a readable image ({error})") from error


def decode(picture: Image.Image, reduction: float = 1.0) -> Image.Image:
    """Decodes a picture to RGB.

    Args:
        picture: an opened, possibly not yet decoded, picture of any mode.
        reduction: by how much the caller is going to shrink it (4.0: four pixels of a row become one). A JPEG is then
            decoded at 1/2, 1/4 or 1/8 of its size where that keeps two pixels or more for each pixel of the result.

    Returns:
        The picture in mode "RGB"; smaller than it says in its header where it was reduced.

    Raises:
        CorruptImage: the pixels cannot be decoded, also when only part of the file is there.
    """
    try:
        if reduction >= 2 * _PIXELS_KEPT and picture.format == "JPEG":
            scale = reduction / _PIXELS_KEPT
            picture.draft(None, (int(picture.width / scale), int(picture.height / scale)))
        picture.load()
    except _DECODER_ERRORS as error:
        raise CorruptImage(f"cannot be decoded ({error})") from error
    return _to_rgb(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit grey at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("F", "I"):  # Pillow clips at 0 and 255, and most of these have another range
        raise CorruptImage(f"expected a picture of 8 or 16 bits a channel, got Pillow's mode {picture.mode}")
    if picture.mode == "P":  # straight to RGB, Pillow warns about palettes with transparency
        return picture.convert("RGBA").convert("RGB")
    return picture.convert("RGB")
