"""Dense attention beside our kernels on a TPU, by its compiler: static estimates, nothing runs.

    python benchmarks/attention_tpu.py [CHIP] [LENGTH ...]

Forward and backward, causal, bfloat16, batch 1, 8 heads of 64. Dense is jax.nn.dot_product_attention, at its roofline:
the larger of the FLOPs that the compiler counts over the chip's peak, and of the bytes that its program moves between
operations through HBM over the bandwidth. What the compiler keeps in VMEM is no such byte: at 1,024 tokens that is
nearly all. A program reaches its roofline at best. Ours is the time of the kernels' schedules, as `longwave report
attention` prints it, which has the lengths 1,024, 4,096 and 16,384; what XLA does around them (delta) is left out.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence

import attention_tpu  # by name: the child process imports it
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import Case, CaseError, estimates
from longwave.kernels.aot.isolate import in_subprocess
from longwave.kernels.aot.topology import topology

HEADS, HEAD_DIM = 8, 64
WIDTHS = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", re.MULTILINE)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
NOT_MOVING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
NOT_MOVING |= {
    "copy-start",
    "copy-done",
    "slice-start",
    "slice-done",
}  # prefetches into VMEM


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", nargs="?", default="v5e", choices=CHIPS)
    parser.add_argument("lengths", nargs="*", type=int, metavar="LENGTH", default=[1024, 4096, 16384])
    options = parser.parse_args()
    chip = CHIPS[options.chip]
    print(f"Causal attention on {chip.name}, forward and backward, {HEADS} heads of {HEAD_DIM}: static estimates")
    found = estimates(attention_tpu.kernels, chip.name, options.lengths, return_errors=True)
    for i, length in enumerate(options.lengths):
        pair = found[2 * i : 2 * i + 2]
        errors = [error for error in pair if isinstance(error, CaseError)]
        ours = sum(estimate.time for kernels in pair for estimate in kernels) if not errors else None
        print(f"  {length:7,d} ours  {f'{ours * 1e6:10,.0f} us' if ours else errors[0]}")
        try:
            flops, moved, held = in_subprocess(attention_tpu.dense, chip.name, length)
        except jax.errors.JaxRuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "hbm" in line.lower()), str(error))
            print(f"  {length:7,d} dense does not compile: {reason[:160]}")
            continue
        roofline = max(flops / chip.peak, moved / chip.bandwidth)
        bound = "compute" if flops / chip.peak > moved / chip.bandwidth else "memory"
        counted = f"{flops / 1e9:,.0f} GFLOP, {moved / 2**20:,.0f} MiB moved, {held / 2**20:,.0f} MiB held"
        ratio = f"; {roofline / ours:.1f} x ours" if ours else ""
        print(f"  {length:7,d} dense {roofline * 1e6:10,.0f} us, {bound} bound: {counted}{ratio}")
    return 0


def kernels(chip: str, lengths: Sequence[int]) -> list[Case]:
    """Our forward and backward program of each length."""
    from longwave.kernels.attention import report

    ours = {entry.problem: entry.candidates[0].case for entry in report.cases(chip) if not entry.peer}
    return [ours[f"{way} causal t={length} d={HEAD_DIM}"] for length in lengths for way in ("forward", "backward")]


def dense(chip: str, length: int) -> tuple[float, float, int]:
    """FLOPs, bytes moved, and bytes held beside arguments and results."""
    place = SingleDeviceSharding(topology(CHIPS[chip].topology)[0])
    x = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.bfloat16, sharding=place)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        o, pull = jax.vjp(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), q, k, v)
        return o, pull(do)

    compiled = jax.jit(gradient).lower(x, x, x, x).compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    return compiled.cost_analysis()["flops"], moved(compiled.as_text()), held


def moved(hlo: str) -> float:
    """Bytes of HBM that operations read and write, by the compiled program: each operand and result outside VMEM.

    `bytes accessed` of the cost analysis counts VMEM, S(1) in the text, as well.
    """
    entry = hlo[hlo.index("\nENTRY") :]
    size: dict[str, float] = {}
    total = 0.0
    for name, result, operation, operands in INSTRUCTION.findall(entry):
        arrays = [x for x in ARRAY.findall(result) if x[0] in WIDTHS and "S(1)" not in x[2]]
        size[name] = sum(WIDTHS[dtype] * math.prod(map(int, dims.split(","))) for dtype, dims, _ in arrays if dims)
        if operation not in NOT_MOVING:
            total += size[name] + sum(size.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
    return total


if __name__ == "__main__":
    sys.exit(main())
