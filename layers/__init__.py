"""Sequence mixers and the small parts around them. `layers.NAME` is what configs name.

MIXERS is the list of all mixers, by name: constructors called with (width, rngs=...). The contract suite, the tables
and the benchmarks read it. A new mixer is one file here, one `.gin` in configs/models/, and one line in this list.
"""

from collections.abc import Callable

from longwave.kernels.lti_ssm import bilinear, zoh
from longwave.layers.aaren import Aaren
from longwave.layers.attention import Attention
from longwave.layers.balance import BalanceLoss
from longwave.layers.based import Based, taylor
from longwave.layers.bidirectional import Bidirectional
from longwave.layers.deltanet import DeltaNet
from longwave.layers.elm import ELM
from longwave.layers.gated_deltanet import GatedDeltaNet
from longwave.layers.gla import GLA
from longwave.layers.half_glu import FullGLU, HalfGLU1, HalfGLU2, Ungated, tanh_gelu
from longwave.layers.hippo import (
    fout,
    fout_matrices,
    inv,
    inv2,
    legs,
    legs_matrices,
    legt,
    legt_matrices,
    lin,
    quad,
    real,
)
from longwave.layers.jrt import JRT
from longwave.layers.kda import KDA
from longwave.layers.lightning import LightningAttention
from longwave.layers.linear_attention import LinearAttention, elu_plus_one
from longwave.layers.lmu import LMU
from longwave.layers.long_conv import LongConv, double_exp_kernel, random_kernel
from longwave.layers.lru import LRU
from longwave.layers.lssl import LSSL
from longwave.layers.mamba import Mamba
from longwave.layers.mamba2 import Mamba2
from longwave.layers.memmamba import MemMamba, memmamba_long
from longwave.layers.mixer import Carry, Context, Mixer, Out, Unsupported
from longwave.layers.mlp import GLU, MLP, gelu
from longwave.layers.mlstm import MLSTM, ExponentialGated, SigmoidGated
from longwave.layers.mom import MoM
from longwave.layers.norms import BatchNorm, LayerNorm, RMSNorm
from longwave.layers.rat import RAT
from longwave.layers.readout import GatedLinear, Projection
from longwave.layers.retnet import RetNet
from longwave.layers.rglru import RGLRU
from longwave.layers.s4 import S4
from longwave.layers.s4d import S4D
from longwave.layers.s5 import S5, complex_normal, lecun_normal, trunc_standard_normal
from longwave.layers.sgconv import SGConv, cosine_scales, normal_scales
from longwave.layers.short_conv import ShortConv
from longwave.layers.slstm import SLSTM, exponential_gate
from longwave.layers.timescale import Exp, Softplus
from longwave.layers.transition import FixedMatrices, Quasiseparable, lagt_factors, legs_factors, legt_factors

MIXERS: dict[str, Callable[..., Mixer]] = {
    "S4": S4,
    "S4D": S4D,
    "S5": S5,
    "LRU": LRU,
    "LSSL": LSSL,
    "LMU": LMU,
    "LongConv": LongConv,
    "SGConv": SGConv,
    "Attention": Attention,
    "Mamba": Mamba,
    "Mamba2": Mamba2,
    "MemMamba": MemMamba,
    "MoM": MoM,
    "MLSTM": MLSTM,
    "SLSTM": SLSTM,
    "Aaren": Aaren,
    "RGLRU": RGLRU,
    "ELM": ELM,
    "RAT": RAT,
    "LinearAttention": LinearAttention,
    "RetNet": RetNet,
    "LightningAttention": LightningAttention,
    "GLA": GLA,
    "DeltaNet": DeltaNet,
    "GatedDeltaNet": GatedDeltaNet,
    "KDA": KDA,
    "Based": Based,
    "ShortConv": ShortConv,
}

__all__ = [
    "ELM",
    "GLA",
    "GLU",
    "JRT",
    "KDA",
    "LMU",
    "LRU",
    "LSSL",
    "MIXERS",
    "MLP",
    "MLSTM",
    "RAT",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "Aaren",
    "Attention",
    "BalanceLoss",
    "Based",
    "BatchNorm",
    "Bidirectional",
    "Carry",
    "Context",
    "DeltaNet",
    "Exp",
    "ExponentialGated",
    "FixedMatrices",
    "FullGLU",
    "GatedDeltaNet",
    "GatedLinear",
    "HalfGLU1",
    "HalfGLU2",
    "LayerNorm",
    "LightningAttention",
    "LinearAttention",
    "LongConv",
    "Mamba",
    "Mamba2",
    "MemMamba",
    "Mixer",
    "MoM",
    "Out",
    "Projection",
    "Quasiseparable",
    "RMSNorm",
    "RetNet",
    "SGConv",
    "ShortConv",
    "SigmoidGated",
    "Softplus",
    "Ungated",
    "Unsupported",
    "bilinear",
    "complex_normal",
    "cosine_scales",
    "double_exp_kernel",
    "elu_plus_one",
    "exponential_gate",
    "fout",
    "fout_matrices",
    "gelu",
    "inv",
    "inv2",
    "lagt_factors",
    "lecun_normal",
    "legs",
    "legs_factors",
    "legs_matrices",
    "legt",
    "legt_factors",
    "legt_matrices",
    "lin",
    "memmamba_long",
    "normal_scales",
    "quad",
    "random_kernel",
    "real",
    "tanh_gelu",
    "taylor",
    "trunc_standard_normal",
    "zoh",
]
