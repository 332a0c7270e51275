"""`draft_draw` by Triton: a token of each proposal row, and what verification needs of the row's law.

The rows stay as they are: beside them is kept what was read of them, by tile, so that they are read as they
were drawn from.

Shapes: B requests, K drafted tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.philox import Uniforms
from blockroll.kernels.rows import fused_draw
from blockroll.kernels.rows.fused_draw import Draws, all_rows, draw
from blockroll.kernels.rows.fused_laws import tiled
from blockroll.kernels.rows.fused_sources import plain, source_of
from blockroll.kernels.rows.logit_rows import Known, LogitRows
from blockroll.types import POINT_MASS, Draft


def drawn(rows: LogitRows, uniforms_BK: Uniforms, num_drafts_B: Tensor, certain: Tensor | bool) -> Draft:
    """A token of each row up to a request's last draft, by inverse CDF, and the rows it was drawn from."""
    size, num_drafts, _ = rows.shape
    rows = plain(rows)
    source = source_of(rows, num_drafts_B)
    known, out = tiled(source), Draws.room(size, num_drafts, rows.logits_BLV.device)
    draw(source, known, uniforms_BK, all_rows(size, num_drafts, rows.logits_BLV.device), out)
    law = replace(rows, known=Known(out.token_ids_BL, out.figures_5BL[0]), tiled=known)
    return Draft(
        token_ids_BK=out.token_ids_BL,
        law=POINT_MASS if certain is True else law,
        num_drafts_B=num_drafts_B,
        certain_B=certain if isinstance(certain, Tensor) else None,
        faults_BK=known.fault_BL,
    )


def builds() -> Iterator[Build]:
    """The last of its kernels, which are those of rows."""
    yield from fused_draw.builds()
