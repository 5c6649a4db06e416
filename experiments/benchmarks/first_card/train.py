"""Whole train steps in bfloat16: forward, loss, backward, clipping, AdamW and moving average; random labels, no data.

The step is written here: `gspn_jax.training` brings libraries for logs that a borrowed machine may lack.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.benchmarks.first_card.context import Context
from gspn_jax.diffusion import GaussianDiffusion
from gspn_jax.models import create_model
from pallas_kernels import record_choices

CLASSES = 1000
TIMED_STEPS = 10
EMA_DECAY = 0.9999

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]  # module, batch of images or latents, key -> mean loss


def compile_step(context: Context, model: str) -> None:
    """Compiles a train step into the cache of compiled programs, for `time_step`."""
    start = time.perf_counter()
    program, *_ = _compiled(context, model)
    context.write({"kind": "compiled", "model": model, "compile_s": time.perf_counter() - start, "mib": _mib(program)})


def time_step(context: Context, model: str) -> None:
    """Times the train step of a model by the host's clock, over steps in a row."""
    start = time.perf_counter()
    program, state, batch, kernels = _compiled(context, model)
    compile_s = time.perf_counter() - start
    # The values do not change the time.
    state, batch = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.02, leaf.dtype), (state, batch))
    for _ in range(1 if context.dry else 2):
        state = program(state, batch)
    jax.block_until_ready(state)
    steps = 1 if context.dry else TIMED_STEPS
    start = time.perf_counter()
    for _ in range(steps):
        state = program(state, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / steps
    memory = jax.devices()[0].memory_stats() or {}
    row = {"kind": "train", "model": model, "images": len(batch), "milliseconds": 1e3 * seconds}
    row |= {"images_per_s": len(batch) / seconds, "compile_s": compile_s, "mib": _mib(program)}
    context.write(row | {"peak_mib": round(memory.get("peak_bytes_in_use", 0) / 2**20), "kernels": kernels})


def _compiled(context: Context, model: str) -> tuple[Any, Any, Any, list[str]]:
    """Returns the compiled step, the shapes of its state and batch, and the kernels that the layers chose."""
    is_classifier, dry = model == "gspn_t", context.dry
    options: dict[str, Any] = {}
    if dry and is_classifier:
        options = dict(widths=(8,), depths=(1,), global_stages=(0,))
    elif dry:
        options = dict(width=16, depth=2) | (dict(num_heads=2) if model.startswith("dit") else {})
    build = functools.partial(create_model, model, num_classes=CLASSES, dtype="bfloat16", **options)
    graph, params = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    images, side = ((2, 8) if dry else (128, 224)) if is_classifier else ((2, 4) if dry else (32, 32))
    batch = jax.ShapeDtypeStruct((images, side, side, 3 if is_classifier else 4), jnp.float32)
    loss = _classification if is_classifier else _denoising
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def step(state: Any, batch: jax.Array) -> Any:
        params, ema, moments, number = state
        key = jax.random.fold_in(jax.random.key(0), number)
        grads = jax.grad(lambda params: loss(nnx.merge(graph, params), batch, key))(params)
        updates, moments = transform.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 1 - EMA_DECAY), moments, number + 1

    state = params, params, jax.eval_shape(transform.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    with record_choices() as choices:
        program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return program, state, batch, sorted({f"{one.implementation}: {one.variants}" for one in choices})


def _classification(module: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    labels = jax.random.randint(key, (len(images),), 0, CLASSES)
    return optax.softmax_cross_entropy_with_integer_labels(module(images, key=key), labels).mean()


def _denoising(module: Any, latents: jax.Array, key: jax.Array) -> jax.Array:
    objective, keys = GaussianDiffusion.linear(), jax.random.split(key, 3)
    times = jax.random.randint(keys[0], (len(latents),), 0, objective.num_steps)
    labels = jax.random.randint(keys[1], times.shape, 0, CLASSES)
    noise = jax.random.normal(keys[2], latents.shape)

    def denoiser(x: jax.Array, time: jax.Array) -> jax.Array:
        return module(x, time, labels, key=key).astype(jnp.float32)

    return objective.losses(denoiser, latents, times, noise)["loss"].mean()


def _mib(program: jax.stages.Compiled) -> int | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    return round((memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 2**20)
