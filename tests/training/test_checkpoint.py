"""Checkpoints: what is kept, where it can be restored, and every way in which it can go wrong."""

import itertools
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.training import checkpoint, differences, fingerprint
from longwave.training.checkpoint import Checkpoints, DamagedCheckpoint, RunMismatch, StateMismatch
from tests.training import processes

CONFIG = "import longwave.layers\n\n# A comment\ntrain.steps = 100\nlayers.S4D.N = 64\n"
RUN = {"config": CONFIG, "data": {"name": "listops-128", "examples": 96}, "versions": {"jax": "0.10.2"}}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt: tuple
    ema: dict[str, Any] | None


def mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("data", "tensor")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def make_state(step: int, on: jax.sharding.Mesh | None = None) -> State:
    """A state of several kinds of arrays, whose values depend on `step`; matrices are split over the mesh."""
    w = np.random.default_rng(step).normal(size=(16, 1024))
    params = {
        "embed": {"w": w.astype(np.float32)},
        "layers": {
            "0": {
                "C": (w[:4, :8] + 1j * w[4:8, :8]).astype(np.complex64),
                "b": np.full(8, step, jnp.bfloat16),
            }
        },
    }
    opt = (optax.ScaleByAdamState(np.int32(step), params, params), optax.EmptyState())
    state = State(np.int32(step), params, opt, None)
    place = lambda x: NamedSharding(on or mesh(8), P("data") if x.ndim == 2 and x.shape[0] % 8 == 0 else P())
    return jax.tree.map(lambda x: jax.device_put(x, place(x)), state)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def open_(directory: Path, like: Any = None, metadata: dict[str, Any] = RUN, **settings: Any) -> Checkpoints:
    settings = {"metric": "accuracy", "larger_is_better": True} | settings
    return Checkpoints(directory, abstract(make_state(0) if like is None else like), metadata=metadata, **settings)


def assert_same(actual: Any, expected: Any) -> None:
    """Bitwise, with dtype and placement."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.sharding) == (e.dtype, e.sharding)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def test_latest_and_best_are_kept(tmp_path):
    scores = {4: 0.2, 8: 0.9, 12: 0.5, 16: 0.9, 20: None, 24: float("nan"), 28: 0.1}
    with open_(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest() is None
        assert checkpoints.best() is None
        with pytest.raises(FileNotFoundError, match="no checkpoint with validation scores"):
            checkpoints.restore_best()
        for step, score in scores.items():
            checkpoints.save(step, make_state(step), scores=None if score is None else {"accuracy": score, "loss": 1})
    assert sorted(os.listdir(tmp_path / "c")) == ["24", "24.json", "28", "28.json", "8", "8.json"]
    with open_(tmp_path / "c", writable=False) as checkpoints:
        assert checkpoints.steps == [8, 24, 28]
        assert checkpoints.best() == (
            8,
            {"accuracy": 0.9, "loss": 1.0},
        )  # the earlier of equals; never the nan
        assert_same(checkpoints.restore_best(), make_state(8))
        assert_same(checkpoints.restore_latest(), make_state(28))
        assert_same(checkpoints.restore(24), make_state(24))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 12 .*steps: \[8, 24, 28\]"):
            checkpoints.restore(12)
        with pytest.raises(ValueError, match="writable=False"):
            checkpoints.save(32, make_state(32))


def test_smaller_can_be_better_and_a_saved_step_only_takes_scores(tmp_path):
    with open_(tmp_path, metric="loss", larger_is_better=False, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), scores={"loss": 1.0})
        checkpoints.save(2, make_state(2), wait=True)
        assert checkpoints.best() == (1, {"loss": 1.0})
        checkpoints.save(2, make_state(3), scores={"loss": 0.5})
        checkpoints.save(2, make_state(3), scores={"loss": 9.0}, wait=True)
        assert checkpoints.best() == (2, {"loss": 0.5})
        with pytest.raises(KeyError, match=r"scores lack 'loss'.*they have \['accuracy'\]"):
            checkpoints.save(3, make_state(3), scores={"accuracy": 1.0})
    with open_(tmp_path, metric="loss", larger_is_better=False) as checkpoints:
        assert checkpoints.best() == (2, {"loss": 0.5})
        assert_same(checkpoints.restore_best(), make_state(2))


def test_the_best_may_still_be_under_way(tmp_path, monkeypatch):
    written = []

    class Slow:
        def __init__(self, promise):
            self.promise = promise

        def result(self):
            written.append(True)
            return self.promise.result()

    save_async = checkpoint.ocp.save_async
    monkeypatch.setattr(checkpoint.ocp, "save_async", lambda *a, **k: Slow(save_async(*a, **k)))
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), scores={"accuracy": 0.5})
        assert checkpoints.best() == (1, {"accuracy": 0.5})
        assert (checkpoints.steps, written) == ([], [])  # and nobody waited for it
        assert_same(checkpoints.restore_best(), make_state(1))
        assert (checkpoints.steps, written) == ([1], [True])
        checkpoints.save(2, make_state(2), scores={"accuracy": 0.4})
        assert checkpoints.best() == (1, {"accuracy": 0.5})


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    place = NamedSharding(mesh(4), P("data"))
    big = lambda step: {f"w{i}": jax.device_put(np.full((512, 512), step + i, np.float32), place) for i in range(4)}
    with open_(tmp_path, like=big(0)) as checkpoints:
        for step in (1, 2):
            state = big(step)
            checkpoints.save(step, state)
            for _ in range(3):
                state = overwrite(state)
    with open_(tmp_path, like=big(0)) as checkpoints:
        for step in (1, 2):
            assert_same(checkpoints.restore(step), big(step))


@pytest.mark.parametrize("shape", [(4,), (1,), (2, 4)])
def test_restores_onto_another_mesh(tmp_path, shape):
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1, mesh(8)))
    other = make_state(1, mesh(*shape))
    with open_(tmp_path, like=other) as checkpoints:
        assert_same(checkpoints.restore_latest(), other)


def test_other_arrays_are_listed_and_never_passed_over(tmp_path):
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        checkpoints.save(2, make_state(2))
    other = make_state(0)
    other.params["layers"]["0"] = {
        "C": jnp.zeros((4, 9), jnp.complex64),
        "b": jnp.zeros(8),
        "D": jnp.zeros(8),
    }
    other = other.replace(params={"layers": other.params["layers"]})
    with open_(tmp_path, like=other) as checkpoints, pytest.raises(StateMismatch) as raised:
        checkpoints.restore_latest()
    assert [line.strip() for line in str(raised.value).splitlines()[1:-1]] == [
        "missing in the checkpoint: params/layers/0/D (8,) float32",
        "only in the checkpoint: params/embed/w (16, 1024) float32",
        "other shape: params/layers/0/C is (4, 8) in the checkpoint, (4, 9) in this run",
        "other dtype: params/layers/0/b is bfloat16 in the checkpoint, float32 in this run",
    ]
    assert "--run_dir" in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["1", "1.json", "2", "2.json"]


def test_long_lists_of_differences_are_counted():
    saved = {f"p{i}": jnp.zeros(1) for i in range(30)}
    lines = differences.state_differences(saved, {})
    assert len(lines) < 20
    assert lines[-1] == "only in the checkpoint: ... and 18 more"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"config": CONFIG.replace("100", "200")}, None),
        ({"config": "train.steps  =  100\nlayers.S4D.N = \\\n    64\n"}, None),
        ({"versions": {"jax": "0.12"}, "command": "train.py"}, None),
        ({"config": CONFIG.replace("64", "32")}, "- layers.S4D.N = 64\n  + layers.S4D.N = 32"),
        ({"config": CONFIG + "train.seed = 1\n"}, "+ train.seed = 1"),
        ({"data": {"name": "listops-128", "examples": 95}}, "- data/examples = 96\n  + data/examples = 95"),
        ({"data": {"name": "listops-128"}}, "- data/examples = 96"),
        ({"config": CONFIG + "train.accumulate = 2\n"}, "+ train.accumulate = 2"),
    ],
)
def test_a_folder_of_another_run_is_refused_with_the_lines_that_differ(tmp_path, change, expected):
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
    with open_(tmp_path, metadata=RUN | change) as checkpoints:
        if expected is None:
            assert_same(checkpoints.restore_latest(), make_state(1))
        else:
            with pytest.raises(RunMismatch) as raised:
                checkpoints.restore_latest()
            assert f"+ this command):\n  {expected}\nName another --run_dir" in str(raised.value)
            assert "train.steps" in str(raised.value)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("train.eval_every = 5", "train.eval_every = 6", []),
        ("listops.ListOps.data_dir = '/a'\nlistops.ListOps.processes = 1", "a/listops.ListOps.data_dir = '/b'", []),
        ("listops.ListOps.data_dirs = 1", "", ["- listops.ListOps.data_dirs = 1"]),
        # A plateau counts evaluations.
        (
            "train.eval_every = 5\nAdamW.plateau = @Plateau()",
            "train.eval_every = 6\nAdamW.plateau = @Plateau()",
            ["- train.eval_every = 5", "+ train.eval_every = 6"],
        ),
        ("train.eval_every = 5\nAdamW.plateau = None", "train.eval_every = 6\nAdamW.plateau = None", []),
        # A macro counts for what it is bound to.
        ("STEPS = 1\ntrain.steps = %STEPS", "a/T = 2\nU = %a/T\ntrain.steps = %U", []),
        ("N = 4\nlayers.S4D.N = %N", "layers.S4D.N = 4", []),
        (
            "STEPS = 1\ntrain.steps = %STEPS\ncosine.steps = (%STEPS, 3)",
            "STEPS = 2\ntrain.steps = %STEPS\ncosine.steps = (%STEPS, 3)",
            ["- cosine.steps = (1, 3)", "+ cosine.steps = (2, 3)"],
        ),
    ],
)
def test_which_bindings_make_another_run(before, now, expected):
    assert differences.run_differences({"config": before}, {"config": now}) == expected


def test_bindings_of_a_config_go_on_over_several_lines():
    config = "from __gin__ import dynamic_registration\na/b.C = [1,\n    2]\n"
    config += "X = \\\n    'y'\ntrain.mesh = {\n  'data': 2,\n}\n"
    assert differences.bindings(config) == {"a/b.C": "[1, 2]", "X": "'y'", "train.mesh": "{ 'data': 2, }"}


# Every file of a checkpoint, damaged in every way, must lead to the state before or to the very state it
# held.
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size + 1))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes() or b" ")
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    with open_(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), scores={"accuracy": step})
    return directory


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, *(pytest.param(f, marks=pytest.mark.full) for f in (Path.unlink, garble))],
)
def test_damage_to_any_file_is_noticed_or_harmless(two_checkpoints, tmp_path, damage):
    noticed = []
    files = [p for p in [two_checkpoints / "2.json", *(two_checkpoints / "2").rglob("*")] if p.is_file()]
    for number, file in enumerate(sorted(files)):
        directory = tmp_path / str(number)
        shutil.copytree(two_checkpoints, directory)
        damage(directory / file.relative_to(two_checkpoints))
        with warnings.catch_warnings(record=True) as caught, open_(directory) as checkpoints:
            warnings.simplefilter("always")
            state = checkpoints.restore_latest()
            best = checkpoints.best()
        told = [str(w.message) for w in caught if "passed over" in str(w.message)]
        assert_same(state, make_state(1 if told else 2))
        assert best == ((1, {"accuracy": 1.0}) if told else (2, {"accuracy": 2.0}))
        if told:
            assert told[0].startswith(f"damaged checkpoint passed over: {directory / '2'}: ")
            assert sorted(os.listdir(directory)) == ["1", "1.json", "2.damaged"]
            noticed.append(str(file.relative_to(two_checkpoints)))
    assert "2.json" in noticed
    assert any("/d/" in name for name in noticed)  # the files that hold the arrays
    assert any("manifest" in name for name in noticed)


def test_an_empty_step_folder_is_passed_over_and_the_run_goes_on(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        (tmp_path / str(step)).mkdir()
    with open_(tmp_path, writable=False) as checkpoints, pytest.warns(RuntimeWarning, match="passed over"):
        checkpoints.restore_latest()
    assert (tmp_path / "4").exists()  # reading alone moves nothing
    with open_(tmp_path) as checkpoints:
        with pytest.warns(RuntimeWarning) as caught:
            assert_same(checkpoints.restore_latest(), make_state(2))
        told = [str(w.message) for w in caught]
        assert [f"{tmp_path}/4: its record 4.json" in told[0], f"{tmp_path}/3: its record" in told[1]] == [
            True,
            True,
        ]
        checkpoints.save(3, make_state(3))
    assert sorted(os.listdir(tmp_path)) == ["2", "2.json", "3", "3.damaged", "3.json", "4.damaged"]
    with open_(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_latest(), make_state(3))


def test_nothing_readable_is_an_error_and_not_a_fresh_start(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "1.json").unlink()
    shutil.rmtree(tmp_path / "2" / "state")
    with open_(tmp_path) as checkpoints:
        with pytest.warns(RuntimeWarning), pytest.raises(DamagedCheckpoint) as raised:
            checkpoints.restore_latest()
        with pytest.raises(DamagedCheckpoint, match=str(tmp_path / "2")):
            checkpoints.restore_best()
    for part in (f"{tmp_path}/1: its record", f"{tmp_path}/2: ", "--run_dir"):
        assert part in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.json"]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoints cannot be written here .* name another --run_dir.*file/c"):
        open_(tmp_path / "file" / "c")
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        open_(tmp_path / "absent", writable=False)
    with pytest.raises(ValueError, match="keep = 0"):
        open_(tmp_path, keep=0)


def test_a_failed_save_is_told_at_the_next_call(tmp_path, monkeypatch):
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        # The disk is full: Orbax's write ends in an error, in the background.
        full = type("Promise", (), {"result": lambda self: (_ for _ in ()).throw(OSError(28, "No space left"))})()
        monkeypatch.setattr(checkpoint.ocp, "save_async", lambda *a, **k: full)
        checkpoints.save(2, make_state(2))
        with pytest.raises(OSError, match=f"{tmp_path}/2 could not be written: OSError: .*No space left"):
            checkpoints.save(3, make_state(3))
        assert checkpoints.steps == [1]


def test_an_error_in_the_run_is_not_hidden_by_a_failed_save(tmp_path, monkeypatch):
    full = type("Promise", (), {"result": lambda self: (_ for _ in ()).throw(OSError(28, "No space left"))})()
    monkeypatch.setattr(checkpoint.ocp, "save_async", lambda *a, **k: full)
    told = pytest.warns(RuntimeWarning, match=f"{tmp_path}/1 could not be written: OSError: .*No space left")
    with told, pytest.raises(KeyError), open_(tmp_path) as checkpoints:  # noqa: PT012
        checkpoints.save(1, make_state(1))
        raise KeyError


def test_one_changed_element_changes_the_fingerprint_and_no_mesh_does():
    arrays = [jnp.arange(24.0).reshape(4, 6), jnp.arange(5, dtype=jnp.bfloat16), jnp.array([True, False])]
    arrays += [
        jnp.int32(7),
        jnp.arange(4) * 1j,
        jax.random.key(3),
        jnp.zeros((0, 3)),
        jnp.arange(6, dtype=jnp.int8),
    ]
    plain = fingerprint.describe(arrays)
    # Independent arithmetic for the first one.
    bits = np.asarray(arrays[0]).ravel().view(np.uint32).astype(object)
    assert plain["0"].fingerprint == sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    split = [jax.device_put(arrays[0], NamedSharding(mesh(4), P("data"))), *arrays[1:]]
    assert fingerprint.describe(split[:1])["0"] == plain["0"]
    swapped = arrays[0].at[0, 0].set(arrays[0][3, 5]).at[3, 5].set(arrays[0][0, 0])
    nudged = arrays[0].at[2, 2].set(np.nextafter(np.float32(14), np.float32(15)))
    for other in (swapped, nudged):
        assert fingerprint.describe([other])["0"] != plain["0"]


# Children are forked before jax starts, so that each costs little more than its own work.
KILLED = """
import itertools, os, signal, sys, time
import jax, jax.numpy as jnp
from longwave.training.checkpoint import Checkpoints
def train(directory):
    make = lambda step: {"step": jnp.int32(step), "w": jnp.full((300_000,), step, jnp.float32)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
    with Checkpoints(directory, abstract, metadata={}, metric="m", larger_is_better=True) as checkpoints:
        state = checkpoints.restore_latest()
        first = 0 if state is None else int(state["step"])
        assert state is None or bool((state["w"] == first).all())
        os.write(1, f"from {first}\\n".encode())
        for step in itertools.count(first + 1):
            checkpoints.save(step, make(step), scores={"m": step % 5})
            os.write(1, f"{step}\\n".encode())
for delay in map(float, sys.argv[2:]):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        train(sys.argv[1])
    os.close(write)
    text = b""
    while text.count(b"\\n") < 4:
        text += os.read(read, 999)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 999):
        text += more
    print(text.decode(), end="", flush=True)
"""


def killed_again_and_again(directory: Path, delays: list[float]) -> list[list[int]]:
    """Runs in one folder, each killed a while after its third save: [where it began, steps saved ...]."""
    (printed,) = processes.outputs(processes.launch(KILLED, directory, *delays, count=1))
    runs = [[int(line) for line in run.split()] for run in printed.split("from ")[1:]]
    assert len(runs) == len(delays)
    return runs


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.full, pytest.mark.large])])
def test_killed_at_any_moment_loses_only_what_came_after_the_last_save(tmp_path, kills):
    rng = random.Random(kills)
    runs = killed_again_and_again(tmp_path, [0.1 * rng.random() for _ in range(kills)])
    for before, after in itertools.pairwise(runs):
        # When save(n) returns, n - 1 is on disk; n itself may be, too, and n + 1 if the end came before it
        # was told.
        assert before[-1] - 1 <= after[0] <= before[-1] + 1
    leaf = jnp.zeros(300_000)
    like = {"step": jnp.int32(0), "w": leaf}
    (tmp_path / "99.orbax-checkpoint-tmp").mkdir()  # one that is certain, beside those of the kills
    with pytest.warns(RuntimeWarning, match=f"half-written checkpoint passed over: {tmp_path}/99."):
        checkpoints = Checkpoints(tmp_path, abstract(like), metadata={}, metric="m", larger_is_better=True)
    with checkpoints:
        assert sorted(os.listdir(tmp_path)) == sorted(f"{s}{e}" for s in checkpoints.steps for e in ("", ".json"))
        for step in checkpoints.steps:
            state = checkpoints.restore(step)
            assert int(state["step"]) == step
            assert bool((state["w"] == step).all())
        assert checkpoints.best()[1] == {"m": 4.0}


TOGETHER = """
import sys
from pathlib import Path
from longwave.training import distributed
distributed.start()
import jax
from tests.training.test_checkpoint import abstract, assert_same, make_state, mesh, open_
count = jax.process_count()
on = jax.make_mesh((2 * count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
"""


@pytest.mark.full
def test_two_processes_write_what_one_reads_and_the_other_way_round(tmp_path):
    save = TOGETHER + TWO_SAVE
    processes.outputs(processes.launch(save, tmp_path / "two", count=2))
    like = make_state(0, mesh(8))
    with open_(tmp_path / "two", like=like) as checkpoints:
        assert checkpoints.steps == [2, 3, 4]
        assert checkpoints.best() == (2, {"accuracy": 1.0})
        assert_same(checkpoints.restore_latest(), make_state(4))
    with open_(tmp_path / "one") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    # Damage that only the second process would meet.
    arrays = max((tmp_path / "two/4/state/ocdbt.process_1/d").iterdir(), key=lambda file: file.stat().st_size)
    truncate(arrays)
    load = TOGETHER + TWO_LOAD
    first, second = processes.outputs(processes.launch(load, tmp_path / "one", tmp_path / "two", count=2))
    assert first == second == "restored 2\nrestored 3\n"
    assert sorted(os.listdir(tmp_path / "two")) == ["2", "2.json", "3", "3.json", "4.damaged", "9", "9.json"]
    with open_(tmp_path / "two", like=like) as checkpoints:
        assert_same(checkpoints.restore_latest(), make_state(9))


def test_what_fails_on_one_process_is_raised_on_both(tmp_path):
    """Each failure is met by one process; the other would wait for it until it is killed, and so fail here."""
    (tmp_path / "file").write_text("")
    (tmp_path / "odd/5/state").mkdir(parents=True)
    (tmp_path / "odd/5.json").mkdir()  # neither a record nor a missing one
    first, second = processes.outputs(processes.launch(TOGETHER + TWO_FAIL, tmp_path, count=2), seconds=90)
    assert first == second
    expected = [
        ("NotADirectoryError", "checkpoints cannot be written here"),
        ("IsADirectoryError", "5.json"),
        ("OSError", "/good/1 could not be written: IsADirectoryError"),
        ("OSError", "/good/2 could not be written: OSError: [Errno 28] No space left on 0"),
        ("OSError", "/good/3 could not be written: OSError: [Errno 28] No space left on 1"),
        ("PermissionError", "[Errno 13] removal"),
    ]
    for line, (kind, text) in zip(first.splitlines(), expected, strict=True):
        assert line.startswith(kind + " ")
        assert text in line


TWO_FAIL = """
from longwave.training import checkpoint
folder, index = Path(sys.argv[1]), jax.process_index()

def told(f, *arguments, **settings):
    try:
        f(*arguments, **settings)
        print("no error")
    except OSError as error:
        print(type(error).__name__, error)

class Promise:
    def __init__(self, fails_on):
        self.fails_on = fails_on

    def result(self):
        if index == self.fails_on:
            raise OSError(28, f"No space left on {index}")

def removal(directory, step):
    raise PermissionError(13, "removal")

like = make_state(0, on)
told(open_, folder / "file/c", like=like)
told(open_, folder / "odd", like=like)
with open_(folder / "good", like=like, keep=1) as checkpoints:
    (folder / "good/1.json.draft").mkdir(exist_ok=True)
    told(checkpoints.save, 1, like)
    save_async = checkpoint.ocp.save_async
    checkpoint.ocp.save_async = lambda *a, **k: Promise(0)
    told(checkpoints.save, 2, like, wait=True)
    checkpoint.ocp.save_async = lambda *a, **k: Promise(1)
    told(checkpoints.save, 3, like, wait=True)
    checkpoint.ocp.save_async = lambda *a, **k: Promise(None)
    checkpoints.save(4, like)
    checkpoint._finish_removal = removal
    told(checkpoints.save, 5, like, wait=True)
"""

TWO_SAVE = """
with open_(Path(sys.argv[1]), like=make_state(0, on)) as checkpoints:
    for step in (1, 2, 3, 4):
        checkpoints.save(step, make_state(step, on), scores={"accuracy": float(step == 2)})
"""

TWO_LOAD = """
for directory in sys.argv[1:]:
    with open_(Path(directory), like=make_state(0, on)) as checkpoints:
        state = checkpoints.restore_latest()
        expected = make_state(int(state.step), on)
        for a, e in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert a.sharding == e.sharding
            for x, y in zip(a.addressable_shards, e.addressable_shards, strict=True):
                assert (x.data == y.data).all()
        print("restored", int(state.step))
        checkpoints.save(9, make_state(9, on), wait=True)
"""
