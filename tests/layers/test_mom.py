"""MoM against its definition in float64 NumPy, token by token and memory by memory; the frame; the balance loss."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.kernels.linear_attention import linear_attention
from longwave.layers import memory_rules
from longwave.layers.balance import Balance, BalanceLoss
from longwave.layers.mixer import Context, float32_parameters, parameter_roles
from longwave.layers.mom import MoM
from longwave.layers.mom_routing import lay_out, run_chunk
from longwave.training.optimizer import AdamW
from tests.layers import mom_oracle
from tests.layers.test_mamba import assert_values_and_gradients, made, parameters, randomised
from tests.tolerances import FORWARD, assert_close

RULES = {
    memory_rules.GatedDelta: mom_oracle.gated_delta,
    memory_rules.Delta: mom_oracle.delta,
    memory_rules.GLA: mom_oracle.gla,
    memory_rules.Linear: mom_oracle.linear,
    memory_rules.Retention: mom_oracle.retention,
    memory_rules.Mamba2: mom_oracle.mamba2,
}
SMALL = {"M": 3, "k": 2, "heads": 2, "P": 2, "conv": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"expand_v": 1.5},
        pytest.param({"single_kv_proj": True, "shared": False, "k": 1}, marks=pytest.mark.full),
    ],
    ids=["as the paper", "one projection, no shared memory"],
)
def test_values_and_every_gradient_entry(settings):
    settings = SMALL | settings
    oracle = mom_oracle.oracle_of(mom_oracle.gated_delta, heads=2, k=settings["k"], shared=settings.get("shared", True))
    assert_values_and_gradients(randomised(MoM, 3, **settings), oracle, (1, 6, 3))


@pytest.mark.full
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not memory_rules.GatedDelta])
def test_other_rules(rule):
    model = randomised(MoM, 3, rule=rule, **SMALL)
    x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    y, carry = mom_oracle.oracle_of(RULES[rule], heads=2, k=2)(parameters(model), x.astype(np.float64))
    got = jax.jit(lambda model, x: model(x)[:2])(model, x)
    assert_close(got[0], y, FORWARD["float32"], "y")
    jax.tree.map(lambda got, want: assert_close(got, want, FORWARD["float32"], "carry"), got[1], carry)


@pytest.mark.full
def test_the_gates_of_low_rank_in_bfloat16():
    """A product of batches, which not every backend has in bfloat16."""
    rule = memory_rules.GLA(8, heads=2, P=4, sets=3, rank=4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(rule)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.bfloat16)
    run = jax.jit(lambda state, x: nnx.merge(graph, state).gates(x)[0])
    exact = run(jax.tree.map(lambda p: p.astype(jnp.float32), low), x.astype(jnp.float32))
    assert_close(run(low, x), exact, FORWARD["float32"])


LENGTH = 12


@functools.cache
def small_model():
    return randomised(MoM, 4, M=4, k=2, heads=2, P=3)


@functools.cache
def two_calls():
    """(model, x, reset, valid) -> y and the carry behind it: a call on half of the tokens, and one on the others."""

    @jax.jit
    def call(model, x, carry, reset, valid):
        return model(x, carry, Context(reset=reset, valid=valid))[:2]

    def run(model, x, reset, valid):
        carry, y = model.init_carry(len(x)), []
        for part in np.array_split(np.arange(x.shape[1]), 2):
            out, carry = call(model, x[:, part], carry, reset[:, part], valid[:, part])
            y.append(out)
        return np.concatenate(y, axis=1), carry

    return run


def _tokens(rows=2):
    x = np.random.default_rng(3).normal(size=(rows, LENGTH, 4)).astype(np.float32)
    return x, np.zeros(x.shape[:2], bool), np.ones(x.shape[:2], bool)


def _documents():
    """Of many lengths, one that visits no memory twice, beside padding on both sides."""
    x, reset, valid = _tokens()
    reset[0, [0, 1, 4, 9, 11]] = True
    reset[1, [2, 3, 8]] = True  # at 2 it is padding's
    valid[1, [0, 1, 2, 10, 11]] = False
    return x, reset, valid


def _one_token():
    x, reset, valid = _tokens()
    return np.repeat(x[:, :1], LENGTH, axis=1), reset, valid


def _nothing():
    """All memories are equally probable: the first two are taken."""
    x, reset, valid = _tokens()
    return 0 * x, reset, valid


CASES = {"a sequence": _tokens, "documents": _documents, "one token, repeated": _one_token, "ties": _nothing}


@pytest.mark.parametrize("case", CASES)
def test_carry_documents_and_padding(case):
    model = small_model()
    x, reset, valid = CASES[case]()
    oracle = mom_oracle.oracle_of(mom_oracle.gated_delta, heads=2, k=2)
    y, carry = oracle(parameters(model), x.astype(np.float64), reset, valid)
    got, end = two_calls()(model, x, reset, valid)
    assert_close(got, y, FORWARD["float32"], "y")
    jax.tree.map(lambda got, want: assert_close(got, want, FORWARD["float32"], "carry"), end, carry)
    visited = np.any(np.asarray(carry["conv"]["q"]) != 0, axis=(2, 3))
    if case == "ties":
        assert not np.any(end["S"])  # nothing is written by nothing
    elif case != "a sequence":
        assert not visited.all()  # there is a memory that the last document left alone
        assert not np.any(np.asarray(end["S"])[~visited])


def test_no_output_depends_on_a_later_token():
    """Not by a bit: neither by the order of tokens nor by the convolutions. Training is the same program."""
    model = small_model()
    x, reset, valid = _tokens()
    y, _ = two_calls()(model, x, reset, valid)
    for seed in range(8):
        other = x.copy()
        other[:, -1] = np.random.default_rng(seed).normal(size=other[:, -1].shape)
        changed, _ = two_calls()(model, other, reset, valid)
        np.testing.assert_array_equal(y[:, :-1], changed[:, :-1])
        assert not np.any(y[:, -1] == changed[:, -1])
    program = lambda key: str(jax.make_jaxpr(lambda x: model(x, None, Context(key=key)).y)(x))
    assert program(None) == program(jax.random.key(0))


@pytest.mark.full
def test_every_memory_on_every_token_with_closed_gates():
    """The recurrence's other exact form, over many chunks: where a memory is not selected, g, beta and w are 0."""
    t, heads, P = 300, 2, 4
    model = randomised(MoM, 4, M=3, k=2, heads=heads, P=P)
    for name in "qkv":  # convolutions that see the token alone
        taps = getattr(model, f"conv_{name}")
        taps[...] = taps[...].at[:-1].set(0)
    x = np.random.default_rng(0).normal(size=(2, t, 4)).astype(np.float32)

    @jax.jit
    def closed(model, x):
        ways, weight, _ = model.route(x, None)
        split = lambda y, s: jax.nn.silu(y * getattr(model, f"conv_{s}")[-1][None, None]).reshape(
            *y.shape[:2], heads, P
        )
        q, gates, given = split(model.W_q(x), "q"), model.rule.gates(x), []
        for m in range(model.memories):
            k, v = split(x @ model.W_k[m], "k"), split(x @ model.W_v[m], "v")
            written = model.rule(q, k, *(gate[:, :, m] for gate in gates))
            here = (ways == m).any(2)[..., None]
            given.append((written.q, written.k, v, *(jnp.where(here, gate, 0) for gate in written[2:])))
        q, k, v, g, w, beta = (jnp.concatenate(arrays) for arrays in zip(*given, strict=True))  # memories as rows
        read, _ = linear_attention(q, k, v, g, w=w, beta=beta, scale=P**-0.5)
        o = jnp.einsum("mbthv,btm->bthv", read.reshape(model.memories, *x.shape[:2], heads, P), weight)
        return model.out(model.norm(o).reshape(*x.shape[:2], -1) * jax.nn.silu(model.W_z(x)))

    assert_close(jax.jit(lambda model, x: model(x).y)(model, x), closed(model, x), FORWARD["float32"])


# The frame


@functools.cache
def _laid_out():
    rng = np.random.default_rng(0)
    rows, t = 3, 11
    ways = np.argsort(rng.random((rows, t, 4)))[..., :2].astype(np.int32)
    ways[0] = np.arange(2)  # all to the same
    valid = np.ones((rows, t), bool)
    valid[1, :3] = valid[1, -2:] = False
    valid[2] = False
    reset = rng.random((rows, t)) < 0.3
    frame = jax.jit(lambda *args: lay_out(args[0], 4, tail=2, chunk=4, reset=args[1], valid=args[2]))(
        ways, reset, valid
    )
    return ways, valid, reset, jax.tree.map(np.asarray, frame)._replace(tail=2)


def test_the_frame_holds_every_memory_in_order():
    ways, valid, reset, frame = _laid_out()
    resets = np.asarray(frame.reset)
    assert frame.token.shape[1] % 4 == 0
    for b in range(len(ways)):
        slot = 0
        for m in range(4):
            own = [t for t in range(ways.shape[1]) if valid[b, t] and m in ways[b, t]]
            assert frame.start[b, m] == slot
            assert frame.token[b, slot : slot + 2 + len(own)].tolist() == [11, 11, *own]
            length = -(-(2 + len(own)) // 4) * 4
            assert set(frame.memory[b, slot : slot + length]) == {m}
            documents = np.cumsum(reset[b] & valid[b])[own]
            first = np.diff(documents, prepend=0) > 0
            np.testing.assert_array_equal(resets[b, slot : slot + 2 + len(own)], [False, False, *first])
            slot += length
        assert np.all(frame.memory[b, slot:] == -1)
    assert frame.valid.sum() == 2 * valid.sum()


def test_values_move_by_gathers_in_both_directions():
    """Every map and its transpose against the dense matrix; no number is scattered but integers."""
    ways, valid, _, frame = _laid_out()
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=(3, *shape)).astype(np.float32)
    f = frame.token.shape[1]
    x, pairs, y = draw(11, 5), draw(11, 4, 5), draw(f, 5)
    tails = draw(4, 2, 5)
    D = np.zeros((3, f, 11), np.float32)
    for b, t, j in zip(*np.nonzero(np.broadcast_to(valid[..., None], ways.shape)), strict=True):
        D[b, frame.slots[b, t, j], t] = 1
    own = np.zeros((3, f, 4), np.float32)
    for b, m in np.ndindex(3, 4):
        own[b, :, m] = frame.memory[b] == m
    at = np.zeros((3, f, 4, 2), np.float32)
    for b, m, i in np.ndindex(3, 4, 2):
        at[b, frame.start[b, m] + i, m, i] = 1
    last = np.zeros((3, f, 4, 2), np.float32)
    for b, m, i in np.ndindex(3, 4, 2):
        slot = frame.start[b, m] + frame.count[b, m] + i
        last[b, slot, m, i] = frame.document[b, slot] == frame.last[b]
    behind = lambda x, tails: np.einsum("bft,btd->bfd", D, x) + np.einsum("bfmi,bmid->bfd", at, tails)
    maps = {
        "tokens": (frame.of_tokens, behind, (x, tails)),
        "pairs": (
            frame.of_pairs,
            lambda x, s: np.einsum("bft,bfm,btmd->bfd", D, own, x) + np.einsum("bfmi,bmid->bfd", at, s),
            (pairs, tails),
        ),
        "summed": (frame.summed, lambda y: np.einsum("bft,bfd->btd", D, y), (y,)),
        "tails": (frame.tails, lambda y: np.einsum("bfmi,bfd->bmid", last, y), (y,)),
    }
    dys = {"tokens": draw(f, 5), "pairs": draw(f, 5), "summed": draw(11, 5), "tails": draw(4, 2, 5)}

    def both(dys):
        moved = {name: jax.vjp(move, *args) for name, (move, _, args) in maps.items()}
        return {name: (y, transpose(dys[name])) for name, (y, transpose) in moved.items()}

    for name, (moved, back) in jax.jit(both)(dys).items():
        _, dense, args = maps[name]
        assert_close(moved, dense(*args), 1e-6, name)
        for i, (arg, got) in enumerate(zip(args, back, strict=True)):
            moves = rng.normal(size=arg.shape)  # <dy, D e> = <D' dy, e>, of each row
            others = [moves if j == i else np.zeros_like(a) for j, a in enumerate(args)]
            of_row = lambda v: v.reshape(3, -1).sum(1)
            assert_close(of_row(got * moves), of_row(dys[name] * dense(*others)), 1e-5, f"{name}, transposed")
    jaxpr = str(jax.make_jaxpr(both)(dys))
    assert "gather" in jaxpr
    assert not re.search(r"f32\[[\d,]*\] = scatter", jaxpr)


@pytest.mark.parametrize(("t", "chunk"), [(2, 16), (2048, 64), (100_000, 256)])
def test_padding_stays_a_small_part_of_a_long_frame(t, chunk):
    assert run_chunk(t, 3, 5) == chunk


# What a model is told


def test_balance_is_of_all_layers_together():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 7, 4))  # layers, rows, tokens, memories
    valid = rng.random((2, 7)) < 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = p >= np.sort(p, -1)[..., -2:-1]
    flat = lambda v: v[:, valid].reshape(-1, 4)
    want = 0.01 * 4 * np.sum(flat(chosen).mean(0) * flat(p).mean(0))
    layers = [
        Balance(*(np.float32(v[i, valid].sum(0)) for v in (chosen, p)), np.float32(valid.sum())) for i in range(2)
    ]
    stacked = jax.tree.map(lambda *v: np.stack(v), *layers)
    for aux in (tuple({"balance": layer} for layer in layers), ({"other": valid, "balance": stacked},)):
        assert_close(BalanceLoss()(aux), want, 1e-6)
    assert_close(BalanceLoss()({"forward": {"balance": layers[0]}, "backward": {"balance": layers[1]}}), want, 1e-6)
    even = Balance(jnp.full(4, 5.0), jnp.full(4, 2.5), jnp.float32(10))
    assert_close(BalanceLoss(coefficient=1.0)(({"balance": even},)), 2.0, 1e-6)


def test_a_layer_tells_its_balance():
    model = made(MoM, 4, **SMALL)
    x, _, valid = _documents()
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        ways, _, balance = nnx.merge(graph, state).route(x, valid)
        return BalanceLoss()(balance), (ways, balance)

    gradient, (ways, balance) = jax.grad(run, has_aux=True)(state)
    scores = np.exp(x @ parameters(model)["router/kernel"])
    assert_close(balance.probability, (scores / scores.sum(-1, keepdims=True))[valid].sum(0), 1e-6)
    counts = np.bincount(np.asarray(ways)[valid].ravel(), minlength=4)
    np.testing.assert_array_equal(balance.routed, counts[:3])
    assert counts[3] == balance.tokens == valid.sum()
    assert np.any(gradient["router"]["kernel"][...])


def test_balance_needs_a_router():
    with pytest.raises(ValueError, match="no layer that has a router"):
        BalanceLoss()(({}, {"summary": np.zeros(3)}))
    layers = ({"balance": Balance(np.zeros(m), np.zeros(m), np.float32(0))} for m in (3, 4))
    with pytest.raises(ValueError, match=re.escape("[3, 4] memories")):
        BalanceLoss()(tuple(layers))


def test_where_parameters_start():
    p = parameters(made(MoM, 64, P=16, heads=8, expand_v=2))
    assert {k: v.shape for k, v in p.items()} == {
        "router/kernel": (64, 4), "W_q/kernel": (64, 128), "W_k": (5, 64, 128), "W_v": (5, 64, 256),
        "conv_q": (4, 128), "conv_k": (4, 128), "conv_v": (4, 256), "rule/W_a": (5, 64, 8), "rule/W_b": (5, 64, 8),
        "rule/decay/A_log": (8,), "rule/decay/dt_bias": (8,), "W_z/kernel": (64, 256), "norm/scale": (32 * 1,),
        "out/kernel": (256, 64),
    }  # fmt: skip
    for name in ("router/kernel", "W_q/kernel", "W_k", "W_v", "rule/W_a", "W_z/kernel", "out/kernel"):
        bound = 2**-2.5 * np.sqrt(6 / sum(p[name].shape[-2:]))
        np.testing.assert_allclose(np.max(np.abs(p[name])), bound, rtol=0.02)
    assert np.exp(p["rule/decay/A_log"]).max() <= 16.001
    single = nnx.eval_shape(lambda: MoM(8, P=4, single_kv_proj=True, rngs=nnx.Rngs(0)))
    assert single.W_k.shape == (1, 8, 16)


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: MoM(8, P=4, rngs=nnx.Rngs(0)))
    decay = {path: AdamW(lr=1.0, weight_decay=0.1).group(role)[1] for path, role in parameter_roles(model).items()}
    assert {path for path, rate in decay.items() if not rate} == {
        "rule/decay/A_log", "rule/decay/dt_bias", "norm/scale",
    }  # fmt: skip
    assert float32_parameters(model) == {"rule/decay/A_log", "rule/decay/dt_bias"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 5}, "MoM.k = 5"),
        ({"M": 0}, "MoM.M = 0"),
        ({"conv": 1}, "MoM.conv = 1"),
        ({"P": 3, "expand_v": 0.5}, "MoM.expand_v = 0.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: MoM(4, rngs=nnx.Rngs(0), **settings))
