"""A function in a process of its own, for what may abort the process: the TPU compiler on complex128."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_CHILD = "from longwave.kernels.aot.isolate import _serve; _serve()"


class ProcessDied(RuntimeError):
    """The child ended without an answer. returncode: its exit code, or minus the signal that ended it."""

    def __init__(self, message: str, returncode: int):
        super().__init__(message)
        self.returncode = returncode


def in_subprocess(
    fn: Callable[..., Any], *args: Any, timeout: float = 600, environment: Mapping[str, str] | None = None
) -> Any:
    """`fn(*args)` in a fresh interpreter prepared for the TPU compiler; its result or exception comes back.

    fn is a function of an importable module; arguments and result are pickled.
    environment: variables that the interpreter starts with beside those of this process, such as LIBTPU_INIT_ARGS.

    Raises:
      ProcessDied: the process was killed or aborted; the message holds the compiler's last words.
      subprocess.TimeoutExpired: after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=pickle.dumps((str(answer), fn, args)),
            capture_output=True,
            timeout=timeout,
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=False,
        )
        if not answer.exists():
            raise ProcessDied(_last_words(fn, child), child.returncode)
        result, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise error
    return result


def _serve() -> None:
    from longwave.kernels.aot.topology import environment

    environment()  # before the pickle imports anybody's module
    answer, fn, args = pickle.load(sys.stdin.buffer)
    try:
        outcome = (fn(*args), None)
    except Exception as error:
        outcome = (None, error)
    Path(answer).write_bytes(pickle.dumps(outcome))


def _last_words(fn: Callable[..., Any], child: subprocess.CompletedProcess[bytes]) -> str:
    how = f"exit code {child.returncode}" if child.returncode >= 0 else signal.Signals(-child.returncode).name
    lines = child.stderr.decode(errors="replace").splitlines()
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]  # how the compiler logs what is fatal
    name = getattr(fn, "__qualname__", fn)
    return f"{name} ended its process ({how}): " + "\n".join(fatal[:1] or lines[-5:])
