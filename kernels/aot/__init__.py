"""Compiling ahead of time for TPU slices, with no TPU: does the step compile, fit, and talk as it should?

    devices = aot.topology("v5e:16x16")
    mesh = aot.mesh(devices, {"data": 16, "fsdp": -1})
    print(aot.compile(jitted_step, abstract_state, abstract_batch, mesh=mesh).table())

And how long should its Pallas kernels take? Static estimates, from the compiler's schedule: see `estimate.py`.

Needs libtpu (`uv sync --group aot`), which compiles on any Linux x86-64 machine.
"""

from longwave.kernels.aot.chips import CHIPS, DISPATCH, Chip
from longwave.kernels.aot.compile import compile
from longwave.kernels.aot.estimate import Case, CaseError, estimates
from longwave.kernels.aot.hlo import Collective, all_gathers, collectives, custom_calls
from longwave.kernels.aot.isolate import ProcessDied, in_subprocess
from longwave.kernels.aot.report import Memory, Report
from longwave.kernels.aot.schedule import ScheduleFormatError
from longwave.kernels.aot.timing import Estimate, Launch, LaunchError
from longwave.kernels.aot.topology import environment, mesh, missing, topology
from longwave.kernels.aot.tune import Candidate, Entry

__all__ = [
    "CHIPS",
    "DISPATCH",
    "Candidate",
    "Case",
    "CaseError",
    "Chip",
    "Collective",
    "Entry",
    "Estimate",
    "Launch",
    "LaunchError",
    "Memory",
    "ProcessDied",
    "Report",
    "ScheduleFormatError",
    "all_gathers",
    "collectives",
    "compile",
    "custom_calls",
    "environment",
    "estimates",
    "in_subprocess",
    "mesh",
    "missing",
    "topology",
]
