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
print(jax.process_count(), distributed.is_main(), distributed.from_main({"a": [1, None]}))
"""

TOGETHER = """
from longwave.training import distributed
distributed.start()
distributed.start()
import jax
index = jax.process_index()
distributed.barrier("together")
long = "x" * 1000 if index == 0 else None
same = distributed.from_main(long) == "x" * 1000
print(jax.process_count(), distributed.is_main(), distributed.from_main({"who": index}), same)
"""


def test_alone_on_a_laptop():
    (printed,) = processes.outputs(processes.launch(ALONE, count=1))
    error, state = printed.strip().splitlines()
    assert "no cluster was recognised" in error
    assert "JAX_COORDINATOR_ADDRESS" in error
    assert state == "1 True {'a': [1, None]}"


@pytest.mark.full
def test_two_processes_find_each_other():
    printed = processes.outputs(processes.launch(TOGETHER, count=2))
    assert [text.strip() for text in printed] == ["2 True {'who': 0} True", "2 False {'who': 0} True"]


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
