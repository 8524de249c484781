"""Compiling for GPUs with no GPU: what is read from the compiler's texts, what is refused, and whole programs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels import aot
from longwave.kernels.aot import gpu, ptx

needs_compiler = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))

SEQUENCE = """\
001: kCopy         [source       | next=002 (1)] kCopy
002: kWhile        [prev=001 (1) | next=006 (1)]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    004: kDynamicSliceFusion [source       | next=005 (1)] params=1, results=1
    005: kCustomKernel       [prev=004 (1) | sink        ] flash grid: [8, 2, 4] threads: [32, 4, 1]  shared_memory: 81920 bytes
006: kCustomKernel [prev=002 (1) | sink        ] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
"""  # noqa: E501

METADATA = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "command_buffer_1"
  }
  thunk_kind: "kCommandBuffer"
}
thunk_metadata {
  thunk_info {
    profile_annotation: "pallas_call.6"
    thunk_id: 5
  }
  thunk_kind: "kCustomKernel"
}
"""

PTX = """\
.version 9.0
.target sm_90a
.address_size 64
.visible .entry flash(
	.param .u64 .ptr .align 256 flash_param_0
)
.reqntid 128, 1, 1
{
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	wgmma.wait_group.sync.aligned 0;
}
.visible .entry loop_compare_fusion(
)
{
}
"""

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'flash' for 'sm_90a'
ptxas info    : Function properties for flash
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16512 bytes smem
ptxas info    : Compile time = 70.095 ms
ptxas info    : Compiling entry function 'loop_compare_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_compare_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""

HLO = """\
ENTRY %main (q: bf16[2,8], k: bf16[2,8]) -> (bf16[2,8], f32[2]) {
  %q = bf16[2,8]{1,0} parameter(0)
  %k = bf16[2,8]{1,0} parameter(1)
  ROOT %pallas_call.6 = (bf16[2,8]{1,0}, f32[2]{0}) custom-call(%q, %k, %k), custom_call_target="__gpu$xla.gpu.triton"
}
"""


def test_launches_are_found_in_loops_too():
    compare, flash, again = ptx.launches(SEQUENCE)
    assert flash == ptx.Launch(thunk=5, kernel="flash", grid=(8, 2, 4), threads=128, dynamic=81920)
    assert (compare.kernel, compare.thunk, again.thunk) == ("loop_compare_fusion", 3, 6)


def test_texts_are_joined_by_the_hlo_instruction():
    instruction = ptx.instructions(METADATA)[5]
    assert ptx.traffic(HLO)[instruction] == 3 * 2 * 8 * 2 + 2 * 4  # two operands, one of them twice, two results


def test_resources_and_tensor_core_instructions():
    assert ptx.listing(PTX) == ptx.Listing("sm_90a", {"flash": 2, "loop_compare_fusion": 0})
    assert ptx.listing("") is None
    assert ptx.resources(PTXAS) == {
        "flash": ptx.Resources(registers=255, spills=20, shared=16512, barriers=1),
        "loop_compare_fusion": ptx.Resources(registers=10, spills=0, shared=0, barriers=0),
    }


@pytest.mark.parametrize(
    ("read", "text", "damage", "says"),
    [
        (ptx.launches, SEQUENCE, ("shared_memory: 81920 bytes", "smem: 80 KiB"), "of 3 launches .* 2 have the form"),
        (ptx.launches, SEQUENCE, (": k", "> k"), "of 0 launches"),
        (ptx.instructions, METADATA, ("thunk_id", "id"), "no profile_annotation with a thunk_id"),
        (ptx.listing, PTX, (".target", ".arch"), "no .target in the PTX of flash, loop_compare_fusion"),
        (ptx.resources, PTXAS, ("Used 10 registers", "10 regs"), "does not say .*registers.* of loop_compare_fusion"),
        (ptx.resources, PTXAS, ("spill loads", "reloads"), "does not say .*spill loads.* of flash"),
    ],
)
def test_another_form_is_an_error_that_says_what_was_expected(read, text, damage, says):
    with pytest.raises(ptx.DumpFormatError, match=says):
        read(text.replace(*damage))


KERNEL = gpu.Kernel("k", 1, (8, 1, 1), 128, registers=255, spills=0, shared=0, barriers=0, tensor=0, bytes=3352)


@pytest.mark.parametrize(
    ("how", "blocks"),
    [
        ({}, 2),  # 256 registers a thread
        ({"registers": 128}, 4),
        ({"registers": 16}, 16),  # of 2,048 threads
        ({"registers": 16, "threads": 32}, 32),  # no more in any case
        ({"registers": 128, "shared": 98_304}, 2),
        ({"registers": 16, "shared": 232_448}, 1),
    ],
)
def test_blocks_of_a_multiprocessor(how, blocks):
    """As NVIDIA's occupancy calculator has it for capability 9.0."""
    assert dataclasses.replace(KERNEL, **how).blocks(gpu.H100) == blocks


def test_floor_is_bytes_over_bandwidth():
    assert KERNEL.floor(gpu.H100) == pytest.approx(1e-9)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "_installed", lambda module: False)
    assert "jax-cuda13-plugin" in gpu.missing()
    with pytest.raises(ModuleNotFoundError, match="uv sync --group aot-gpu"):
        gpu.topology()
    monkeypatch.setattr(gpu, "_installed", lambda module: module.startswith("jax_plugins"))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "nvidia-cuda-nvcc" in gpu.missing()


def programs():
    """A loop of matmuls and an addition on one chip, and one step of gradient descent on eight."""
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    loop = lambda a, b: jax.lax.scan(lambda a, _: (jnp.tanh(a @ b), None), a, None, length=5)[0]
    add = lambda a, b: a + b

    def sgd(w, x):
        gradient = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - 0.1 * gradient

    mesh = aot.mesh(gpu.topology(8), {"data": 4, "fsdp": 2})
    abstract = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    step = jax.jit(sgd, donate_argnums=0, out_shardings=NamedSharding(mesh, P("fsdp")))
    w, batch = abstract((512, 256), "fsdp"), abstract((1024, 512), ("data", "fsdp"))
    return gpu.compile(loop, x, x), gpu.compile(add, x, x), gpu.compile(step, w, batch, mesh=mesh)


@needs_compiler
@pytest.mark.full
def test_programs_of_one_and_of_eight_chips():
    one, add, eight = aot.in_subprocess(programs)
    matmul = max(one.kernels, key=lambda kernel: kernel.tensor)
    assert matmul.tensor > 0
    assert matmul.spills == 0
    assert matmul.launches == 1
    (sums,) = add.kernels
    assert (sums.bytes, sums.tensor, sums.spills) == (3 * 512 * 512 * 2, 0, 0)
    assert "static estimates for NVIDIA H100" in one.table()
    assert one[matmul.name] is matmul
    with pytest.raises(KeyError, match="no kernel 'none'; there are"):
        one["none"]

    assert eight.report.devices == 8
    kinds = {c.kind: c for c in eight.report.collectives}
    assert kinds["all-gather"].operands[0].dims == (256, 256)  # the weight, and never the activations
    assert kinds.keys() & {"all-reduce", "reduce-scatter"}
    assert eight.report.memory.arguments == 512 * 256 * 4 // 2 + 1024 * 512 * 4 // 8
    assert eight.report.memory.aliased == 512 * 256 * 4 // 2
