"""What one step commits: drafts against the target's rows, by coins that are given.

Laws come as rows of logits with what makes laws of them (`kernels/rows`), and are read where a token is
judged: nobody needs to form probabilities of all rows. Two rules verify drafts, by whether these were drawn
or certain.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.block_verify import reference
from blockroll.kernels.choice import is_triton
from blockroll.kernels.philox import Uniforms, drawn
from blockroll.kernels.rows import Logits, as_rows
from blockroll.kernels.rows.checks import check_columns, check_rows
from blockroll.types import Draft, PointMass, Rows, Verdict

__all__ = ["chosen_logprobs", "join_verdicts", "settle_first", "verify_block"]

join_verdicts = reference.join_verdicts


def verify_block(draft: Draft, target: Rows | Tensor, uniforms_BL: Uniforms) -> Verdict:
    """Accept the longest draft prefix the target allows, then take one token from the target.

    Law: if each draft token was drawn from its row of `draft.law`, no draft depends on the uniforms, and
    these are independent on (0, 1), the committed tokens are a sample of the target.

    Where drafts were certain, uniform i draws the token of row i from the target, and draft i stands if it is
    that token: the first that is not is replaced by it. Where they were drawn, uniform i is the accept coin
    of draft i, and the last one draws the token behind those accepted, from the residual after a rejection.
    Source of the second rule: Leviathan et al. 2023, appendix A.1; Chen et al. 2023, theorem 1.
    `target` (B, L, V) may be probabilities: rows that sum to one, float64. K may be zero, and a request may
    have fewer drafts than K. Uniforms are float64, or the coins that they are made from. InvalidInput where
    shapes or types do not belong together.
    """
    size, num_drafts, vocab_size = _checked_sizes(draft, target)
    check_rows("the target", target, (size, num_drafts + 1, vocab_size))
    check_columns("uniforms_BL", uniforms_BL, (size, num_drafts + 1), torch.float64)
    if is_triton():
        from blockroll.kernels.block_verify import fused

        return fused.verify(draft, target, uniforms_BL)
    return reference.verify(draft, as_rows(target), drawn(uniforms_BL))


def settle_first(draft: Draft, target: Rows | Tensor, uniforms_B2: Uniforms) -> Verdict:
    """The first position alone, whatever becomes of the others: its draft if accepted, else what replaces it.

    Of `target` the first row counts. `uniforms_B2` are its accept coin and the coin of the token that
    replaces a rejected draft; where drafts were certain, the coin that draws the token of its position, and
    one that decides nothing.
    Law: verify_block on one draft without its extra token; the token that stands is a sample of the target.
    InvalidInput as of `verify_block`, and where there is no draft or no row.
    """
    size, num_drafts, vocab_size = _checked_sizes(draft, target)
    num_rows = target.shape[1]
    if num_drafts == 0 or num_rows == 0:
        raise InvalidInput(
            f"there are K = {num_drafts} drafts and {num_rows} target rows: to settle the first position "
            "give one of each, or more"
        )
    check_rows("the target", target, (size, num_rows, vocab_size))
    check_columns("uniforms_B2", uniforms_B2, (size, 2), torch.float64)
    if is_triton():
        from blockroll.kernels.block_verify import fused

        return fused.settle(draft, target, uniforms_B2)
    return reference.settle(draft, as_rows(target), drawn(uniforms_B2))


def chosen_logprobs(
    parts: Sequence[Logits], is_chosen_BL: Tensor, token_ids_BL: Tensor, temperature_B: Tensor
) -> Tensor:
    """Log-probabilities under the causal policy, float64 (B, L): full vocabulary, T = 1 where greedy.

    Of the chosen cells of all rows, which come in parts; 0 in others. InvalidInput where shapes or types do
    not belong together.
    """
    size, width = token_ids_BL.shape
    check_columns("token_ids_BL", token_ids_BL, (size, width), torch.int64)
    check_columns("is_chosen_BL", is_chosen_BL, (size, width), torch.bool)
    num_rows = sum(part.shape[1] for part in parts)
    if num_rows != width or any(part.shape[0] != size for part in parts) or len(temperature_B) != size:
        raise InvalidInput(
            f"there are rows {[tuple(part.shape) for part in parts]} and {len(temperature_B)} temperatures "
            f"for tokens {(size, width)}: give parts that are as wide together, and one temperature for each "
            "request"
        )
    if is_triton():
        from blockroll.kernels.block_verify import fused

        return fused.chosen_logprobs(parts, is_chosen_BL, token_ids_BL, temperature_B)
    return reference.chosen_logprobs(parts, is_chosen_BL, token_ids_BL, temperature_B)


def _checked_sizes(draft: Draft, target: Rows | Tensor) -> tuple[int, int, int]:
    """B, K and V, once the drafts are what they must be; the numbers in their tensors are not looked at."""
    if draft.token_ids_BK.dim() != 2 or len(target.shape) != 3:
        raise InvalidInput(
            f"drafts have shape {tuple(draft.token_ids_BK.shape)} and the target {tuple(target.shape)}: give "
            "(B, K) and (B, K + 1, V)"
        )
    size, num_drafts = draft.token_ids_BK.shape
    check_columns("token_ids_BK", draft.token_ids_BK, (size, num_drafts), torch.int64)
    check_columns("num_drafts_B", draft.num_drafts_B, (size,), torch.int64)
    if draft.certain_B is not None:
        check_columns("certain_B", draft.certain_B, (size,), torch.bool)
    counts = draft.num_drafts
    if counts is not None and (len(counts) != size or not all(0 <= n <= num_drafts for n in counts)):
        raise InvalidInput(
            f"num_drafts is {[*counts]}: give 0 to {num_drafts}, which K is, for each of {size} requests"
        )
    vocab_size = target.shape[2]
    if not isinstance(draft.law, PointMass):
        check_rows("the law of the drafts", draft.law, (size, num_drafts, vocab_size))
    return size, num_drafts, vocab_size
