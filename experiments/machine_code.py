"""What is in the machine code (SASS) of a kernel, as nvdisasm prints it: its loops, and the work of units.

The standard library alone is needed to import it.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

# Copies from shared to device memory by TMA, and the end of a group of them, which a line has in any case; UBLKCP moves
# one contiguous piece, in either direction.
_STORES = ("UTMASTG", "UBLKCP.G.S", "UTMACMDFLUSH")
_PRODUCT = "HGMMA"
_FLOATING = frozenset(("FADD", "FMUL", "FFMA", "FMNMX", "HADD2", "HMUL2", "HFMA2", "HMNMX2"))
_SHARED = frozenset(("LDS", "STS", "LDSM", "STSM"))


class Opcodes(NamedTuple):
    """How often each opcode, with its modifiers, is in the text."""

    whole: dict[str, int]  # the kernel
    loop: dict[str, int]  # its line loops, one after the other
    product: dict[str, int]  # the part of the line loops around tensor cores that a branch may skip; often empty


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a thread issues, on average over something such as a line."""

    instructions: float
    floating_point: float  # additions, products, both at once, minima and maxima; two packed halves are one
    special_functions: float
    shared_memory: float  # bytes, at least 4 for each access, since a warp's takes a cycle of 128 bytes or more
    tensor_flops: float  # its share of those of its warpgroup
    tensor_operands: float  # bytes of shared memory that tensor cores read, likewise


def count_opcodes(machine_code: str) -> Opcodes:
    """Opcodes of a kernel, of the innermost loops that store to memory by TMA, and of the product in them.

    A loop is what lies between a branch backwards and its target. The assembler moves rare paths, such as a wait that
    is not over at once, behind the end of the kernel: they jump back as well, over EXIT, and are no part of a loop. A
    kernel that walks several directions has a line loop for each.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    branches: list[tuple[int, str, bool]] = []  # place, target, whether it may not be taken
    for line in machine_code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if found[2].startswith("BRA") and (target := re.search(r"\((\.L_\w+)\)", found[3])):
                is_conditional = bool(found[1] or re.match(r"\s*!?U?P\d", found[3]))
                branches.append((len(code), target[1], is_conditional))
            code.append(found[2])
    if not code:
        raise LookupError("no instruction in the disassembly")
    known = [(at, labels[target], is_conditional) for at, target, is_conditional in branches if target in labels]
    loops = [range(target, at + 1) for at, target, _ in known if target <= at]
    storing = [loop for loop in loops if "EXIT" not in (text := code[loop.start : loop.stop]) and _stores(text)]
    innermost = [loop for loop in storing if not any(other != loop and _contains(loop, other) for other in storing)]
    skipped = [range(at + 1, target) for at, target, is_conditional in known if is_conditional and at < target]
    counts = collections.Counter[str](), collections.Counter[str]()
    for loop in set(innermost):
        counts[0].update(code[loop.start : loop.stop])
        if product := _product(code, loop, skipped):
            counts[1].update(code[product.start : product.stop])
    return Opcodes(dict(collections.Counter(code)), dict(counts[0]), dict(counts[1]))


def mix(opcodes: Mapping[str, int], product: Mapping[str, int], products: float) -> Mix:
    """Of `opcodes`, where the part of them in `product` runs `products` times as often as the rest."""
    weighed = {opcode: number - (1 - products) * product.get(opcode, 0) for opcode, number in opcodes.items()}

    def total(weight) -> float:
        return sum(number * weight(opcode.split(".")) for opcode, number in weighed.items())

    return Mix(
        instructions=total(lambda _: 1),
        floating_point=total(lambda parts: parts[0] in _FLOATING),
        special_functions=total(lambda parts: parts[0] == "MUFU"),
        shared_memory=total(lambda parts: max(4, _width(parts)) if parts[0] in _SHARED else 0),
        tensor_flops=total(lambda parts: _multiplied(parts)[0]),
        tensor_operands=total(lambda parts: _multiplied(parts)[1]),
    )


def _stores(code: list[str]) -> bool:
    return any(opcode.startswith(_STORES) for opcode in code)


def _contains(loop: range, other: range) -> bool:
    return loop.start <= other.start and other.stop <= loop.stop


def _product(code: list[str], loop: range, skipped: list[range]) -> range | None:
    """The least that a branch of the loop may skip and that holds all of its products of tensor cores."""
    products = [place for place in loop if code[place].startswith(_PRODUCT)]
    if not products:
        return None
    whole = range(products[0], products[-1] + 1)
    around = [part for part in skipped if _contains(loop, part) and _contains(part, whole)]
    return min(around, key=len, default=None)


def _width(parts: list[str]) -> int:
    """Bytes that a thread loads or stores: LDS.128, LDS.U8, STSM.16.M88.4 (four 8 x 8 tiles of a warp)."""
    if "M88" in parts or "MT88" in parts:
        return 4 * int(parts[-1] if parts[-1] in ("2", "4") else 1)
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in parts if part in sizes), 4)


def _multiplied(parts: list[str]) -> tuple[float, float]:
    """Flops of a product of tensor cores, such as HGMMA.64x192x16, and bytes of its 16-bit factors: of a thread."""
    if parts[0] != _PRODUCT:
        return 0, 0
    rows, columns, depth = (int(size) for size in parts[1].split("x"))
    return 2 * rows * columns * depth / 128, 2 * (rows + columns) * depth / 128
