"""Draws one augmented training batch with its labels, exactly as a training run gets it.

    python -m experiments.figures.batch --config=configs/classifier.py:gspn_t --config.data.path=ROOT --output=batch.png
    python -m experiments.figures.batch --data_name=image_folder --data_path=ROOT --output=batch.png

Mixup and cutmix come later, on the device, and are not drawn.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from configs.classifier import get_config
from experiments import command_line
from experiments.contact_sheet import contact_sheet
from gspn_jax import data


def draw(config: Any, *, output: str, count: int, batch: int) -> str:
    """Writes a contact sheet of a batch that the configuration makes.

    Args:
        config: a configuration of `configs/classifier.py`.
        output: the file to write; its suffix gives the format.
        count: how many images of the batch, from the first.
        batch: which batch, from 0.

    Returns:
        One line that says which images were written.

    Raises:
        ValueError: count or batch is too small, or the data is wrong.
    """
    if count < 1 or batch < 0:
        raise ValueError(f"count, batch: expected at least 1 image of batch 0 or later, got {count}, {batch}")
    dataset = data.load(config.data.name, config.data.path or None)
    # An image depends only on its place in the stream, so the rest of a large batch need not be made.
    stream = data.training_batches(
        dataset.train,
        batch_size=min(count, config.batch_size),
        image_size=config.data.image_size,
        augmentation=data.Augmentation(**config.augmentation.to_dict()),
        seed=config.seed,
        num_threads=0,  # threads would make later batches too
        on_corrupt=config.data.on_corrupt,
    )
    stream.restore({**stream.state(), "position": batch * config.batch_size})
    drawn = next(stream)
    sheet = contact_sheet(drawn["image"], [dataset.class_names[label] for label in drawn["label"]])
    sheet.save(output)
    return f"{output}: {len(drawn['image'])} of the {config.batch_size} images of batch {batch}"


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration and preset; by default gspn_t on ImageNet.")
    flags.DEFINE_string("data_name", None, "Data source, instead of the configuration's.")
    flags.DEFINE_string("data_path", None, "Path of the data, instead of the configuration's.")
    flags.DEFINE_string("output", "batch.png", "Picture to write.")
    flags.DEFINE_integer("count", 36, "How many images of the batch to draw.")
    flags.DEFINE_integer("batch", 0, "Which batch, from 0.")


def main() -> None:
    chosen = flags.FLAGS
    config: Any = chosen.config or get_config("gspn_t")
    if chosen.data_name is not None:
        config.data.name = chosen.data_name
        config.data.path = ""
    if chosen.data_path is not None:
        config.data.path = chosen.data_path
    print(draw(config, output=chosen.output, count=chosen.count, batch=chosen.batch))


if __name__ == "__main__":
    command_line.start(main, define_flags)
