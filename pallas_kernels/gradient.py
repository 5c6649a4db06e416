"""The gradient rules, shared by every implementation.

An implementation has the four functions of `reference`: scan and low-rank propagation, forward and backward. The rules
decide which arrays are kept between forward and backward (the inputs and h, never more) and how a mesh splits the work.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels import reference
from pallas_kernels.choices import Variants
from pallas_kernels.mosaic.tiles import Tile
from pallas_kernels.sharding import MeshAxes, sharded
from pallas_kernels.up_projection import UpProjection


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of one call of an operation."""

    implementation: str
    chunk: int | None
    axes: MeshAxes
    # Only for scans:
    directions: tuple[str, ...] = ()
    from_logits: bool = False  # whether the weights are given as logits
    tile: Tile | None = None
    # Only for a low-rank propagation by Mosaic kernels:
    variants: Variants | None = None

    @property
    def functions(self) -> Any:
        """The implementation's four functions."""
        if self.implementation == "xla":
            return reference
        # Imported late: Pallas takes a second to import and needs parts of jaxlib that not every platform has.
        from pallas_kernels.mosaic.operations import Kernels

        return Kernels(interpret=self.implementation == "mosaic_interpret")

    @property
    def scan_options(self) -> dict[str, Any]:
        """Options of the scans' functions."""
        options = dict(directions=self.directions, chunk=self.chunk, from_logits=self.from_logits)
        return options if self.tile is None else options | dict(tile=self.tile)

    def variant_option(self, kernel: str) -> dict[str, Any]:
        """The option that names the variant of "inference", "training" or "backward"; none for the reference."""
        return {} if self.variants is None else dict(variant=getattr(self.variants, kernel))


def _summed(gradient: jax.Array, *names: str | None) -> jax.Array:
    """The gradient of an argument of which every device on the named axes holds the whole: the sum over devices."""
    present = tuple(name for name in names if name is not None)
    return lax.psum(gradient, present) if present else gradient


def _over_shared_weights(call: Call) -> str | None:
    """The axis over which the gradient of weights is summed."""
    return call.axes.channel if call.axes.shares_weights else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(call: Call, x: jax.Array, weights: jax.Array, lam: jax.Array) -> jax.Array:
    """Line scans in D directions, after the checks of the operations.

    Args:
        call: with the D directions.
        x: (B, H, W, C).
        weights: (B, H, W, D, 3, C_w), or their logits.
        lam: (B, H, W, D, C).

    Returns:
        h, (B, D, H, W, C) in x's dtype.
    """
    forward = functools.partial(call.functions.scan_forward, **call.scan_options)
    return sharded(forward, call.axes, _scan_specs(call), call.axes.map_spec(5))(x, weights, lam)


def _scan_forward(call, x, weights, lam):
    h = scan(call, x, weights, lam)
    return h, (x, weights, lam, h)


def _scan_backward(call, residuals, grad_h):
    def backward(*arrays):
        grad_x, grad_weights, grad_lam = call.functions.scan_backward(*arrays, **call.scan_options)
        return grad_x, _summed(grad_weights, _over_shared_weights(call)), grad_lam

    specs, states = _scan_specs(call), call.axes.map_spec(5)
    return sharded(backward, call.axes, (*specs, states, states), specs)(*residuals, grad_h)


scan.defvjp(_scan_forward, _scan_backward)


def _scan_specs(call: Call) -> tuple:
    """Partition specs of x, weights and lam."""
    return call.axes.map_spec(4), call.axes.weight_spec(6), call.axes.map_spec(5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank(call: Call, x, proxy, up: UpProjection, merge) -> jax.Array:
    """`propagate_low_rank`, after its checks."""
    return _propagate_low_rank(call, (x, proxy, up, merge), keep=False)[0]


def _low_rank_forward(call, *inputs):
    y, states = _propagate_low_rank(call, inputs, keep=True)
    return y, (inputs, states)


def _propagate_low_rank(call: Call, inputs: tuple, keep: bool) -> tuple[jax.Array, tuple]:
    """y, and h of the four directions if `keep`."""
    options = call.variant_option("training" if keep else "inference")
    forward = functools.partial(call.functions.low_rank_forward, chunk=call.chunk, keep=keep, **options)
    specs = call.axes.map_spec(4), _states_spec(call)
    return sharded(forward, call.axes, _low_rank_specs(call, inputs[2]), specs)(*inputs)


def _low_rank_backward(call, residuals, grad_y):
    inputs, states = residuals
    options = dict(chunk=call.chunk) | call.variant_option("backward")

    def backward(inputs, states, grad_y):
        _, proxy, _, merge = inputs
        grad_x, of_proxy, of_up, of_merge = call.functions.low_rank_backward(*inputs, states, grad_y, **options)
        of_up = jax.tree.map(lambda grad: _summed(grad, call.axes.batch), of_up)
        of_up = of_up._replace(logits=_summed(of_up.logits, _over_shared_weights(call)))
        of_up = jax.tree.map(lambda grad: grad.astype(proxy.dtype), of_up)
        of_proxy = _summed(of_proxy, call.axes.channel).astype(proxy.dtype)
        return grad_x, of_proxy, of_up, _summed(of_merge, *call.axes.names).astype(merge.dtype)

    specs = _low_rank_specs(call, inputs[2])
    in_specs = specs, _states_spec(call), call.axes.map_spec(4)
    return sharded(backward, call.axes, in_specs, specs)(inputs, states, grad_y)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _low_rank_specs(call: Call, up: UpProjection) -> tuple:
    """Partition specs of x, proxy, up and merge."""
    maps: Any = PartitionSpec(None, None, call.axes.channel)
    logits: Any = PartitionSpec(None, None, None, None if call.axes.shares_weights else call.axes.channel)
    of_up = UpProjection(logits, maps, maps, None if up.skip is None else maps)
    return call.axes.map_spec(4), PartitionSpec(call.axes.batch), of_up, PartitionSpec()


def _states_spec(call: Call) -> PartitionSpec:
    """The partition spec of the states: four arrays (B, H, W, C) of the reference, one (B, 4, H, W, C) of kernels."""
    return call.axes.map_spec(4 if call.implementation == "xla" else 5)
