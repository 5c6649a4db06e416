"""Runs of image classifiers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gspn_jax.batching import batched
from gspn_jax.runs.description import sizes_of
from gspn_jax.runs.run import Picture, Run
from gspn_jax.training.mixing import MixingOptions
from gspn_jax.training.tasks.classification import Classification

# Options that change the computation but not the parameters' shapes, and their values in a description without them.
_DEFAULTS = {
    "mixer": "gspn",
    "alignment": "aligned",
    "chunk": 2,
    "global_stages": (),
    "stem_stride": 4,
    "activation": "none",
}
_BATCH = 32  # images classified at a time


class ClassifierRun(Run):
    """A run of a classifier.

    `run.model(run.preprocess(images))` returns logits; `run.predict(images)` returns class names and probabilities.
    """

    task_name = "classification"
    networks = ("classifier",)

    def make_task(self, *, mixing: MixingOptions | None = None) -> Classification:
        """Returns the task.

        Args:
            mixing: mixup, cutmix and label smoothing of training batches; None for none.
        """
        described = self.description["data"]
        mean, std = described.get("mean", ()), described.get("std", ())
        return Classification(self.build, num_classes=self.num_classes, mean=mean, std=std, mixing=mixing)

    @functools.cached_property
    def task(self) -> Classification:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The task for evaluation, without mixing."""
        return self.make_task()

    def model_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns images (B, S, S, 3) float32."""
        size = self.description["data"]["image_size"]
        return (jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32),)

    def preprocess(self, images: Picture | Sequence[Picture]) -> jax.Array:
        """Returns the model's input, normalised images (B, S, S, 3) float32; arguments are those of `pictures`."""
        return self.task.normalised(jnp.asarray(self.pictures(images)))

    def predict(self, images: Picture | Sequence[Picture], top: int = 5) -> list[list[tuple[str, float]]]:
        """Returns the `top` most probable classes of each image.

        Args:
            images: see `pictures`.
            top: number of classes, at least 1.

        Returns:
            For each image a list of (class name, probability), most probable first.

        Raises:
            ValueError: `top` is less than 1, there is no image, or a value is not an image.
        """
        if top < 1:
            raise ValueError(f"top: expected an integer >= 1, got {top}")
        count, pictures = min(top, self.num_classes), self.pictures(images)
        answers = []
        for start in range(0, len(pictures), _BATCH):
            part = pictures[start : start + _BATCH]
            logits = self._logits(part)
            shares, classes = jax.device_get(jax.lax.top_k(jax.nn.softmax(logits), count))
            for row_shares, row_classes in zip(shares, classes, strict=True):
                names = [self.class_names[label] for label in row_classes]
                answers.append([(name, float(share)) for name, share in zip(names, row_shares, strict=True)])
        return answers

    def features(self, images: np.ndarray) -> np.ndarray:
        """Returns the input of the head, (B, F) float32, for uint8 images (B, H, W, 3), which are not resized."""
        return self._features(images)

    @functools.cached_property
    def _logits(self) -> Callable[[np.ndarray], np.ndarray]:
        return batched(self.task.logits, self.params, _BATCH)

    @functools.cached_property
    def _features(self) -> Callable[[np.ndarray], np.ndarray]:
        return batched(self.task.features, self.params, _BATCH)

    def computation(self) -> dict[str, Any]:
        """Returns the mixer's and the network's options of `_DEFAULTS`, and the normalisation of images."""
        options = {**_DEFAULTS, **sizes_of(self.description)}
        described = {f"model.{key}": options[key] for key in _DEFAULTS}
        return described | {f"data.{key}": self.description["data"].get(key) for key in ("mean", "std")}

    @classmethod
    def summary(cls, numbers: Mapping[str, float]) -> list[str]:
        """Returns lines with the accuracies of the parameters and, if the run keeps it, of the moving average.

        The last line is the run's result: top-1 of the moving average, or of the parameters.
        """
        lines = [f"parameters: top-1 {numbers['top1']:.2f}%, top-5 {numbers['top5']:.2f}%"]
        if "ema_top1" in numbers:
            lines.append(f"moving average: top-1 {numbers['ema_top1']:.2f}%, top-5 {numbers['ema_top5']:.2f}%")
        return [*lines, f"top-1: {numbers.get('ema_top1', numbers['top1']):.2f}%"]
