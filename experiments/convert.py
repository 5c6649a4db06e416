"""Makes a workdir of published parameters, as a training run would leave one.

    python -m experiments.convert --source=gspn_t.pth --workdir=runs/gspn_t_released
    python -m experiments.evaluate --workdir=runs/gspn_t_released --data_path=ROOT
    python -m experiments.convert --source=DiT-XL-2-256x256.pt --workdir=runs/dit_released
    python -m experiments.sample --workdir=runs/dit_released --autoencoder=vae.safetensors --guidance=4

Takes .pt, .pth and .safetensors files, the .index.json of a sharded one, and hf://owner/name/file of the Hugging Face
Hub. PyTorch is not needed, and nothing in a file can run. Of a checkpoint, the moving averages are taken where it holds
them.

The parameters' names tell the network: a classifier or a generator of GSPN's authors, or a DiT or SiT, which
--objective tells apart. Their shapes tell its sizes.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from gspn_jax.weights import OBJECTIVES, convert


def define_flags() -> None:
    flags.DEFINE_string("source", None, "File of parameters, or hf://owner/name/file.", required=True)
    flags.DEFINE_string("workdir", None, "Folder to make.", required=True)
    flags.DEFINE_enum("alignment", None, ["unturned", "aligned"], "Of GSPN; by default unturned, as released.")
    flags.DEFINE_integer("chunk", None, "Lines of a local block of GSPN; by default 2.", lower_bound=1)
    flags.DEFINE_list(
        "global_stages", None, "Stages of a classifier with global blocks, from 0; by default as released."
    )
    flags.DEFINE_list("global_blocks", None, "Global blocks of a GSPN generator, from 0; by default none, as released.")
    flags.DEFINE_enum("objective", None, OBJECTIVES, "Of a generator; by default ddpm, and SiT's is linear.")
    flags.DEFINE_integer("num_heads", None, "Of a DiT; by default as the published one of its width.", lower_bound=1)
    flags.DEFINE_integer("image_size", None, "Side of the images; by default 224, of generators 256.", lower_bound=1)
    flags.DEFINE_integer("resize", None, "Short side before the centre crop; by default image size / 0.875.")
    flags.DEFINE_string("class_names", None, "Text file, one class a line, in the order of the labels.")


def main() -> None:
    chosen = flags.FLAGS
    names = ("alignment", "chunk", "global_stages", "global_blocks", "objective", "num_heads", "image_size", "resize")
    options: dict[str, Any] = {name: chosen[name].value for name in names}
    for name in ("global_stages", "global_blocks"):
        if options[name] is not None:
            options[name] = command_line.integers(name, options[name])
    class_names = Path(chosen.class_names).read_text().splitlines() if chosen.class_names else ()
    converted = convert(chosen.source, chosen.workdir, class_names=class_names, **options)
    name = converted.description["model"]["name"]
    print(f"{name}: {converted.parameters:,} parameters written to {chosen.workdir}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
