"""What dense attention costs a TPU at the lengths of Long Range Arena, by its compiler: a floor, nothing runs.

    python benchmarks/attention_tpu.py [CHIP] [LENGTH ...]

jax.nn.dot_product_attention, forward and backward, bfloat16, batch 1, 8 heads of 64, every token sees all. The floor
is the larger of FLOPs over the chip's peak and bytes over its bandwidth, as the compiler counts both. It is a static
estimate, and favours dense attention: a program reaches neither. Beside it stand our kernels' static estimates, which
`longwave report attention` prints.
"""

from __future__ import annotations

import argparse
import sys

import attention_tpu  # by name: the child process imports it
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.isolate import in_subprocess
from longwave.kernels.aot.topology import topology

HEADS, HEAD_DIM = 8, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", nargs="?", default="v5e", choices=CHIPS)
    parser.add_argument("lengths", nargs="*", type=int, metavar="LENGTH", default=[1024, 2048, 4096, 16384, 65536])
    options = parser.parse_args()
    chip = CHIPS[options.chip]
    print(f"Dense attention on {chip.name}, forward and backward, {HEADS} heads of {HEAD_DIM}: a static estimate")
    for length in options.lengths:
        try:
            flops, moved, held = in_subprocess(attention_tpu.cost, chip.name, length)
        except jax.errors.JaxRuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "hbm" in line.lower()), str(error))
            print(f"  {length:7,d} does not compile: {reason[:160]}")
            continue
        compute, memory = flops / chip.peak, moved / chip.bandwidth
        print(
            f"  {length:7,d} {flops / 1e9:8,.0f} GFLOP {moved / 2**20:8,.0f} MiB moved {held / 2**20:7,.0f} MiB held"
            f"  at least {max(compute, memory) * 1e6:8,.0f} us ({'compute' if compute > memory else 'memory'} bound)"
        )
    return 0


def cost(chip: str, length: int) -> tuple[float, float, int]:
    """FLOPs, bytes accessed, and bytes held beside arguments and results."""
    place = SingleDeviceSharding(topology(CHIPS[chip].topology)[0])
    x = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), jnp.bfloat16, sharding=place)

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        o, pull = jax.vjp(jax.nn.dot_product_attention, q, k, v)
        return o, pull(do)

    compiled = jax.jit(gradient).lower(x, x, x, x).compile()
    counted = compiled.cost_analysis()
    return counted["flops"], counted["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(main())
