"""Being told to stop: SIGTERM (a preempted machine) or SIGINT (Ctrl-C) ends the run after the step under way.

    with Preemption() as preemption:
        for step in ...:
            if preemption.requested(step): break
    # save, then exit with RESUMABLE

With several processes, all of them stop at the same step, whichever was told.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

# Exit code of a run that was stopped and saved: the same command goes on from there. It is EX_TEMPFAIL of
# sysexits.h ("try again later"), so that a launcher's loop can tell it from success (0) and failure (1).
RESUMABLE = 75


class Preemption:
    """Turns the first SIGTERM or SIGINT into a flag; a second SIGINT raises KeyboardInterrupt at once.

    A context manager, entered in the main thread after `distributed.start`; the handlers found there come
    back at its end.
    """

    def __init__(self) -> None:
        self._stop = False
        self._interrupted = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._together = jax.process_count() > 1
        # With several processes SIGTERM belongs to jax's preemption service, which tells the other hosts.
        for number in (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`. With several processes: each calls it once a step."""
        if self._together and not self._stop:
            self._stop = multihost_utils.reached_preemption_sync_point(step)
        return self._stop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # to the preemption service: Ctrl-C on one host stops them all
        else:
            self._stop = True
