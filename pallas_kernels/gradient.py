"""The gradient rules, shared by every implementation.

An implementation has the four functions of `reference`: scan and propagation, forward and backward. The rules decide
which arrays are kept between forward and backward (the inputs and h, never more) and how a mesh splits the work.
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
from pallas_kernels.up_projection import UpProjection, gradients_of_maps


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of one call of an operation."""

    implementation: str
    chunk: int | None
    axes: MeshAxes
    # Only for a line scan:
    direction: str | None = None
    from_logits: bool = False  # whether its weights are given as logits
    tile: Tile | None = None
    # Only for a propagation by Mosaic kernels:
    variants: Variants | None = None

    @property
    def functions(self) -> Any:
        """The implementation's four functions."""
        if self.implementation == "xla":
            return reference
        # Imported late: Pallas takes a second to import and needs parts of jaxlib that not every platform has.
        from pallas_kernels.mosaic.operations import Kernels

        return Kernels(interpret=self.implementation == "mosaic_interpret")

    def forward_options(self, keep: bool) -> dict[str, Any]:
        """Options of a propagation's forward function; `keep` says whether h is kept for the gradient."""
        options = dict(chunk=self.chunk, keep=keep)
        return options if self.variants is None else options | dict(variant=self.variants.forward(keep))

    @property
    def scan_options(self) -> dict[str, Any]:
        """Options of a scan's functions."""
        options = dict(direction=self.direction, chunk=self.chunk, from_logits=self.from_logits)
        return options if self.tile is None else options | dict(tile=self.tile)


def _summed(gradient: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The gradient of an argument of which every device on the named axes holds the whole: the sum over devices."""
    return lax.psum(gradient, names) if names else gradient


def _over_shared_weights(call: Call) -> tuple[str, ...]:
    """The axes over which the gradient of weights is summed."""
    return (call.axes.channel,) if call.axes.shares_weights and call.axes.channel else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(call: Call, x: jax.Array, weights: jax.Array, lam: jax.Array) -> jax.Array:
    """`line_scan` or `line_scan_from_logits`, after its checks."""
    forward = functools.partial(call.functions.scan_forward, **call.scan_options)
    maps, rows = call.axes.map_spec(4), call.axes.weight_spec(5)
    return sharded(forward, call.axes, (maps, rows, maps), maps)(x, weights, lam)


def _scan_forward(call, x, weights, lam):
    h = scan(call, x, weights, lam)
    return h, (x, weights, lam, h)


def _scan_backward(call, residuals, grad_h):
    def backward(*arrays):
        grad_x, grad_weights, grad_lam = call.functions.scan_backward(*arrays, **call.scan_options)
        return grad_x, _summed(grad_weights, _over_shared_weights(call)), grad_lam

    maps, rows = call.axes.map_spec(4), call.axes.weight_spec(5)
    return sharded(backward, call.axes, (maps, rows, maps, maps, maps), (maps, rows, maps))(*residuals, grad_h)


scan.defvjp(_scan_forward, _scan_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def propagation(call: Call, x, logits, lam, gate, skip, merge) -> jax.Array:
    """Aligned `propagate`, after its checks; `skip` may be None."""
    return _propagate(call, (x, logits, lam, gate, skip, merge), keep=False)[0]


def _propagation_forward(call, *inputs):
    y, h = _propagate(call, inputs, keep=True)
    return y, (inputs, h)


def _propagate(call: Call, inputs: tuple, keep: bool) -> tuple[jax.Array, tuple]:
    """y, and h of the four directions if `keep`."""
    forward = functools.partial(call.functions.propagation_forward, **call.forward_options(keep))
    states = (call.axes.map_spec(4),) * (4 if keep else 0)
    specs = _propagation_specs(call, inputs[4])
    return sharded(forward, call.axes, specs, (call.axes.map_spec(4), states))(*inputs)


def _propagation_backward(call, residuals, grad_y):
    inputs, h = residuals

    def backward(inputs, h, grad_y):
        *gradients, grad_merge = call.functions.propagation_backward(*inputs, h, grad_y, chunk=call.chunk)
        gradients[1] = _summed(gradients[1], _over_shared_weights(call))
        return *gradients, _summed(grad_merge, call.axes.names)

    specs = _propagation_specs(call, inputs[4])
    states = (call.axes.map_spec(4),) * 4
    return sharded(backward, call.axes, (specs, states, call.axes.map_spec(4)), specs)(inputs, h, grad_y)


propagation.defvjp(_propagation_forward, _propagation_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank(call: Call, x, proxy, up: UpProjection, merge) -> jax.Array:
    """`propagate_low_rank` by kernels, after its checks."""
    return _propagate_low_rank(call, (x, proxy, up, merge), keep=False)[0]


def _low_rank_forward(call, *inputs):
    y, h = _propagate_low_rank(call, inputs, keep=True)
    return y, (inputs, h)


def _propagate_low_rank(call: Call, inputs: tuple, keep: bool) -> tuple[jax.Array, tuple]:
    """y, and h of the four directions if `keep`."""
    forward = functools.partial(call.functions.low_rank_forward, **call.forward_options(keep))
    maps = call.axes.map_spec(4)
    return sharded(forward, call.axes, _low_rank_specs(call, inputs[2]), (maps, (maps,) * (4 if keep else 0)))(*inputs)


def _low_rank_backward(call, residuals, grad_y):
    inputs, h = residuals
    assert call.variants is not None
    options = dict(chunk=call.chunk, variant=call.variants.backward)

    def backward(inputs, h, grad_y):
        _, proxy, up, _ = inputs
        grad_x, *of_maps, grad_merge = call.functions.low_rank_backward(*inputs, h, grad_y, **options)
        of_proxy, of_up = gradients_of_maps(proxy, up, tuple(of_maps))
        batch, channel = ((name,) if name else () for name in (call.axes.batch, call.axes.channel))
        of_up = jax.tree.map(lambda grad: _summed(grad, batch), of_up)
        of_up = of_up._replace(logits=_summed(of_up.logits, _over_shared_weights(call)))
        of_up = jax.tree.map(lambda grad: grad.astype(proxy.dtype), of_up)
        return grad_x, _summed(of_proxy, channel).astype(proxy.dtype), of_up, _summed(grad_merge, call.axes.names)

    specs, maps = _low_rank_specs(call, inputs[2]), call.axes.map_spec(4)
    return sharded(backward, call.axes, (specs, (maps,) * 4, maps), specs)(inputs, h, grad_y)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _low_rank_specs(call: Call, up: UpProjection) -> tuple:
    """Partition specs of x, proxy, up and merge."""
    maps: Any = PartitionSpec(None, None, call.axes.channel)
    logits: Any = PartitionSpec(None, None, None, None if call.axes.shares_weights else call.axes.channel)
    of_up = UpProjection(logits, maps, maps, None if up.skip is None else maps)
    return call.axes.map_spec(4), PartitionSpec(call.axes.batch), of_up, PartitionSpec()


def _propagation_specs(call: Call, skip: jax.Array | None) -> tuple:
    """Partition specs of x, logits, lam, gate, skip and merge."""
    maps = call.axes.map_spec(5)
    return call.axes.map_spec(4), call.axes.weight_spec(6), maps, maps, None if skip is None else maps, PartitionSpec()
