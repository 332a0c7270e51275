"""The layouts of decoding: tokens, and the masks that are drafted with behind them.

Shapes: R new rows per request, K drafted tokens, P proposals.
"""

from functools import lru_cache

from blockroll.kernels.block_attention import RowLayout


def causal_rows(num_rows: int) -> RowLayout:
    """Tokens one after another, each seeing those before it."""
    return two_forward_rows(num_rows, 0)


@lru_cache(maxsize=64)
def two_forward_rows(num_clean: int, num_drafts: int) -> RowLayout:
    """Tokens, the last of which is the anchor, and K masks behind them; no token sees a mask.

    The masks see the tokens and each other.
    """
    levels = (num_clean - 1,) if num_drafts else ()
    return RowLayout(num_clean=num_clean, width=num_drafts, levels=levels)


@lru_cache(maxsize=64)
def fused_rows(num_drafts: int, levels: tuple[int, ...]) -> RowLayout:
    """The anchor and K drafts to verify, then a proposal of K + 1 masks per level.

    The proposal of level p sees the anchor, the first p drafts and itself. Its slot 0 stands on the position
    of the token that the verdict adds after p accepted drafts, so slots 1..K are the next step's drafts.
    Source: the layout that Zyphra ships for ZAYA1-8B-Diffusion; TiDAR (arXiv 2511.08923), figure 3.
    """
    width = num_drafts + 1
    return RowLayout(num_clean=width, width=width if levels else 0, levels=levels)
