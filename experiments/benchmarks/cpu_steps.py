"""Compiles a step of a model, then runs it once for every line of its standard input and prints the seconds.

`experiments.benchmarks.cpu` starts this file as a script: in this checkout, in an older one, and with PyTorch's Python.
So it imports JAX or transformers only where it needs them, and nothing of `experiments`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

IMAGENET_CLASSES = 1000


class Step(NamedTuple):
    """A step to time.

    Attributes:
        program: a preset of the classifiers, "mixer" (one GSPN mixer of 96 channels) or "convnext" (PyTorch's).
        training: also computes the gradients of the loss by all parameters (of the mixer: by its input too).
        batch: images.
        size: side of an image, or of the mixer's map.
        classes: outputs of the head.
        options: of the preset.
    """

    program: str
    training: bool
    batch: int
    size: int
    classes: int = IMAGENET_CLASSES
    options: dict[str, Any] = {}


STEPS = {
    "gspn_t_inference": Step("gspn_t", False, 4, 224),
    "gspn_t_training": Step("gspn_t", True, 4, 224),
    "convnext_t_inference": Step("convnext", False, 4, 224),
    "convnext_t_training": Step("convnext", True, 4, 224),
    "digits_training": Step("gspn_nano", True, 128, 8, 10, {"stem_stride": 1}),
    "cifar10_training": Step("gspn_nano", True, 128, 32, 10),
    "mixer_training": Step("mixer", True, 32, 16),
}


def prepare(step: Step) -> Callable[[], Any]:
    """Returns the compiled step: a function that returns when the step is done."""
    return _convnext(step) if step.program == "convnext" else _gspn(step)


def _gspn(step: Step) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from gspn_jax import models
    from gspn_jax.mixers import GSPNMixer

    is_mixer = step.program == "mixer"

    def build() -> Any:
        if is_mixer:
            return GSPNMixer(96, proxy_rank=8, rngs=nnx.Rngs(0))
        # Up to commit 6c3f906 the function had another name.
        create = models.create_model if hasattr(models, "create_model") else models.build  # pyright: ignore
        return create(step.program, num_classes=step.classes, rngs=nnx.Rngs(0), dtype=jnp.float32, **step.options)

    graph, params = nnx.split(nnx.jit(build)())
    x = jax.random.normal(jax.random.key(1), (step.batch, step.size, step.size, 96 if is_mixer else 3))
    labels = jnp.zeros(step.batch, jnp.int32)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = forward(params, x)
        return jnp.sum(y**2) if is_mixer else optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    function = jax.grad(loss, (0, 1) if is_mixer else 0) if step.training else forward
    compiled = jax.jit(function).lower(params, x).compile()
    return lambda: jax.block_until_ready(compiled(params, x))


def _convnext(step: Step) -> Callable[[], Any]:
    import transformers  # pyright: ignore[reportMissingImports]

    configuration = transformers.ConvNextConfig(num_labels=step.classes)
    model = transformers.ConvNextForImageClassification(configuration).train(step.training)
    model.requires_grad_(step.training)
    x = next(model.parameters()).detach().new_empty(step.batch, 3, step.size, step.size).normal_()
    labels = x.new_zeros(step.batch).long()

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(x, labels=labels).loss.backward()

    return train if step.training else lambda: model(x)


def main(name: str) -> None:
    run = prepare(STEPS[name])
    for _ in range(2):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
