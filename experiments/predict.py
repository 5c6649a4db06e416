"""The likeliest classes of pictures.

python -m experiments.predict --workdir=runs/digits picture.png [more.jpg ...]
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import classification, command_line
from gspn_jax import data
from gspn_jax.training import load_parameters


def run(workdir: str, paths: Sequence[str], *, step: int | None = None, top: int = 5) -> list[list[tuple[str, float]]]:
    """Returns, for each picture, its `top` classes as (name, probability), likeliest first.

    Args:
        workdir: of a run, or of converted weights; the moving average is used where there is one.
        paths: image files of any size.
        step: None for the newest good checkpoint.
        top: how many classes.

    Raises:
        ValueError, OSError, CheckpointError: in one line, what is wrong.
    """
    if not paths:
        raise ValueError("paths: expected at least one image file, got none")
    params, meta = load_parameters(workdir, step)
    task = classification.make_task(meta)
    count = min(top, meta["num_classes"])
    if count < 1:
        raise ValueError(f"top: expected an integer >= 1, got {top}")
    batches = data.evaluation_batches(
        data.ImageFiles(paths),
        batch_size=min(len(paths), 32),
        image_size=meta["data"]["image_size"],
        resize=meta["data"]["resize"] or None,
        num_threads=1,
        exif_rotation=True,
    )
    likeliest = jax.jit(lambda params, images: jax.lax.top_k(jax.nn.softmax(task.logits(params, images)), count))
    params = jax.tree.map(jnp.asarray, params)
    answers: list[list[tuple[str, float]]] = []
    for batch in batches:
        shares, classes = jax.device_get(likeliest(params, jnp.asarray(batch["image"])))
        for row in np.flatnonzero(batch["mask"]):
            names = [meta["class_names"][number] for number in classes[row]]
            answers.append([(name, float(share)) for name, share in zip(names, shares[row], strict=True)])
    return answers


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer("step", None, "Checkpoint; by default the newest good one.")
    flags.DEFINE_integer("top", 5, "How many classes to show.")


def main(argv: Sequence[str]) -> None:
    answers = run(flags.FLAGS.workdir, argv, step=flags.FLAGS.step, top=flags.FLAGS.top)
    for path, classes in zip(argv, answers, strict=True):
        print(path)
        for name, share in classes:
            print(f"  {100 * share:6.2f}%  {name}")


if __name__ == "__main__":
    command_line.start(main, define_flags)
