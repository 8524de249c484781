"""What XLA's GPU compiler and ptxas leave behind, from text to structure: launches, resources, bytes.

The texts are XLA's thunk sequence and its metadata, PTX, the optimised HLO, and what `ptxas -v` says. None of these
forms is documented: one that is not understood is an error that says what was looked for, never a number.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from longwave.kernels.aot.hlo import INSTRUCTION, shapes_in


class DumpFormatError(ValueError):
    """What XLA or ptxas wrote is not what this module can read."""


class Launch(NamedTuple):
    """A line of the thunk sequence that launches a kernel; `dynamic` is shared memory that its PTX does not fix."""

    thunk: int
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    dynamic: int


_THUNK = re.compile(r"^\s*\d+: (k\w+)\s+\[", re.MULTILINE)
_LAUNCH = re.compile(
    r"^\s*(\d+): k\w*Kernel\s+\[[^\]]*\]\s+(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
    r"\s+shared_memory: (\d+) bytes\s*$",
    re.MULTILINE,
)


def launches(sequence: str) -> list[Launch]:
    """Every launch of a thunk sequence, those inside loops and branches too."""
    found = []
    for thunk, kernel, *numbers in _LAUNCH.findall(sequence):
        x, y, z, *threads, dynamic = map(int, numbers)
        found.append(Launch(int(thunk), kernel, (x, y, z), math.prod(threads), dynamic))
    kinds = _THUNK.findall(sequence)
    expected = sum(kind.endswith("Kernel") for kind in kinds)
    if len(found) != expected or not kinds:
        raise DumpFormatError(
            f"of {expected} launches in XLA's thunk sequence {len(found)} have the form 'ID: kKernel [...] NAME grid: "
            f"[x, y, z] threads: [x, y, z] shared_memory: N bytes'; it begins {sequence[:200]!r}"
        )
    return found


_METADATA = re.compile(r'thunk_info \{\s*profile_annotation: "([^"]+)"\s*thunk_id: (\d+)\s*\}')


def instructions(metadata: str) -> dict[int, str]:
    """Thunk -> the HLO instruction that it carries out."""
    found = {int(thunk): name for name, thunk in _METADATA.findall(metadata)}
    if not found:
        raise DumpFormatError(f"no profile_annotation with a thunk_id in XLA's thunk metadata: {metadata[:200]!r}")
    return found


class Listing(NamedTuple):
    """A PTX file: what it is for, and how many tensor-core instructions each of its kernels holds."""

    target: str
    tensor: dict[str, int]


_ENTRY = re.compile(r"^\.visible \.entry ([\w$]+)\(", re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TENSOR = re.compile(r"^\s*(?:@\S+ )?(?:wgmma\.mma_async|mma|tcgen05\.mma)\.", re.MULTILINE)


def listing(ptx: str) -> Listing | None:
    """None: the file holds no kernel, as XLA's file of constants."""
    _, *parts = _ENTRY.split(ptx)
    if not parts:
        return None
    if (target := _TARGET.search(ptx)) is None:
        raise DumpFormatError(f"no .target in the PTX of {', '.join(parts[::2])}")
    kernels = zip(parts[::2], parts[1::2], strict=True)
    return Listing(target[1], {name: len(_TENSOR.findall(body)) for name, body in kernels})


class Resources(NamedTuple):
    """What a kernel takes: registers and bytes of spills (stores and loads) a thread; shared memory a block."""

    registers: int
    spills: int
    shared: int
    barriers: int


def resources(said: str) -> dict[str, Resources]:
    """What `ptxas -v` says of each kernel. It is silent about barriers and shared memory that are not used."""
    _, *parts = re.split(r"Compiling entry function '([\w$]+)'", said)
    found = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):

        def number(pattern: str, *, default: int | None = None, name=name, text=text) -> int:
            if match := re.search(pattern, text):
                return int(match[1])
            if default is None:
                raise DumpFormatError(f"ptxas does not say {pattern!r} of {name}: {text.strip()[:300]!r}")
            return default

        found[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            shared=number(r"(\d+) bytes smem", default=0),
            barriers=number(r"used (\d+) barriers", default=0),
        )
    return found


def traffic(hlo_text: str) -> dict[str, int]:
    """HLO instruction -> bytes, if its operands are read once and its results written once."""
    moved, shapes = {}, {}
    for line in hlo_text.splitlines():
        if match := INSTRUCTION.match(line):
            shapes[match["name"]] = results = shapes_in(match["shape"])
            operands = dict.fromkeys(re.findall(r"%([\w.-]+)", match["operands"]))
            arrays = [*results, *(shape for operand in operands for shape in shapes.get(operand, ()))]
            moved[match["name"]] = sum(shape.bytes for shape in arrays)
    return moved
