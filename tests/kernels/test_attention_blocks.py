"""Which blocks the forward kernel takes: the table's for the chip that is traced for, else the rule's."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from longwave.kernels.aot.chips import CHIPS, traced_for
from longwave.kernels.attention import blocks
from longwave.kernels.attention.blocks import Cut
from longwave.kernels.attention.mask import Causal, Window

ROWS = [
    pytest.param(row["blocks"], id=f"{chip} {problem}")
    for chip, rows in json.loads(blocks.TABLE.read_text()).items()
    for problem, row in rows.items()
]


def queries(t, d=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, t, 8, d), dtype)


def on(chip):
    device = AbstractDevice(device_kind=CHIPS[chip].kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("row", ROWS)
def test_what_is_frozen_is_a_whole_number_of_pieces_and_tiles(row):
    cut = Cut.of(row)
    assert cut.row == row
    for block, piece, tile in zip((cut.q, cut.k), cut.piece, cut.tile, strict=True):
        assert block % piece == piece % tile == tile % 128 == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_the_table_holds_on_its_chip_and_the_rule_elsewhere(chip):
    q = queries(16384)
    frozen = json.loads(blocks.TABLE.read_text())[chip][blocks.problem(q, q, Causal())]["blocks"]
    with on(chip):
        assert traced_for() == chip
        assert blocks.forward(q, q, q, Causal()) == Cut.of(frozen)
        odd = queries(16384 + 128)  # which no block of the table divides
        assert blocks.forward(odd, odd, odd, Causal()) == blocks.rule(odd, odd, odd, Causal())
        assert blocks.forward(q, q, q, Causal() & Window(300)) == blocks.rule(q, q, q, Causal() & Window(300))
    assert traced_for() is None
    assert blocks.forward(q, q, q, Causal()) == blocks.rule(q, q, q, Causal())
    assert blocks.forward(q, q, q, Causal(), chip) == Cut.of(frozen)
