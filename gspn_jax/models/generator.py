"""GSPN generators (GSPN, section 4.2): denoisers of latents for class-conditional diffusion.

The network follows the authors' released code. Patches of the latents become tokens, and the embeddings of timestep and
class are added to them once. Then follow in-blocks, one middle block, and as many out-blocks; each out-block also reads
the output of its mirrored in-block (a long skip). There is no positional embedding: the scans' order encodes positions.

A block takes two maps: the residual stream, and the hidden map, which is the previous block's output. It first adds the
hidden map to the residual stream. The parameters of in-blocks and of out-blocks are stacked on a first axis, and each
stack runs in a `jax.lax.scan`, so that compile time does not grow with depth.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from gspn_jax.mixers import MixerBuilder
from gspn_jax.mixers.gspn import FAN_IN_UNIFORM
from gspn_jax.models import layers
from gspn_jax.models.conditioning import AdaptiveHead, Conditioning
from gspn_jax.models.sizes import check_counts
from gspn_jax.models.stack import graph_of, stacked
from pallas_kernels import named_layer
from pallas_kernels.checks import has_empty_axis

XAVIER = nnx.initializers.xavier_uniform()

# Consecutive blocks that differ only in their parameters: the graph of one block, and the number of blocks.
Run = tuple[nnx.GraphDef, int]


class Block(nnx.Module):
    """Adds hidden to residual, then applies norm, mixing and feed-forward; out-blocks first merge in a long skip."""

    def __init__(
        self,
        width: int,
        *,
        mixer: MixerBuilder,
        chunk: int | None,
        long_skip: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: Any = dict(dtype=dtype, rngs=rngs)
        project = functools.partial(nnx.Linear, use_bias=False, **options)
        self.long_skip = nnx.Linear(2 * width, width, kernel_init=XAVIER, **options) if long_skip else None
        self.norm = layers.layer_norm(width, **options)
        self.project = project(width, width, kernel_init=XAVIER)
        self.depthwise = layers.DepthwiseConv(width, 7, use_bias=True, **options)
        self.mixer = mixer(width, chunk=chunk, **options)
        self.forward_in = project(width, width, kernel_init=FAN_IN_UNIFORM)
        self.forward_depthwise = layers.DepthwiseConv(width, 3, **options)
        self.forward_out = project(width, width, kernel_init=XAVIER)

    def __call__(
        self,
        hidden: jax.Array,
        residual: jax.Array,
        skip: Sequence[jax.Array] = (),
        rate: float | jax.Array = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the next hidden map and residual stream, both (B, H, W, width), the latter float32.

        Args:
            hidden: the previous block's output, (B, H, W, width).
            residual: the sum of all outputs before it, (B, H, W, width) float32.
            skip: for an out-block, a tuple with its in-block's output, (B, H, W, width); else empty.
            rate: probability with which an image loses `hidden` (stochastic depth).
            key: PRNG key of stochastic depth; None keeps `hidden` for all images.
        """
        if self.long_skip is not None:
            hidden = self.long_skip(jnp.concatenate([hidden, *skip], axis=-1))
        residual = _add(residual, hidden, rate, key)
        x = self.mixer(self.depthwise(self.project(self.norm(residual))))
        x = self.forward_depthwise(self.forward_in(x))
        return self.forward_out(jnp.square(jax.nn.relu(x))), residual


class Generator(nnx.Module):
    """Predicts noise and variance channels from noisy latents, timestep and class.

    Latents may have any height and width that `patch` divides.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        depth: int,
        *,
        mixer: MixerBuilder,
        patch: int = 2,
        in_channels: int = 4,
        chunk: int | None = 2,
        global_blocks: Sequence[int] | None = None,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layers.

        Args:
            num_classes: number of classes, without "no class".
            width: channels of the tokens.
            depth: number of in-blocks and out-blocks together, even; with the middle block there are depth + 1.
            mixer: called as mixer(width, chunk=..., dtype=..., rngs=...); returns a module on maps, whose parameters'
                shapes do not depend on chunk.
            patch: side of a token's patch in latent pixels.
            in_channels: channels of the latents.
            chunk: lines of a chunk in all blocks that are not global.
            global_blocks: blocks that get chunk None, counted from 0 in order of execution; None: the last two.
            drop_path: stochastic depth of the last block's output; it grows linearly from 0 at the first block's.
            remat: recomputes each block in the backward pass instead of keeping its inner maps.
            dtype: dtype of the computation; parameters, residual stream and the last layer are float32.
            rngs: source of the initial parameters.

        Raises:
            ValueError: an argument out of range; the message names it.
        """
        check_counts(
            num_classes=num_classes, width=width, depth=depth, patch=patch, in_channels=in_channels, chunk=chunk
        )
        if depth < 2 or depth % 2:
            raise ValueError(f"depth: expected an even number of at least 2, got {depth}")
        global_blocks = (depth - 1, depth) if global_blocks is None else global_blocks
        if not set(global_blocks) <= set(range(depth + 1)):
            raise ValueError(f"global_blocks: expected blocks in 0..{depth}, got {tuple(global_blocks)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        dtype = jnp.dtype(dtype)
        self.depth, self.patch, self.in_channels, self.num_classes = depth, patch, in_channels, num_classes
        self.drop_path, self.remat, self.dtype = drop_path, remat, dtype
        chunks = [None if index in set(global_blocks) else chunk for index in range(depth + 1)]
        half = depth // 2
        block = functools.partial(Block, width, mixer=mixer, dtype=dtype)
        in_block, out_block = (functools.partial(block, long_skip=long_skip) for long_skip in (False, True))

        self.embed = nnx.Linear(patch * patch * in_channels, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.conditioning = Conditioning(num_classes, width, rngs=rngs)
        self.in_blocks = stacked(functools.partial(in_block, chunk=chunk), half, rngs)
        self.in_runs = _runs(in_block, chunks[:half])
        self.mid_block = in_block(chunk=chunks[half], rngs=rngs)
        self.out_blocks = stacked(functools.partial(out_block, chunk=chunk), half, rngs)
        self.out_runs = _runs(out_block, chunks[half + 1 :])
        self.norm = layers.layer_norm(width, dtype=jnp.float32, rngs=rngs)
        self.head = AdaptiveHead(width, patch * patch * 2 * in_channels, rngs=rngs)

    def __call__(
        self, latents: jax.Array, timestep: jax.Array, label: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns (B, H, W, 2 * in_channels) float32: the prediction, then variance channels.

        The objective defines their meaning: noise or velocity, and how the variance is interpolated.

        Args:
            latents: (B, H, W, in_channels) any float dtype, H and W divisible by `patch`.
            timestep: (B,) integers or floats; the released networks count 0..999.
            label: (B,) integers in 0..num_classes; num_classes means "no class".
            key: PRNG key of stochastic depth in training; None for inference.

        Raises:
            ValueError: another shape, or labels out of range; within `jax.jit` such labels give NaN.
        """
        check_inputs(latents, timestep, label, self.num_classes, channels=self.in_channels, patch=self.patch)
        condition = self.conditioning(timestep, label)
        # (B, H, W, in_channels) to (B, H / patch, W / patch, width)
        tokens = self.embed(layers.patches(latents, self.patch))
        residual = tokens.astype(jnp.float32) + condition[:, None, None]
        hidden = jnp.zeros_like(tokens)

        # A block drops the previous block's output; the first block's hidden map is zero.
        rates = jnp.asarray(self.drop_path * np.arange(-1, self.depth + 1).clip(0) / self.depth, jnp.float32)
        keys = None if key is None or self.drop_path == 0 else jax.random.split(key, self.depth + 2)

        def drops(part: int | slice) -> tuple[jax.Array, jax.Array | None]:
            """Returns drop rates and keys of some blocks."""
            return rates[part], None if keys is None else keys[part]

        half = self.depth // 2
        run = functools.partial(_run_blocks, remat=self.remat)
        hidden, residual, (skips,) = run(
            "in_blocks", self.in_blocks, self.in_runs, hidden, residual, (), *drops(slice(half))
        )
        mid_block = jax.checkpoint(self.mid_block) if self.remat else self.mid_block
        with named_layer("mid_block"):
            hidden, residual = mid_block(hidden, residual, (), *drops(half))
        hidden, residual, _ = run(
            "out_blocks", self.out_blocks, self.out_runs, hidden, residual, (skips[::-1],), *drops(slice(half + 1, -1))
        )
        x = self.norm(_add(residual, hidden, *drops(-1)))
        return layers.unpatched(self.head(x, condition), self.patch)


def check_inputs(
    latents: jax.Array, timestep: jax.Array, label: jax.Array, num_classes: int, *, channels: int, patch: int
) -> None:
    """Raises ValueError unless latents are (B, H, W, channels) in whole patches, timestep (B,), label integers (B,)."""
    shape = latents.shape
    if len(shape) != 4 or shape[-1] != channels or has_empty_axis(shape) or shape[1] % patch or shape[2] % patch:
        raise ValueError(
            f"latents: expected shape (B, H, W, {channels}) with H and W divisible by patch = {patch}, got {shape}"
        )
    for name, array in (("timestep", timestep), ("label", label)):
        if array.shape != shape[:1]:
            raise ValueError(f"{name}: expected shape {shape[:1]}, as latents have rows, got {array.shape}")
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"label: expected integers, got {label.dtype}")
    if not isinstance(label, Tracer):  # the values of a traced label are not known
        wrong = [number for number in np.asarray(label).tolist() if not 0 <= number <= num_classes]
        if wrong:
            raise ValueError(f"label: expected 0..{num_classes} ({num_classes}: no class), got {wrong[0]}")


def _add(residual: jax.Array, hidden: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns residual + hidden in residual's dtype, with stochastic depth of `hidden` unless key is None."""
    hidden = hidden.astype(residual.dtype)
    return residual + (hidden if key is None else layers.drop_path(hidden, rate, key))


def _runs(build: Callable[..., Block], chunks: Sequence[int | None]) -> tuple[Run, ...]:
    """Returns the runs of blocks with equal chunks: a chunk is static, so each run needs its own scan."""
    groups = [(chunk, len(list(group))) for chunk, group in itertools.groupby(chunks)]
    return tuple((graph_of(functools.partial(build, chunk=chunk)), length) for chunk, length in groups)


def _run_blocks(
    name: str,
    blocks: Block,
    runs: Sequence[Run],
    hidden: jax.Array,
    residual: jax.Array,
    skips: tuple[jax.Array, ...],
    rates: jax.Array,
    keys: jax.Array | None,
    *,
    remat: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Runs all blocks of a stack, one scan for each run.

    Args:
        name: of the stack, for the layer report.
        blocks: parameters of n blocks, stacked on a first axis.
        runs: consecutive blocks with equal chunks, n in all.
        hidden, residual: (B, H, W, width), see `Block`.
        skips: for out-blocks, a tuple with the in-blocks' outputs, (n, B, H, W, width); else empty.
        rates: (n,) drop rates.
        keys: (n,) PRNG keys, or None.
        remat: see `Generator`.

    Returns:
        hidden, residual, and, if `skips` is empty, a tuple with the outputs of all blocks, (n, B, H, W, width).
    """
    stacks, start = (nnx.state(blocks), skips, rates, keys), 0
    outputs = []
    for graph, length in runs:

        def step(carry, slices, graph=graph):
            state, skip, rate, key = slices
            hidden, residual = nnx.merge(graph, state)(*carry, skip, rate, key)
            return (hidden, residual), () if skip else (hidden,)

        # A scan's body is compiled apart from the forward pass, so common subexpressions cannot undo the recomputation.
        step = jax.checkpoint(step, prevent_cse=False) if remat else step
        part = jax.tree.map(lambda stack, start=start, stop=start + length: stack[start:stop], stacks)
        with named_layer(f"{name} {start} to {start + length - 1}"):
            (hidden, residual), output = jax.lax.scan(step, (hidden, residual), part)
        outputs.append(output)
        start += length
    return hidden, residual, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
