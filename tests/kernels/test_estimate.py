"""Static estimates: weighing a schedule, and the published times that the model must give back."""

import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels import aot
from longwave.kernels.aot import pipeline
from longwave.kernels.aot.schedule import UNITS, Region, Schedule, parse
from longwave.kernels.aot.timing import weigh
from tests.kernels import estimated
from tests.kernels.estimated import MEASURED, TABLE, causal_case, matmul_case, sample, square, walk_case

needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
V5E, V5P, V6E = aot.CHIPS["v5e"], aot.CHIPS["v5p"], aot.CHIPS["v6e"]
abstract = jax.ShapeDtypeStruct
SQUARE = abstract((128, 128), jnp.float32)


def kernel(grid, parallel=False, **more):
    return pipeline.Kernel("k", grid, parallel, **{"bytes": 0, "exact": True, "vmem": 0} | more)


def schedule(root, iterations=10, matmuls=(), use=()):
    """Of 100 bundles, with `matmuls` (bundle, count) of bf16 and `use` (bundle, unit, slots)."""
    table, count = np.zeros((100, len(UNITS)), int), np.zeros(100, int)
    for bundle, number in matmuls:
        count[bundle] = number
    for bundle, unit, slots in use:
        table[bundle, UNITS.index(unit)] = slots
    capacity = np.array([4, 3, 4, 2, 1, 3, 3, 1, 1, 2])
    return Schedule(table, capacity, {"bf16": count, "f32": 0 * count}, root, root.children[0], iterations)


def region(kind, start, end, *children, stage=False):
    return Region(kind, start, end, children, stage)


# The loop over the grid with the body [20, 90): start up [22, 30), a guard [30, 80) around a region with matmuls
# [40, 50), one with a loop [60, 70), and the end [82, 88).
NESTED = region("kernel", 0, 100,
    region("loop", 10, 100,
        region("predicated", 20, 90,
            region("predicated", 22, 30),
            region("predicated", 30, 80,
                region("predicated", 40, 50),
                region("predicated", 55, 75, region("loop", 60, 70)),
            ),
            region("predicated", 82, 88),
            stage=True,
        ),
    ),
)  # fmt: skip


def test_every_region_counts_as_often_as_it_runs():
    built = schedule(
        NESTED,
        matmuls=[(45, 4), (65, 2)],
        use=[(5, "EUP", 1), (12, "VALU", 2), (25, "VSTORE:SPILL", 1), (45, "VALU", 4), (65, "VALU", 4), (85, "EUP", 1)],
    )
    launch = aot.Launch(steps=8, regions=(0.25, 0.5), trips=(3,), flops=1e6)
    estimate = weigh(built, kernel((2, 4), bytes=820, vmem=7), launch, V5E)
    # the loop's own 20, the body's own 6, two ends once in 4 steps, the guard's own 20 at 0.75, the two, a loop thrice
    bundles = 20 + 6 + (8 + 6) / 4 + 20 * 0.75 + 10 * 0.25 + 10 * 0.5 + 10 * 0.5 * 3
    assert estimate.bundles == pytest.approx(bundles)
    assert estimate.mxu == pytest.approx((4 * 0.25 + 2 * 0.5 * 3) * 16 / 4 / bundles)
    assert estimate.valu == pytest.approx((2 + 4 * 0.25 + 4 * 0.5 * 3) / 4 / bundles)
    assert estimate.eup == pytest.approx(1 / 4 / bundles)  # what lies before the loop does not count
    assert estimate.spills == pytest.approx(1 / 4)
    assert estimate.compute == pytest.approx(8 * bundles / 1.5e9)
    assert (estimate.dma, estimate.bytes, estimate.vmem, estimate.code) == (pytest.approx(1e-9), 820, 7, 100)
    assert estimate.time == pytest.approx(8 * bundles / 1.5e9 + 8 * 0.154e-6)
    assert estimate.peak == pytest.approx(1e6 / estimate.time / 196.608e12)
    assert estimate.bound == "compute"


def test_memory_binds_where_it_takes_longer():
    estimate = weigh(
        schedule(NESTED, matmuls=[(45, 4), (65, 2)]),
        kernel((8,), bytes=10**6),
        aot.Launch(steps=8, regions=(1, 1), trips=(1,), bytes=10**9),
        V6E,
    )
    assert (estimate.bytes, estimate.bytes_exact) == (10**9 + 10**6, True)
    assert estimate.time == estimate.dma == pytest.approx(1.001e9 / 1.64e12)
    assert estimate.bound == "memory"


def test_a_launch_may_say_how_often_a_walk_begins():
    built, launch = schedule(NESTED, matmuls=[(45, 4), (65, 2)]), aot.Launch(8, regions=(0.0, 0.0), trips=(3,))
    rare = weigh(built, kernel((8,)), aot.Launch(8, regions=(0.0, 0.0), trips=(3,), ends=0.5), V5E)
    assert rare.bundles == pytest.approx(26 + 14 / 2)
    assert weigh(built, kernel((8,)), launch, V5E).bundles == pytest.approx(26 + 14 / 8)


def test_two_cores_share_parallel_steps():
    built = schedule(NESTED, iterations=6, matmuls=[(45, 4), (65, 2)])
    launch = aot.Launch(steps=8, regions=(1, 1), trips=(1,))
    estimate = weigh(built, kernel((2, 4), parallel=True), launch, V5P)
    assert estimate.compute == pytest.approx(4 * estimate.bundles / 1.75e9)
    with pytest.raises(aot.LaunchError, match=r"8 steps on 1 cores.* runs 6 times"):
        weigh(built, kernel((2, 4)), launch, V5P)


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        (aot.Launch(8, regions=(1,), trips=(1,)), r"has 2 innermost.*0x28 to 0x32 \(4 .*regions names 1: \(1,\)"),
        (aot.Launch(8, regions=(1, 1, 1), trips=(1,)), "has 2 innermost.*regions names 3"),
        (aot.Launch(8, regions=(1, 1)), "has 1 loops inside a step.*0x3c to 0x46.*trips names 0"),
        (aot.Launch(9, regions=(1, 1), trips=(1,)), r"steps is 9, its grid is \(2, 4\)"),
    ],
)
def test_a_launch_that_does_not_fit_the_schedule_is_refused(launch, says):
    with pytest.raises(aot.LaunchError, match=f"kernel k: .*{says}"):
        weigh(schedule(NESTED, matmuls=[(45, 4), (65, 2)]), kernel((2, 4)), launch, V5E)


def test_a_compiled_loop_of_other_steps_is_refused():
    with pytest.raises(aot.LaunchError, match="16 steps on 1 cores, but the compiled loop runs 10 times"):
        weigh(parse(*sample("matmul_v5e")), kernel((2, 2, 4)), aot.Launch(16), V5E)


def test_a_grid_that_is_not_annotated_is_not_passed_over():
    bundles, use = sample("matmul_v5e")
    silent = parse(bundles.replace("iteration index, stage = 0", ""), use)
    with pytest.raises(aot.LaunchError, match="has 1 innermost"):
        weigh(silent, kernel((2, 2, 2)), aot.Launch(8), V5E)


@pytest.mark.parametrize(("chip", "flops"), [(V5E, 196.6e12), (V5P, 458.8e12), (V6E, 917.5e12)])
def test_a_chips_peak_is_the_published_one(chip, flops):
    assert chip.peak == pytest.approx(flops, rel=1e-3)


# What needs the compiler, all in one process.
def gradient_case(launches):
    x = abstract((128, 128), jnp.float32)
    return aot.Case("gradient", "v5e", jax.grad(lambda x: (square(x) ** 2).sum()), (x,), launches)


def hoard(x):
    """Asks for 256 MiB of VMEM."""
    scratch = [pltpu.VMEM((1 << 19, 128), jnp.float32)]
    return pl.pallas_call(lambda x_ref, o_ref, s: None, out_shape=x, scratch_shapes=scratch, name="hoard")(x)


def abort(x):
    import os

    os.abort()


def twice(x):
    """Of two kernels that are the same the compiler writes one."""
    return estimated.matmul(x, x, blocks=(128, 128, 128)), estimated.matmul(x + 1, x, blocks=(128, 128, 128))


def twice_case():
    launches = {"matmul": aot.Launch(8)}
    return aot.Case("twice", "v5e", twice, (abstract((256, 256), jnp.bfloat16),), launches)


CASES = {
    "twice": twice_case,
    "one core": lambda: aot.Case("one", "v5p", square, (SQUARE,), {"forward": aot.Launch(1)}),
    "small blocks": lambda: matmul_case("v5e", (128, 128, 128), 1024),
    "large blocks": lambda: matmul_case("v5e", (512, 1024, 1024), 4096),
    "v5p": lambda: matmul_case("v5p", (256, 256, 256), 512),
    "v6e": lambda: matmul_case("v6e", (256, 256, 256), 512),
    "walk": lambda: walk_case("v6e"),
    "causal": lambda: causal_case("v5p"),
    "gradient": lambda: gradient_case({"forward": aot.Launch(1), "backward": aot.Launch(1)}),
    "one is not named": lambda: gradient_case({"backward": aot.Launch(1)}),
    "abort": lambda: aot.Case("aborts", "v5e", abort, (SQUARE,), {}),
    "one too many": lambda: gradient_case(
        {"forward": aot.Launch(1), "backward": aot.Launch(1), "third": aot.Launch(1)}
    ),
    "regions": lambda: matmul_case("v5e", (128, 128, 128), 256, regions=(0.5,)),
    "too large": lambda: aot.Case("hoards", "v5e", hoard, (SQUARE,), {"hoard": aot.Launch(1)}),
}


def build():
    return [case() for case in CASES.values()]


def everything_measured():
    return [matmul_case("v5e", *key) for key in MEASURED]


def peers():
    """jax's two attention kernels at blocks of 512: of 8 heads, 4,096 tokens, width 128."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    heads, length, block = 8, 4096, 512
    n = length // block
    launch = aot.Launch(heads * n * n, regions=((n + 1) / 2 / n,), flops=2 * heads * length**2 * 128)
    q = (abstract((1, heads, length, 128), jnp.bfloat16),) * 3
    sizes = flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
    first = partial(flash.flash_attention, causal=True, block_sizes=sizes)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    sizes = splash_attention_kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
    second = jax.vmap(splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))
    return [
        case
        for chip in ("v5e", "v5p", "v6e")
        for case in (
            aot.Case("flash", chip, first, q, {"flash_attention": launch}),
            aot.Case("splash", chip, second, q, {"splash_mha_fwd_no_residuals": launch}),
        )
    ]


@pytest.fixture(scope="module")
def outcomes():
    return dict(zip(CASES, aot.estimates(build, return_errors=True), strict=True))


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "key"), [("small blocks", ((128,) * 3, 1024)), ("large blocks", ((512, 1024, 1024), 4096))]
)
def test_published_times_are_given_back(outcomes, name, key):
    (estimate,) = outcomes[name]
    assert estimate.time + aot.DISPATCH == pytest.approx(MEASURED[key], rel=0.05)


@needs_libtpu
def test_small_blocks_are_far_worse(outcomes):
    (small,), (large,) = outcomes["small blocks"], outcomes["large blocks"]
    assert small.peak < 0.1 * large.peak
    assert large.peak > 0.85


@needs_libtpu
@pytest.mark.parametrize("name", ["small blocks", "large blocks", "v5p", "v6e"])
def test_the_matrix_units_do_the_useful_work_and_no_more(outcomes, name):
    """Whole blocks fill the square of a matrix unit: its busy cycles are the FLOPs over what the chip can do."""
    (estimate,) = outcomes[name]
    chip = aot.CHIPS[estimate.chip]
    assert estimate.mxu * estimate.compute * chip.peak == pytest.approx(estimate.flops, rel=1e-6)


@needs_libtpu
def test_two_cores_take_half_the_steps_each(outcomes):
    (estimate,) = outcomes["causal"]
    assert estimate.compute == pytest.approx(64 * estimate.bundles / V5P.clock)
    assert estimate.bytes_exact


@needs_libtpu
def test_a_kernel_that_is_called_twice_counts_twice(outcomes):
    first, second = outcomes["twice"]
    assert first == second


@needs_libtpu
def test_a_kernel_without_parallel_axes_runs_on_one_core(outcomes):
    (estimate,) = outcomes["one core"]
    assert estimate.compute == pytest.approx(estimate.bundles / V5P.clock)


@needs_libtpu
def test_a_walk_moves_what_its_table_says(outcomes):
    (estimate,) = outcomes["walk"]
    changes = 1 + np.count_nonzero(np.diff(TABLE[0]))
    assert estimate.bytes == changes * 128 * 128 * (2 + 4) + 128 * 128 * 2 + TABLE.nbytes
    assert estimate.bytes_exact


@needs_libtpu
def test_kernels_of_a_gradient_go_by_their_names(outcomes):
    assert [(e.kernel, e.steps, e.chip) for e in outcomes["gradient"]] == [
        ("forward", 1, "v5e"),
        ("backward", 1, "v5e"),
    ]


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one is not named", "gradient on v5e: LaunchError: kernel forward has no Launch; there is one for: backward"),
        ("one too many", "LaunchError: no kernel third was compiled, only ['forward', 'backward']"),
        ("regions", "LaunchError: kernel matmul: its schedule has 0 innermost predicated regions"),
        ("too large", "hoards on v5e: JaxRuntimeError: RESOURCE_EXHAUSTED: Allocation (size=268435456)"),
        ("abort", "case aborts: _estimate_all ended its process (SIGABRT)"),
    ],
)
def test_a_case_that_fails_says_why_and_leaves_the_others_theirs(outcomes, name, says):
    assert isinstance(outcomes[name], aot.CaseError)
    assert says in str(outcomes[name])


def failing():
    return [CASES["regions"]()]


@pytest.mark.full
@needs_libtpu
def test_a_case_that_fails_raises_unless_asked_for():
    with pytest.raises(aot.CaseError, match="of 256 on v5e"):
        aot.estimates(failing)


def test_what_cannot_be_imported_is_refused():
    build = lambda: []
    build.__module__ = "__main__"
    with pytest.raises(ValueError, match="importable module"):
        aot.estimates(build)


@pytest.mark.full
@needs_libtpu
def test_all_published_times_are_given_back():
    for (key, seconds), (estimate,) in zip(MEASURED.items(), aot.estimates(everything_measured), strict=True):
        assert estimate.time + aot.DISPATCH == pytest.approx(seconds, rel=0.05), key


@pytest.mark.full
@pytest.mark.large
@needs_libtpu
def test_other_peoples_kernels_can_be_estimated():
    """Of peak, in per cent: what another reading of the same compiler's schedules gave."""
    peaks = [100 * estimate.peak for (estimate,) in aot.estimates(peers)]
    assert peaks == pytest.approx([42.5, 37.8, 31.9, 27.9, 12.0, 10.4], abs=1)


def test_an_interrupted_compiler_is_not_started_again(monkeypatch):
    """Ctrl-C reaches the compiler's process too: its end is no verdict on a case."""
    started = []

    def interrupted(*args, **how):
        started.append(args)
        Path(args[1], f"{args[2]}.name").write_text("a case")
        raise aot.ProcessDied("it ended its process (SIGINT)", -signal.SIGINT)

    monkeypatch.setattr("longwave.kernels.aot.estimate.in_subprocess", interrupted)
    with pytest.raises(aot.ProcessDied, match="SIGINT"):
        aot.estimates(peers, return_errors=True)
    assert len(started) == 1
