"""One picture of many images, each with its caption."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

LEAST_SIDE = 96  # pixels: smaller images are drawn larger, each pixel as a square
CAPTION_HEIGHT = 14
GAP = 4


def contact_sheet(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Returns images uint8 (N, H, W, 3) in a nearly square grid, each above its caption."""
    count, height, width, _ = images.shape
    times = math.ceil(LEAST_SIDE / min(height, width))
    columns = math.ceil(math.sqrt(count * height / width))
    step_x, step_y = width * times + GAP, height * times + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, math.ceil(count / columns) * step_y + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = GAP + number % columns * step_x, GAP + number // columns * step_y
        sheet.paste(Image.fromarray(image.repeat(times, axis=0).repeat(times, axis=1)), (left, top))
        while pen.textlength(caption) > width * times:
            caption = caption[:-1]
        pen.text((left, top + height * times), caption, fill="black")
    return sheet
