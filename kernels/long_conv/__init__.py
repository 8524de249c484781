"""Convolution with a free kernel as long as the input: causal, or with an anti-causal kernel beside it.

y_t = sum_{s<=t} k_{t-s} u_s + sum_{s>t} k_anti_{s-t-1} u_s
"""

from longwave.kernels.long_conv.fft import fft_size, long_conv

__all__ = ["fft_size", "long_conv"]
