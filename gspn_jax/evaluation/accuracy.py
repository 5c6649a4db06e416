"""Top-1 and top-5 accuracy: exact counts in which every image counts once."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def count_batch(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns the counts "images", "top1" and "top5", () int32, and "loss", the summed cross entropy, () float32.

    Traceable.

    Args:
        logits: (B, num_classes) float32. The lower class wins a tie, so constant logits get no credit for every label.
        labels: (B,) int32.
        mask: (B,) bool; False rows are padding.
    """
    ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = (ranked == labels[:, None]) & mask[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return {
        "images": mask.sum(dtype=jnp.int32),
        "top1": hits[:, 0].sum(dtype=jnp.int32),
        "top5": hits.sum(dtype=jnp.int32),
        "loss": jnp.where(mask, nll, 0.0).sum(),
    }


def accuracy(
    count: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]],
    batches: Iterable[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Mapping[str, jax.Array]],
) -> dict[str, float]:
    """Returns top1 and top5 in percent, the mean loss, and the number of images.

    Args:
        count: batch on the devices -> the counts of `count_batch`.
        batches: host batches; every process must have the same number of them.
        place: moves a batch to the devices.

    Raises:
        ValueError: the batches have no image, or the loss is NaN or Inf.
    """
    pending: list[dict[str, jax.Array]] = []
    totals: dict[str, Any] = {"images": 0, "top1": 0, "top5": 0, "loss": 0.0}

    def drain(keep: int) -> None:
        """Adds the oldest counts to the totals until `keep` batches are pending."""
        while len(pending) > keep:
            counts = jax.device_get(pending.pop(0))
            for name in totals:
                totals[name] += counts[name].item()

    for batch in batches:
        pending.append(count(place(batch)))
        drain(keep=2)  # bounds the number of batches that wait on the device
    drain(keep=0)
    if not totals["images"]:
        raise ValueError("batches: expected at least one image, got none")
    if not math.isfinite(totals["loss"]):
        raise ValueError(
            f"loss: expected a finite number, got {totals['loss']}: the parameters or the logits are wrong"
        )
    images = totals["images"]
    return {
        "top1": 100.0 * totals["top1"] / images,
        "top5": 100.0 * totals["top5"] / images,
        "loss": totals["loss"] / images,
        "images": images,
    }
