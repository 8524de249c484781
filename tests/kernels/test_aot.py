"""Compiling ahead: what must be communicated, what must be held, and errors that say what to do."""

import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels import aot
from longwave.kernels.aot.report import GIB, HBM_GIB

needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
SLICES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x2")
F32 = 4  # bytes


def abstract(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def slice_mesh(name):
    return aot.mesh(aot.topology(name), {"data": 2, "fsdp": -1})


def sgd(w, x):
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    return w - 0.1 * gradient, loss


def sgd_report(mesh, spec, K=512, N=256, batch=1024):
    w, x = abstract(mesh, (K, N), *spec), abstract(mesh, (batch, K), ("data", "fsdp"))
    replicated = NamedSharding(mesh, P())
    step = jax.jit(sgd, donate_argnums=0, out_shardings=(w.sharding, replicated))
    return aot.compile(step, w, x, mesh=mesh, parameters=w)


def of_kind(report, *kinds):
    return [c for c in report.collectives if c.kind in kinds]


@needs_libtpu
@pytest.mark.parametrize("name", SLICES)
def test_fully_sharded_weight_is_gathered_and_its_gradient_reduced(name):
    mesh, K, N, batch = slice_mesh(name), 512, 256, 1024
    fsdp = mesh.shape["fsdp"]
    report = sgd_report(mesh, ("fsdp",), K, N, batch)
    (gather,) = of_kind(report, "all-gather")  # the weight, and never the activations
    assert (gather.operands[0].dims, gather.results[0].dims) == ((K // fsdp, N), (K, N))
    assert gather.operands == aot.all_gathers(report.hlo)[0].operands
    reductions = [s.dims for c in of_kind(report, "all-reduce", "reduce-scatter") for s in c.operands]
    assert (K, N) in reductions or (K // fsdp, N) in reductions  # the gradient
    assert () in reductions  # the loss
    weight, inputs = K * N * F32 // fsdp, batch * K * F32 // mesh.size
    assert report.memory.arguments == weight + inputs
    assert report.memory.aliased == weight
    assert weight < report.memory.outputs <= weight + 1024  # and the loss, in a tile of its own
    assert report.parameters == K * N
    assert report.fits
    assert report.needed == report.memory.total < report.capacity


@needs_libtpu
def test_data_parallel_gathers_nothing_and_reduces_the_whole_gradient():
    report = sgd_report(slice_mesh("v5e:2x4"), ())
    assert {c.kind for c in report.collectives} == {"all-reduce"}
    reduced = [s for c in report.collectives for s in c.operands]
    assert sorted(s.dims for s in reduced) == [(), (512, 256)]
    assert sum(c.bytes for c in report.collectives) == F32 * (1 + 512 * 256)


@needs_libtpu
def test_independent_rows_do_not_communicate():
    mesh = slice_mesh("v5e:2x4")
    report = aot.compile(lambda x: jnp.tanh(x) * 2, abstract(mesh, (64, 128), ("data", "fsdp")), mesh=mesh)
    assert report.collectives == ()


def explicit(mesh):
    """One collective of every kind, by hand: (function, argument of 64 KiB a device, bytes by kind)."""
    n = mesh.size

    def local(x):  # (128, 128) on each device
        x = jnp.sin(jax.lax.psum(x, "d"))
        x = jnp.sin(jax.lax.ppermute(x, "d", [(i, (i + 1) % n) for i in range(n)]))
        x = jnp.sin(jax.lax.all_to_all(x, "d", 0, 1, tiled=True).reshape(128, 128))
        x = jnp.sin(jax.lax.all_gather(x, "d", tiled=True))
        return jax.lax.psum_scatter(x, "d", tiled=True)

    whole = 128 * 128 * F32
    expected = {
        "all-reduce": whole,
        "collective-permute": whole,
        "all-to-all": whole,
        "all-gather": n * whole,
        "reduce-scatter": n * whole,
    }
    fn = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    return fn, abstract(mesh, (128 * n, 128), "d"), expected


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_libtpu) for name in SLICES] + ["cpu"])
def test_every_kind_is_found_once_with_its_bytes(name):
    mesh = aot.mesh(jax.devices() if name == "cpu" else aot.topology(name), {"d": -1})
    fn, x, expected = explicit(mesh)
    report = aot.compile(fn, x, mesh=mesh)
    assert {c.kind: c.bytes for c in report.collectives} == expected
    assert len(report.collectives) == len(expected)
    for kind in expected:
        assert f"  {kind} " in report.table()


# The forms of asynchronous collectives, abridged from what the compilers write.
ASYNCHRONOUS = """
%fused_computation.69 (param_0.192: bf16[1024,1024]) -> bf16[4096,1024] {
  %param_0.192 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.35 = bf16[4096,1024]{1,0:T(8,128)(2,1)} all-gather(%param_0.192), channel_id=6, dimensions={0}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.112 (param_0.196: bf16[1024,1024]) -> bf16[4096,1024] {
  %param_0.196 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.37 = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.196), channel_id=6, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %start = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}) all-gather-start(%p), channel_id=1, dimensions={0}
  %done = f32[16,128]{1,0:T(8,128)} all-gather-done(%start)
  %permute = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[], u32[]) collective-permute-start(f32[8,128]{1,0:T(8,128)} %p), channel_id=1
  ROOT %end = f32[8,128]{1,0} collective-permute-done(%permute), metadata={op_name="all-gather(x)"}
}
"""  # noqa: E501


def test_asynchronous_collectives_count_once():
    found = [(c.kind, c.operands[0].dims, c.results[0].dims, c.bytes) for c in aot.collectives(ASYNCHRONOUS)]
    assert found == [
        ("all-gather", (1024, 1024), (4096, 1024), 4096 * 1024 * 2),
        ("all-gather", (8, 128), (16, 128), 16 * 128 * 4),
        ("collective-permute", (8, 128), (8, 128), 8 * 128 * 4),
    ]


@needs_libtpu
def test_memory_of_an_adamw_step_is_what_its_arrays_take():
    """Parameters and both moments split eight ways and donated; so is the batch; the step in int32."""
    mesh, K, N, batch = slice_mesh("v5e:2x4"), 1024, 512, 256

    def step(state, x):
        w, m, v, t = state
        g = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
        return w - 1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v, t

    w = abstract(mesh, (K, N), ("data", "fsdp"))
    state = (w, w, w, abstract(mesh, (), dtype=jnp.int32))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    x = abstract(mesh, (batch, K), ("data", "fsdp"))
    report = aot.compile(jitted, state, x, mesh=mesh, parameters=w)
    moments, inputs = 3 * K * N * F32 // 8, batch * K * F32 // 8
    assert moments + inputs < report.memory.arguments <= moments + inputs + 1024  # the step counter in its tile
    assert moments < report.memory.aliased <= moments + 1024
    assert report.parameters == K * N
    text = report.table()
    assert "524,288" in text
    assert "8 x TPU v5 lite, mesh data 2 x fsdp 4" in text
    assert report.verdict == f"fits: needs {report.needed / 2**20:.2f} MiB of 15.75 GiB per device"
    matmuls = 2 * 2 * (batch // 8) * K * N  # forward, and the gradient of the weight
    assert matmuls <= report.flops <= 1.2 * matmuls


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_what_is_too_large_does_not_fit(name):
    mesh = aot.mesh(aot.topology(name), {"d": -1})
    capacity = HBM_GIB[mesh.devices.flat[0].device_kind]
    gib = math.ceil(capacity) // 2 + 1  # in, and as much out
    x = abstract(mesh, (mesh.size, gib * GIB // 4096 // F32, 4096), "d")
    report = aot.compile(lambda x: x * 2, x, mesh=mesh)
    assert not report.fits
    assert report.needed == 2 * gib * GIB
    assert report.capacity == pytest.approx(capacity * GIB, abs=0.05 * GIB)  # the compiler's, and the table's
    assert report.verdict == f"does not fit: needs {2 * gib:.2f} GiB of {report.capacity / GIB:.2f} GiB per device"
    assert report.verdict in report.table()


@needs_libtpu
def test_other_compiler_errors_are_not_swallowed():
    mesh = slice_mesh("v5e:2x4")
    x = abstract(mesh, (64, 128), ("data", "fsdp"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        aot.compile(lambda x: x * 2, x, mesh=mesh, compiler_options={"xla_no_such_option": True})


@needs_libtpu
def test_the_mesh_is_ambient_and_arrays_are_still_made_on_the_cpu():
    mesh = slice_mesh("v5e:2x4")
    seen = []

    def step(x):
        seen.append(dict(jax.sharding.get_abstract_mesh().shape))
        with jax.ensure_compile_time_eval():
            seen.append(int(jnp.arange(4).sum()))
            key = jax.random.key(0)
        x = jax.lax.with_sharding_constraint(x + jax.random.normal(key, x.shape), P("data", "fsdp"))
        return jax.shard_map(lambda y: jax.lax.psum(y, "data"), in_specs=P("data"), out_specs=P())(x)

    report = aot.compile(step, abstract(mesh, (64, 128), "data"), mesh=mesh)
    assert seen == [{"data": 2, "fsdp": 4}, 6]
    assert of_kind(report, "all-reduce")
    assert jax.devices()[0].platform == "cpu"
    assert float(jnp.ones(3).sum()) == 3.0


@needs_libtpu
def test_a_function_without_shardings_on_the_mesh_is_refused():
    with pytest.raises(ValueError, match="compiled for 1 x cpu, not for the 8 devices of the mesh"):
        aot.compile(lambda x: x * 2, jax.ShapeDtypeStruct((8, 8), jnp.float32), mesh=slice_mesh("v5e:2x4"))


@needs_libtpu
def test_custom_calls_show_pallas_kernels():
    from jax.experimental import pallas as pl

    mesh = aot.mesh(aot.topology("v5e:2x2")[:1], {"d": 1})
    x = abstract(mesh, (64, 128))

    def double(x):
        body = lambda x_ref, y_ref: y_ref.__setitem__(..., 2 * x_ref[...])
        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    assert aot.custom_calls(aot.compile(double, x, mesh=mesh).hlo) == {"tpu_custom_call": 1}
    assert aot.custom_calls(aot.compile(lambda x: x * 2, x, mesh=mesh).hlo) == {}


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "axes", "sizes"),
    [
        ("v5e:2x4", {"data": -1}, (8,)),
        ("v5e:16x16", {"data": 32, "tensor": -1}, (32, 8)),
        ("v5p:4x4x4", {"data": 8, "fsdp": 8}, (8, 8)),  # splits a side of the torus
        ("v4:2x2x2", {"data": 2, "seq": 2, "tensor": 2}, (2, 2, 2)),
        ("tpu7x:2x2x1", {"data": 2, "seq": 2, "tensor": 2}, (2, 2, 2)),  # two devices a chip
    ],
)
def test_meshes(name, axes, sizes):
    mesh = aot.mesh(aot.topology(name), axes)
    assert mesh.axis_names == tuple(axes)
    assert mesh.devices.shape == sizes
    assert len(set(mesh.devices.flat)) == math.prod(sizes)


@pytest.mark.parametrize("axes", [{"d": 3}, {"d": 3, "f": -1}, {"d": -1, "f": -1}, {"d": 0}, {"d": 0, "f": -1}, {}])
def test_meshes_that_do_not_cover_the_devices_are_refused(axes):
    with pytest.raises(ValueError, match="expected sizes whose product is 8"):
        aot.mesh(jax.devices(), axes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "no chip 'v9'; expected v4, v5e, v5p, v6e, tpu7x, .*v5e:16x16"),
        ("v5litepod:2x2", "no chip 'v5litepod'"),
        ("v5e", "a v5e slice has 2 sides"),
        ("v5e:2x2x2", "a v5e slice has 2 sides"),
        ("v5p:2x2", "a v5p slice has 3 sides"),
        ("v5e:2by4", "a v5e slice has 2 sides"),
    ],
)
def test_wrong_names_say_what_is_right(name, message):
    with pytest.raises(ValueError, match=message):
        aot.topology(name)


@needs_libtpu
def test_sides_that_no_slice_has_are_the_compilers_to_refuse():
    with pytest.raises(ValueError, match=r"topology 'v5e:3x5': .*not divisible.*; expected v4, v5e"):
        aot.topology("v5e:3x5")


def test_without_libtpu_the_error_names_the_group_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="uv sync --group aot"):
        aot.topology("v5e:2x4")


def test_environment_keeps_what_is_set_and_says_when_it_is_too_late(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "here")
    monkeypatch.delenv("TPU_WORKER_ID", raising=False)
    aot.environment()
    aot.environment()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "here"
    assert os.environ["TPU_WORKER_ID"] == "0"
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: "7f00-7f01 r-xp /lib/libtpu.so\n")
    aot.environment()  # loaded, and all was set in time
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD")
    with pytest.raises(RuntimeError, match=r"before ALLOW_MULTIPLE_LIBTPU_LOAD could be set"):
        aot.environment()


def abort():
    """As the TPU compiler of some versions does on complex128."""
    print(
        "F1122 01:55:07.638826 10239 rewriter.cc:2101] Unsupported expansion to c128[8,8]",
        file=sys.stderr,
        flush=True,
    )
    print("*** Check failure stack trace: ***", file=sys.stderr, flush=True)
    os.abort()


def float64_step(name):
    jax.config.update("jax_enable_x64", True)
    mesh = slice_mesh(name)
    aot.compile(lambda x: jnp.exp(x * 1j), abstract(mesh, (8, 8), "data", dtype=jnp.float64), mesh=mesh)


def test_an_abort_is_an_error_here_with_the_last_words():
    with pytest.raises(aot.ProcessDied, match=r"abort ended its process \(SIGABRT\): F1122 .* c128\[8,8\]$"):
        aot.in_subprocess(abort, timeout=120)


@needs_libtpu
def test_float64_is_refused_before_it_reaches_the_compiler():
    with pytest.raises(TypeError, match=r"64-bit floating point; first met in: .*f64"):
        aot.in_subprocess(float64_step, "v5e:2x4", timeout=120)


@pytest.mark.full
def test_a_subprocess_returns_its_result():
    assert aot.in_subprocess(np.sum, np.arange(3.0)) == 3.0
