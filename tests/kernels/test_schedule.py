"""Reading the compiler's schedules: what stored samples hold, and that a damaged one is refused by name."""

import re

import pytest

from longwave.kernels.aot.schedule import UNITS, ScheduleFormatError, parse
from tests.kernels.estimated import FOLDER, SAMPLES, sample


def count(pattern, text):
    return len(re.findall(pattern, text, re.MULTILINE))


@pytest.fixture(params=sorted(SAMPLES))
def texts(request):
    return sample(request.param)


def test_everything_that_is_listed_is_read(texts):
    bundles, use = texts
    schedule = parse(bundles, use)
    rows = [line.split() for line in use.splitlines() if re.fullmatch(r"[\d ]+", line)]
    assert schedule.capacity.tolist() == [int(n) for n in rows[0]]
    assert schedule.use.tolist() == [[int(n) for n in row] for row in rows[1:]]
    assert schedule.bundles == len(rows) - 1 == count(r"^ *(0x[0-9a-f]+|0) .*: .*\{", bundles)
    assert sum(schedule.matmuls["bf16"]) == count(r" = vmatmul", bundles) > 0
    assert sum(schedule.matmuls["f32"]) == 0
    assert (schedule.matmuls["bf16"] <= schedule.capacity[0]).all()
    branches = count(r"= sbr\.rel", bundles)
    assert len(list(schedule.root.tree())) == 1 + branches  # in these samples no branch jumps over nothing
    assert [schedule.bundles, "kernel"] == [schedule.root.end, schedule.root.kind]


# Regions as the listings show them, read by eye: a line each, the region's own matmuls last.
TREES = {
    "matmul_v5e": """
        kernel 0x0 0x168 8
          loop 0x10 0x162 8
            stage 0x44 0x14c 8
              predicated 0x56 0x67 0
              predicated 0x128 0x133 0""",
    "causal_v6e": """
        kernel 0x0 0x4bd 8
          loop 0x10 0x4b7 8
            stage 0x6c 0x49d 8
              predicated 0x8a 0xa3 0
              predicated 0xb1 0x3c4 8
              predicated 0x3d1 0x47f 0""",
    "walk_v5e": """
        kernel 0x0 0x212 16
          loop 0xe 0x20d 16
            stage 0x42 0x1fd 16
              predicated 0x56 0x115 8
              predicated 0x122 0x1e5 8
                loop 0x122 0x1e5 8""",
}


@pytest.mark.parametrize("name", TREES)
def test_regions_are_those_of_the_listing(name):
    schedule = parse(*sample(name))

    def lines(region, depth):
        kind = "stage" if region.stage else region.kind
        yield f"{'  ' * depth}{kind} {region.start:#x} {region.end:#x} {schedule.matmul_count(region)}"
        for child in region.children:
            yield from lines(child, depth + 1)

    assert list(lines(schedule.root, 0)) == [line[8:] for line in TREES[name].splitlines()[1:]]
    assert schedule.grid is schedule.root.children[0]


@pytest.mark.parametrize(
    ("name", "steps"), [("matmul_v5e", 8), ("matmul_v6e", 8), ("causal_v5e", 128), ("walk_v6e", 8)]
)
def test_the_grids_loop_runs_its_steps_and_fills_and_drains(name, steps):
    assert parse(*sample(name)).iterations == steps + 2


def swap(*pairs):
    """Replaces texts, a pair each."""

    def damage(text):
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        return text

    return damage


BUNDLES = {
    "nothing": (lambda text: "", "bundles such as"),
    "another file": (lambda text: sample("matmul_v5e")[1], "bundles such as"),
    "a bundle is missing": (lambda text: re.sub(r"\n  0x4c .*", "", text), "bundle 0x4c.*consecutive.*0x4d"),
    "the end is missing": (lambda text: text[: text.rindex("= vsyncpa")], "bundle .*closing brace"),
    "the tail is missing": (lambda text: text[: text.index("\n 0x163")], "rows.*355 bundles.*found 360"),
    "branches say no target": (swap(("target bundleno", "to")), "target bundleno = N"),
    "branches are called otherwise": (swap(("sbr.rel", "jump")), "labels LB"),
    "a way into functions": (swap(("= vsyncpa [#allocation4], 0", "= scall")), "scall"),
    "targets are far away": (swap(("bundleno = 332", "bundleno = 33200")), "within the 360"),
    "regions cross": (swap(("bundleno = 103", "bundleno = 340"), ("0x67 PF", "0x67   ")), "ends within"),
    "labels are elsewhere": (swap(("0x67 PF:", "0x67   :"), ("0x68  ", "0x68 PF")), "labels PF"),
    "an unknown matmul": (swap(("vmatmul.bf16.gmra", "vmatmul.f8e4m3.gmra")), "vmatmul of bf16 or f32"),
    "the pipeline's test": (swap((", 9 ", ", 7 ")), "pipeline's own test"),
    "the number of steps": (swap((", 10 /* loop exit", ", %s9 /* loop exit")), "number of steps"),
    "two grids": (
        swap(("0x68   : > {", "0x68   : > { %s9 = sphi /* iteration index, stage = 0 */ ;;")),
        "one outermost",
    ),
}
USE = {
    "nothing": (lambda text: "", "units, their capacity"),
    "a row is missing": (lambda text: text[: text.rstrip().rindex("\n")], "one for each of the 360 bundles.*found 359"),
    "a row too many": (lambda text: text.rstrip() + "\n0 0 0 0 0 0 0 0 0 0\n", "found 361"),
    "a unit is called otherwise": (swap(("EUP", "TRANSCENDENTAL")), "line 2.*EUP"),
    "a unit more": (swap(("SALU", "SALU, XYZ")), "line 2"),
    "a short row": (lambda text: text.rstrip()[:-2], "row .*10 numbers"),
    "no numbers": (swap(("4     3", "four  3")), "whole numbers"),
    "more than there are": (swap(("4     3     4", "4     3     1")), "slots"),
}


@pytest.mark.parametrize("damage", BUNDLES)
def test_damaged_bundles_are_refused(damage):
    bundles, use = sample("matmul_v5e")
    damaged, says = BUNDLES[damage][0](bundles), BUNDLES[damage][1]
    assert damaged != bundles
    with pytest.raises(ScheduleFormatError, match=rf"(?s){says}.*libtpu"):
        parse(damaged, use)


@pytest.mark.parametrize("damage", USE)
def test_damaged_utilisation_is_refused(damage):
    bundles, use = sample("matmul_v5e")
    damaged, says = USE[damage][0](use), USE[damage][1]
    assert damaged != use
    with pytest.raises(ScheduleFormatError, match=rf"(?s)utilization.*{says}.*libtpu"):
        parse(bundles, damaged)


def test_files_of_two_kernels_do_not_belong_together():
    with pytest.raises(ScheduleFormatError, match="one for each of the 360 bundles"):
        parse(sample("matmul_v5e")[0], sample("matmul_v6e")[1])


def test_use_follows_the_instructions():
    """The units of a bundle are those that its instructions need, in the listing's own words."""
    bundles, use = sample("causal_v5e")
    schedule = parse(bundles, use)
    spills = schedule.use[:, UNITS.index("VSTORE:SPILL")]
    assert spills.sum() == count(r"= vst \[vmem:\[#\w+_spill\]", bundles)
    fills = schedule.use[:, UNITS.index("VLOAD:FILL")]
    assert fills.sum() == count(r"= vld \[vmem:\[#\w+_spill\]", bundles)
    powers = count(r"= vpow2\.f32|= vrcp\.f32", bundles)
    assert schedule.use[:, UNITS.index("EUP")].sum() == powers > 0


def test_samples_are_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 200_000
