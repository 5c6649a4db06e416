"""Draws how far one pixel reaches: under each of the four directions, and under their merge.

    python -m experiments.figures.influence --output=docs/influence.png

The logits of the propagation are smooth random fields, like those of a network; lam, gate and merge are 1. The
brightness of a pixel is the amount that the marked pixel adds to it, on a root scale.
"""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags

from experiments import command_line
from pallas_kernels import DIRECTIONS, line_scan, row_stochastic

HEIGHT, WIDTH = 72, 128
PIXEL = (40, 52)


def influence(seed: int = 0) -> np.ndarray:
    """Returns the amount that the marked pixel adds to each pixel, (4, H, W), one map for each direction."""
    coarse = jax.random.normal(jax.random.key(seed), (4, HEIGHT // 12, WIDTH // 12, 3))
    logits = 3 * jax.image.resize(coarse, (4, HEIGHT, WIDTH, 3), "cubic")[..., None]
    x = jnp.zeros((1, HEIGHT, WIDTH, 1)).at[(0, *PIXEL, 0)].set(1)
    maps = [
        line_scan(x, row_stochastic(logits[d, None], direction=direction), jnp.ones_like(x), direction=direction)
        for d, direction in enumerate(DIRECTIONS)
    ]
    return np.stack(maps)[:, 0, :, :, 0]


def draw(path: str) -> None:
    """Writes the picture into a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = influence()
    panels = dict(zip((*DIRECTIONS, "merged"), (*maps, maps.mean(axis=0)), strict=True))
    figure, axes = pyplot.subplots(1, 5, figsize=(15, 2.1), layout="constrained")
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(np.sqrt(panel), cmap="magma", vmin=0, vmax=np.sqrt(maps.mean(axis=0).max()) / 3)
        axis.plot(PIXEL[1], PIXEL[0], marker="+", color="cyan", markersize=8)
        axis.set_title(title, fontsize=12)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def define_flags() -> None:
    flags.DEFINE_string("output", "docs/influence.png", "PNG file to write.")


def main() -> None:
    draw(flags.FLAGS.output)
    print(f"Written to {flags.FLAGS.output}.")


if __name__ == "__main__":
    command_line.start(main, define_flags)
