"""Start of a run on one or many processes, and the few things that all of them must do together.

The same command runs on a laptop and on every host of a pod. `start` comes before anything that touches a
device.
"""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_DESCRIPTION = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"


def start(distributed: bool | None = None) -> None:
    """Connects the processes of a run. Call once, before any device is touched; a second call does nothing.

    distributed: None joins a cluster if there is one (Cloud TPU, GKE, SLURM, Open MPI, Kubernetes, or the
    three variables below) and otherwise goes on alone; True insists on one; False never looks.

    A cluster that nothing announces is described by JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises ValueError where the description is incomplete or wrong, and
    RuntimeError where devices were touched before.
    """
    if distributed is False or jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    if address and not address.rpartition(":")[2].isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address!r}: expected host:port")
    processes, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        # Asks every kind of cluster that jax knows for what is not given.
        jax.distributed.initialize(address, processes, index)
    except ValueError as error:
        # What jax says where it recognises no cluster; one that it recognises but cannot join raises
        # otherwise.
        if "be defined" not in str(error):
            raise
        if (address, processes, index) != (None, None, None):
            raise ValueError(f"no cluster was recognised, so {_DESCRIPTION} must all be set") from None
        if distributed:
            raise ValueError(
                "distributed = True, but no cluster was recognised (Cloud TPU, GKE, SLURM, Open MPI, "
                f"Kubernetes); set {_DESCRIPTION}, or leave distributed out to run on this machine alone"
            ) from None


def is_main() -> bool:
    """Whether this process is the one that writes logs, configs and tables."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here. Every process must call it with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_all(value: Any) -> list[Any]:
    """Every process's `value` (anything that JSON can hold), on every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(np.max(multihost_utils.process_allgather(np.int32(text.size))))
    rows = multihost_utils.process_allgather(np.pad(text, (0, length - text.size), constant_values=ord(" ")))
    return [json.loads(np.asarray(row, np.uint8).tobytes()) for row in rows]


def from_main(value: Any) -> Any:
    """The main process's `value`, on every process; the others' is ignored."""
    return from_all(value if is_main() else None)[0]


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value and not value.isdigit():
        raise ValueError(f"{name} = {value!r}: expected a whole number")
    return int(value) if value else None
