"""Draws images of prompts with Stable Diffusion 1.5, SDXL and their kin, by attention or by GSPN.

    python -m experiments.text_to_image --model=FOLDER --prompt="a photo of a cat" --output=cat.png
    python -m experiments.text_to_image --model=FOLDER --prompt="a cat" --prompt="a dog" --size=768x512 --output=a.png
    python -m experiments.text_to_image --model=FOLDER --prompts=captions.txt --output_folder=pictures

The model is a folder in the layout of diffusers, a single file of parameters, a workdir of experiments.convert, or
hf://owner/name of a folder on the Hugging Face Hub. One image is written as it is, several as a grid with captions.

With --prompts, every line of the file is a caption, and --output_folder gets one PNG for each, with a manifest of the
settings: the same command goes on after an interruption, and several processes share the work. An image depends only
on the seed and its number.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from experiments import command_line
from experiments.contact_sheet import contact_sheet
from experiments.sample import check_output
from gspn_jax import TextToImage
from gspn_jax.data.pictures import read_picture
from gspn_jax.evaluation.image_archive import to_pixels
from gspn_jax.mixers import MIXERS
from gspn_jax.models.registry import DTYPES
from gspn_jax.text_to_image import SAMPLERS
from gspn_jax.text_to_image.picture_folder import PictureFolder


def define_flags() -> None:
    flags.DEFINE_string("model", None, "Folder, file, workdir, or hf://owner/name.", required=True)
    flags.DEFINE_multi_string("prompt", [], "Text to draw; may be given several times.")
    flags.DEFINE_string("output", "image.png", "Image file.")
    flags.DEFINE_string("prompts", "", "Text file with a caption on every line, instead of --prompt.")
    flags.DEFINE_string("output_folder", "", "With --prompts: folder for one PNG a caption.")
    flags.DEFINE_string("negative_prompt", None, "What guidance leads away from.")
    flags.DEFINE_integer("num_images", 1, "Images of each --prompt.", lower_bound=1)
    flags.DEFINE_string("size", "", "WIDTHxHEIGHT in pixels, multiples of 8; by default the size of training.")
    flags.DEFINE_integer("num_steps", 50, "Steps of the sampler.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1: none. By default 7.5, for SDXL 5.")
    flags.DEFINE_enum("sampler", None, SAMPLERS, "By default the model's own.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 4, "Images at a time.", lower_bound=1)
    flags.DEFINE_string("image", "", "Picture to start from, resized to --size if that is given.")
    flags.DEFINE_float("strength", None, "With --image: share of the steps that run; by default 0.8.")
    flags.DEFINE_enum("mixer", None, list(MIXERS), "What takes the place of self-attention; by default attention.")
    flags.DEFINE_string("replacements", None, "File or folder of the mixer's released parameters.")
    flags.DEFINE_enum("alignment", None, ["aligned", "unturned"], "Of GSPN; by default unturned with --replacements.")
    flags.DEFINE_integer("chunk", 4, "Lines after which GSPN's scans restart; 0: never.", lower_bound=0)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of parameters and computation.")
    flags.DEFINE_string("model_config", None, "For a single file: folder with its configurations and tokenizers.")
    flags.DEFINE_list("original_size", [], "SDXL: HEIGHT,WIDTH of the training image; by default the image's size.")
    flags.DEFINE_list("target_size", [], "SDXL: HEIGHT,WIDTH after the crop; by default the image's size.")
    flags.DEFINE_list("crop", [], "SDXL: TOP,LEFT of the crop; by default none.")
    flags.DEFINE_bool("fsdp", False, "Shards the UNet's parameters over the devices.")


def main() -> None:
    chosen = flags.FLAGS
    if bool(chosen.prompt) == bool(chosen.prompts):
        raise ValueError("prompt, prompts: expected one of the two, got " + ("both" if chosen.prompt else "none"))
    if bool(chosen.prompts) != bool(chosen.output_folder):
        raise ValueError("output_folder: expected a folder with --prompts and none with --prompt")
    size = _size(chosen.size)
    call: dict[str, Any] = dict(num_steps=chosen.num_steps, guidance=chosen.guidance, sampler=chosen.sampler)
    call |= dict(seed=chosen.seed, negative_prompt=chosen.negative_prompt)
    call |= {} if size is None else dict(height=size[1], width=size[0])
    for name in ("original_size", "target_size", "crop"):
        words: list[str] = getattr(chosen, name)
        numbers = command_line.integers(name, words)
        if numbers and len(numbers) != 2:
            raise ValueError(f"{name}: expected two numbers, got {','.join(words)}")
        call |= {name: numbers} if numbers else {}
    captions = _captions(chosen.prompts) if chosen.prompts else []
    if chosen.image and captions:
        raise ValueError(f"image: expected none with --prompts, got {chosen.image}")
    if chosen.image:
        call |= dict(image=_picture(chosen.image, size), strength=chosen.strength)
    elif chosen.strength is not None:
        raise ValueError(f"strength: expected none without --image, got {chosen.strength}")
    if not captions:
        check_output(chosen.output)
    pipeline = TextToImage.load(
        chosen.model, mixer=chosen.mixer, replacements=chosen.replacements, alignment=chosen.alignment,
        chunk=chosen.chunk or None, dtype=chosen.dtype, config=chosen.model_config, fsdp=chosen.fsdp,
    )  # fmt: skip
    if captions:
        draw_captions(pipeline, captions, chosen.output_folder, batch_size=chosen.batch_size, **call)
        return
    images = to_pixels(
        2 * pipeline(chosen.prompt, num_images=chosen.num_images, batch_size=chosen.batch_size, **call) - 1
    )
    if jax.process_index() == 0:
        names = [prompt for prompt in chosen.prompt for _ in range(chosen.num_images)]
        sheet = Image.fromarray(images[0]) if len(images) == 1 else contact_sheet(images, names)
        sheet.save(chosen.output)
        print(f"{chosen.output}: {len(images)} images of {images.shape[2]}x{images.shape[1]} pixels")


def draw_captions(pipeline: TextToImage, captions: list[str], path: str, *, batch_size: int, **call: Any) -> None:
    """Draws a PNG of each caption into a folder; image n has the noise of number n.

    Args:
        pipeline: the model.
        captions: of the images.
        path: folder, see `PictureFolder`.
        batch_size: images at a time.
        call: arguments of the pipeline; recorded.

    Raises:
        ValueError: the folder was begun with other captions or settings.
    """
    with PictureFolder.opened(path, captions, pipeline.settings(**call)) as folder:
        missing = folder.missing()
        for start in tqdm(range(0, len(missing), batch_size), unit="batch", disable=not missing):
            numbers = missing[start : start + batch_size]
            padded = numbers + numbers[-1:] * (batch_size - len(numbers))  # one compiled program for all batches
            images = pipeline([captions[n] for n in padded], numbers=padded, progress=False, **call)
            for number, image in zip(numbers, images, strict=False):
                folder.write(number, image)
    if jax.process_index() == 0:
        print(f"{path}: {len(captions)} images")


def _captions(path: str) -> list[str]:
    captions = Path(path).read_text().splitlines()
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError(f"prompts: expected a text file with a caption on every line, got {path}")
    return captions


def _size(text: str) -> tuple[int, int] | None:
    """Returns (width, height), None if the flag is empty."""
    if not text:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"size: expected WIDTHxHEIGHT, such as 768x512, got {text}")
    return int(sides[0]), int(sides[1])


def _picture(path: str, size: tuple[int, int] | None) -> np.ndarray:
    """Returns a picture (H, W, 3), 0 to 1, resized to `size` or to the multiples of 8 below its own."""
    picture = read_picture(path)
    width, height = size or (max(side // 8 * 8, 8) for side in picture.size)
    return np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255


if __name__ == "__main__":
    command_line.start(main, define_flags)
