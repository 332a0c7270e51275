"""What a drafter hands to a step is checked before anything is made of it: a bad draft commits nothing.

Shapes: B running requests, K drafted tokens, L = K + 1 rows to verify, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blockroll.errors import InvalidDraft
from blockroll.kernels import transfer
from blockroll.kernels.rows import PackedLogits, as_rows
from blockroll.rollout.engine.drafting import DraftRows, Verifying
from blockroll.types import Draft, Plan, PointMass, Rows

_LARGEST_ERROR = 1e-5  # of the sum of a law: what float32 rounding makes of a large vocabulary


def check_drafted(
    drafted: DraftRows | Draft, plan: Plan, *, batch_size: int, vocab_size: int
) -> Tensor | None:
    """Raise InvalidDraft unless these are drafts that a step of `plan` can verify.

    That is (B, K) in shape, 0..K drafts for each request, and of a Draft, which may be narrower: token ids of
    the vocabulary, drawn from laws that are laws and that could give them. Rows may hold NaN: that fails a
    request alone.

    Where a look at numbers is a wait, whose are wrong comes as a tensor, bool (B,), to be looked at with the
    step's results; `check_values` then says what is wrong. Until then only `fitted` drafts are fit for use.
    None: nothing is left to look at.
    """
    width = _checked_width(drafted, plan, batch_size, vocab_size)
    if isinstance(drafted, DraftRows):
        if len(drafted.origins) != batch_size:
            raise _invalid(plan, f"{len(drafted.origins)} origins", f"{batch_size}, one for each request")
    elif (certain_B := drafted.certain_B) is not None and (certain_B.shape, certain_B.dtype) != (
        (batch_size,),
        torch.bool,
    ):
        given = f"certain_B of {certain_B.dtype} {tuple(certain_B.shape)}"
        raise _invalid(plan, given, f"torch.bool ({batch_size},)")
    if transfer.is_free(drafted.num_drafts_B.device):
        check_values(drafted, plan, vocab_size=vocab_size)
        return None
    return _are_wrong(drafted, width, vocab_size)


def fitted(drafted: DraftRows | Draft, *, vocab_size: int) -> DraftRows | Draft:
    """The same, with no token id outside the vocabulary and no more drafts than there is room for."""
    if isinstance(drafted, DraftRows):
        return drafted
    return replace(
        drafted,
        token_ids_BK=drafted.token_ids_BK.clamp(0, vocab_size - 1),
        num_drafts_B=drafted.num_drafts_B.clamp(0, drafted.token_ids_BK.shape[1]),
    )


def check_values(drafted: DraftRows | Draft, plan: Plan, *, vocab_size: int) -> None:
    """Raise InvalidDraft unless the numbers in tensors of the right shapes are right; looks at them."""
    num_drafts = drafted.num_drafts_B.tolist()
    width = plan.num_drafts if isinstance(drafted, DraftRows) else drafted.token_ids_BK.shape[1]
    for slot, number in enumerate(num_drafts):
        if not 0 <= number <= width:
            raise _invalid(
                plan,
                f"{number} drafts for request {slot} of the batch",
                f"0 to {'K = ' if width == plan.num_drafts else ''}{width}, the width of its tensors",
            )
    if drafted.num_drafts is not None and list(drafted.num_drafts) != num_drafts:
        raise _invalid(
            plan,
            f"num_drafts {[*drafted.num_drafts]} beside num_drafts_B {num_drafts}",
            "the same counts in both, or none in num_drafts",
        )
    if isinstance(drafted, DraftRows):
        return
    tokens_BK = drafted.token_ids_BK
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


def _are_wrong(drafted: DraftRows | Draft, width: int, vocab_size: int) -> Tensor | None:
    """Whose numbers `check_values` would refuse, bool (B,)."""
    num_drafts_B = drafted.num_drafts_B
    is_wrong_B = (num_drafts_B < 0) | (num_drafts_B > width)
    if isinstance(drafted, DraftRows):
        return is_wrong_B
    tokens_BK = drafted.token_ids_BK
    is_wrong_B |= ((tokens_BK < 0) | (tokens_BK >= vocab_size)).any(dim=1)
    if drafted.num_drafts is not None:
        is_wrong_B |= num_drafts_B != transfer.sent(drafted.num_drafts, num_drafts_B.device)
    if not isinstance(drafted.law, PointMass):
        fit = fitted(drafted, vocab_size=vocab_size)
        assert isinstance(fit, Draft)
        for is_wrong_BK, _ in _wrong_laws(fit, drafted.law):
            is_wrong_B |= is_wrong_BK.any(dim=1)
    return is_wrong_B


def _wrong_laws(draft: Draft, law: Rows | Tensor) -> list[tuple[Tensor, str]]:
    """Of the drafts that are meant, what is no probability, not of sum 1, or 0 where the draft is."""
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
    return [(is_meant_BK & ~is_right_BK, what) for is_right_BK, what in checks]


def _check_laws(draft: Draft, law: Rows | Tensor, plan: Plan) -> None:
    for is_wrong_BK, what in _wrong_laws(draft, law):
        wrong = is_wrong_BK.nonzero()
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
