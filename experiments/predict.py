"""Prints the most probable classes of images. Photographs are turned upright by their EXIF data.

python -m experiments.predict --workdir=runs/digits image.png [more.jpg ...]
"""

from collections.abc import Sequence

from absl import flags

from experiments import command_line
from gspn_jax import load_run


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_integer("top", 5, "How many classes to show.")


def main(paths: Sequence[str]) -> None:
    values = flags.FLAGS
    answers = load_run(values.workdir, step=values.step, task="classification").predict(list(paths), top=values.top)
    for path, classes in zip(paths, answers, strict=True):
        print(path)
        for name, share in classes:
            print(f"  {100 * share:6.2f}%  {name}")


if __name__ == "__main__":
    command_line.start(main, define_flags, positional="IMAGE")
