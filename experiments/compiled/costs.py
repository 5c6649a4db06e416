"""Counts the bytes and FLOPs of a compiled GPU program from its text (optimised HLO), and the least time they take.

The text names shapes, so bytes are those of operands and results. Each counts once per instruction, whether or not it
stays in a cache or is read twice. Where an instruction slices an array or updates it in place, only the slice counts. A
Mosaic kernel counts whole arrays; if its launches share them, as on maps that are not square, that is too much.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from pallas_kernels.mosaic.card import COPY_BANDWIDTH, MATRIX_FLOPS, VECTOR_FLOPS

ENTRY = "ENTRY"
# They launch no kernel.
_FREE = frozenset(
    ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "optimization-barrier")
)
_FREE_TARGETS = ("AllocateBuffer",)
_SLICES = ("dynamic-slice", "slice", "gather")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|c64|c128|[suf]\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9-]*)\(([^)]*)\)(.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    shape: str  # of the result, as printed
    operands: tuple[str, ...]  # names, in the same computation
    attributes: str  # the rest of the line
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """Returns the first group of `pattern` in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The name of the function that a custom call calls."""
        return self.attribute(r'custom_call_target="([^"]*)"') if self.opcode == "custom-call" else ""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape, which may be a tuple."""

    dims: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        width = _BYTES.get(self.dtype) or int(re.sub(r"^[suf](\d+).*", r"\1", self.dtype)) / 8
        return math.ceil(math.prod(self.dims) * (0 if self.dtype in ("token", "opaque") else width))


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of an instruction that launches something."""

    name: str
    kind: str  # "fusion", "matrix product", "convolution", "depthwise convolution", "copy", a custom call's target, ...
    launches: int  # how often it runs: the trips of the loops around it
    bytes: int
    flops: int  # in matrix products and convolutions

    @property
    def least_seconds(self) -> float:
        """The longer of the times that its bytes and its FLOPs take on an H200."""
        rate = VECTOR_FLOPS if self.kind == "depthwise convolution" else MATRIX_FLOPS
        return max(self.bytes / COPY_BANDWIDTH, self.flops / rate)


def totals(text: str) -> dict[str, float]:
    """Returns launches, bytes, FLOPs and the least milliseconds of a compiled program on an H200.

    The least time is the sum over all instructions. Caches, starts of kernels and other arithmetic are left out.
    """
    costs = list(Program(text).costs())
    return {
        "launches": sum(cost.launches for cost in costs),
        "bytes": sum(cost.launches * cost.bytes for cost in costs),
        "flops": sum(cost.launches * cost.flops for cost in costs),
        "least_ms": float(f"{1e3 * sum(cost.launches * cost.least_seconds for cost in costs):.4g}"),
    }


def arrays(shape: str) -> list[Array]:
    """Reads a printed shape, such as "(f32[2,3]{1,0}, s32[])"."""
    return [Array(tuple(map(int, filter(None, dims.split(",")))), dtype) for dtype, dims in _ARRAY.findall(shape)]


def _size(shape: str) -> int:
    return sum(array.bytes for array in arrays(shape))


class Program:
    """The computations of a module's text."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._users: dict[str, dict[str, list[Instruction]]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if opened := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line):
                current = self._computations[ENTRY if opened[1] else opened[2]] = {}
            elif found := _INSTRUCTION.match(line):
                root, name, shape, opcode, operands, rest = found.groups()
                # An instruction that runs beside others has two lines; the first says everything.
                opcode = "fusion" if opcode == "fusion-start" else opcode
                names = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", operands))
                if opcode == "parameter":
                    rest = f", index={operands}{rest}"
                current[name] = Instruction(name, opcode, shape, names, rest, bool(root))
        if ENTRY not in self._computations:
            raise ValueError("text: expected optimised HLO with an ENTRY computation")
        for key, computation in self._computations.items():
            users = self._users[key] = collections.defaultdict(list)
            for instruction in computation.values():
                for operand in dict.fromkeys(instruction.operands):
                    users[operand].append(instruction)

    def costs(self, computation: str = ENTRY, trips: int = 1) -> Iterator[Cost]:
        """Yields the cost of everything that is launched, in loops too; a loop of unknown length counts once."""
        for instruction in self._computations[computation].values():
            if instruction.opcode == "while":
                known = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
                yield from self.costs(instruction.attribute(r"body=%?([\w.\-]+)"), trips * int(known or 1))
            elif instruction.opcode in ("call", "conditional", "async-start"):
                called = instruction.attribute(r"(?:to_apply|calls|branch_computations)=\{?%?([\w.\-]+)")
                yield from self.costs(called, trips)
            elif (
                instruction.opcode not in _FREE
                and instruction.target not in _FREE_TARGETS
                and not instruction.opcode.endswith("-done")
            ):
                yield self._cost(*self._launched(computation, instruction), trips)

    def _launched(self, key: str, instruction: Instruction) -> tuple[str, Instruction]:
        """Returns the instruction, or the custom call in a fusion that gives it slices of operands and results."""
        if instruction.opcode == "fusion":
            inside = instruction.attribute(r"calls=%?([\w.\-]+)")
            for inner in self._computations[inside].values():
                if inner.target and inner.target not in _FREE_TARGETS:
                    return inside, inner
        return key, instruction

    def _cost(self, key: str, instruction: Instruction, trips: int) -> Cost:
        shapes = [self._computations[key][name].shape for name in instruction.operands]
        # A result that is written into an operand's place is counted once.
        pairs = instruction.attribute(r"output_to_operand_aliasing=\{((?:[^{}]|\{[^{}]*\})*)\}")
        aliased = {int(at) for at in re.findall(r": \((\d+), \{", pairs)}
        read = [shape for at, shape in enumerate(shapes) if at not in aliased]
        touched = tuple(array for shape in (*read, instruction.shape) for array in arrays(shape))
        kind, flops = self._product(instruction, shapes)
        return Cost(
            name=instruction.name,
            kind=kind,
            launches=trips,
            bytes=self._bytes(instruction, shapes, touched),
            flops=flops,
        )

    def _product(self, instruction: Instruction, shapes: Sequence[str]) -> tuple[str, int]:
        """Returns the kind of an instruction and the FLOPs of its matrix products or its convolution."""
        if instruction.target.startswith("__cudnn$conv"):
            return self._convolution(instruction, shapes)
        if instruction.target:
            return instruction.target, 0
        if instruction.opcode == "fusion":
            flops = self._dots(instruction.attribute(r"calls=%?([\w.\-]+)"))
            return ("matrix product" if flops else "fusion"), flops
        return instruction.opcode, 0

    def _dots(self, key: str) -> int:
        computation, flops = self._computations[key], 0
        for inner in computation.values():
            if inner.opcode == "fusion":
                flops += self._dots(inner.attribute(r"calls=%?([\w.\-]+)"))
            elif inner.opcode == "dot":
                (left,) = arrays(computation[inner.operands[0]].shape)
                (result,) = arrays(inner.shape)
                axes = filter(None, inner.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(","))
                flops += 2 * math.prod(result.dims) * math.prod(left.dims[int(axis)] for axis in axes)
        return flops

    def _convolution(self, instruction: Instruction, shapes: Sequence[str]) -> tuple[str, int]:
        result, *operands = (arrays(shape)[0] for shape in (instruction.shape, *shapes))
        # Every output pixel takes one product with each kernel entry that leads to its channel.
        if "BackwardFilter" in instruction.target:
            kernel, outputs = result, operands[1]
        elif "BackwardInput" in instruction.target:
            kernel, outputs = operands[1], operands[0]
        else:
            kernel, outputs = operands[1], result
        channels = kernel.dims[instruction.attribute(r"dim_labels=\w+_(\w+)->").index("o")]
        flops = 2 * math.prod(outputs.dims) * math.prod(kernel.dims) // channels
        is_depthwise = int(instruction.attribute(r"feature_group_count=(\d+)") or 1) == channels > 1
        return ("depthwise convolution" if is_depthwise else "convolution"), flops

    def _bytes(self, instruction: Instruction, shapes: Sequence[str], touched: Sequence[Array]) -> int:
        if instruction.opcode in _SLICES:
            return 2 * _size(instruction.shape)
        if instruction.opcode == "copy-start":
            return 2 * _size(shapes[0])
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _size(shapes[1])
        if instruction.opcode == "fusion":
            return self._fusion_bytes(instruction.attribute(r"calls=%?([\w.\-]+)"))
        return sum(array.bytes for array in touched)

    def _fusion_bytes(self, key: str) -> int:
        computation = self._computations[key]
        total = sum(self._read(key, inner) for inner in computation.values() if inner.opcode == "parameter")
        (root,) = (inner for inner in computation.values() if inner.is_root)
        results = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for result in results:
            while result.opcode in ("bitcast", "convert") and computation[result.operands[0]].opcode in (
                "dynamic-update-slice", "bitcast",
            ):  # fmt: skip
                result = computation[result.operands[0]]
            updates = result.opcode == "dynamic-update-slice"
            total += _size(computation[result.operands[1]].shape if updates else result.shape)
        return total

    def _read(self, key: str, source: Instruction) -> int:
        """Returns the bytes that a fusion reads of an array: slices where it slices it, none where it updates it."""
        elements = sum(math.prod(array.dims) for array in arrays(source.shape))
        return math.ceil(_size(source.shape) * self._wanted(key, source) / max(elements, 1))

    def _wanted(self, key: str, source: Instruction) -> int:
        """Returns the number of elements of an array that its users in a fusion read."""
        elements = sum(math.prod(array.dims) for array in arrays(source.shape))
        users, wanted = self._users[key][source.name], 0
        for user in users:
            is_first = user.operands[0] == source.name
            if is_first and user.opcode in (*_SLICES, "bitcast", "convert"):
                wanted += self._wanted(key, user)
            elif not (is_first and user.opcode == "dynamic-update-slice"):
                return elements
        return min(wanted, elements) if users else elements
