"""Pallas TPU kernels run on the TPU interpreter, on a CPU: poisoned memory, bounds, and races that fail.

    with interpreted():
        o = kernel(q, k, v)
    assert_close(o, expected, ...)          # a number that was never written is NaN, and close to nothing

What a block cannot show, since the interpreter does not model it: tiling, the size of VMEM, rounding on the
MXU, speed. Its cost is by grid step, a few milliseconds each, whatever the step computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu


class RaceFound(RuntimeError):
    """Two accesses to one place of memory, at least one of them a write, of which either may come first."""


@contextlib.contextmanager
def interpreted(*, poison: bool = True, races: bool = True, cores: int = 2) -> Iterator[None]:
    """Every TPU kernel traced inside runs on the interpreter; what it must never do raises.

    poison: memory begins as NaN (integers as their largest value): scratch and outputs before they are written, and
            blocks beyond the edge of an array. What reads it computes NaN, which the caller's comparison finds.
            False: as 0, which tells whether poison is what went wrong.
    races:  two unordered accesses to one place raise RaceFound when the block ends, wherever in the block they were.
    cores:  of the chip; "parallel" grid axes are dealt out to them, in an order that is shuffled.

    Reading or writing out of bounds raises at once, and so does a block that lies wholly beyond its array. A DMA moves
    its data when it is waited for: reading early reads poison. That it is never waited for is not noticed.

    Raises:
      RaceFound: see above; the interpreter prints or logs both places.
      RuntimeError: no kernel ran inside (another backend's form was chosen), or this jax tells races otherwise.
    """
    settings = pltpu.InterpretParams(
        uninitialized_memory="nan" if poison else "zero",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
        detect_races=races,
        num_cores_or_threads=cores,
        **_only_report(),
    )
    pltpu.reset_tpu_interpret_mode_state()  # what a kernel that raised elsewhere left behind
    try:
        with _recorded() as states, pltpu.force_tpu_interpret_mode(settings):
            yield
            jax.effects_barrier()  # kernels run behind the caller's back
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    if not states:
        raise RuntimeError("no Pallas TPU kernel ran inside `interpreted()`: call the kernel, not its operation")
    if racing := sum(state.races_found for state in states):
        raise RaceFound(f"races in {racing} of {len(states)} kernels; the interpreter printed or logged the places")


# What is private to jax: all of it is here. The state of a kernel's races is dropped when the next one begins.

_MODULE, _STATE = "jax._src.pallas.mosaic.interpret.interpret_pallas_call", "RaceDetectionState"


@contextlib.contextmanager
def _recorded() -> Iterator[list[Any]]:
    """Collects the race detector of every kernel that is interpreted inside."""
    module = sys.modules.get(_MODULE)  # loaded by what the interpreter's public names come from
    make: Any = getattr(module, _STATE, None)
    if make is None or "races_found" not in {field.name for field in dataclasses.fields(make)}:
        raise RuntimeError(
            f"jax {jax.__version__}: expected {_MODULE}.{_STATE} with a field 'races_found', as in jax 0.10.2 to "
            "0.12; without it races would go unseen"
        )
    states: list[Any] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        states.append(make(*args, **kwargs))
        return states[-1]

    setattr(module, _STATE, recording)
    try:
        yield states
    finally:
        setattr(module, _STATE, make)


def _only_report() -> dict[str, Any]:
    """From jax 0.11 on a race may raise inside the kernel; here both versions report, and the block's end raises."""
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    return {"on_race": "warn"} if "on_race" in fields else {}
