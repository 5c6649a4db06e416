"""Makes a workdir of published parameters, as a training run would leave one.

    python -m experiments.convert --source=gspn_t.pth --workdir=runs/gspn_t_released
    python -m experiments.evaluate --workdir=runs/gspn_t_released --data_path=ROOT
    python -m experiments.convert --source=DiT-XL-2-256x256.pt --workdir=runs/dit_released
    python -m experiments.sample --workdir=runs/dit_released --autoencoder=vae.safetensors --guidance=4
    python -m experiments.convert --source=stable-diffusion-v1-5 --workdir=runs/sd15 --dtype=bfloat16
    python -m experiments.text_to_image --model=runs/sd15 --prompt="a photo of a cat"

Takes .pt, .pth and .safetensors files, the .index.json of a sharded one, and hf://owner/name/file of the Hugging Face
Hub. PyTorch is not needed, and nothing in a file can run. Of a checkpoint, the moving averages are taken where it holds
them.

The parameters' names tell the network: a classifier or a generator of GSPN's authors, or a DiT or SiT, which
--objective tells apart. Their shapes tell its sizes. A folder in the layout of diffusers (here or hf://owner/name) is a
text-to-image model, and so is a single file with the names of Stability's programs: Stable Diffusion 1.5, SDXL and
their kin.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from gspn_jax import text_to_image
from gspn_jax.mixers import MIXERS
from gspn_jax.models.registry import DTYPES
from gspn_jax.weights import OBJECTIVES, convert

OF_TEXT_TO_IMAGE = ("alignment", "chunk", "mixer", "replacements", "dtype", "model_config")
OF_OTHERS = ("alignment", "chunk", "global_stages", "global_blocks", "objective", "num_heads", "image_size", "resize")


def define_flags() -> None:
    flags.DEFINE_string("source", None, "File of parameters, or hf://owner/name/file.", required=True)
    flags.DEFINE_string("workdir", None, "Folder to make.", required=True)
    flags.DEFINE_enum("alignment", None, ["unturned", "aligned"], "Of GSPN; by default unturned, as released.")
    flags.DEFINE_integer("chunk", None, "Lines of a local block of GSPN; by default 2, in a UNet 4.", lower_bound=1)
    flags.DEFINE_list(
        "global_stages", None, "Stages of a classifier with global blocks, from 0; by default as released."
    )
    flags.DEFINE_list("global_blocks", None, "Global blocks of a GSPN generator, from 0; by default none, as released.")
    flags.DEFINE_enum("objective", None, OBJECTIVES, "Of a generator; by default ddpm, and SiT's is linear.")
    flags.DEFINE_integer("num_heads", None, "Of a DiT; by default as the published one of its width.", lower_bound=1)
    flags.DEFINE_integer("image_size", None, "Side of the images; by default 224, of generators 256.", lower_bound=1)
    flags.DEFINE_integer("resize", None, "Short side before the centre crop; by default image size / 0.875.")
    flags.DEFINE_enum("mixer", None, list(MIXERS), "Of a UNet: what takes the place of self-attention.")
    flags.DEFINE_string("replacements", None, "Of a UNet: file or folder of the mixer's released parameters.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Of a text-to-image model's stored parameters; by default float32.")
    flags.DEFINE_string("model_config", None, "Of a single file: folder with its configurations and tokenizers.")
    flags.DEFINE_string("class_names", None, "Text file, one class a line, in the order of the labels.")


def main() -> None:
    chosen = flags.FLAGS
    is_text_to_image = text_to_image.is_published(chosen.source)
    taken, others = (OF_TEXT_TO_IMAGE, OF_OTHERS) if is_text_to_image else (OF_OTHERS, OF_TEXT_TO_IMAGE)
    kind = "a text-to-image model" if is_text_to_image else "this network"
    for name in {*others, *(["class_names"] if is_text_to_image else [])} - set(taken):
        if chosen[name].value is not None:
            raise ValueError(f"{name}: expected none for {kind}, got {chosen[name].value}")
    options: dict[str, Any] = {name: chosen[name].value for name in taken}
    if is_text_to_image:
        options["config"] = options.pop("model_config")
        given = {name: value for name, value in options.items() if value is not None}
        _, count = text_to_image.convert(chosen.source, chosen.workdir, **given)
        print(f"text-to-image model: {count:,} parameters written to {chosen.workdir}")
        return
    for name in ("global_stages", "global_blocks"):
        if options[name] is not None:
            options[name] = command_line.integers(name, options[name])
    class_names = Path(chosen.class_names).read_text().splitlines() if chosen.class_names else ()
    converted = convert(chosen.source, chosen.workdir, class_names=class_names, **options)
    name = converted.description["model"]["name"]
    print(f"{name}: {converted.parameters:,} parameters written to {chosen.workdir}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
