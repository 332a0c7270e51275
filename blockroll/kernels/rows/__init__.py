"""Laws of rows of logits: temperature, mixing, edits and truncation, and what tokens are drawn from.

A law is held as what it comes from (`LogitRows`, `PackedRows`), so that no op needs B x L x V
probabilities. Float64 where something is decided; of large vocabularies float32 weights and their float64
sums (`weights.py`). Compiled code (`compiled.py`) reads the same rows where it serves.
"""

from blockroll.kernels.rows.compiled import At
from blockroll.kernels.rows.edits import Edits, Mix, mixed_logits
from blockroll.kernels.rows.logit_rows import DenseRows, LogitRows, as_rows, target_probs
from blockroll.kernels.rows.packed import Logits, PackedLogits, PackedRows, rectangle, without_non_finite
from blockroll.kernels.rows.truncation import Cut

__all__ = [
    "At",
    "Cut",
    "DenseRows",
    "Edits",
    "LogitRows",
    "Logits",
    "Mix",
    "PackedLogits",
    "PackedRows",
    "as_rows",
    "mixed_logits",
    "rectangle",
    "target_probs",
    "without_non_finite",
]
