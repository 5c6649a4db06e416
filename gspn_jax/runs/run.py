"""A run: a description, parameters, and everything that training, evaluation and sampling ask of them."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from PIL import Image

from gspn_jax import data
from gspn_jax.data.decoding import CorruptImage
from gspn_jax.data.pictures import prepare_picture, read_picture
from gspn_jax.models.report import layer_report
from gspn_jax.runs.description import RunDescription, model_builder, network_of
from gspn_jax.training.functional import Functional
from gspn_jax.training.sharding import MeshOptions, make_mesh, replicate
from gspn_jax.training.state import Parameters
from gspn_jax.training.tasks import Task

Picture = Any  # uint8 (H, W, 3), a Pillow image, or the path of an image file


class Run(abc.ABC):
    """A trained, converted or new run; one subclass for each task.

    Args:
        description: what the run is.
        weights: "raw" and, where the run keeps it, "ema": nested dicts of arrays; empty for a run that starts.
        parameters: which of them `model` has.
        workdir: where the run was loaded from.
        step: of the checkpoint.

    Attributes:
        description, weights, parameters, workdir, step: as given.
        class_names: names of the classes, in the order of the labels.

    Raises:
        ValueError: the description is of another task, or of a network that does not do it.
    """

    task_name: ClassVar[str]
    networks: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        description: RunDescription,
        weights: Mapping[str, Parameters] | None = None,
        *,
        parameters: str = "raw",
        workdir: str = "",
        step: int = 0,
    ):
        network = network_of(description)
        if network not in self.networks:
            raise ValueError(
                f"model.name: expected a {' or a '.join(self.networks)}, as {self.task_name} needs, "
                f"got {description['model']['name']!r}, a {network}"
            )
        self.description, self.weights, self.parameters = description, dict(weights or {}), parameters
        self.workdir, self.step = workdir, step
        self.class_names = list(description["class_names"])
        self.num_classes = description["num_classes"]

    @property
    def build(self) -> Callable[[nnx.Rngs], nnx.Module]:
        """NNX rngs -> the model with fresh parameters."""
        return model_builder(self.description)

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The model with the parameters of this run. ValueError for a run that has none yet."""
        return Functional(self.build).merge(jax.tree.map(jnp.asarray, self.params))

    @property
    def params(self) -> Parameters:
        """The chosen parameters: a nested dict of host arrays."""
        if self.parameters not in self.weights:
            raise ValueError(
                f"parameters: expected one of {', '.join(self.weights) or 'none'}, got {self.parameters!r}"
            )
        return self.weights[self.parameters]

    @functools.cached_property
    def task(self) -> Task:
        """The task as evaluation and sampling need it."""
        return self.make_task()

    def layer_report(self, batch_size: int) -> list[str]:
        """Describes what each line scan and propagation of the model runs on, with so many images at a time."""
        return layer_report(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))), *self.model_inputs(batch_size))

    def evaluate(
        self,
        source: data.Source | data.Latents,
        *,
        weights: str | None = None,
        batch_size: int = 128,
        on_corrupt: str = "stop",
        num_threads: int = 8,
    ) -> dict[str, float]:
        """Evaluates parameters on every image of a source, on all devices.

        Args:
            source: images, or latents of a generator that denoises them.
            weights: "raw" or "ema"; by default the parameters of this run.
            batch_size: images at a time, over all devices.
            on_corrupt: "stop" or "drop" for images that cannot be read.
            num_threads: threads that read images.

        Returns:
            Numbers by name: top1 and top5 in percent, loss, images; of a generator loss and images.
        """
        mesh = make_mesh(MeshOptions())
        with jax.set_mesh(mesh):
            evaluate = make_evaluate(
                self.task, source, self.description,
                batch_size=batch_size, on_corrupt=on_corrupt, num_threads=num_threads,
            )  # fmt: skip
            return evaluate(replicate(self.weights[weights or self.parameters], mesh))

    def pictures(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Returns images as the data pipeline prepares them for evaluation: resized, centre cropped.

        Args:
            images: uint8 arrays (H, W, 3), (H, W) or (B, H, W, 3), Pillow images, paths of image files, or a sequence
                of these, of any sizes. Photographs that say so in their EXIF data are turned upright.

        Returns:
            uint8 (B, S, S, 3), S the image size of the run.

        Raises:
            ValueError: no image, or one that is not an image.
        """
        described = self.description["data"]
        is_one = isinstance(images, str | Image.Image) or hasattr(images, "__fspath__")
        is_one |= isinstance(images, np.ndarray | jax.Array) and images.ndim < 4
        each: list[Any] = [images] if is_one else list(images)  # pyright: ignore[reportArgumentType]
        if not each:
            raise ValueError("images: expected at least one image, got none")
        size, resize = described["image_size"], described["resize"] or None
        prepared = []
        for number, image in enumerate(each):
            try:
                prepared.append(prepare_picture(read_picture(image), size, resize))
            except CorruptImage as error:
                name = f"image {number}" if isinstance(image, np.ndarray | Image.Image) else str(image)
                message = str(error) if str(error).startswith(name) else f"{name}: {error}"
                raise ValueError(f"images: {message}") from error
        return np.stack(prepared)

    @abc.abstractmethod
    def make_task(self, **training: Any) -> Any:
        """Returns the task; `training`: options that only matter while training."""

    @abc.abstractmethod
    def model_inputs(self, batch_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns shapes and dtypes of what the model is called on."""

    @abc.abstractmethod
    def preprocess(self, images: Picture | Sequence[Picture]) -> jax.Array:
        """Returns what the model takes, (B, S, S, 3) float32, made of `images` as `pictures` takes them."""

    @abc.abstractmethod
    def computation(self) -> dict[str, Any]:
        """Returns, by key of the configuration, what the model computes and its parameters' shapes do not show."""

    @classmethod
    @abc.abstractmethod
    def summary(cls, numbers: Mapping[str, float]) -> list[str]:
        """Returns the last lines of a run, made of the numbers of its evaluation."""


def differences(source: Run, target: Run) -> list[str]:
    """Returns a line for each thing that two runs compute differently although their parameters have equal shapes."""
    was, here = source.computation(), target.computation()
    was, here = ({key: _as_tuple(value) for key, value in values.items()} for values in (was, here))
    return [
        f"{key}: {was[key]} there, {here[key]} here; --config.{key}={str(was[key]).replace(' ', '')} computes the same"
        for key in was
        if key in here and was[key] != here[key]
    ]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def make_evaluate(
    task: Task,
    source: data.Source | data.Latents,
    description: RunDescription,
    *,
    batch_size: int,
    num_threads: int = 8,
    num_workers: int = 0,
    on_corrupt: str = "stop",
) -> Callable[[Parameters], dict[str, float]]:
    """Returns parameters -> the task's numbers on `source`.

    Call it under a mesh (`jax.set_mesh`): batches are rounded up to a multiple of its `data` axis. Arguments as of
    `Run.evaluate`.
    """

    def evaluate(params: Parameters) -> dict[str, float]:
        rows = jax.sharding.get_mesh().shape["data"]
        batches = data.evaluation_batches(
            source,
            batch_size=-(-batch_size // rows) * rows,
            image_size=description["data"]["image_size"],
            resize=description["data"]["resize"] or None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=num_threads,
            num_workers=num_workers,
            on_corrupt=on_corrupt,  # pyright: ignore[reportArgumentType]
            exif_rotation=description["data"].get("exif_rotation", False),
        )
        try:
            numbers = task.evaluate(params, batches)
        finally:
            batches.close()
        if batches.dropped:
            logging.warning("%d corrupt images were left out of the evaluation", batches.dropped)
        return numbers

    return evaluate
