"""The GPU that kernels are planned for: the one that JAX computes on, or one that a caller assumes; and its rates."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

LEAST_CAPABILITY = (9, 0)  # the first with TMA
LEAST_SHARED_MEMORY = 227 * 1024  # bytes that a CTA may ask for; tiles are planned for this much


@dataclasses.dataclass(frozen=True)
class Card:
    """The properties of a GPU that a kernel's tile depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes that a CTA may ask for

    @property
    def multiplies(self) -> bool:
        """Whether it has wgmma, the Hopper tensor-core instruction that the low_rank kernels need."""
        return self.capability[0] == 9


H200 = Card("NVIDIA H200", (9, 0), 132, 227 * 1024)
# Rates of an H200 for estimates.
COPY_BANDWIDTH = 4.3e12  # bytes per second that a large copy reads and writes; the data sheet says 4.8e12
MATRIX_FLOPS = 700e12  # per second, bfloat16 on the tensor cores; the data sheet says 989e12
VECTOR_FLOPS = 60e12  # per second, float32 on the other units; the data sheet says 67e12

_assumed: contextvars.ContextVar[Card | None] = contextvars.ContextVar("assumed_card", default=None)


@contextlib.contextmanager
def assume(card: Card) -> Iterator[None]:
    """Operations that the block traces are planned as if JAX ran on `card`: to compile for a GPU without having one.

    A compiled function is planned when it is traced; one that was traced before keeps its plan.
    """
    token = _assumed.set(card)
    try:
        yield
    finally:
        _assumed.reset(token)


def present() -> Card | str:
    """The GPU that JAX computes on by default, or the reason why the kernels cannot run on it."""
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
    """The present GPU, or an H200 if there is none: the interpreter runs the kernels as an H200 would."""
    card = present()
    return H200 if isinstance(card, str) else card


def _asked() -> Card | str:
    # On a machine with devices of several kinds, arrays are on the default device that the user has set.
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
        # Some plugins do not report it; every GPU with TMA so far has at least this much.
        shared_memory=int(getattr(device, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)),
    )
