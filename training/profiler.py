"""A trace of some steps, for TensorBoard or xprof."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from longwave.training import distributed


class Profiler:
    """Traces the steps first to last of `window` into run_dir/profile, on process 0; None traces nothing.

    A run that begins inside the window traces what is left of it; one that ends inside stops the trace.
    """

    def __init__(self, window: tuple[int, int] | None, run_dir: epath.Path):
        self._window, self._directory, self._on = window, run_dir / "profile", False

    def before(self, step: int, state: Any) -> None:
        """To be called before every step; `state` is what the step will read."""
        if self._window is None or not distributed.is_main():
            return
        first, last = self._window
        if not self._on and first <= step <= last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._on = True
        elif self._on and step > last:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._on:
            self._stop()

    def _stop(self) -> None:
        self._on, self._window = False, None
        jax.profiler.stop_trace()
