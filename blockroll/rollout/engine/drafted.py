"""What a drafter hands to a step is checked before anything is made of it: a bad draft commits nothing.

Shapes: B running requests, K drafted tokens, L = K + 1 rows to verify, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.errors import InvalidDraft
from blockroll.rollout.engine.drafting import DraftRows, Verifying
from blockroll.samplers import PackedLogits, as_rows
from blockroll.types import Draft, Plan, PointMass, Rows

_LARGEST_ERROR = 1e-5  # of the sum of a law: what float32 rounding makes of a large vocabulary


def check_drafted(drafted: DraftRows | Draft, plan: Plan, *, batch_size: int, vocab_size: int) -> None:
    """Raise InvalidDraft unless these are drafts that a step of `plan` can verify.

    That is (B, K) in shape, 0..K drafts for each request, and of a Draft, which may be narrower: token ids of
    the vocabulary, drawn from laws that are laws and that could give them. Rows may hold NaN: that fails a
    request alone.
    """
    width = _checked_width(drafted, plan, batch_size, vocab_size)
    wrong = ((drafted.num_drafts_B < 0) | (drafted.num_drafts_B > width)).nonzero()
    if len(wrong):
        slot = int(wrong[0])
        raise _invalid(
            plan,
            f"{int(drafted.num_drafts_B[slot])} drafts for request {slot} of the batch",
            f"0 to {'K = ' if width == plan.num_drafts else ''}{width}, the width of its tensors",
        )
    if isinstance(drafted, DraftRows):
        if len(drafted.origins) != batch_size:
            raise _invalid(plan, f"{len(drafted.origins)} origins", f"{batch_size}, one for each request")
        return
    tokens_BK, certain_B = drafted.token_ids_BK, drafted.certain_B
    if certain_B is not None and (certain_B.shape, certain_B.dtype) != ((batch_size,), torch.bool):
        given = f"certain_B of {certain_B.dtype} {tuple(certain_B.shape)}"
        raise _invalid(plan, given, f"torch.bool ({batch_size},)")
    strange = tokens_BK[(tokens_BK < 0) | (tokens_BK >= vocab_size)]
    if len(strange):
        raise _invalid(
            plan,
            f"the token id {int(strange[0])}",
            f"ids from 0 to {vocab_size - 1}, behind a request's last draft too",
        )
    if not isinstance(drafted.law, PointMass):
        _check_laws(drafted, drafted.law, plan)


def check_verifying(
    verifying: Verifying, plan: Plan, *, batch_size: int, num_rows: int, vocab_size: int
) -> None:
    """Raise InvalidDraft unless these are so many rows for each request, packed or not."""
    _check_shape(plan, "logits_BLV", verifying.logits_BLV, (batch_size, num_rows, vocab_size))


def check_kept(kept: Sequence[object | None], plan: Plan, *, batch_size: int) -> None:
    """Raise InvalidDraft unless there is one for each request."""
    if len(kept) != batch_size:
        raise _invalid(plan, f"{len(kept)} proposals to keep", f"{batch_size}, one or None for each request")


def _checked_width(drafted: DraftRows | Draft, plan: Plan, batch_size: int, vocab_size: int) -> int:
    """Drafts that its tensors have room for, once their types and shapes are right."""
    num_drafts = plan.num_drafts
    if isinstance(drafted, Draft):
        width = num_drafts
        if isinstance(drafted.token_ids_BK, Tensor) and drafted.token_ids_BK.dim() == 2:
            width = min(drafted.token_ids_BK.shape[1], num_drafts)
        _check_integers(plan, "token_ids_BK", drafted.token_ids_BK, (batch_size, width))
        num_drafts, law = width, drafted.law
        if not isinstance(law, PointMass):
            _check_shape(plan, "law", law, (batch_size, num_drafts, vocab_size))
        if isinstance(law, Tensor) and law.dtype != torch.float64:
            raise _invalid(plan, f"law of {law.dtype}", "float64, rows, or POINT_MASS")
    elif isinstance(drafted, DraftRows):
        num_rows = num_drafts + plan.settles_first
        _check_shape(plan, "logits", drafted.logits, (batch_size, num_rows, vocab_size))
    else:
        raise _invalid(plan, f"{drafted!r}", "DraftRows or a Draft")
    _check_integers(plan, "num_drafts_B", drafted.num_drafts_B, (batch_size,))
    return num_drafts


def _check_laws(draft: Draft, law: Rows | Tensor, plan: Plan) -> None:
    """Of the drafts that are meant: probabilities, of sum 1, above 0 where the draft is."""
    own_BK = as_rows(law).probs_of(draft.token_ids_BK)
    is_meant_BK = torch.arange(own_BK.shape[1], device=own_BK.device) < draft.num_drafts_B[:, None]
    checks = [(own_BK > 0, "probability 0 for the very token it gave")]
    if isinstance(law, Tensor):  # rows make their probabilities themselves
        error_BK = (law.sum(dim=-1) - 1).abs()
        checks = [
            (torch.isfinite(law).all(dim=-1), "NaN or infinity"),
            ((law >= 0).all(dim=-1), "a negative probability"),
            (error_BK <= _LARGEST_ERROR, f"probabilities whose sum is not 1 within {_LARGEST_ERROR:g}"),
            *checks,
        ]
    for is_right_BK, what in checks:
        wrong = (is_meant_BK & ~is_right_BK).nonzero()
        if len(wrong):
            slot, offset = wrong[0].tolist()
            raise _invalid(
                plan,
                f"a law with {what} for draft {offset} of request {slot}",
                "the law that the draft was really drawn from, or POINT_MASS",
            )


def _check_integers(plan: Plan, name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    _check_shape(plan, name, given, shape)
    if given.dtype != torch.int64:
        raise _invalid(plan, f"{name} of {given.dtype}", "int64")


def _check_shape(plan: Plan, name: str, given: Rows | PackedLogits | Tensor, shape: tuple[int, ...]) -> None:
    is_shaped = isinstance(given, Rows | PackedLogits | Tensor)
    if not is_shaped or given.shape != shape:
        found = tuple(given.shape) if is_shaped else type(given).__name__
        raise _invalid(plan, f"{name} of {found}", f"a tensor of {shape}")


def _invalid(plan: Plan, given: str, allowed: str) -> InvalidDraft:
    return InvalidDraft(
        f"the drafter {plan.drafter!r} of plan {plan.name} gave {given}; it must give {allowed}. Nothing was "
        "committed: mend it, or abort the requests"
    )
