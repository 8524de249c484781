"""Draws masks, and which blocks of them a kernel visits: docs/images/attention_masks.png.

python benchmarks/attention_masks.py [PATH]
"""

from __future__ import annotations

import sys

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from longwave.kernels.attention.mask import Butterfly, Causal, Global, Mask, Prefix, Window

TOKENS, BLOCK = 64, 8
MASKS: dict[str, Mask] = {
    "Causal()": Causal(),
    "Causal() & Window(20)": Causal() & Window(20),
    "Causal() & (Window(12) | Sinks(4))": Causal() & (Window(12) | Prefix(4)),
    "Causal() | Prefix(20)": Causal() | Prefix(20),
    "Butterfly(8)": Butterfly(BLOCK),
    "Butterfly(8, factors=2) | Global(8)": Butterfly(BLOCK, 2) | Global(BLOCK),
}
COLORS = {"not fetched": "#ffffff", "fetched, hidden": "#f2d5d8", "visible": "#7fa6d1", "visible, no mask": "#1f4e8c"}


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/images/attention_masks.png"
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    for ax, (title, mask) in zip(figure.subplots(2, 3).flat, MASKS.items(), strict=True):
        cells, live = _cells(mask)
        ax.imshow(cells, cmap=ListedColormap(list(COLORS.values())), vmin=0, vmax=3, interpolation="nearest")
        for i, j in np.argwhere(live):
            corner = j * BLOCK - 0.5, i * BLOCK - 0.5
            ax.add_patch(Rectangle(corner, BLOCK, BLOCK, fill=False, edgecolor="#333333", linewidth=0.6))
        ax.set_title(f"{title}\n{live.sum()} of {live.size} blocks", fontsize=9)
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel("keys", fontsize=8)
        ax.set_ylabel("queries", fontsize=8)
    handles = [Patch(facecolor=color, edgecolor="#333333", label=name) for name, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _cells(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Of every pair of tokens the index of its color; which blocks are live."""
    n = TOKENS // BLOCK
    token, lo = np.arange(TOKENS), np.arange(n) * BLOCK
    corners = lo[:, None], lo[:, None] + BLOCK - 1, lo[None, :], lo[None, :] + BLOCK - 1
    live, whole = (np.broadcast_to(np.asarray(answer(*corners)), (n, n)) for answer in (mask.live, mask.whole))
    seen = np.broadcast_to(np.asarray(mask.visible(token[:, None], token[None, :])), (TOKENS, TOKENS))
    fetched, unmasked = (np.kron(blocks, np.ones((BLOCK, BLOCK), bool)) for blocks in (live, whole))
    return fetched.astype(int) + seen + (seen & unmasked), live


if __name__ == "__main__":
    main()
