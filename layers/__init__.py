"""Sequence mixers and the small parts around them. `layers.NAME` is what configs name.

MIXERS is the list of all mixers, by name: constructors called with (width, rngs=...). The contract suite, the tables
and the benchmarks read it. A new mixer is one file here, one `.gin` in configs/models/, and one line in this list.
"""

from collections.abc import Callable

from longwave.kernels.lti_ssm import bilinear, zoh
from longwave.layers.attention import Attention
from longwave.layers.bidirectional import Bidirectional
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
from longwave.layers.lmu import LMU
from longwave.layers.long_conv import LongConv, double_exp_kernel, random_kernel
from longwave.layers.lru import LRU
from longwave.layers.lssl import LSSL
from longwave.layers.mamba import Mamba
from longwave.layers.mamba2 import Mamba2
from longwave.layers.memmamba import MemMamba, memmamba_long
from longwave.layers.mixer import Carry, Context, Mixer, Out, Unsupported
from longwave.layers.mlp import GLU, MLP, gelu
from longwave.layers.norms import BatchNorm, LayerNorm, RMSNorm
from longwave.layers.readout import GatedLinear, Projection
from longwave.layers.s4 import S4
from longwave.layers.s4d import S4D
from longwave.layers.s5 import S5, complex_normal, lecun_normal, trunc_standard_normal
from longwave.layers.sgconv import SGConv, cosine_scales, normal_scales
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
}

__all__ = [
    "GLU",
    "LMU",
    "LRU",
    "LSSL",
    "MIXERS",
    "MLP",
    "S4",
    "S4D",
    "S5",
    "Attention",
    "BatchNorm",
    "Bidirectional",
    "Carry",
    "Context",
    "Exp",
    "FixedMatrices",
    "FullGLU",
    "GatedLinear",
    "HalfGLU1",
    "HalfGLU2",
    "LayerNorm",
    "LongConv",
    "Mamba",
    "Mamba2",
    "MemMamba",
    "Mixer",
    "Out",
    "Projection",
    "Quasiseparable",
    "RMSNorm",
    "SGConv",
    "Softplus",
    "Ungated",
    "Unsupported",
    "bilinear",
    "complex_normal",
    "cosine_scales",
    "double_exp_kernel",
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
    "trunc_standard_normal",
    "zoh",
]
