"""The GPU that kernels are planned for: asked of the device, or assumed where a program is compiled without one."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

LEAST_CAPABILITY = (9, 0)  # the first with TMA
LEAST_SHARED_MEMORY = 227 * 1024  # bytes a CTA may ask for; what the tiles are planned for


@dataclasses.dataclass(frozen=True)
class Card:
    """What the plan of a kernel depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a CTA may ask for

    @property
    def multiplies(self) -> bool:
        """Whether it has the tensor-core instructions of the kernels that make maps: wgmma, of Hopper alone."""
        return self.capability[0] == 9


H200 = Card("NVIDIA H200", (9, 0), 132, 227 * 1024)
# Rates of an H200 for estimates.
COPY_BANDWIDTH = 4.3e12  # bytes per second that a large copy reads and writes; the data sheet says 4.8e12
MATRIX_FLOPS = 700e12  # per second, bfloat16 on the tensor cores; the data sheet says 989e12
VECTOR_FLOPS = 60e12  # per second, float32 on the other units; the data sheet says 67e12

_assumed: contextvars.ContextVar[Card | None] = contextvars.ContextVar("assumed_card", default=None)


@contextlib.contextmanager
def assume(card: Card) -> Iterator[None]:
    """Traces of the block choose and plan as if JAX ran on `card`: to compile for a GPU on a machine without one.

    Compiled functions choose when they are traced; one that was traced before keeps its choice.
    """
    token = _assumed.set(card)
    try:
        yield
    finally:
        _assumed.reset(token)


def present() -> Card | str:
    """The GPU that JAX computes on by default, or the reason why there is none that can run the kernels."""
    card = _assumed.get() or _asked()
    if isinstance(card, str):
        return card
    if card.capability < LEAST_CAPABILITY:
        return f"{card.name} has compute capability {'.'.join(map(str, card.capability))}; the kernels need 9.0"
    if card.shared_memory < LEAST_SHARED_MEMORY:
        return (
            f"{card.name} gives a CTA {card.shared_memory} bytes of shared memory; the kernels need "
            f"{LEAST_SHARED_MEMORY}"
        )
    return card


def planned_for() -> Card:
    """The present card, or an H200 where there is none: the interpreter runs what would run there."""
    card = present()
    return H200 if isinstance(card, str) else card


def _asked() -> Card | str:
    # A default that the user has set, on a machine of several kinds, says where arrays are.
    default: Any = jax.config.jax_default_device
    device = jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]
    if device.platform != "gpu":
        return f"JAX runs on the {device.platform}; the kernels need an NVIDIA GPU of compute capability 9.0 or more"
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if not capability:
        return f"{device.device_kind} reports no CUDA compute capability; the kernels need 9.0 or more"
    return Card(
        name=device.device_kind,
        capability=(int(capability[1]), int(capability[2])),
        multiprocessors=int(getattr(device, "core_count", H200.multiprocessors)),
        # Plugins that do not say: every card with TMA so far gives as much.
        shared_memory=int(getattr(device, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)),
    )
