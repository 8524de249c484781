"""Which mixers the contract is asked of, at which sizes: every one of the list, and forms that take other paths."""

import functools

import jax

from longwave import layers
from longwave.layers import memory_rules
from longwave.layers.fusion import Weighted
from longwave.layers.note_choices import Periodic, StepSize
from tests.layers.toy_mixers import ChunkMemory, Leaky, Smoother

partial = functools.partial
# A pool that overflows, another alpha than that at which nothing is read, around a small mixer.
NOTES = {
    "mixer": partial(layers.LRU, N=4, output=None),
    "fusion": partial(Weighted, alpha=0.5),
    "k": 3,
    "summary": 8,
    "heads": 2,
    "p": None,
}
LINEAR_FAMILY = ("LinearAttention", "RetNet", "LightningAttention", "GLA", "DeltaNet", "GatedDeltaNet", "KDA")
MIXERS = {
    **layers.MIXERS,
    # Small ones of what compiles long.
    "S4": partial(layers.S4, N=8, l_max=16),
    "LSSL": partial(layers.LSSL, N=8),
    "LMU": partial(layers.LMU, order=8),
    "LongConv": partial(layers.LongConv, l_max=32),
    "SGConv": partial(layers.SGConv, l_max=32, kernel_dim=4),
    "Mamba": partial(layers.Mamba, N=4),
    "Mamba2": partial(layers.Mamba2, N=8, P=8),
    "MemMamba": partial(layers.MemMamba, note=Periodic(period=7, on=4), read=Periodic(period=7, on=4), **NOTES),
    **{name: partial(layers.MIXERS[name], heads=2) for name in LINEAR_FAMILY},
    "Based": partial(layers.Based, heads=2, feature_dim=4),
    "RAT": partial(layers.RAT, L=4, H=4),
    "ELM": partial(layers.ELM, memory=8),
    "MoM": partial(layers.MoM, M=3, heads=2, P=4),
    "toy leaky": Leaky,
    "toy chunks": ChunkMemory,
    "toy smoother": Smoother,
}
# Other settings of the same classes take other paths through them.
FORMS = {
    "S4D two-sided": partial(layers.S4D, bidirectional=True),
    "Attention non-causal": partial(layers.Attention, causal=False),
    "Attention grouped, window, sinks": partial(layers.Attention, heads=4, kv_heads=2, window=5, sinks=2),
    "Bidirectional": partial(layers.Bidirectional, mixer=layers.S4D),
    "S4 two-sided": partial(layers.S4, bidirectional=True),
    "S4 LegT and FouT, channels": partial(layers.S4, init=(layers.legt, layers.fout), n_ssm=2, channels=2, l_max=16),
    "S4 LegS and Lin, channels": partial(layers.S4, init=(layers.legs, layers.lin), n_ssm=2, channels=2, l_max=16),
    "S4D real": partial(layers.S4D, real=True, init=layers.real),
    "LSSL fixed": partial(layers.LSSL, N=8, transition=layers.FixedMatrices, train_dt=False, l_max=64, channels=2),
    "LSSL LegT": partial(
        layers.LSSL,
        N=8,
        alpha=1.0,
        channels=2,
        transition=partial(layers.Quasiseparable, init=layers.legt_factors, n_ssm=2),
    ),
    "LMU memories": partial(layers.LMU, order=6, memories=3, theta=24),
    "S5 two-sided": partial(layers.S5, P=8, J=2, bidirectional=True),
    "S5 whole spectrum, clipped": partial(layers.S5, P=6, conj_sym=False, clip_eigs=True, output=layers.HalfGLU2),
    "LongConv short": partial(
        layers.LongConv, l_max=5, lam=0.05, window=3, init=lambda key, shape: 0.3 * jax.random.normal(key, shape)
    ),
    "LongConv two-sided": partial(layers.LongConv, l_max=20, bidirectional=True),
    "SGConv short": partial(layers.SGConv, l_max=12, kernel_dim=2, decay_min=1.0, decay_max=3.0),
    "SGConv two-sided": partial(layers.SGConv, l_max=16, kernel_dim=4, channels=2, bidirectional=True),
    "Mamba norms and biases": partial(layers.Mamba, N=4, conv=3, norm=layers.RMSNorm, bias=True, expand=1),
    "Mamba2 groups, limits, biases": partial(
        layers.Mamba2, N=4, P=4, G=2, conv=2, bias=True, D_per_channel=True, dt_limit=(0.01, 0.5)
    ),
    "MemMamba long, reading lower layers": partial(layers.memmamba_long, window=2, **{**NOTES, "p": 1}),
    "MemMamba around Mamba": partial(
        layers.memmamba_long, window=2, **{**NOTES, "mixer": partial(layers.Mamba, N=2)}, scorer=StepSize
    ),
    "JRT": partial(layers.JRT, heads=2, feature_dim=4, prefix=5),
    "ShortConv gated": partial(layers.ShortConv, conv=2, gated=True),
    "DeltaNet around tokens": partial(
        layers.DeltaNet, heads=2, expand_k=0.5, expand_v=1.5, conv=1, negative_eigenvalues=True
    ),
    "RAT as attention": partial(layers.RAT, L=1, H=2, G=1),
    "RAT of long chunks": partial(layers.RAT, L=16, rope=None),
    "RAT as a recurrent network": partial(layers.RAT, L=None, span=24),
    "MLSTM sigmoid gates, dense, biases": partial(
        layers.MLSTM, cell=layers.SigmoidGated(), block=None, heads=2, conv_bias=False, bias=True
    ),
    "SLSTM exponential forget gate, no convolution": partial(
        layers.SLSTM, heads=2, conv=None, log_forget=layers.exponential_gate
    ),
    "MoM one memory each, one projection, linear attention": partial(
        layers.MoM, k=1, shared=False, heads=2, P=4, expand_v=2, single_kv_proj=True, conv=2, rule=memory_rules.Linear
    ),
    "Bidirectional tied": partial(layers.Bidirectional, mixer=layers.Attention, tied=True),
}
