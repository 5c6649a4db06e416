"""What the benchmark of the mixers compares: GSPN by each path of its kernels and without them, and attention.

A mixer's whole work is timed, from its map and parameters; of GSPN also the propagation alone, from a proxy or from
maps in memory. Parameters are bfloat16 like the maps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels
from experiments import kernel_contenders
from experiments.kernel_contenders import HEAD_WIDTH, attention_heads, linear_attention, softmax_attention
from experiments.kernel_shapes import KernelShape
from gspn_jax.mixers import GSPNMixer
from pallas_kernels import DIRECTIONS, UpProjection
from pallas_kernels.dispatch import PATHS
from pallas_kernels.mosaic import paths
from pallas_kernels.up_projection import gradients_of_maps, maps_of

DTYPE = "bfloat16"
# What a program starts from. "mixer": a map and the mixer's parameters. "proxy": a map, its proxy, the columns of the
# projections and merge; making the maps is part of it. "maps": a map, logits, lam, gate, skip and merge.
SCOPES = ("mixer", "proxy", "maps")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One mixer, and for GSPN how it propagates."""

    name: str
    kind: str  # "gspn", "separate", "softmax" or "linear"
    implementation: str
    path: str | None = None  # of "gspn" by kernels; None for the cheapest by their table
    normalised: bool = False  # of "separate": by a pass of its own, into float32 weights

    @property
    def propagates(self) -> bool:
        return self.kind in ("gspn", "separate")

    @property
    def interpreted(self) -> "Contender":
        """The same with its kernels interpreted."""
        return dataclasses.replace(self, implementation=self.implementation.replace("mosaic", "mosaic_interpret"))


LISTED = (
    Contender("table", "gspn", "mosaic"),
    Contender("flash_attention", "softmax", "cudnn"),
    *(Contender(path, "gspn", "mosaic", path) for path in PATHS),
    Contender("separate", "separate", "mosaic"),
    Contender("separate_normalised", "separate", "mosaic", normalised=True),
    Contender("xla", "gspn", "xla"),
    Contender("linear_attention", "linear", "xla"),
    Contender("softmax_attention", "softmax", "xla"),
)
CONTENDERS = {contender.name: contender for contender in LISTED}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def maps_in(parts: int, proxy: jax.Array, up: UpProjection) -> list[tuple[jax.Array, Any, Any, Any]]:
    """`maps_of`, in 1 part or in 4 of one direction each. The gradients are summed in float32, as the kernels do: the
    rule of the matrix products themselves rounds each term of the proxy's to bfloat16, an error of 1%."""
    return [maps_of(proxy, part) for part in _parts(parts, up)]


def _maps_forward(parts, proxy, up):
    return maps_in(parts, proxy, up), (proxy, up)


def _maps_backward(parts, residuals, grads):
    proxy, up = residuals
    found = [gradients_of_maps(proxy, part, grad) for part, grad in zip(_parts(parts, up), grads, strict=True)]
    of_up = [jnp.concatenate(arrays, axis=1) for arrays in zip(*(one for _, one in found), strict=True)]
    cast = UpProjection(*(grad.astype(array.dtype) for grad, array in zip(of_up, up, strict=True)))
    return functools.reduce(jnp.add, [of_proxy for of_proxy, _ in found]).astype(proxy.dtype), cast


maps_in.defvjp(_maps_forward, _maps_backward)


def _parts(parts: int, up: UpProjection) -> list[UpProjection]:
    each = len(DIRECTIONS) // parts
    return [UpProjection(*(array[:, i * each : (i + 1) * each] for array in up)) for i in range(parts)]  # type: ignore


def four_scans(contender: Contender, chunk: int | None, x: jax.Array, maps: Any, merge: jax.Array) -> jax.Array:
    """`pallas_kernels.propagate` as a line scan for each direction and passes over the maps by XLA.

    Args:
      maps: of `maps_in` in four parts, so that no direction is cut out of an array, which would copy it.
    """
    y = jnp.zeros(x.shape, jnp.float32)
    for scale, direction, (logits, lam, gate, skip) in zip(merge, DIRECTIONS, maps, strict=True):
        logits, lam, gate, skip = (array.squeeze(3) for array in (logits, lam, gate, skip))
        options: Any = dict(direction=direction, chunk=chunk, implementation=contender.implementation)
        if contender.normalised:
            weights = pallas_kernels.row_stochastic(logits, direction=direction)
            h = pallas_kernels.line_scan(x, weights, lam, **options)
        else:
            h = pallas_kernels.line_scan_from_logits(x, logits, lam, **options)
        gate, h, skip, wide, scale = (array.astype(jnp.float32) for array in (gate, h, skip, x, scale))
        y = y + scale * (gate * h + skip * wide)
    return y.astype(x.dtype)


def columns_of(mixer: GSPNMixer, channels: int) -> UpProjection:
    """Those of a mixer's projections for its last channels."""
    projections = mixer.lam, mixer.gate, mixer.skip
    of_maps = [one.kernel[...].reshape(-1, 4, mixer.channels)[..., -channels:] for one in projections]
    return UpProjection(mixer.logits.kernel[...].reshape(-1, 4, 3, mixer.channels)[..., -channels:], *of_maps)


class SeparateMixer(GSPNMixer):
    """GSPN by `four_scans`, with the parameters of `GSPNMixer`."""

    contender: Contender

    def __call__(self, x: jax.Array) -> jax.Array:
        maps = maps_in(4, self.proxy(x), columns_of(self, self.channels))
        return four_scans(self.contender, self.chunk, x, maps, self.merge[...])


class AttentionMixer(nnx.Module):
    """Attention over all pixels with its projections, in as many heads of 64 as hold the map's channels."""

    def __init__(self, shape: KernelShape, attend: Callable[..., jax.Array], rngs: nnx.Rngs):
        self.attend, self.heads = attend, attention_heads(shape)
        inner, options = self.heads * HEAD_WIDTH, dict[str, Any](dtype=DTYPE, param_dtype=DTYPE, rngs=rngs)
        self.qkv = nnx.Linear(shape.channels, 3 * inner, use_bias=False, **options)
        self.out = nnx.Linear(inner, shape.channels, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = (x.shape[0], x.shape[1] * x.shape[2])
        qkv = jnp.split(self.qkv(x).reshape(*tokens, -1), 3, axis=-1)
        y = self.attend(*(array.reshape(*tokens, self.heads, HEAD_WIDTH) for array in qkv))
        return self.out(y.reshape(*x.shape[:3], -1))


def build(contender: Contender, shape: KernelShape) -> Any:
    """The mixer's graph and the shapes of its parameters."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        if not contender.propagates:
            flash = functools.partial(softmax_attention, implementation=contender.implementation)
            return AttentionMixer(shape, linear_attention if contender.kind == "linear" else flash, rngs)
        kind = GSPNMixer if contender.kind == "gspn" else SeparateMixer
        mixer = kind(
            shape.channels, proxy_rank=shape.rank, chunk=shape.chunk, implementation=contender.implementation,
            path=contender.path, dtype=jnp.dtype(DTYPE), param_dtype=jnp.dtype(DTYPE), rngs=rngs,
        )  # fmt: skip
        if isinstance(mixer, SeparateMixer):
            mixer.contender = contender
        return mixer

    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def bind(contender: Contender, shape: KernelShape, scope: str) -> Callable[..., jax.Array]:
    """The contender as a function of `draw_inputs` alone, the gradient aside."""
    if scope == "mixer":
        graph, _ = build(contender, shape)
        return lambda parameters, x: nnx.merge(graph, parameters)(x)
    options: Any = dict(chunk=shape.chunk, implementation=contender.implementation, path=contender.path)
    if contender.kind == "gspn" and scope == "proxy":
        return functools.partial(pallas_kernels.propagate_low_rank, **options)
    if contender.kind == "gspn":
        propagate: Any = functools.partial(pallas_kernels.propagate, **options)
        return lambda x, maps, merge: propagate(x, *maps, merge)
    scans = functools.partial(four_scans, contender, shape.chunk)
    return scans if scope == "maps" else lambda x, proxy, up, merge: scans(x, maps_in(4, proxy, up), merge)


def reason_against(contender: Contender, shape: KernelShape, scope: str, pass_: str) -> str | None:
    """Why the contender cannot run at the shape here; None if it can."""
    if not contender.propagates:
        if scope != "mixer":
            return "attention has neither proxy nor maps"
        alike = kernel_contenders.CONTENDERS[contender.name]
        return kernel_contenders.reason_against(alike, shape, DTYPE, pass_)
    reason = pallas_kernels.implementations()[contender.implementation]
    if reason is not None:
        return reason
    path = contender.path or ""
    if scope == "maps" and path.startswith("low_rank"):
        return "makes the maps itself"
    size = (shape.batch, shape.height, shape.width, shape.channels)
    if path.endswith(paths.ON_CHIP):
        work = paths.Work(size, DTYPE, shape.weight_channels, shape.chunk, 0 if scope == "maps" else shape.rank)
        try:
            _ = paths.forms(work, path, contender.implementation == "mosaic_interpret")
        except ValueError as error:
            return str(error)
    return None


@functools.partial(jax.jit, static_argnums=1)
def _parameters(key: jax.Array, sizes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """Of variance 1 / fan in, which is the first axis; drawn in one program, since each takes long to compile."""
    pairs = zip(jax.random.split(key, len(sizes)), sizes, strict=True)
    return [(jax.random.normal(one, size) * size[0] ** -0.5).astype(DTYPE) for one, size in pairs]


def draw_inputs(contender: Contender, shape: KernelShape, scope: str, key: jax.Array) -> tuple[Any, ...]:
    """What `bind` takes and, last, a gradient of the result. Parameters have variance 1 / fan in, the rest 1."""
    keys = iter(jax.random.split(key, 20))
    pixels = shape.batch, shape.height, shape.width

    def draw(*size: int) -> jax.Array:
        return kernel_contenders.normal(next(keys), size, DTYPE)

    x, grad = draw(*pixels, shape.channels), draw(*pixels, shape.channels)
    if scope == "mixer":
        leaves, tree = jax.tree.flatten(build(contender, shape)[1])
        return tree.unflatten(_parameters(next(keys), tuple(leaf.shape for leaf in leaves))), x, grad
    merge = draw(1, 4)[0]
    if scope == "proxy":
        sizes = (shape.rank, 4, 3, shape.weight_channels), *[(shape.rank, 4, shape.channels)] * 3
        return x, draw(*pixels, shape.rank), UpProjection(*_parameters(next(keys), sizes)), merge, grad
    parts = 1 if contender.kind == "gspn" else 4
    each = 4 // parts
    maps = [
        (draw(*pixels, each, 3, shape.weight_channels), *(draw(*pixels, each, shape.channels) for _ in range(3)))
        for _ in range(parts)
    ]
    return x, maps if parts == 4 else maps[0], merge, grad


def bytes_moved(contender: Contender, shape: KernelShape, scope: str, pass_: str) -> int:
    """The least bytes that a program reads and writes in device memory: everything it is given once a pass, every
    result once.

    | pass | reads | writes |
    |---|---|---|
    | forward | inputs: I | result: E |
    | both | inputs, twice; gradient of the result: 2 I + E | result, gradients of the inputs: E + I |

    E = B H W C values. I is, for a mixer, the map and the parameters; what lies between them (proxy, maps, states,
    queries, keys, values) does not count, whether or not an implementation writes it.
    """
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    *given, grad = jax.eval_shape(functools.partial(draw_inputs, contender, shape, scope), key)
    inputs, result = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one)) for one in (given, grad))
    return inputs + result if pass_ == "forward" else 3 * inputs + 2 * result
