"""Dense, flash and block-sparse attention at the lengths of Long Range Arena: time and memory, forward and backward.

    python benchmarks/attention.py [LENGTH ...] [--causal] [--peer_python PYTHON] [--json PATH] [--plot PATH]
    python benchmarks/attention.py --check --peer_python PYTHON [--cores 0 1]

The first form races on the CPU, float32, batch 1: jax.nn.dot_product_attention (dense), our chunked form (flash), the
same with the butterfly mask (sparse), and PyTorch's scaled_dot_product_attention. The second tries what is claimed at
4,096 tokens. What the TPU compiler says of dense attention is asked by attention_tpu.py.

PYTHON has torch. What cannot run, or needs more than --memory GiB, is skipped with its reason. Times are processor
time, of all cores together. The exit code is 0 if every claim that could be tried holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import Measured, Skipped

HEADS = {1024: 4, 2048: 4, 4096: 4, 16384: 1, 65536: 1}
BLOCK = 256  # of the butterfly: each block of queries sees 1 + log2(length / BLOCK) blocks of keys
NAMES = {"dense": "dense", "flash": "flash", "sparse": "block-sparse (butterfly)", "torch": "torch SDPA"}
TIME = {64: 1.2, 16: 1.8}  # claimed at 4,096 tokens: flash over torch, by head dimension
MEMORY = 0.25  # flash over dense


class Problem(NamedTuple):
    """Self-attention of one sequence."""

    length: int
    heads: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{kind}, length {self.length:,}, {self.heads} x {self.head_dim}"


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # results as they come, into a pipe too
    options = _options()
    if options.contestant:
        _compete(options)
        return 0
    problems = [Problem(n, HEADS.get(n, 1), options.head_dim, options.causal) for n in options.lengths or HEADS]
    if options.check:
        problems = [Problem(4096, 4, d, causal) for d in TIME for causal in (False, True)]
    results = {}
    within = True
    for problem in problems:
        results[problem] = _race(problem, options)
        within &= _report(problem, results[problem], options.check)
    if options.json:
        rows = [_row(p, name, result) for p, contestants in results.items() for name, result in contestants.items()]
        Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.plot:
        _plot(results, options.plot)
    return 0 if within else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="*", type=int, metavar="LENGTH", help=f"default: {', '.join(map(str, HEADS))}")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true", help="default: every token sees all, as in Long Range Arena")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--check", action="store_true", help="the claims, at 4,096 tokens")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--plot", metavar="PATH", help="draw it into this PNG file")
    parser.add_argument("--cores", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=5, help="of up to 4,096 tokens; longer ones have fewer")
    parser.add_argument("--memory", type=float, default=8, help="GiB that a contestant may take")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()


def _race(problem: Problem, options: argparse.Namespace) -> dict[str, Measured | Skipped]:
    settings = [str(problem.length), "--head_dim", str(problem.head_dim), "--memory", str(options.memory)]
    settings += ["--causal"] * problem.causal + ["--cores", *map(str, options.cores)]
    command = lambda name: [
        options.peer_python if name == "torch" else sys.executable,
        *(__file__, "--contestant", name, *settings),
    ]
    rounds = max(1, min(options.rounds, options.rounds * 4096 // problem.length))
    return harness.race(
        {name: command(name) for name in NAMES}, rounds=rounds, burst=max(1, 4096 // problem.length), timeout=1800
    )


def _compete(options: argparse.Namespace) -> None:
    """The child process: one step is forward and backward."""
    harness.pin(*options.cores)
    import numpy as np

    (length,) = options.lengths
    shape = (1, length, HEADS.get(length, 1), options.head_dim)
    arrays = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(4)]
    make = _torch if options.contestant == "torch" else _jax
    step = make(options.contestant, arrays, options.causal, options.memory * 2**30)
    harness.serve(step, warmup=1 if length <= 16384 else 0)


def _torch(_: str, arrays: Sequence[Any], causal: bool, most: float) -> Any:
    import torch

    *qkv, do = (torch.from_numpy(x).transpose(1, 2) for x in arrays)
    qkv = [x.requires_grad_() for x in qkv]

    def step() -> Any:
        o = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=causal)
        return torch.autograd.grad(o, qkv, do)

    return step


def _jax(name: str, arrays: Sequence[Any], causal: bool, most: float) -> Any:
    import jax

    attend = _form(name, causal)

    @jax.jit
    def gradient(q: Any, k: Any, v: Any, do: Any) -> Any:
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    compiled = gradient.lower(*arrays).compile()
    if (need := compiled.memory_analysis().temp_size_in_bytes) > most:
        raise MemoryError(f"it needs {need / 2**30:.1f} GiB, more than --memory {most / 2**30:g}")
    arrays = jax.device_put(arrays)
    return lambda: jax.block_until_ready(compiled(*arrays))


def _form(name: str, causal: bool) -> Any:
    from functools import partial

    import jax

    from longwave.kernels.attention import attention
    from longwave.kernels.attention.mask import Butterfly, Causal, Mask

    if name == "dense":
        return partial(jax.nn.dot_product_attention, is_causal=causal)
    seen = Causal() if causal else Mask()
    return partial(attention, mask=seen & Butterfly(BLOCK) if name == "sparse" else seen, backend="chunked")


def _report(problem: Problem, results: Mapping[str, Measured | Skipped], check: bool) -> bool:
    """Prints what was measured; with `check` the claims too. True if each that could be tried holds."""
    print(f"Forward and backward, {problem}")
    dense, flash, torch = results["dense"], results["flash"], results["torch"]
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {NAMES[name]:26s} skipped: {result.reason}")
            continue
        ratio = f"{_over(dense, result):6.2f} x dense's speed" if isinstance(dense, Measured) else ""
        print(f"  {NAMES[name]:26s} {result.seconds * 1e3:9.1f} ms {result.mebibytes:8.0f} MiB {ratio}")
    within = True
    claims = [("flash / torch: time", torch, "seconds", TIME.get(problem.head_dim))]
    claims += [("flash / dense: memory", dense, "mebibytes", MEMORY)]
    for what, other, field, limit in claims if check else ():
        if isinstance(flash, Skipped) or isinstance(other, Skipped):
            continue
        ratio = getattr(flash, field) / getattr(other, field)
        within &= ratio <= limit
        print(f"  {what} {ratio:.2f} (at most {limit:.2f}){'' if ratio <= limit else '   MISSED'}")
    return within


def _over(a: Measured, b: Measured) -> float:
    return a.seconds / b.seconds


def _row(problem: Problem, name: str, result: Measured | Skipped) -> dict[str, Any]:
    return {**problem._asdict(), "contestant": name, **result._asdict()}


def _plot(results: Mapping[Problem, Mapping[str, Measured | Skipped]], path: str) -> None:
    """Per head, since longer problems have fewer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    fields = {"seconds": "processor time a head (s)", "mebibytes": "memory that a step adds, a head (MiB)"}
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        for name, color in zip(NAMES, ("#6b6b6b", "#1f4e8c", "#2f7f5f", "#d1495b"), strict=True):
            points = {
                p.length: getattr(r[name], field) / p.heads for p, r in results.items() if isinstance(r[name], Measured)
            }
            ax.plot(list(points), list(points.values()), "o-", color=color, label=NAMES[name])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="length (tokens)", ylabel=label, xticks=[p.length for p in results])
        ax.set_xticklabels([f"{p.length // 1024}K" for p in results])
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
