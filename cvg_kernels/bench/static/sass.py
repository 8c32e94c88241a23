"""Reads the machine code of NVIDIA GPUs (SASS) as `nvdisasm -c` prints it: control flow, loops, and what a loop does.

Only what a budget of instructions needs. A loop is a strongly connected part of the graph of basic blocks, found from
the outside inwards, so loops that the compiler entered in the middle, and blocks that it laid out elsewhere
(Blackwell's waits), count where they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P[0-9T]+)\s+)?(?P<opcode>[A-Z][A-Z0-9_.a-z]*)"
    r"\s*(?P<operands>.*?)\s*;?\s*(?:/\*.*)?$"
)
_LABEL = re.compile(r"^(\.L_[\w.]+|\.text\.[\w$.]+|\$[\w$.]+):")
_TARGET = re.compile(r"\.L_\w+")
#: A branch with such an operand goes on to the next instruction as well.
_CONDITION = re.compile(r"^!?U?P[0-6]\b")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int
    predicate: str | None  #: `P0`, `!UP1`; `None`: always done
    opcode: str  #: with its modifiers, `LDG.E.128`
    operands: str

    @property
    def name(self) -> str:
        """The operation without modifiers, `LDG`."""
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether, as a branch, it may also be passed over."""
        return (
            self.predicate not in (None, "PT", "UPT")
            or bool(_CONDITION.match(self.operands))
            or self.opcode.startswith(("BRA.DIV", "BRA.CONV", "WARPSYNC"))
        )


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
        address: address of its first instruction.
        depth: 0 for an outermost loop.
        body: every instruction in it, in order; both sides of a branch.
        inner: the loops right inside.
    """

    address: int
    depth: int
    body: tuple[Instruction, ...]
    inner: tuple[Loop, ...]

    def all(self) -> Iterable[Loop]:
        """This loop and all loops in it."""
        yield self
        for loop in self.inner:
            yield from loop.all()

    def without(self, taken: Callable[[Loop], bool]) -> tuple[Instruction, ...]:
        """The body less the loops inside, however deep, for which `taken` is true."""
        gone = {
            instruction.address for loop in self.all() if loop is not self and taken(loop) for instruction in loop.body
        }
        return tuple(instruction for instruction in self.body if instruction.address not in gone)


def instructions(text: str) -> list[Instruction]:
    """The instructions of the first function in `text`."""
    return [instruction for block in blocks(text) for instruction in block.instructions]


def blocks(text: str) -> list[Block]:
    """The basic blocks of the first function in `text`, with their edges.

    Raises:
        ValueError: `text` holds no instruction, or a branch goes to a label that is not there.
    """
    found, labels, joins = [Block()], {}, {}
    for line in _function(text).splitlines():
        if label := _LABEL.match(line):
            if found[-1].instructions:
                found.append(Block())
            labels[label[1]] = len(found) - 1
        elif match := _INSTRUCTION.match(line):
            instruction = Instruction(
                int(match["address"], 16), match["predicate"], match["opcode"], match["operands"]
            )
            found[-1].instructions.append(instruction)
            if instruction.name == "BSSY":
                joins[instruction.operands.split(",")[0]] = _TARGET.search(instruction.operands)[0]
            if _ends_block(instruction):
                found.append(Block())
    if not found[-1].instructions:
        found.append(Block())  # labels behind the last instruction
    if not any(block.instructions for block in found):
        raise ValueError("no SASS instruction in the text; it must be the output of `nvdisasm -c`")
    for number, block in enumerate(found[:-1]):
        last = block.instructions[-1] if block.instructions else None
        targets = [] if last is None else _targets(last, joins)
        unknown = [target for target in targets if target not in labels]
        if unknown:
            raise ValueError(f"a branch at {last.address:#x} goes to {unknown[0]}, which is nowhere")
        block.successors.update(labels[target] for target in targets)
        if last is None or _goes_on(last):
            block.successors.add(number + 1)
    return found


def _function(text: str) -> str:
    """The text of the first function with code."""
    parts = re.split(r"^//-+ \.text\.\S+.*$", text, flags=re.MULTILINE)
    return parts[1] if len(parts) > 1 else text


_BRANCHES = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU")


def _ends_block(instruction: Instruction) -> bool:
    return (
        instruction.name in (*_BRANCHES, "BSYNC", "EXIT", "RET", "CALL", "KILL")
        or instruction.name == "WARPSYNC"
        and ".L_" in instruction.operands
    )


def _targets(instruction: Instruction, joins: dict[str, str]) -> list[str]:
    """The labels that an instruction at the end of a block may go to; a call of another function is none."""
    if instruction.name == "BSYNC":
        return [joins[instruction.operands]] if instruction.operands in joins else []
    return _TARGET.findall(instruction.operands) if _ends_block(instruction) else []


def _goes_on(instruction: Instruction) -> bool:
    """Whether the next instruction may follow."""
    if instruction.name in (*_BRANCHES, "EXIT", "RET", "KILL"):
        return instruction.conditional
    if instruction.name == "CALL":  # within a function ptxas uses it as a branch
        return instruction.conditional or ".L_" not in instruction.operands
    return True


def loops(text: str) -> list[Loop]:
    """The outermost loops of the first function in `text`, in the order of their addresses.

    A block that only jumps to itself, unconditionally and without work (the end mark of every function), is none.
    """
    code = blocks(text)
    reached, waiting = set(), [0]
    while waiting:
        number = waiting.pop()
        if number not in reached:
            reached.add(number)
            waiting.extend(code[number].successors)
    return _loops_within(code, reached, 0, {})


def _loops_within(code: list[Block], nodes: set[int], depth: int, cut: dict[int, set[int]]) -> list[Loop]:
    """Loops among `nodes`; `cut` holds, by header, the edges that surrounding loops took away."""

    def successors(node: int) -> set[int]:
        return (code[node].successors & nodes) - cut.get(node, set())

    found = []
    for component in _components(nodes, successors):
        if len(component) == 1 and not component & successors(next(iter(component))):
            continue
        entered = {
            target
            for node in range(len(code))
            if node not in component
            for target in code[node].successors & component
        }
        header = min(entered or component)
        inner_cut = {node: cut.get(node, set()) | {header} for node in component}
        inner = _loops_within(code, component, depth + 1, inner_cut)
        body = tuple(instruction for node in sorted(component) for instruction in code[node].instructions)
        if body:
            found.append(Loop(body[0].address, depth, body, tuple(inner)))
    return sorted(found, key=lambda loop: loop.address)


def _components(nodes: set[int], successors: Callable[[int], set[int]]) -> list[set[int]]:
    """Strongly connected components (Tarjan), without recursion: functions have thousands of blocks."""
    index, low, on_stack = {}, {}, set()
    stack, found = [], []
    for root in sorted(nodes):
        if root in index:
            continue
        work = [(root, iter(sorted(successors(root))))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for target in rest:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, iter(sorted(successors(target)))))
                    break
                if target in on_stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = set()
                    while node not in component:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.add(member)
                    found.append(component)
    return found
