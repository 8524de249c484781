"""Attention on GPUs, with no GPU: kernels interpreted, kernels assembled for sm_90a, and the rule that picks."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels import aot, gpu_compat
from longwave.kernels.aot import gpu as compiler
from longwave.kernels.attention import flash, gpu, pallas_gpu
from longwave.kernels.attention.mask import Blocks, BlockSparse, Butterfly, Causal, Mask, Prefix, Sinks, Window
from longwave.kernels.attention.pallas_gpu import Tile, Tiles
from longwave.kernels.attention.reference import Coordinates, Scores
from tests.kernels import attention_oracle as oracle
from tests.kernels.test_attention_cases import CASES, MASKS, places

needs_compiler = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))
needs_triton = pytest.mark.skipif(gpu_compat.missing() is not None, reason=str(gpu_compat.missing()))


def interpreted(tile):
    how = {"tiles": Tiles(tile, tile, tile), "interpret": True}
    return flash.Forms(default=flash.Form(partial(pallas_gpu.forward, **how), partial(pallas_gpu.backward, **how)))


def compare(x, mask, sees, q_at, k_at, tile, softcap=None, plain=False):
    """The interpreted kernels on x against the oracle."""
    tq, tk, d = x.q.shape[1], x.k.shape[1], x.q.shape[3]
    i, j = (np.asarray(at.placed(t).position) for at, t in ((q_at, tq), (k_at, tk)))
    see = oracle.seen(sees(i[..., :, None], j[..., None, :]), q_at.segment, k_at.segment)
    scores, at = Scores(mask, d**-0.5, softcap), jax.tree.map(jnp.asarray, (q_at, k_at))
    got = oracle.run(lambda q, k, v: flash.attention(interpreted(tile), scores, q, k, v, *at), x)
    known = {"scale": scores.scale, "softcap": softcap}
    rounded = oracle.attention(x, see, **known, rounded=True) if plain else None
    oracle.check(got, oracle.attention(x, see, **known), plain=rounded)


@needs_triton
def test_ragged_causal_heads_of_odd_width_equal_the_oracle():
    x = oracle.inputs(1, 37, 37, 2, 2, 24, 16)
    compare(x, Causal(), lambda i, j: j <= i, Coordinates(), Coordinates(), Tile(16, 32, 4, 1))


@needs_triton
def test_all_options_at_once_equal_the_oracle():
    q_at, k_at = places("documents", 2, 33, 40)
    mask, sees = Causal() & (Window(6) | Sinks(3)), lambda i, j: (j <= i) & ((i - j < 6) | (j < 3))
    compare(oracle.inputs(2, 33, 40, 4, 2, 8, 16), mask, sees, q_at, k_at, Tile(16, 16, 4, 1), softcap=0.7)


COVER = [case for case in CASES if not case.mask.startswith("table")]


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.large] * (i % 5 > 0)) for i, case in enumerate(COVER)]
)
def test_cover_of_sizes_and_options_equals_the_oracle(case):
    b, kv = (1 if case.tq * case.tk > 2**17 else 2), (2 if case.heads == 1 else 1)
    x = oracle.inputs(b, case.tq, case.tk, case.heads * kv, kv, case.d, case.dv, dtype=case.dtype)
    if not case.dlse:
        x = x._replace(dlse=np.zeros_like(x.dlse))
    _, mask, sees = MASKS[case.mask]
    at, bfloat16 = places(case.at, b, case.tq, case.tk), case.dtype == "bfloat16"
    compare(x, mask, sees, *at, Tile(64, 128, 4, 1), case.softcap, plain=bfloat16)


def test_two_runs_visit_every_live_block_and_no_dead_one_at_the_ends():
    live = np.array([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0]], bool)
    expected = ([1, 2, 5], [], [0, 1, 2, 3, 4, 5], [0, 2, 3, 4])  # of the last, block 3 in vain
    runs = pallas_gpu._runs(live[None])
    np.testing.assert_array_equal(jax.jit(pallas_gpu._runs)(live[None]), runs)
    note = lambda j, state: (state[0].at[state[1]].set(j), state[1] + 1)
    walk = jax.jit(jax.vmap(lambda runs: pallas_gpu._walk(runs, note, (jnp.full(8, -1), 0))))
    for walked, n, blocks in zip(*walk(runs[0]), expected, strict=True):
        assert walked[:n].tolist() == blocks


def arrays(d=64, dv=None, dtype=jnp.bfloat16, tq=512, tk=None, heads=(4, 2)):
    q, k, v = (
        jax.ShapeDtypeStruct((2, t, h, width), dtype)
        for t, h, width in ((tq, heads[0], d), (tk or tq, heads[1], d), (tk or tq, heads[1], dv or d))
    )
    return q, k, v


PLAIN = Scores(Causal(), 0.125)
NOWHERE = Coordinates(), Coordinates()


@needs_triton
@pytest.mark.parametrize(
    ("xs", "mask", "reason"),
    [
        (arrays(), Causal() & Window(100), None),
        (arrays(d=256, dv=200), Causal() | Prefix(300), None),
        (arrays(d=128, dtype=jnp.float32, tk=70), Causal() & (Window(100) | Sinks(4)), None),
        (arrays(tq=4096), Causal() & Blocks(100), None),
        (arrays(d=264), Mask(), "width 264; registers hold 256 of bfloat16"),
        (arrays(d=136, dtype=jnp.float32), Mask(), "width 136; registers hold 128 of float32"),
        (arrays(dtype=jnp.float64), Mask(), "are float64"),
        ((*arrays()[:2], arrays(dtype=jnp.float32)[2]), Mask(), "bfloat16, float32"),
        (arrays(tq=4096), Butterfly(64), "live blocks in more than two runs"),
        (arrays(), BlockSparse(np.eye(8), 64), "tables"),
        ((jax.ShapeDtypeStruct((2, 0, 4, 64), jnp.bfloat16), *arrays()[1:]), Mask(), "empty"),
    ],
)
def test_what_the_kernels_refuse_has_a_reason(xs, mask, reason):
    found = pallas_gpu.supports(*xs, *NOWHERE, Scores(mask, 0.125))
    assert found is None if reason is None else reason in found


@pytest.fixture
def cudnn():
    """JAX as where cuDNN is installed."""
    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", return_value=91_000):
        yield


@needs_triton
@pytest.mark.parametrize(
    ("xs", "scores", "at", "lse", "form", "reason"),
    [
        (arrays(), PLAIN, NOWHERE, False, "cudnn", "all that is asked"),
        (arrays(tk=100), Scores(Mask(), 1.0), NOWHERE, False, "cudnn", "all that is asked"),
        (arrays(), Scores(Window(9) & Causal(), 1.0), NOWHERE, False, "cudnn", "all that is asked"),
        (arrays(), PLAIN, NOWHERE, True, "pallas", "log-sum-exp"),
        (arrays(), Scores(Causal(), 1.0, softcap=30.0), NOWHERE, False, "pallas", "capped"),
        (arrays(), Scores(Window(9), 1.0), NOWHERE, False, "pallas", "neither full, causal nor a causal window"),
        (arrays(), Scores(Causal(1), 1.0), NOWHERE, False, "pallas", "neither full"),
        (arrays(), PLAIN, (Coordinates(None, np.zeros(512, int)),) * 2, False, "pallas", "segments are data"),
        (arrays(tk=100), PLAIN, NOWHERE, False, "pallas", "512 queries and 100 keys"),
        (arrays(dtype=jnp.float32), PLAIN, NOWHERE, False, "pallas", "float32"),
        (arrays(d=160), PLAIN, NOWHERE, False, "pallas", "multiple of 8 up to 128"),
        (arrays(d=320), PLAIN, NOWHERE, False, "chunked", "not pallas: heads of width 320"),
    ],
)
def test_the_rule(cudnn, xs, scores, at, lse, form, reason):
    choice = gpu.choose(*xs, *at, scores, return_lse=lse)
    assert choice.form == form
    assert reason in choice.reason


@needs_triton
def test_without_cudnn_pallas_is_chosen_and_the_reason_logged_once(caplog):
    gpu._log.cache_clear()
    with caplog.at_level("INFO"), mock.patch("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None):
        for _ in range(2):
            assert gpu.choose(*arrays(), *NOWHERE, PLAIN, return_lse=False).form == "pallas"
    assert [record.getMessage() for record in caplog.records] == [
        "attention on GPUs: pallas; not cudnn: cuDNN is not detected."
    ]


def lowered(f, platform):
    """The gradient of f, as lowered for a platform on this machine."""
    loss = lambda q, k, v: f(q, k, v).astype(jnp.float32).sum()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays()).lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_is_called_on_cuda_forward_and_backward_and_nowhere_else(cudnn):
    of_chunks = lambda *args: flash.attention(flash.Forms(), PLAIN, *args)
    f = lambda q, k, v: gpu.with_cudnn(of_chunks, PLAIN)(q, k, v, *NOWHERE)[0]
    cuda, cpu = (lowered(f, platform) for platform in ("cuda", "cpu"))
    assert cuda.count("__cudnn$fmhaSoftmax(") == 1
    assert cuda.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert "while" not in cuda
    assert "cudnn" not in cpu


@needs_triton
def test_kernels_are_called_on_cuda_forward_and_backward_and_nowhere_else():
    f = lambda q, k, v: flash.attention(flash.Forms(cuda=gpu.PALLAS), PLAIN, q, k, v, *NOWHERE)[0]
    assert lowered(f, "cuda").count("custom_call @__gpu$xla.gpu.triton") == 3
    assert "triton" not in lowered(f, "cpu")


RICH = Scores(Causal() & (Window(512) | Sinks(4)), 0.125, softcap=30.0)


def assembled(dtype, width, chips=1):
    """Kernels with every option, and with none: run in a process of its own."""

    def program(scores, heads, ids):
        mesh = aot.mesh(compiler.topology(chips), {"data": -1})
        q, k, v = arrays(width, dtype=dtype, tq=2048, heads=heads)
        ids = Coordinates(*(jax.ShapeDtypeStruct((2048,), jnp.int32),) * 2) if ids else Coordinates()

        def loss(q, k, v, at):
            f = lambda q, k, v: flash.attention(flash.Forms(cuda=gpu.PALLAS), scores, q, k, v, at, at)
            over = P(None, None, "data") if chips > 1 else P()
            o, lse = jax.shard_map(f, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)(q, k, v)
            return o.astype(jnp.float32).sum() + lse.sum()

        heads = NamedSharding(mesh, P(None, None, "data"))
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads) for x in (q, k, v))
        return compiler.compile(jax.grad(loss, (0, 1, 2)), q, k, v, ids, mesh=mesh)

    return program(PLAIN, (8, 8), False), program(RICH, (8, 8 if chips > 1 else 2), True)


@needs_triton
@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("bfloat16", 128),
        *(pytest.param(*case, marks=pytest.mark.large) for case in (("bfloat16", 64), ("bfloat16", 256))),
        *(pytest.param(*case, marks=pytest.mark.large) for case in (("float32", 64), ("float32", 128))),
    ],
)
def test_kernels_assemble_for_sm_90a_without_spills(dtype, width):
    for program in aot.in_subprocess(assembled, dtype, width):
        for name in ("attention_forward", "attention_dq", "attention_dkv"):
            kernel = program[name]
            assert kernel.spills == 0, program.table()
            assert kernel.shared <= 99 * 1024  # of every chip since sm_80
            assert kernel.tensor > 0
            assert kernel.launches == 1


@needs_triton
@needs_compiler
@pytest.mark.full
def test_heads_split_over_eight_gpus_do_not_communicate():
    plain, _ = aot.in_subprocess(assembled, "bfloat16", 64, 8)
    assert plain["attention_forward"].grid == (16, 1, 2)
    assert plain.report.collectives == ()
