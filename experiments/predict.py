"""Prints the most probable classes of images.

    python -m experiments.predict --workdir=runs/digits image.png [more.jpg ...]

Photographs are turned upright by their EXIF data.
"""

from collections.abc import Sequence

from absl import flags

from experiments import command_line
from gspn_jax import load_run


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of a run or of converted weights.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest good one.")
    flags.DEFINE_integer("top", 5, "Number of classes to print for each image.")


def main(paths: Sequence[str]) -> None:
    values = flags.FLAGS
    answers = load_run(values.workdir, step=values.step, task="classification").predict(list(paths), top=values.top)
    for path, classes in zip(paths, answers, strict=True):
        print(path)
        for name, share in classes:
            print(f"  {100 * share:6.2f}%  {name}")


if __name__ == "__main__":
    command_line.start(main, define_flags, positional="IMAGE")
