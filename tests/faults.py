"""Faults of an engine, to be planted: each breaks what is said of the tokens, and changes nothing else.

A fault is planted by a function `plant(target, name, value)` that sets an attribute, as pytest's
`monkeypatch.setattr` does; `planted` does it for a while.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from blockroll.kernels.block_attention import RowLayout
from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.samplers import laws as laws_module

Plant = Callable[[Any, str, Any], None]
Fault = Callable[[Plant], None]


@contextlib.contextmanager
def planted(fault: Fault | None) -> Iterator[None]:
    """Within, the fault is there; None: none is."""
    with contextlib.ExitStack() as stack:
        if fault is not None:
            fault(lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value)))
        yield


def _change_verdicts(plant: Plant, change: Callable[..., Any]) -> None:
    """`change(verdict, draft, target, uniforms)` takes the place of every verdict on drafts."""
    verify = decoding.verify_block

    def wrong(draft: Any, target: Any, uniforms_BL: Any) -> Any:
        return change(verify(draft, target, uniforms_BL), draft, target, uniforms_BL)

    plant(decoding, "verify_block", wrong)


def residual_is_the_target(plant: Plant) -> None:
    """Behind a rejected draft the token is drawn from the target itself."""

    def change(verdict: Any, draft: Any, target: Any, uniforms_BL: Any) -> Any:
        accepted_B1 = verdict.num_accepted_B[:, None]
        rows_BV = target.at(torch.arange(len(accepted_B1)), accepted_B1[:, 0])
        tokens_B1 = inverse_cdf(rows_BV, uniforms_BL[:, -1])[:, None]
        return dataclasses.replace(
            verdict,
            token_ids_BL=verdict.token_ids_BL.scatter(1, accepted_B1, tokens_B1),
            behavior_logprobs_BL=verdict.behavior_logprobs_BL.scatter(
                1, accepted_B1, rows_BV.gather(1, tokens_B1).log()
            ),
        )

    _change_verdicts(plant, change)


def logprobs_of_another_temperature(plant: Plant) -> None:
    """What is recorded of tokens is a tenth too likely."""
    _change_verdicts(
        plant,
        lambda verdict, *_: dataclasses.replace(
            verdict, behavior_logprobs_BL=0.9 * verdict.behavior_logprobs_BL
        ),
    )


def draft_law_of_another_temperature(plant: Plant) -> None:
    """Drafts are drawn at their own temperature, and the law that is stated is that of temperature 1."""
    draw_draft = laws_module.draw_draft

    def wrong(logits: Any, temperature: Any, uniforms_BK: Any, num_drafts: Any = None, **kwargs: Any) -> Any:
        draft = draw_draft(logits, temperature, uniforms_BK, num_drafts, **kwargs)
        return dataclasses.replace(draft, law=logits.double().softmax(-1))

    plant(laws_module, "draw_draft", wrong)


def coin_of_the_rejected_draft_again(plant: Plant) -> None:
    """The coin that rejected a draft draws the token in its place."""
    verify = decoding.verify_block

    def wrong(draft: Any, target: Any, uniforms_BL: Any) -> Any:
        num_drafts = draft.token_ids_BK.shape[1]
        if not num_drafts:
            return verify(draft, target, uniforms_BL)
        accepted_B = verify(draft, target, uniforms_BL).num_accepted_B
        coin_B1 = uniforms_BL.gather(1, accepted_B.clamp(max=num_drafts - 1)[:, None])
        return verify(draft, target, torch.cat([uniforms_BL[:, :-1], coin_B1], dim=1))

    plant(decoding, "verify_block", wrong)


def coin_that_drew_the_draft_accepts_it(plant: Plant) -> None:
    """One coin for both."""
    uniforms = decoding.step_uniforms

    def wrong(*arguments: Any, **options: Any) -> Any:
        draft_BK, verify_BL = uniforms(*arguments, **options)
        return draft_BK, torch.cat([draft_BK, verify_BL[:, draft_BK.shape[1] :]], dim=1)

    plant(decoding, "step_uniforms", wrong)


def tokens_of_a_truncated_law(plant: Plant) -> None:
    """The least likely tokens are never drawn in a first position, and no option says so."""

    def change(verdict: Any, draft: Any, target: Any, uniforms_BL: Any) -> Any:
        rows_B = torch.arange(len(uniforms_BL))
        rows_BV = target.at(rows_B, torch.zeros_like(rows_B))
        kept_BV = rows_BV.where(rows_BV >= 0.02 * rows_BV.amax(1, keepdim=True), 0.0)
        tokens_B1 = inverse_cdf(kept_BV, uniforms_BL[:, 0])[:, None]
        tokens_BL = torch.cat([tokens_B1, verdict.token_ids_BL[:, 1:]], dim=1)
        return dataclasses.replace(verdict, token_ids_BL=tokens_BL)

    _change_verdicts(plant, change)


def cache_rows_one_late(plant: Plant) -> None:
    """Each committed row behind a prompt holds what was meant for the one before it."""
    commit = SlotCache.commit

    def moved(self: SlotCache, start: int, token_ids: Any) -> None:
        slots = range(start, start + len(token_ids))
        before = [len(self.tokens(slot)) for slot in slots]
        commit(self, start, token_ids)
        for slot, first, tokens in zip(slots, before, token_ids, strict=True):
            last = min(first + len(tokens), self.capacity - 1)
            for tensor in (*self._keys, *self._values) if first else ():
                tensor[slot, :, first:last] = tensor[slot, :, first - 1 : last - 1].clone()

    plant(SlotCache, "commit", moved)


def positions_one_late(plant: Plant) -> None:
    """New rows stand one further behind a prefix than they do."""
    positions = RowLayout.positions

    def shifted(self: RowLayout, lengths_B: Any) -> Any:
        return positions(self, lengths_B) + (lengths_B > 0)[:, None]

    plant(RowLayout, "positions", shifted)
