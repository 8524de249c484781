"""What an optimised HLO module says of itself: collectives with their shapes, and custom calls.

Works on `compiled.as_text()` of every backend. An instruction counts once, also where a loop repeats it: the
text for a TPU does not give trip counts.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) "
    r"(?P<op>[a-z][\w-]*)\((?P<operands>.*?)\)(?:, (?P<rest>.*))?$"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?$")


class Shape(NamedTuple):
    """Element type as HLO writes it ("bf16") and dimensions, of one device's part."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(math.prod(self.dims) * (int(bits[0]) if bits else 8) / 8)  # pred is a byte


class Collective(NamedTuple):
    """One collective: operands and results of one device, and the JAX operation it comes from."""

    kind: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    source: str

    @property
    def bytes(self) -> int:
        """Of the whole array, on one device: what is gathered, or what is yet to be reduced or moved."""
        return max(sum(s.bytes for s in self.operands), sum(s.bytes for s in self.results))


class _Instruction(NamedTuple):
    computation: str
    op: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    rest: str


def shapes_in(text: str) -> tuple[Shape, ...]:
    return tuple(Shape(t, tuple(map(int, filter(None, dims.split(","))))) for t, dims in _SHAPE.findall(text))


def _instructions(hlo_text: str) -> Iterator[_Instruction]:
    computation, shapes = "", {}
    for line in hlo_text.splitlines():
        if m := _COMPUTATION.match(line):
            computation, shapes = m[1], {}
        elif m := INSTRUCTION.match(line):
            shapes[m["name"]] = results = shapes_in(m["shape"])
            operands = shapes_in(m["operands"])  # older texts write the shapes there, newer ones only the names
            if not operands:
                names = re.findall(r"%([\w.-]+)", m["operands"])
                operands = tuple(s for name in names for s in shapes.get(name, ()))
            yield _Instruction(computation, m["op"], operands, results, m["rest"] or "")


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective, the two halves of an asynchronous one counted once.

    On a TPU a reduce-scatter is an all-reduce and a slice in a fusion ("all-reduce-scatter"); an asynchronous
    all-gather is spread over the fusions that hide it (of one `chain_id`). Both are seen through.
    """
    found, chains = [], set()
    for i in _instructions(hlo_text):
        if not (m := _COLLECTIVE.match(i.op)):
            continue
        if chain := re.search(r'chain_id="(\d+)"', i.rest):
            channel = re.search(r"channel_id=(\d+)", i.rest)
            key = (m[1], channel and channel[1], chain[1])
            if key in chains:
                continue
            chains.add(key)
        kind, results = m[1], i.results
        if m[2] and len(results) >= 2 * len(i.operands):  # a start's results: (operands, results, semaphores)
            results = results[len(i.operands) : 2 * len(i.operands)]
        if kind == "all-reduce" and i.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', i.rest)
        found.append(Collective(kind, i.operands, results, source[1] if source else ""))
    return found


def all_gathers(hlo_text: str) -> list[Collective]:
    """The all-gathers: a test asserts from their operand shapes that no activation is among them."""
    return [c for c in collectives(hlo_text) if c.kind == "all-gather"]


def custom_calls(hlo_text: str) -> dict[str, int]:
    """Target -> how many; a Pallas kernel is "tpu_custom_call" on TPU."""
    return dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', hlo_text)))
