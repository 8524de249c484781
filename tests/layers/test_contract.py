"""The contract suite: every mixer of the list keeps it; a seeded fault is found by what it breaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave import layers
from longwave.layers import contract
from longwave.layers.contract_forms import crossing
from longwave.layers.contract_gaps import gap
from longwave.layers.mixer import Mixer, Out
from tests import tolerances
from tests.layers.contract_cases import FORMS, LINEAR_FAMILY, MIXERS
from tests.layers.toy_mixers import ChunkMemory, Leaky, Smoother


def broken(checks):
    return {check.name for check in checks if not check.passed}


# In the long group: their operations have tests of their own.
LATER = (
    "LRU",
    "LSSL",
    "LMU",
    "SGConv",
    "Mamba2",
    "MemMamba",
    "MLSTM",
    "SLSTM",
    "RGLRU",
    "ELM",
    "RAT",
    "Based",
    "MoM",
    *LINEAR_FAMILY,
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in LATER)) for n in MIXERS])
def test_every_mixer_keeps_the_contract(name):
    checks = contract.examine(MIXERS[name])
    assert not broken(checks), contract.certificate(checks, name)


LONGEST = (
    "LMU memories",
    "MLSTM sigmoid gates, dense, biases",
    "LSSL fixed",
    "LSSL LegT",
    "SGConv short",
    "Mamba norms and biases",
)  # tested elsewhere too


def form_marks(name):
    """S4's forms with channels compile for half a minute each."""
    large = (name.startswith("S4 ") and "channels" in name) or name.startswith(("MemMamba", "MoM")) or name in LONGEST
    return [pytest.mark.full, *([pytest.mark.large] if large else [])]


@pytest.mark.parametrize("name", [pytest.param(n, marks=form_marks(n)) for n in FORMS])
def test_every_form_keeps_the_contract(name):
    loose = contract.Tolerances(gradient=tolerances.UNDAMPED_GRADIENT["float32"])
    checks = contract.examine(FORMS[name], tolerances=loose if "FouT" in name else contract.Tolerances())
    assert not broken(checks), contract.certificate(checks, name)


LONG = ("Attention",)  # and the others where there is time


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.large] * (n not in LONG)) for n in MIXERS])
def test_every_mixer_keeps_the_contract_in_its_long_form(name):
    checks = contract.examine(MIXERS[name], contract.LONG)
    assert not broken(checks), contract.certificate(checks, name)


def test_the_library_and_the_tests_have_the_same_tolerances():
    assert contract.Tolerances().forward == tolerances.FORWARD["float32"]
    assert contract.Tolerances().gradient == tolerances.GRADIENT["float32"]
    assert contract.Tolerances().bfloat16 == tolerances.BFLOAT16_FACTOR


def test_what_is_not_claimed_is_skipped_with_the_reason():
    class Nothing(Smoother):
        supports = frozenset()

        def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
            if ctx.reset is not None:
                raise layers.mixer.Unsupported(self, "reset", "it is a test")
            return super().__call__(x, carry, ctx)

    checks = {check.name: check for check in contract.examine(Nothing)}
    assert not broken(checks.values())
    skipped = {name: check.skipped for name, check in checks.items() if check.skipped}
    assert set(skipped) == {"causality", "chunks", "steps", "gradients", "start", "reset", "packing"}
    assert skipped["packing"] == "does not claim 'reset'"


# Faults: each breaks one promise of an honest mixer.


class ReadsNextToken(Leaky):
    def inputs(self, x, valid):
        x = super().inputs(x, valid)
        return x + 1e-3 * jnp.roll(x, -1, axis=1)


class ReadsNextTokenInTraining(Leaky):
    def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
        out = super().__call__(x, carry, ctx)
        if ctx.key is None:
            return out
        return out._replace(y=out.y + jax.random.bernoulli(ctx.key, shape=x.shape) * jnp.roll(x, -1, axis=1))


class ForgetsBetweenChunks(ChunkMemory):
    def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
        y, carry, aux = super().__call__(x, carry, ctx)
        return Out(y, {**carry, "open": jnp.zeros_like(carry["open"])}, aux)


class ForgetsAtSteps(Leaky):
    def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
        return super().__call__(x, jax.tree.map(jnp.zeros_like, carry) if x.shape[1] == 1 else carry, ctx)


class StopsGradientAtTheCarry(Leaky):
    def mix(self, *args):
        h, hs = super().mix(*args)
        return jax.lax.stop_gradient(h), hs


class StartsElsewhere(Leaky):
    def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
        return super().__call__(x, self.init_carry(x.shape[0]) + 1 if carry is None else carry, ctx)


class ResetCutsItsOwnInput(Leaky):
    def step(self, h, inputs):
        a, u, reset, valid = inputs
        return super().step(h, (a, jnp.where(reset[:, None], 0, u), reset, valid))


class ResetLeaks(Leaky):
    def step(self, h, inputs):
        a, u, reset, valid = inputs
        return super().step(h, (a, u + 1e-3 * a * h * reset[:, None], reset, valid))


class ResetsOnlyAtTheStart(Leaky):
    def mix(self, x, h0, reset, valid):
        return super().mix(x, h0, reset & (jnp.arange(x.shape[1]) == 0)[None, :], valid)


class PaddingDecaysTheState(Leaky):
    def write(self, h, new, valid):
        return new, new


class PaddingWrites(PaddingDecaysTheState):
    def inputs(self, x, valid):
        return x


class PaddingHasOutputs(Leaky):
    def outputs(self, h, x, valid):
        return super().outputs(h, x, jnp.ones_like(valid))


class GarbageLeaks(Leaky):
    def inputs(self, x, valid):
        return x * valid[..., None]  # NaN * 0 is NaN


class MixesRows(Leaky):
    def inputs(self, x, valid):
        x = super().inputs(x, valid)
        return x + 0.1 * jnp.mean(x, axis=0, keepdims=True)


class CarryChangesItsType(Leaky):
    def mix(self, *args):
        h, hs = super().mix(*args)
        return h.astype(jnp.float16), hs


class OutputInAnotherType(Leaky):
    def outputs(self, *args):
        return super().outputs(*args).astype(jnp.float32)


class GradientIsNotFinite(Leaky):
    def outputs(self, h, x, valid):
        return super().outputs(h, x + jnp.sqrt(jnp.abs(x)), valid)


class RoundsItsState(Leaky):
    def outputs(self, h, x, valid):
        return super().outputs(h.astype(jnp.float8_e4m3fn) if x.dtype == jnp.bfloat16 else h, x, valid)


class HasAMoodOfItsOwn(Leaky):
    def outputs(self, *args):
        noise = lambda: np.float32(1e-6 * np.random.default_rng().normal())
        mood = jax.pure_callback(noise, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")
        y = super().outputs(*args)
        return y * (1 + mood).astype(y.dtype)


class GathersTheBatch(Leaky):
    def outputs(self, h, x, valid):
        if jax.sharding.get_abstract_mesh().shape:
            h = jax.lax.with_sharding_constraint(h, jax.sharding.PartitionSpec())
        return super().outputs(h, x, valid)


class RoleIsMissing(Leaky):
    roles = {"B": "B", "C": "C", "D": "D"}


class KeepsWhatIsNotThere(Leaky):
    keep_float32 = frozenset({"A_log"})


class AcceptsWhatItDoesNotClaim(Leaky):
    supports = frozenset({"causal", "carry"})


class ClaimsWhatItRefuses(Leaky):
    def __call__(self, x, carry=None, ctx=layers.mixer.Context()):
        if ctx.reset is not None:
            raise NotImplementedError("resets")
        return super().__call__(x, carry, ctx)


class CarryIsWeaklyTyped(Leaky):
    def init_carry(self, batch, *, capacity=None):
        return jnp.full((batch, self.width), 0.0)


class BuildsDiffer(Leaky):
    def __init__(self, width, *, rngs):
        super().__init__(width, rngs=rngs)
        self.activation = lambda x: x


FAULTS = {
    ReadsNextToken: {"causality"},
    StopsGradientAtTheCarry: {"gradients"},
    ResetCutsItsOwnInput: {"reset"},
    ResetLeaks: {"reset"},
    PaddingDecaysTheState: {"padding"},
    PaddingWrites: {"padding"},
    GarbageLeaks: {"garbage"},
    MixesRows: {"rows"},
    CarryChangesItsType: {"types"},
    GradientIsNotFinite: {"finite"},
    GathersTheBatch: {"sharding"},
    RoleIsMissing: {"roles"},
    AcceptsWhatItDoesNotClaim: {"supports"},
}
MORE_FAULTS = {  # kept from the default suite by its time alone
    ReadsNextTokenInTraining: {"causality"},
    ForgetsBetweenChunks: {"chunks", "steps"},
    ForgetsAtSteps: {"chunks", "steps"},
    StartsElsewhere: {"start"},
    ResetsOnlyAtTheStart: {"packing"},
    PaddingHasOutputs: {"padding"},
    OutputInAnotherType: {"types"},
    RoundsItsState: {"bfloat16"},
    HasAMoodOfItsOwn: {"repeatable"},
    KeepsWhatIsNotThere: {"roles"},
    ClaimsWhatItRefuses: {"supports"},
    CarryIsWeaklyTyped: {"compilation"},
    BuildsDiffer: {"compilation"},
}


@pytest.mark.parametrize(
    ("fault", "promises"),
    [*FAULTS.items(), *(pytest.param(*item, marks=pytest.mark.full) for item in MORE_FAULTS.items())],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found_by_the_promise_it_breaks(fault, promises):
    checks = contract.examine(fault)
    assert broken(checks) == promises, contract.certificate(checks, fault.__name__)


def test_the_certificate_says_what_differs_and_where():
    checks = contract.examine(ReadsNextToken)
    text = contract.certificate(checks, "A leak")
    assert text.startswith("A leak\n")
    assert "| ✗ | causality" in text
    assert "tokens from time 1 on changed, y: first at time 0, row 0" in text
    assert "rests on 'causality', which fails" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert len(lines) == len(contract.PROMISES) + 2


def test_hyper_parameters_come_by_partial():
    class Scaled(Leaky):
        def __init__(self, width, *, gain, rngs):
            super().__init__(width, rngs=rngs)
            assert gain == 8

    checks = contract.examine(functools.partial(Scaled, gain=8), contract.Settings(width=2, length=5, piece=2))
    assert not broken(checks), contract.certificate(checks)


@pytest.mark.parametrize(("field", "value"), [("piece", 24), ("piece", 1), ("batch", 1), ("width", 0)])
def test_settings_name_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        contract.Settings(**{field: value})


def test_a_mixer_without_a_call_fails_with_its_own_words():
    checks = contract.examine(lambda width, *, rngs: Mixer())
    assert "defines no __call__" in next(check.detail for check in checks if check.name == "supports")


def test_gap_tells_where():
    want = np.zeros((2, 4, 3))
    got = want.copy()
    got[1, 2, 0], got[0, 3, 1], want[0, 0, 0] = 0.5, 0.5, 1
    got[0, 0, 0] = 1
    assert gap("y", got, want, 0.1).detail == "first at time 2, row 1: 0.5, expected 0"
    assert gap("y", np.where(got == 0.5, np.nan, got), want, 0.1).error == np.inf
    assert gap("y", got[:1], want, 0.1).detail == "shape (1, 4, 3), expected (2, 4, 3)"
    assert gap("y", got, want, 0.6).holds


@pytest.mark.parametrize(
    ("groups", "crosses"),
    [
        ("[2,4]<=[4,2]T(1,0)", True),  # over data: {0,2,4,6},{1,3,5,7}
        ("[4,2]<=[8]", False),  # over tensor: {0,1},{2,3},...
        ("{{0,2,4,6},{1,3,5,7}}", True),
        ("{{0,1},{2,3},{4,5},{6,7}}", False),
        ("{}", True),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", True),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", False),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0','axis_2'}", True),
    ],
)
def test_collectives_over_the_batch_axis_are_recognised(groups, crosses):
    text = f"%g = f32[24,132,16] all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{1}}"
    assert bool(crossing(text, 4, 2)) == crosses
    assert not crossing(text.replace("132", "48"), 4, 2)  # no batch in it: made from parameters
