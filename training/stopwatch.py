"""Where the host's time goes: named spans of the loop's iterations, about a microsecond each."""

from __future__ import annotations

import collections
import statistics
import time
from types import TracebackType


class Stopwatch:
    """Seconds of named spans, by iteration; the last `window` iterations are kept.

    for n in range(steps):
        watch.lap()
        with watch("data"): batch = next(stream)
        with watch("dispatch"): state, metrics = step(state, batch)

    A lap that is still running counts for nothing. Spans do not nest; what no span covers is the "rest".
    """

    def __init__(self, window: int = 1024):
        self._laps: collections.deque[dict[str, float]] = collections.deque(maxlen=window)
        self._now: dict[str, float] = {}
        self._began: float | None = None

    def lap(self) -> None:
        """Ends an iteration and begins the next."""
        now = time.perf_counter()
        if self._began is not None:
            self._now["total"] = now - self._began
            self._laps.append(self._now)
        self._began, self._now = now, {}

    def __call__(self, name: str) -> Span:
        return Span(self._now, name)

    def __len__(self) -> int:
        return len(self._laps)

    def median_outside(self, *names: str) -> float:
        """Median over the laps of the seconds outside these spans; 0 before the first lap ends."""
        if not self._laps:
            return 0.0
        return statistics.median(lap["total"] - sum(lap.get(n, 0.0) for n in names) for lap in self._laps)

    def medians(self) -> dict[str, float]:
        """Median seconds a lap of every span (0 in laps without it), of the rest, and of the total."""
        names = sorted({name for lap in self._laps for name in lap} - {"total"})
        spans = {name: statistics.median(lap.get(name, 0.0) for lap in self._laps) for name in names}
        return {**spans, "rest": self.median_outside(*names), "total": self.median_outside()}


class Span:
    """Adds the time inside a `with` to one entry of a lap."""

    __slots__ = ("_began", "_lap", "_name")

    def __init__(self, lap: dict[str, float], name: str):
        self._lap, self._name = lap, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lap[self._name] = self._lap.get(self._name, 0.0) + time.perf_counter() - self._began
