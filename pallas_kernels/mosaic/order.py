"""The order that the memory model asks of a kernel, checked in its machine code on every path.

Threads write results to shared memory and TMA copies them to device memory. The interpreter runs a kernel's operations
one after the other; only the machine code shows whether the compilers have kept the order between the two. How the
operations appear, each compiled alone by ptxas 13.5:

    st.shared, atom.shared                    STS, STSM, ATOMS
    fence.proxy.async.shared::cta             MEMBAR.ALL.CTA, FENCE.VIEW.ASYNC.S
    bar.sync                                  BAR.SYNC
    cp.async.bulk out of shared memory        UTMASTG, UBLKCP.G.S; added to it: UTMAREDG, UBLKRED.G.S
    cp.async.bulk into shared memory          UTMALDG, UBLKCP.S.G
    cp.async.bulk.commit_group                UTMACMDFLUSH, which raises a scoreboard until the group has been read
    cp.async.bulk.wait_group n, also .read    DEPBAR.LE with that scoreboard and n
    wgmma.mma_async, wgmma.wait_group n       HGMMA, WARPGROUP.DEPBAR.LE gsb0, n
    griddepcontrol.wait, .launch_dependents   ACQBULK, PREEXIT

Not seen are addresses, and with them which buffer a store writes: stores outside the innermost loop of the copies are
taken for the walk's state and may come before a wait. Nor whether a copy into shared memory has arrived when threads
read it, and has been read before the next one overwrites it; nor whose barrier it is, of several warpgroups. The
interpreter's race detector looks for these.
"""

import re
from typing import NamedTuple

from pallas_kernels.mosaic.machine_code import STORES, Instruction, MachineCode

_WRITES = ("STS", "STSM", "ATOMS", "ST", "ATOM")  # by threads; the last two where a pointer may be to any memory
_LOADS = ("UTMALDG", "UBLKCP.S.G")  # copies into shared memory by TMA
_OF_NEXT_KERNEL = ("ACQBULK", "PREEXIT")


class _State(NamedTuple):
    """What a path has left open."""

    written: str = ""  # "written": to shared memory, no fence yet; "fenced": no barrier yet
    groups: int = 0  # of copies that may still read shared memory
    alone: bool = False  # the last wait for groups was not followed by a barrier, so it holds for one thread
    group: int | None = None  # the instruction that closed the last group
    copies: int | None = None  # the last copy that is in no group
    products: tuple[int, ...] = ()  # HGMMA instructions whose results are not there yet


def violations(code: MachineCode, stores: int) -> list[str]:
    """Says where a path through the code breaks the order; an empty list if none does.

    - Between the last write to shared memory and a copy out of it or into it come the fence and then the barrier.
    - Between the fence and the barrier nothing is written.
    - Where results are written, at most `stores` - 1 groups of copies have not been read; a barrier follows the wait.
    - Every copy is in a group when a thread waits for groups; none has to be read when a thread ends.
    - Nothing touches the registers of a matrix product between its start and its wait.
    - No instruction of programmatic dependent launches, which nothing here asks for.

    Args:
        code: of a kernel.
        stores: lines of results for which it has buffers.
    """
    return [text for _, text in sorted(_Walk(code, stores).found)]


class _Walk:
    """Follows all paths at once: the states that can occur at each block's start, until no new one is found."""

    def __init__(self, code: MachineCode, stores: int):
        self.code, self.stores = code, stores
        self.found: set[tuple[int, str]] = set()
        self._scoreboards = {f"SB{one.scoreboard}" for one in code.instructions if one.has("UTMACMDFLUSH")}
        seen, left = {(0, _State())}, [(0, _State())]
        while left:
            block, state = left.pop()
            for n in code.blocks[block]:
                state = self._after(n, state)
            new = {(following, state) for following in code.following[block]} - seen
            seen |= new
            left += new

    def _report(self, n: int, text: str) -> None:
        instruction = self.code.instructions[n]
        self.found.add((instruction.address, f"{instruction}: {text}"))

    def _after(self, n: int, state: _State) -> _State:
        """The state after instruction n; what a predicate may skip proves nothing."""
        one = self.code.instructions[n]
        if one.has(*_OF_NEXT_KERNEL):
            self._report(n, "launches depend on each other")
        if state.products:
            for product in state.products:
                if _registers(one) & _registers(self.code.instructions[product]) and not one.has("HGMMA"):
                    self._report(n, f"touches the result of {self.code.instructions[product]} before its wait")
        if one.has(*_WRITES):
            return self._write(n, state)
        if one.has(*STORES, *_LOADS):
            if state.written:
                self._report(n, f"no {'fence' if state.written == 'written' else 'barrier'} since the last write")
            return state if one.has(*_LOADS) else state._replace(copies=n)
        if one.has("UTMACMDFLUSH"):
            return state._replace(groups=min(state.groups, self.stores) + 1, group=n, copies=None)
        if one.has("HGMMA"):
            return state._replace(products=(*(p for p in state.products if p != n), n))
        if one.has("EXIT") or (one.has("DEPBAR") and one.operands.split(",")[0] in self._scoreboards):
            return self._wait(n, state)
        if one.predicate:
            return state
        if one.has("FENCE.VIEW.ASYNC.S"):
            return state._replace(written=state.written and "fenced")
        if one.has("BAR.SYNC"):
            return state._replace(written="" if state.written == "fenced" else state.written, alone=False)
        if one.has("WARPGROUP.DEPBAR"):
            still = _last_number(one)
            return state._replace(products=state.products[-still:] if still else ())
        return state

    def _write(self, n: int, state: _State) -> _State:
        if state.written == "fenced":
            self._report(n, "writes between the fence and the barrier")
        # In another loop than the copies, a thread writes the state of a walk and not results.
        loop = self.code.innermost(state.group) if state.group is not None else frozenset()
        if (state.groups >= self.stores or state.alone) and (not loop or n in loop):
            what = "a barrier follows the wait" if state.alone else "the copies before have been read"
            self._report(n, f"writes before {what}")
        return state._replace(written="written")

    def _wait(self, n: int, state: _State) -> _State:
        """A wait for groups, or a thread's end."""
        one = self.code.instructions[n]
        if state.copies is not None:
            self._report(n, f"{self.code.instructions[state.copies]} is in no group")
        if one.has("EXIT"):
            if state.groups:
                self._report(n, "copies may not have been read")
            return state
        return state if one.predicate else state._replace(groups=min(state.groups, _last_number(one)), alone=True)


def _last_number(one: Instruction) -> int:
    return int(one.operands.rpartition(",")[2], 16)


def _registers(one: Instruction) -> frozenset[int]:
    """The registers that an instruction reads or writes."""
    if one.has("HGMMA"):
        first, columns = re.match(r"R(\d+)", one.operands), re.match(r"HGMMA\.64x(\d+)", one.opcode)
        assert first and columns, one
        return frozenset(range(int(first[1]), int(first[1]) + int(columns[1]) // 2))  # 64 columns / 128 threads
    width = re.search(r"\.(64|128|2|4)\b", one.opcode)
    width = {"64": 2, "128": 4}.get(width[1], int(width[1])) if width else 1
    wide = one.has("IMAD.WIDE", "CS2R")
    found = set()
    for place, operand in enumerate(one.operands.split(", ")):
        for name, of_two in re.findall(r"\bR(\d+)(\.64)?", operand):
            count = 2 if of_two or (wide and place in (0, 3)) else 1 if "[" in operand else width
            found |= set(range(int(name), int(name) + count))
    return frozenset(found)
