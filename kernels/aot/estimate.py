"""Static estimates of programs: compiles them for TPUs that are not here, and reads the schedules of their kernels.

def build(chip):
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    return [aot.Case("square", chip, matmul, (x, x), {"matmul": aot.Launch(steps=8, flops=2 * 1024**3)})]

((estimate,),) = aot.estimates(build, "v5e")
print(f"{estimate.time * 1e6:.0f} us, {estimate.peak:.0%} of peak: a static estimate")
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
from jax.sharding import NamedSharding, PartitionSpec

from longwave.kernels.aot import pipeline
from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.compile import compile
from longwave.kernels.aot.hlo import shapes_in
from longwave.kernels.aot.isolate import ProcessDied, in_subprocess
from longwave.kernels.aot.schedule import Schedule, ScheduleFormatError, parse
from longwave.kernels.aot.timing import Estimate, Launch, LaunchError, weigh
from longwave.kernels.aot.topology import mesh, topology

_KERNEL = re.compile(
    r'%(?P<hlo>[\w.-]+) = (?P<results>[^\n]*?) custom-call\([^\n]*custom_call_target="tpu_custom_call", '
    r"operand_layout_constraints=\{(?P<operands>(?:[^{}]|\{[^{}]*\})*)\}"
    r'.*?op_name="(?P<scope>[^"]*)/pallas_call"',
    re.DOTALL,
)
_DUMP = "dump"
_PASSES = ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization")  # of some 70: 100 MB a kernel
_FLAGS = f"--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={'|'.join(_PASSES)} --xla_jf_dump_to="


class CaseError(RuntimeError):
    """A case that could not be compiled or read; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program for one chip: `fn` of `args` (`jax.ShapeDtypeStruct`s).

    launches: kernel -> what it says of itself. A `pallas_call` without a name goes by the scope that it is called in,
        or by what that begins with ("flash_mha_bwd_dq").
    """

    name: str
    chip: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    launches: Mapping[str, Launch]


@overload
def estimates(
    build: Callable[..., Sequence[Case]], *args: Any, return_errors: Literal[False] = False, timeout: float = 3600
) -> list[list[Estimate]]: ...
@overload
def estimates(
    build: Callable[..., Sequence[Case]], *args: Any, return_errors: Literal[True], timeout: float = 3600
) -> list[list[Estimate] | CaseError]: ...
def estimates(
    build: Callable[..., Sequence[Case]], *args: Any, return_errors: bool = False, timeout: float = 3600
) -> list[Any]:
    """The estimates of the kernels of each case, in the order in which the program calls them.

    build: a function of an importable module; `build(*args)` gives the cases. They are compiled one after the other in
        one process of their own, since the compiler must be told to write its schedules before it is loaded.
    return_errors: a case that fails (for want of VMEM, say) leaves its `CaseError` in its place.

    Raises:
      CaseError: the first case that failed, unless `return_errors`.
      ValueError: `build` is not importable.
      subprocess.TimeoutExpired: after `timeout` seconds.
    """
    if build.__module__ == "__main__":
        raise ValueError(f"build: expected a function of an importable module, found {build} of __main__")
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{_FLAGS}{folder}/{_DUMP}"
        # What this process asks of XLA (tests: to compile fast for the CPU) must not change an estimate.
        environment = {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}", "XLA_FLAGS": ""}
        first, count = 0, None
        while count is None:
            try:
                count = in_subprocess(
                    _estimate_all, folder, first, build, args, timeout=timeout, environment=environment
                )
            except ProcessDied as died:  # the compiler aborted on a case: those after it get a new process
                if died.returncode in (-signal.SIGINT, -signal.SIGTERM):  # somebody wants it to stop
                    raise
                first = len(list(Path(folder).glob("*.outcome")))
                if not (name := Path(folder, f"{first}.name")).exists():
                    raise
                _write(folder, first, CaseError(f"case {name.read_text()}: {died}"))
                first += 1
        outcomes = [pickle.loads(Path(folder, f"{i}.outcome").read_bytes()) for i in range(count)]
    for outcome in outcomes:
        if isinstance(outcome, CaseError) and not return_errors:
            raise outcome
    return outcomes


def _write(folder: str, i: int, outcome: Any) -> None:
    Path(folder, f"{i}.outcome").write_bytes(pickle.dumps(outcome))


def _estimate_all(folder: str, first: int, build: Callable[..., Sequence[Case]], args: tuple[Any, ...]) -> int:
    """Leaves the outcome of every case from `first` on in `folder`; in a process that dumps to a folder in it."""
    cases = build(*args)
    for i, case in enumerate(cases[first:], first):
        Path(folder, f"{i}.name").write_text(case.name)
        dump = Path(folder, _DUMP)
        shutil.rmtree(dump, ignore_errors=True)  # what a process that died has left
        dump.mkdir()
        try:
            outcome: Any = _estimate(case, dump)
        except Exception as error:
            outcome = CaseError(f"case {case.name} on {case.chip}: {type(error).__name__}: {str(error)[:2000]}")
        _write(folder, i, outcome)
        shutil.rmtree(dump)  # a large kernel leaves megabytes
    return len(cases)


def _estimate(case: Case, dump: Path) -> list[Estimate]:
    chip = CHIPS[case.chip]
    device = mesh(topology(chip.topology)[:1], {"x": 1})
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(device, PartitionSpec()))
    args, jitted = jax.tree.map(place, case.args), jax.jit(case.fn)
    report = compile(jitted, *args, mesh=device)
    if not report.fits:
        raise MemoryError(report.verdict)
    with jax.sharding.use_abstract_mesh(device.abstract_mesh):
        equations = list(pipeline.equations(jitted.trace(*args).jaxpr.jaxpr))
    found, compiled = [], [_Compiled.of(match) for match in _KERNEL.finditer(report.hlo)]
    # Of kernels that are the same only one is written out.
    schedules = {dataclasses.replace(k, hlo=""): s for k in compiled if (s := _schedule(dump, k.hlo))}
    for called_as in compiled:
        equation = _equation(called_as, equations)
        name = equation.params["name"]
        key = _key(case, name or called_as.name, named=name is not None)
        kernel = dataclasses.replace(pipeline.read(equation, case.launches[key].prefetch), name=key)
        if not (schedule := schedules.get(dataclasses.replace(called_as, hlo=""))):
            raise ScheduleFormatError("dump", f"kernel {called_as.hlo}", f"files of {' and '.join(_PASSES)}", "none")
        found.append(weigh(schedule, kernel, case.launches[key], chip))
    if silent := set(case.launches) - {estimate.kernel for estimate in found}:
        raise LaunchError(
            f"no kernel {', '.join(sorted(silent))} was compiled, only {[estimate.kernel for estimate in found]}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A kernel in the compiled program: its instruction, the scope it is called in, shapes of what goes in and out."""

    hlo: str
    name: str
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, match: re.Match[str]) -> _Compiled:
        scope = re.findall(r"[^()]+", match["scope"].rpartition("/")[2])[-1]  # transpose(jvp(NAME)) is NAME
        dims = lambda text: tuple(shape.dims for shape in shapes_in(text))
        return cls(match["hlo"], scope, dims(match["operands"]), dims(match["results"]))


def _equation(compiled: _Compiled, equations: list[Any]) -> Any:
    """The `pallas_call` that a kernel comes from: by its name, and by shapes where others have that name or none."""
    alike = [e for e in equations if e.params["name"] == compiled.name]
    alike = alike or [e for e in equations if e.params["name"] is None]
    if len(set(map(pipeline.signature, alike))) > 1:
        shapes = lambda variables: tuple(v.aval.shape for v in variables)
        both = (compiled.operands, compiled.results)
        alike = [e for e in alike if (shapes(e.invars), shapes(e.outvars)) == both]
    if len(set(map(pipeline.signature, alike))) != 1:
        raise LaunchError(
            f"kernel {compiled.name}: expected one pallas_call of this name, found {len(alike)} that differ; "
            "give each kernel of a program a name of its own"
        )
    return alike[0]


def _key(case: Case, name: str, *, named: bool) -> str:
    keys = [key for key in case.launches if name == key or (not named and name.startswith(key))]
    if not keys:
        raise LaunchError(f"kernel {name} has no Launch; there is one for: {', '.join(case.launches) or 'none'}")
    return max(keys, key=len)


def _schedule(dump: Path, hlo: str) -> Schedule | None:
    """Of a kernel by its name in the HLO; None where it is the same as another's, which alone is written."""
    texts = []
    for name in _PASSES:
        files = [f for f in dump.iterdir() if re.fullmatch(rf"\d+-{re.escape(hlo)}-\d+-{name}\.txt", f.name)]
        if not files:
            return None
        (file,) = files
        texts.append(file.read_text())
    return parse(*texts)
