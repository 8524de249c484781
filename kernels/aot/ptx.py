"""What XLA's GPU compiler and ptxas leave behind, from text to structure: launches, resources, bytes.

Three texts of XLA's dump (the thunk sequence, its metadata, PTX), the optimised HLO, and what `ptxas -v` says. None
of these forms is documented: one that is not understood is an error that says what was looked for, never a number.
"""

from __future__ import annotations

import dataclasses
import math
import re

from longwave.kernels.aot.hlo import _INSTRUCTION, _shapes


class DumpFormatError(ValueError):
    """What XLA or ptxas wrote is not what this module can read: it says what was looked for, and where."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A line of XLA's thunk sequence that launches a kernel."""

    id: int
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    dynamic: int  # bytes of shared memory beside those in the kernel's text


_THUNK = re.compile(r"^\s*(\d+): (k\w+)\s+\[", re.MULTILINE)
_LAUNCH = re.compile(
    r"^\s*(\d+): k\w*Kernel\s+\[[^\]]*\]\s+(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
    r"\s+shared_memory: (\d+) bytes\s*$",
    re.MULTILINE,
)


def launches(sequence: str) -> list[Launch]:
    """Every launch of XLA's thunk sequence, those inside loops and branches too."""
    found = []
    for match in _LAUNCH.finditer(sequence):
        number, kernel, *sizes = match.groups()
        x, y, z, *threads, dynamic = map(int, sizes)
        found.append(Launch(int(number), kernel, (x, y, z), math.prod(threads), dynamic))
    kinds = [kind for _, kind in _THUNK.findall(sequence)]
    expected = sum(kind.endswith("Kernel") for kind in kinds)
    if len(found) != expected or (sequence.strip() and not kinds):
        raise DumpFormatError(
            f"XLA's thunk sequence has {expected} launches, {len(found)} of the form 'ID: kKernel [..] NAME grid: "
            f"[x, y, z] threads: [x, y, z] shared_memory: N bytes'; it begins: {sequence[:200]!r}"
        )
    return found


_METADATA = re.compile(r'thunk_info \{\s*profile_annotation: "([^"]+)"\s*thunk_id: (\d+)\s*\}')


def annotations(metadata: str) -> dict[int, str]:
    """Thunk -> the HLO instruction that it carries out."""
    found = {int(number): name for name, number in _METADATA.findall(metadata)}
    if metadata.strip() and not found:
        raise DumpFormatError(f"no profile_annotation with a thunk_id in XLA's thunk metadata: {metadata[:200]!r}")
    return found


_ENTRY = re.compile(r"^\.visible \.entry ([\w$]+)\(", re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TENSOR = re.compile(r"^\s*(?:@\S+ )?(?:wgmma\.mma_async|mma|tcgen05\.mma)\.", re.MULTILINE)
_USAGE = {
    "registers": r"Used (\d+) registers",
    "barriers": r"used (\d+) barriers",
    "static": r"(\d+) bytes smem",
    "stores": r"(\d+) bytes spill stores",
    "loads": r"(\d+) bytes spill loads",
}
_REQUIRED = ("registers", "stores", "loads")  # ptxas leaves out barriers and shared memory that are 0


def resource_usage(text: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says of each kernel: registers, spills, barriers and static shared memory."""
    _, *parts = re.split(r"Compiling entry function '([\w$]+)'", text)
    usage = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        found = {field: re.search(pattern, part) for field, pattern in _USAGE.items()}
        if absent := [_USAGE[field] for field in _REQUIRED if found[field] is None]:
            raise DumpFormatError(f"ptxas does not say {' nor '.join(absent)} of {name}: {part.strip()[:300]!r}")
        used = {field: int(match[1]) if match else 0 for field, match in found.items()}
        usage[name] = {**used, "spills": used["stores"] + used["loads"]}
        del usage[name]["stores"], usage[name]["loads"]
    return usage



def traffic(hlo_text: str) -> dict[str, int]:
    """Instruction -> bytes, its operands read once and its results written once."""
    moved, shapes = {}, {}
    for line in hlo_text.splitlines():
        if match := _INSTRUCTION.match(line):
            shapes[match["name"]] = results = _shapes(match["shape"])
            names = dict.fromkeys(re.findall(r"%([\w.-]+)", match["operands"]))
            moved[match["name"]] = sum(s.bytes for x in (results, *(shapes.get(n, ()) for n in names)) for s in x)
    return moved
