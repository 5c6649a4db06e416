"""Tests of the exact counts of right answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspn_jax.evaluation.accuracy import accuracy, count_batch


def test_counts_match_numpy_and_leave_padding_out():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 9)).astype(np.float32)
    labels, mask = rng.integers(9, size=40).astype(np.int32), rng.random(40) < 0.7
    got = jax.device_get(jax.jit(count_batch)(logits, labels, mask))
    order = np.argsort(-logits, axis=1)
    top1, top5 = order[:, 0] == labels, (order[:, :5] == labels[:, None]).any(1)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), labels]
    assert got["images"] == mask.sum() and got["top1"] == (top1 & mask).sum() and got["top5"] == (top5 & mask).sum()
    assert 0 < got["top1"] < got["top5"] < got["images"] < 40
    assert got["loss"] == pytest.approx(nll[mask].sum(), rel=1e-5)


def test_equal_logits_are_not_all_right():
    labels = jnp.arange(10, dtype=jnp.int32)
    got = count_batch(jnp.zeros((10, 10)), labels, jnp.ones(10, bool))
    assert (int(got["top1"]), int(got["top5"])) == (1, 5)


def test_fewer_than_five_classes():
    got = count_batch(jnp.eye(3), jnp.asarray([0, 1, 0], jnp.int32), jnp.ones(3, bool))
    assert (int(got["top1"]), int(got["top5"])) == (2, 3)


def test_percentages_over_batches():
    batches = [
        {"logits": np.eye(4, dtype=np.float32), "label": np.array(label, np.int32), "mask": np.array(mask)}
        for label, mask in (([0, 1, 2, 0], [True] * 4), ([0, 0, 0, 0], [True, True, False, False]))
    ]
    got = accuracy(
        lambda batch: count_batch(batch["logits"], batch["label"], batch["mask"]),
        batches,
        lambda batch: {name: jnp.asarray(rows) for name, rows in batch.items()},
    )
    assert got["images"] == 6 and got["top1"] == pytest.approx(100 * 4 / 6) and got["top5"] == 100.0


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(lambda batch: {}, [], lambda batch: {})
