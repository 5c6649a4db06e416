"""The machine code (SASS) of a kernel: its instructions and loops, and how many instructions a warp executes.

`order` reads from it what the memory model asks for. No GPU is needed: nvdisasm prints the code.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

_LINE = re.compile(
    r"\s*(?P<waits>[-\d&]+):(?P<until_read>[-\d]):[-\d]:.:\S+"  # what the assembler tells the scheduler
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/"
    r"\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*)"
)
_LABEL = re.compile(r"(\.L_\w+):")
# Instructions that go elsewhere in a way that `MachineCode` does not follow.
_UNKNOWN = ("BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "BREAK", "RPCMOV", "KILL")
# Copies from shared to device memory by TMA: of a tensor's box or of consecutive bytes, stored or added.
STORES = ("UTMASTG", "UTMAREDG", "UBLKCP.G.S", "UBLKRED.G.S")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: bytes from the kernel's start.
        predicate: P0 or !UP1, with which it is skipped in some threads; "" where all execute it.
        opcode: with modifiers: LDS.128.
        operands: as printed.
        scoreboard: the counter that it raises until it has read its operands, or None.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    scoreboard: int | None

    def __str__(self) -> str:
        return f"{self.opcode} at {self.address:#06x}"

    def has(self, *opcodes: str) -> bool:
        """Whether its opcode begins with the dotted parts of one of `opcodes`: LDS, LDS.128."""
        return any(f"{self.opcode}.".startswith(f"{opcode}.") for opcode in opcodes)


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions in the order of their addresses; `parse` makes it.

    Instructions and blocks are numbered. A block is a run of instructions that is entered at its first and left at its
    last. `blocks` and all that follows from them raise LookupError for a kernel that jumps but to labels.

    Attributes:
        instructions: of the kernel.
        targets: the number of the instruction to which a branch goes, by the branch's number.
    """

    instructions: tuple[Instruction, ...]
    targets: Mapping[int, int]

    @functools.cached_property
    def blocks(self) -> tuple[range, ...]:
        """The instructions of each block."""
        for found in self.instructions:
            if found.has(*_UNKNOWN):
                raise LookupError(f"{found}: expected no jump but to a label")
        ends = {n for n, found in enumerate(self.instructions) if n in self.targets or found.has("EXIT")}
        starts = sorted({0, *self.targets.values(), *(n + 1 for n in ends)} - {len(self.instructions)})
        return tuple(map(range, starts, [*starts[1:], len(self.instructions)]))

    @functools.cached_property
    def following(self) -> tuple[tuple[int, ...], ...]:
        """For each block the blocks that may come next."""
        block_at = {block.start: b for b, block in enumerate(self.blocks)}
        following = []
        for b, block in enumerate(self.blocks):
            last = self.instructions[block[-1]]
            jumps = [block_at[self.targets[block[-1]]]] if block[-1] in self.targets else []
            # A branch may also depend on a predicate among its operands, or on whether threads disagree.
            leaves = last.has("EXIT", "BRA") and not last.predicate and "," not in last.operands
            falls = [] if leaves or b + 1 == len(self.blocks) else [b + 1]
            following.append(tuple({*jumps, *falls}))
        return tuple(following)

    @functools.cached_property
    def reached(self) -> frozenset[int]:
        """The blocks that can be reached from the kernel's start: behind its end are fillers."""
        return self._from([0])

    @functools.cached_property
    def loops(self) -> Mapping[int, frozenset[int]]:
        """The blocks of each loop, by its first block, in the order of addresses. Loops that only wait are left out."""
        loops = {
            head: blocks
            for head, blocks in self._all_loops.items()
            if not any(self.instructions[n].has("NANOSLEEP") for b in blocks for n in self.blocks[b])
            or any(blocks > others for others in self._all_loops.values())
        }
        return dict(sorted(loops.items()))

    @functools.cached_property
    def _all_loops(self) -> Mapping[int, frozenset[int]]:
        before: dict[int, set[int]] = collections.defaultdict(set)
        for b in self.reached:
            for after in self.following[b]:
                before[after].add(b)
        # The blocks through which every path to a block goes.
        needed = {b: self.reached if b else frozenset([0]) for b in self.reached}
        changed = True
        while changed:
            found = {b: frozenset([b]).union(frozenset.intersection(*(needed[a] for a in before[b] or {b}))) if b
                     else needed[0] for b in self.reached}  # fmt: skip
            changed, needed = found != needed, found
        loops: dict[int, frozenset[int]] = {}
        for b in self.reached:
            for head in set(self.following[b]) & needed[b]:
                blocks, left = {head}, [b]
                while left:
                    block = left.pop()
                    left += before[block] - blocks if block not in blocks else ()
                    blocks.add(block)
                loops[head] = loops.get(head, frozenset()) | blocks
        return loops

    def innermost(self, instruction: int) -> frozenset[int]:
        """The instructions of the smallest loop with this instruction; none outside of loops."""
        around = [self._numbers(blocks) for blocks in self.loops.values()]
        return min((found for found in around if instruction in found), key=len, default=frozenset())

    @functools.cached_property
    def opcodes(self) -> Mapping[str, int]:
        """How often each opcode is in the code."""
        return dict(collections.Counter(found.opcode for found in self.instructions))

    def executed(self, trips: Sequence[int]) -> dict[str, int]:
        """The instructions that a warp executes, where no wait is long and branches choose the longest path.

        Args:
            trips: for each of `loops` how often a warp passes it, each time that it comes there.

        Returns:
            Instructions of the "prologue", before the first loop that stores results, of the "epilogue" after the last,
            "between" them, and of each such loop without the loops inside it: "loop 0x14c0", its address.
        """
        if len(trips) != len(self.loops):
            raise ValueError(f"trips: expected {len(self.loops)}, one for each loop, got {len(trips)}")
        waits = [blocks for head, blocks in self._all_loops.items() if head not in self.loops]
        kept = self._from([0], without=frozenset[int]().union(*waits))
        return dict(self._longest(kept, 0, dict(zip(self.loops, trips, strict=True)), None))

    def _from(self, starts: Iterable[int], without: frozenset[int] = frozenset()) -> frozenset[int]:
        """The blocks that can be reached from `starts`, which are among them."""
        found, left = set(), list(starts)
        while left:
            block = left.pop()
            if block not in found and block not in without:
                found.add(block)
                left += self.following[block]
        return frozenset(found)

    def _numbers(self, blocks: Iterable[int]) -> frozenset[int]:
        return frozenset(n for b in blocks for n in self.blocks[b])

    def _stores(self, blocks: Iterable[int]) -> bool:
        return any(self.instructions[n].has(*STORES) for n in self._numbers(blocks))

    def _longest(self, region: frozenset[int], start: int, trips: Mapping[int, int], name: str | None):
        """Counts the instructions of the longest path from block `start` through the region, as in `executed`.

        `name` is the loop whose body the region is; None for the whole kernel.
        """
        inner = {head: self.loops[head] & region for head in self.loops if self.loops[head] & region < region}
        inner = {h: blocks for h, blocks in inner.items() if not any(blocks < other for other in inner.values())}
        head_of = {b: head for head, blocks in inner.items() for b in blocks}
        storing = [b for head, blocks in inner.items() if self._stores(blocks) for b in blocks]
        after = self._from(storing)

        def place(b: int) -> str:
            if name is not None:
                return name
            ahead = not self._from([b]).isdisjoint(storing)
            return ("between" if ahead else "epilogue") if b in after else "prologue"

        @functools.cache
        def best(b: int) -> collections.Counter[str]:
            head = head_of.get(b)
            if head is None:
                here, ways = collections.Counter({place(b): len(self.blocks[b])}), {*self.following[b]}
            else:
                blocks = inner[head]
                own = f"loop {self.instructions[self.blocks[head].start].address:#06x}"
                once = self._longest(blocks, head, trips, own if self._stores(blocks) else place(b))
                here = collections.Counter({part: n * trips[head] for part, n in once.items()})
                ways = {way for block in blocks for way in self.following[block]} - blocks
            rest = (best(way) for way in sorted((ways & region) - {start}))
            return here + max(rest, key=lambda counts: counts.total(), default=collections.Counter())

        return best(start)


def parse(disassembly: str) -> MachineCode:
    """Reads what nvdisasm prints with scheduling information (`.sass_ctrl`).

    Raises:
        LookupError: there is no instruction.
    """
    instructions, labels, branches = [], {}, {}
    for line in disassembly.splitlines():
        label, found = _LABEL.match(line), _LINE.match(line)
        if label:
            labels[label[1]] = len(instructions)
        if not found:
            continue
        scoreboard = None if found["until_read"] == "-" else int(found["until_read"])
        instruction = Instruction(
            int(found["address"], 16), found["predicate"] or "", found["opcode"], found["operands"].strip(), scoreboard
        )
        if instruction.has("BRA"):
            branches[len(instructions)] = instruction.operands.rpartition("`(")[2].rstrip(")")
        instructions.append(instruction)
    if not instructions:
        raise LookupError("no instruction in the disassembly")
    return MachineCode(tuple(instructions), {n: labels[label] for n, label in branches.items()})
