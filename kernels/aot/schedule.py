"""The TPU compiler's final schedule of one kernel, read from two of the files that it dumps: text in, structure out.

A TensorCore issues one bundle of instructions a cycle, and a schedule lists them with the empty ones (stalls) kept.

    packed-bundles-post-ra                      the bundles, their branches and their instructions
    pre-delay_hlo-static-per-bundle-utilization how many slots of each unit every bundle fills, and how many there are

The formats are documented nowhere and change with libtpu. What is not understood raises `ScheduleFormatError`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NoReturn

import numpy as np
from jaxtyping import Int

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
DELAY = 4  # the bundles after a branch that are issued whether it is taken or not

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2})\+? *)?: *[> ]*\{", re.MULTILINE)
_MNEMONIC = re.compile(r"(?:\{|;;)\s*(?:%\S+ = )?([a-z]\w*(?:\.\w+)*)")
_BRANCH = re.compile(r"(?:\{|;;)\s*%\w+ = sbr\.rel (?:\((!?%\w+)\) )?target bundleno = (\d+)")
_MATMUL = re.compile(r"vmatmul\.(?:mubr\.)?(?:msk\.)?(lmr\.bf16|bf16|f32)\b")
_COUNTER = re.compile(r"(%\w+) = sphi [^;]*?iteration index, stage = 0\b(?! iter bound)")
_DEFINITION = re.compile(r"(%[ps]\w+) = (p[a-z]+|scmp\.\w+\.s32\.totalorder|sld|smov|scalar_select) ([^;}/]*)")
_CORE = re.compile(r"(%\w+) = sld \S+ /\* core id")
_SPILL = re.compile(r"sst (\[smem:\[#\w+_spill\]\]) (%\w+)")


class ScheduleFormatError(ValueError):
    """A dumped file is not what this reader knows: what was expected, where, and what was found."""

    def __init__(self, file: str, where: str, expected: str, found: object):
        super().__init__(
            f"{file}, {where}: expected {expected}, found {found!r}. The format of the compiler's schedule is "
            "undocumented and this reader knows libtpu 0.0.42; no figure is given rather than a wrong one"
        )


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles [start, end) that are issued together: the whole kernel, a loop, or what a branch may jump over.

    stage: a predicated region that every step runs through: it is skipped while the grid's pipeline fills or drains, or
        by the core that has no part in the kernel.
    """

    kind: Literal["kernel", "loop", "predicated"]
    start: int
    end: int
    children: tuple[Region, ...] = ()
    stage: bool = False

    def tree(self) -> Iterator[Region]:
        """This region and all inside it, in program order."""
        yield self
        for child in self.children:
            yield from child.tree()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel on one chip.

    use: slots that each bundle fills, a column for each of `UNITS`; capacity: slots there are.
        VLOAD counts the reloads of spilled registers (VLOAD:FILL) too, and VSTORE their spills.
    matmuls: dtype -> `vmatmul` instructions of each bundle (one feeds a vector register to a matrix unit). "lmr.bf16"
        is the form that v5e and v5p take where no more than half of the unit's rows are used.
    root: the kernel, with its loops and predicated regions.
    grid: the loop over the grid, None where the grid is one step.
    iterations: how often `grid` runs: the steps of one core, and up to two more that fill and drain the pipeline.
    """

    use: Int[np.ndarray, "bundles units"]
    capacity: Int[np.ndarray, " units"]
    matmuls: Mapping[str, Int[np.ndarray, " bundles"]]
    root: Region
    grid: Region | None
    iterations: int

    @property
    def bundles(self) -> int:
        return len(self.use)

    def matmul_count(self, region: Region) -> int:
        return sum(int(count[region.start : region.end].sum()) for count in self.matmuls.values())


def parse(bundles: str, utilization: str) -> Schedule:
    """Reads the text of the two files (the module's docstring names them).

    Raises:
      ScheduleFormatError: a file is not understood, or the two do not belong together.
    """
    code = _split(bundles)
    capacity, use = _utilization(utilization)
    if len(use) != len(code):
        _fail("utilization", "rows", f"one for each of the {len(code)} bundles", len(use))
    root, grid, iterations = _grid(code, _regions(code))
    return Schedule(use, capacity, _matmuls(code), root, grid, iterations)


def _fail(file: str, where: str, expected: str, found: object) -> NoReturn:
    raise ScheduleFormatError(file, where, expected, found)


class _Bundle(str):
    """The text of one bundle, and its label ("LB": loop body, "PF": behind a predicated region ...)."""

    label: str | None


def _split(text: str) -> list[_Bundle]:
    heads = list(_BUNDLE.finditer(text))
    if not heads:
        _fail("bundles", "file", "bundles such as '0x1f : { ... }'", text[:80])
    code = []
    for i, head in enumerate(heads):
        if int(head[1], 16) != i:
            _fail("bundles", f"bundle {i:#x}", "consecutive addresses", head[1])
        bundle = _Bundle(text[head.end() - 1 : heads[i + 1].start() if i + 1 < len(heads) else len(text)])
        bundle.label = head[2]
        if "}" not in bundle:
            _fail("bundles", f"bundle {i:#x}", "a closing brace", bundle[-80:])
        code.append(bundle)
    return code


def _utilization(text: str) -> tuple[np.ndarray, np.ndarray]:
    lines = [line.strip() for line in text.strip().splitlines()]
    if len(lines) < 5 or not lines[0].startswith("== CAPAC") or not lines[3].startswith("== UTIL"):
        _fail("utilization", "head", "the units, their capacity and '== UTILIZATION:'", "\n".join(lines[:4]))
    if (units := tuple(re.split(r",\s*", lines[1]))) != UNITS:
        _fail("utilization", "line 2", f"the units {', '.join(UNITS)}", ", ".join(units))
    try:
        table = [[int(n) for n in line.split()] for line in (lines[2], *lines[4:])]
    except ValueError as error:
        _fail("utilization", "rows", "whole numbers", str(error))
    for i, row in enumerate(table):
        if len(row) != len(UNITS):
            _fail("utilization", f"row {i - 1}", f"{len(UNITS)} numbers", row)
    capacity, use = np.array(table[0]), np.array(table[1:])
    if (capacity < 1).any() or (use < 0).any() or (use > capacity).any():
        _fail("utilization", "rows", f"0 to {capacity.tolist()} slots", use.max(axis=0).tolist())
    return capacity, use


def _matmuls(code: list[_Bundle]) -> dict[str, np.ndarray]:
    count = {dtype: np.zeros(len(code), int) for dtype in ("bf16", "lmr.bf16", "f32")}
    for i, bundle in enumerate(code):
        if "vmatmul" not in bundle:
            continue
        for name in _MNEMONIC.findall(bundle):
            if name.startswith("vmatmul"):
                if not (match := _MATMUL.match(name)):
                    _fail("bundles", f"bundle {i:#x}", "vmatmul of bf16 or f32", name)
                count[match[1]][i] += 1
    return count


def _regions(code: list[_Bundle]) -> Region:
    """A branch back is a loop, its delay slots included; a branch forward jumps over what lies behind its slots."""
    spans: list[Region] = []
    targets: dict[str, set[int]] = {"loop": set(), "predicated": set()}
    for i, bundle in enumerate(code):
        branches = _BRANCH.findall(bundle) if "sbr" in bundle or "scall" in bundle else []
        names = [n for n in _MNEMONIC.findall(bundle) if n.startswith(("sbr", "scall"))] if "s" in bundle else []
        if len(names) != len(branches) or len(branches) > 1:
            _fail("bundles", f"bundle {i:#x}", "at most one 'sbr.rel (%p) target bundleno = N'", names)
        for _, target in branches:
            kind: Literal["loop", "predicated"] = "loop" if int(target) <= i else "predicated"
            start, end = (int(target), i + 1 + DELAY) if kind == "loop" else (i + 1 + DELAY, int(target))
            if start > end or end > len(code):
                _fail("bundles", f"bundle {i:#x}", f"a target within the {len(code)} bundles", target)
            targets[kind].add(int(target))
            if start < end:
                spans.append(Region(kind, start, end))
    labelled = {i for i, bundle in enumerate(code) if bundle.label in ("LB", "LH")}
    if labelled != targets["loop"]:
        _fail("bundles", "labels LB", f"the targets of the branches back, {sorted(targets['loop'])}", sorted(labelled))
    if lost := {i for i, bundle in enumerate(code) if bundle.label == "PF"} - targets["predicated"]:
        _fail("bundles", "labels PF", f"among the targets {sorted(targets['predicated'])}", sorted(lost))
    # Where a loop fills all of a predicated region, the branch over it comes first.
    return _nest(Region("kernel", 0, len(code)), sorted(spans, key=lambda r: (r.start, -r.end, r.kind == "loop")))


def _nest(parent: Region, inside: list[Region]) -> Region:
    children = []
    while inside:
        head, rest = inside[0], inside[1:]
        if head.end > parent.end:
            _fail("bundles", f"bundle {head.start:#x}", f"a region that ends within {parent}", head.end)
        split = next((i for i, region in enumerate(rest) if region.start >= head.end), len(rest))
        children.append(_nest(head, rest[:split]))
        inside = rest[split:]
    return dataclasses.replace(parent, children=tuple(children))


def _grid(code: list[_Bundle], root: Region) -> tuple[Region, Region | None, int]:
    """The root with its stages marked, the loop over the grid in it, and how often that runs."""
    predicates = _Predicates(code)
    for region in root.children:  # all of a kernel that one core of two runs
        if region.kind == "predicated" and predicates.core & predicates.compared(code, region):
            root = _swap(root, region, dataclasses.replace(region, stage=True))
    heads = {i: match[1] for i, bundle in enumerate(code) if (match := _COUNTER.search(bundle))}
    if not heads:
        return root, None, 1
    outermost = [r for child in root.children for r in ((child, *child.children) if child.stage else (child,))]
    loops = [r for r in outermost if r.kind == "loop" and r.start in heads]
    if len(heads) != 1 or len(loops) != 1:
        _fail("bundles", "loops", "one outermost loop whose counter is the 'iteration index, stage = 0'", sorted(heads))
    (loop,), (counter,) = loops, heads.values()
    ((_, limit),) = predicates.compares(code, loop.end - 1 - DELAY) or (("", "nothing"),)
    if not limit.isdigit():
        _fail("bundles", f"the grid's loop at {loop.start:#x}", "an exit test against a number of steps", limit)
    iterations = int(limit)

    def bounds(region: Region) -> set[str]:
        """The numbers that the counter alone is compared with where the branch over the region is decided."""
        compares = predicates.compares(code, region.start - 1 - DELAY) if region.kind == "predicated" else []
        return {value for _, value in compares} if {register for register, _ in compares} == {counter} else set()

    filled = [child for child in loop.children if str(iterations - 1) in bounds(child)]
    pipelined = "iteration index, stage = 1" in "".join(code[loop.start : loop.end])
    if pipelined and not filled:
        filled = [child for child in loop.children if bounds(child) == {"1"}]
    large = [c for c in loop.children if c.kind == "predicated" and 2 * (c.end - c.start) > loop.end - loop.start]
    if len(filled) > 1 or (pipelined and large and not filled):
        _fail("bundles", f"the grid's loop at {loop.start:#x}", "one region behind the pipeline's own test", filled)
    children = tuple(dataclasses.replace(c, stage=True) if c in filled else c for c in loop.children)
    grid = dataclasses.replace(loop, children=children)
    return _swap(root, loop, grid), grid, iterations


def _swap(tree: Region, old: Region, new: Region) -> Region:
    children = tuple(new if child is old else _swap(child, old, new) for child in tree.children)
    return dataclasses.replace(tree, children=children)


class _Predicates:
    """What branches depend on."""

    def __init__(self, code: list[_Bundle]):
        text = re.sub(r"/\*\w+=\*/", "", "".join(code))  # an argument's name
        self.spilled = dict(_SPILL.findall(text))
        defined = {name: (op, rest.split(",")) for name, op, rest in _DEFINITION.findall(text)}
        self.defined = {name: (op, [word.strip() for word in words]) for name, (op, words) in defined.items()}
        self.core = set(_CORE.findall(text))

    def compares(self, code: list[_Bundle], branch: int) -> list[tuple[str, str]]:
        """(register, value) of the ordered comparisons that decide a branch, [] where other things do too."""
        (name, _), *_ = _BRANCH.findall(code[branch])
        leaves, todo = [], [name.lstrip("!")]
        while todo:
            op, words = self.defined.get(todo.pop(), ("", []))
            if op.startswith("p"):  # pnand, por, pneg, pmov ...
                todo += words
            elif op.startswith(("scmp.ge", "scmp.lt", "scmp.gt", "scmp.le")):
                leaves.append((self._register(words[0]), words[1]))
            elif op.startswith("scmp.ne") and words[1] == "0" and (kept := self._kept(words[0])):
                todo.append(kept)
            else:
                return []
        return leaves

    def compared(self, code: list[_Bundle], region: Region) -> set[str]:
        """The registers of the one comparison that the branch over a region depends on."""
        (name, _), *_ = _BRANCH.findall(code[region.start - 1 - DELAY])
        op, words = self.defined.get(name.lstrip("!"), ("", []))
        return {self._register(word) for word in words} if op.startswith("scmp") else set()

    def _register(self, name: str) -> str:
        """The register that a copy or a reload has its value from."""
        op, words = self.defined.get(name, ("", [name]))
        if op == "sld" and words[0] in self.spilled:
            return self._register(self.spilled[words[0]])
        return self._register(words[0]) if op == "smov" and words[0].startswith("%") else name

    def _kept(self, name: str) -> str | None:
        """The predicate that was kept in a scalar register as 1 or 0."""
        op, words = self.defined.get(self._register(name), ("", []))
        return words[0] if op == "scalar_select" and words[1:] == ["1", "0"] else None
