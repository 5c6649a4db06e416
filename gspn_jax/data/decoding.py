"""Decodes image files to RGB pixels, at no higher resolution than needed."""

import errno
import io
import os
import stat
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow's errors for damaged files. File system errors cannot occur, because files are read before they are decoded.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
_DECODER_ERRORS = (*_DECODER_ERRORS, Image.DecompressionBombError)

# The JPEG decoder can halve an image up to three times at almost no cost. It may do so while this many decoded pixels
# remain for each pixel of the result in each direction: the bicubic filter then still does the last reduction.
_PIXELS_KEPT = 2.0

# Transposition that turns the stored pixels upright, by the EXIF tag "Orientation"; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of a file.

    Raises:
        CorruptImage: a folder, a pipe (reading one could wait forever) or another special file, or symbolic links that
            form a loop; the message names the path.
        OSError: the file is missing or cannot be read.
    """
    name = os.fspath(path)
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait, too
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptImage(f"{name}: expected a regular file, got a loop of symbolic links") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise CorruptImage(f"{name}: expected a regular file, got a folder, pipe or device")
    with open(number, "rb") as file:
        return file.read()


def open_picture(data: bytes, *, exif_rotation: bool = False) -> Image.Image:
    """Returns an image whose header is read; `decode` reads the pixels.

    Args:
        data: contents of an image file.
        exif_rotation: turns the image upright by its EXIF tag "Orientation". An image that is turned is decoded in this
            call, at full size.

    Raises:
        CorruptImage: this is not an image.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its text holds an address that differs at each try
        raise CorruptImage("not a readable image") from error
    except _DECODER_ERRORS as error:
        raise CorruptImage(f"not a readable image ({error})") from error
    return upright(picture) if exif_rotation else picture


def decode(picture: Image.Image, reduction: float = 1.0) -> Image.Image:
    """Decodes an image to RGB.

    Args:
        picture: an opened, possibly not yet decoded, image of any mode.
        reduction: by how much the caller is going to shrink it (4.0: four pixels of a row become one). A JPEG is then
            decoded at 1/2, 1/4 or 1/8 of its size if that keeps two pixels or more for each pixel of the result.

    Returns:
        The image in mode "RGB"; smaller than its header says if it was reduced.

    Raises:
        CorruptImage: the pixels cannot be decoded, for example because the file is cut off.
    """
    if reduction >= 2 * _PIXELS_KEPT and picture.format == "JPEG":
        scale = reduction / _PIXELS_KEPT
        size = int(picture.width / scale), int(picture.height / scale)
    else:
        size = None
    _load(picture, size)
    return _to_rgb(picture)


def _load(picture: Image.Image, draft: tuple[int, int] | None = None) -> None:
    try:
        if draft is not None:
            picture.draft(None, draft)
        picture.load()
    except _DECODER_ERRORS as error:
        raise CorruptImage(f"cannot be decoded ({error})") from error


def upright(picture: Image.Image) -> Image.Image:
    """Returns an image turned upright by its EXIF tag "Orientation"; CorruptImage if it cannot be decoded."""
    if _orientation(picture) not in _UPRIGHT:
        return picture
    _load(picture)  # which already turns a TIFF, and then removes the tag
    method = _UPRIGHT.get(_orientation(picture))
    return picture if method is None else picture.transpose(method)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # damaged EXIF data do not make an image unreadable
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16"):  # Pillow's own conversion clips 16-bit grey at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("F", "I"):  # Pillow clips at 0 and 255, and most of these images have another range
        raise CorruptImage(f"expected an image of 8 or 16 bits a channel, got Pillow's mode {picture.mode}")
    if picture.mode == "P":  # straight to RGB, Pillow warns about palettes with transparency
        return picture.convert("RGBA").convert("RGB")
    return picture.convert("RGB")
