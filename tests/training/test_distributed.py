"""Start on one process and on two."""

import pytest

from longwave.training import distributed
from tests.training import processes

ALONE = """
from longwave.training import distributed
import jax
try:
    distributed.start(True)
except ValueError as error:
    print(error)
distributed.start(False)
distributed.start()
distributed.start()
distributed.barrier("alone")
print(jax.process_count(), distributed.is_main(), distributed.on_main(lambda: {"a": [1, None]}))
"""

TOGETHER = """
from longwave.training import distributed
distributed.start()
distributed.start()
import jax
index = jax.process_index()
distributed.barrier("together")
same = distributed.on_main(lambda: "x" * 1000) == "x" * 1000
print(jax.process_count(), distributed.is_main(), distributed.on_main(lambda: {"who": index}), same)

class Odd(ValueError):  # which pickle cannot make again from its text
    def __init__(self, value):
        super().__init__(f"odd {value}")

def fails(error, *where):
    if index in where:
        raise error

def told(f, *arguments):
    try:
        print(f(*arguments))
    except Exception as error:
        print(type(error).__name__, str(error))

path = "/folder"
told(distributed.on_main, lambda: fails(PermissionError(13, "Permission denied", path), 0, 1))
told(distributed.on_main, lambda: fails(Odd(3), 0))
told(distributed.on_main, lambda: {1, 2})
told(distributed.on_all, lambda: fails(FileNotFoundError(f"no {index}"), 1))
told(distributed.on_all, lambda: index * 10)
told(distributed.check_agreement, {"config": "a = 1", "data": "x"})
told(distributed.check_agreement, {"config": f"a = {index}", "data": "x"})
told(distributed.check_agreement, {"config": "a", "data": "x"} if index else {"config": "a"})
"""
UNLIKE = "ValueError the 2 processes of a run must be started alike: {} on process 1 is not that of process 0"
TOLD = [
    "PermissionError [Errno 13] Permission denied: '/folder'",
    "Odd odd 3",
    "TypeError Object of type set is not JSON serializable",
    "FileNotFoundError no 1",
    "[0, 10]",
    "None",
    UNLIKE.format("'config'"),
    UNLIKE.format("'data'"),
]


def test_alone_on_a_laptop():
    (printed,) = processes.outputs(processes.launch(ALONE, count=1))
    error, state = printed.strip().splitlines()
    assert "no cluster was recognised" in error
    assert "JAX_COORDINATOR_ADDRESS" in error
    assert state == "1 True {'a': [1, None]}"


def test_two_processes_find_each_other_and_fail_together():
    """A process that waited for one that has raised would be killed, and so fail here."""
    first, second = (text.splitlines() for text in processes.outputs(processes.launch(TOGETHER, count=2), seconds=60))
    assert first == ["2 True {'who': 0} True", *TOLD]
    elsewhere = [line.replace("Odd", "ValueError") for line in TOLD]  # the nearest class that can be made there
    assert second == ["2 False {'who': 0} True", *elsewhere]


def test_alone_a_function_is_just_called():
    error, value = KeyError("x"), {1: object()}
    assert distributed.on_main(lambda: value) is value
    assert distributed.on_all(lambda: value) == [value]
    for run in (distributed.on_main, distributed.on_all):
        with pytest.raises(KeyError) as raised:
            run(lambda: (_ for _ in ()).throw(error))
        assert raised.value is error
    distributed.check_agreement({"config": "a"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAX_NUM_PROCESSES", "two", "JAX_NUM_PROCESSES = 'two': expected a whole number"),
        ("JAX_PROCESS_ID", "-1", "JAX_PROCESS_ID = '-1': expected a whole number"),
        ("JAX_COORDINATOR_ADDRESS", "localhost", "JAX_COORDINATOR_ADDRESS = 'localhost': expected host:port"),
    ],
)
def test_wrong_description_of_the_cluster_is_named(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start()
