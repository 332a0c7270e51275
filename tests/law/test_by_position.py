"""Coins by position: whatever is drafted, by whom and when, the text is the one that its coins draw."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from blockroll.kernels.block_verify import reference
from blockroll.kernels.rows import as_rows
from blockroll.kernels.rows.weights import drawn_from
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.drafting import Drafter
from blockroll.samplers import draw_draft
from blockroll.types import Draft, Plan, Request, Sampling
from tests.engines import PlansInTurn
from tests.law.by_position import cells_of, coins_given, law_by_position, requests_of
from tests.law.engine_cells import PROMPT
from tests.law.integrate import Tokens, _boundaries, _product, _split, max_difference, target_law
from tests.law.table_policy import TablePolicy
from tests.law.toys import TOYS

LENGTH = 4
HISTORY = Plan(2, drafter="history")
PLANS = [Plan(0), Plan(1), Plan(2), Plan(1, (0,)), Plan(2, (0, 1, 2)), Plan(1, drafter="history"), HISTORY]
IN_TURN = [
    (Plan(0), HISTORY, Plan(2)),
    (Plan(2, (0, 2)), HISTORY, Plan(2, (0,)), Plan(0)),
    (HISTORY, Plan(1), Plan(1, (0, 1))),
]


def engine_of(toy, plans: Sequence[Plan], **options) -> Engine:
    most = max(plan.num_drafts for plan in plans)
    plan = plans[0] if len(plans) == 1 else PlansInTurn(*plans)
    return Engine(TablePolicy(toy, most), plan=plan, **options)


def texts_of(engine: Engine, requests: Sequence[Request]) -> dict[str, Tokens]:
    engine.submit(requests)
    texts = {}
    while engine.num_requests:
        texts |= {rollout.request.request_id: rollout.token_ids for rollout in engine.step().finished}
    return texts


@pytest.mark.parametrize("corner", ["low", "high"])
@pytest.mark.parametrize("plans", [*((plan,) for plan in PLANS), *IN_TURN], ids=str)
@pytest.mark.parametrize("name", ["argmax_draft", "four_tokens", "hot", "greedy"])
def test_every_cell_of_coins_gives_the_text_that_they_draw_whatever_is_drafted(name, plans, corner):
    toy = dataclasses.replace(TOYS[name], draft_temperature=0)
    cells = cells_of(toy, LENGTH, corner)
    engine = engine_of(toy, plans, max_batch_size=50)
    with coins_given(cells.coins_TP):
        texts = texts_of(engine, requests_of(toy, LENGTH, len(cells.texts)))
    assert [texts[str(t)] for t in range(len(cells.texts))] == cells.texts
    assert sum(cells.volumes) == pytest.approx(1, abs=1e-12)


def test_a_call_repeated_with_its_seeds_is_drafted_from_itself_and_draws_the_same_texts():
    toy = TOYS["four_tokens"]
    engine = engine_of(toy, [HISTORY], max_batch_size=7)
    cells = cells_of(toy, LENGTH, "low")
    requests = requests_of(toy, LENGTH, len(cells.texts))
    accepted = []
    with coins_given(cells.coins_TP):
        for _ in range(2):
            engine.submit(requests)
            finished = []
            while engine.num_requests:
                finished += engine.step().finished
            texts = {rollout.request.seed: rollout.token_ids for rollout in finished}
            assert [texts[t] for t in range(len(cells.texts))] == cells.texts
            accepted.append(sum(rollout.stats.num_accepted for rollout in finished))
    assert min(accepted) > 0


@pytest.mark.parametrize("plans", [(Plan(2),), (Plan(2, (0, 2)),), (HISTORY,), IN_TURN[1]], ids=str)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_texts_that_are_aborted_and_go_on_elsewhere_are_the_same(plans, num_steps):
    toy = TOYS["argmax_draft"]

    def run(requests):
        engine = engine_of(toy, plans)
        engine.submit(requests)
        texts = {}
        for _ in range(num_steps):
            texts |= {rollout.request.request_id: rollout.token_ids for rollout in engine.step().finished}
        left = engine.abort([request.request_id for request in requests])
        resumed = [dataclasses.replace(each.request, prefix=each.as_prefix()) for each in left]
        return texts | texts_of(engine_of(toy, plans[::-1]), resumed)

    law = law_by_position(toy, run, length=LENGTH)
    assert max_difference(law, target_law(toy, LENGTH)) < 1e-12


def redraws_by_the_coin_that_rejected(
    draw: Callable, draft: Draft, target: torch.Tensor, uniforms: torch.Tensor
):
    """Accepts by the coin, and after a rejection draws from the rest of the row by the same coin."""
    verdict = draw(draft, target, uniforms)
    rows = as_rows(target).dense()
    for b in range(len(uniforms)):
        for i in range(int(draft.num_drafts_B[b])):
            token = int(draft.token_ids_BK[b, i])
            verdict.is_draft_BL[b, i:] = False
            if uniforms[b, i] < rows[b, i, token]:
                verdict.is_draft_BL[b, i], verdict.token_ids_BL[b, i] = True, token
                continue
            rest = rows[b, i].clone()
            rest[token] = 0
            drawn = drawn_from(rest[None], uniforms[b, i, None])
            verdict.token_ids_BL[b, i] = drawn.token_ids_B[0]
            break
    return verdict


def test_planted_a_redraw_by_the_coin_that_rejected_is_caught(monkeypatch):
    draw = reference.draw_by_position
    monkeypatch.setattr(
        reference, "draw_by_position", lambda *each: redraws_by_the_coin_that_rejected(draw, *each)
    )
    toy = TOYS["argmax_draft"]
    law = law_by_position(toy, lambda requests: texts_of(engine_of(toy, [Plan(2, (0,))]), requests), length=3)
    assert max_difference(law, target_law(toy, 3)) > 1e-3


class OneDraft(Drafter):
    """Draws one draft from the toy's draft law; if it looks, it withholds what its accept coin dislikes."""

    name = "one_draft"

    def __init__(self, toy, *, looks: bool) -> None:
        self.toy, self.looks = toy, looks

    def propose(self, step):
        state = torch.tensor([running.state for running in step.batch])
        known = torch.tensor([running.num_tokens for running in step.batch])
        draws, coins = decoding.step_uniforms(
            state[:, 1], known, state[:, 2], 1, settles=False, by_position=False
        )
        rows = torch.tensor([[self.toy.draft_V((), 0).tolist()]] * len(known), dtype=torch.float64)
        draft = draw_draft(rows.log(), torch.ones(len(known)), draws)
        withheld_B = coins[:, 0] > 0.5 if self.looks else torch.zeros(len(known), dtype=torch.bool)
        return dataclasses.replace(draft, num_drafts_B=torch.where(withheld_B, 0, draft.num_drafts_B))


@pytest.mark.parametrize("looks", [False, True])
def test_planted_a_draft_of_a_law_that_was_chosen_by_its_coin_is_caught(looks, monkeypatch):
    """Where drafts are drawn the coin that accepts must not be known: there the rule does not protect."""
    toy = TOYS["stochastic"]
    target_V, draft_V = toy.target_V(()), toy.draft_V((), 0)
    residual_V = (target_V - draft_V).clip(min=0)
    intervals = [
        _split(_boundaries(draft_V), "low"),
        _split(np.concatenate([[0.5], target_V / draft_V]), "low"),
        _split(np.concatenate([_boundaries(target_V), _boundaries(residual_V)]), "low"),
    ]
    points, widths = (torch.from_numpy(_product(each)) for each in zip(*intervals, strict=True))
    monkeypatch.setattr(
        decoding,
        "step_uniforms",
        lambda seeds, *_, settles, by_position: (points[seeds, :1], points[seeds, 1:]),
    )
    engine = engine_of(toy, [Plan(1, drafter="one_draft")], drafters=[OneDraft(toy, looks=looks)])
    sampling = Sampling(max_tokens=8)
    engine.submit(
        Request(request_id=str(c), prompt_ids=(PROMPT,), seed=c, sampling=sampling)
        for c in range(len(points))
    )
    law = dict.fromkeys(((token,) for token in range(toy.vocab_size)), 0.0)
    for commit in engine.step().commits:
        law[commit.token_ids[:1]] += float(widths[int(commit.request_id)].prod())
    assert (max_difference(law, target_law(toy, 1)) < 1e-12) != looks
    assert not looks or max_difference(law, target_law(toy, 1)) > 1e-2
