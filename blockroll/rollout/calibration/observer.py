"""Bets that the tokens of a step follow the laws recorded with them, placed in the engine that draws them.

One position of each request is looked at, chosen before its token is known. Each functional is blind to some
faults, so all are bet on; what is claimed of each is exact under the stated law, whatever came before:

    surprisal  min(-log mu(x), 12) / 12, by the recorded log-probability: the mean of the row mu itself.
               Another temperature, another row
    draft_set  whether x is likelier under the draft's law than under mu: what mu gives these tokens; of a
               certain draft, whether x is the draft. A residual replaced by mu, a wrong draft law
    tail       whether x has less than a hundredth of the likeliest token's probability: what mu gives such
               tokens. Truncation that nobody stated, a tail that is lost
    accept     whether the draft was accepted: min(1, mu / q). A wrong draft law, a wrong rule
    reused     whether the accept coin lies where the draft's uniform did, in the draft's interval of its
               cumulative law: q. One coin for both
    rejected   whether a token in place of a rejected draft is that very draft: never
    draft      as surprisal, of the draft under the law it was drawn from. A mis-stated draft law
    coins      the uniform that drew a token, behind accepted drafts or without any: 1/2
    residual   the same of a token in place of a rejected draft: 1/2. A reused coin

The same rows say how far drafts are from what they are held against: `FIGURES`, means over looked-at
positions that had a draft with a law of its own, but for `target_entropy`, which is over all.

Shapes: B requests, L target positions, K drafts, N looked-at rows, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from blockroll.rollout.calibration.bets import Bets
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.engine.trace import StepTrace
from blockroll.types import Draft, PointMass, Rows, Verdict

FUNCTIONALS = ("surprisal", "draft_set", "tail", "accept", "reused", "rejected", "draft", "coins", "residual")
FIGURES = ("target_entropy", "draft_tv", "draft_kl", "target_surprisal", "draft_surprisal")
BOUND = 12.0  # nats, of a surprisal
TAIL = 0.01  # of the likeliest token's probability
LEAST_LOG = -30.0  # nats: what has no probability in a draft row counts as this
DEAD_BAND = 1e-4  # by which a mean may lie beside its claim: float32 rounds by less, bfloat16 by more


class Calibration:
    """Looks at the steps that it is told of, as an engine's observer; `take` gives what was bet since."""

    def __init__(self, seed: int = 0) -> None:
        """`seed` chooses positions, and never a token."""
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._seen = Evidence()

    def __call__(self, trace: StepTrace) -> None:
        """One step of a batch."""
        for target, (draft, verdict) in zip(trace.targets, trace.parts, strict=True):
            self._look(target, draft, verdict)

    def take(self) -> Evidence:
        """What was bet, and seen, since the last call."""
        seen, self._seen = self._seen, Evidence()
        return seen

    def _look(self, target: Rows, draft: Draft, verdict: Verdict) -> None:
        num_drafts_B = draft.num_drafts_B.cpu().numpy()
        width = target.shape[1]
        offsets_B = self._generator.integers(0, np.minimum(num_drafts_B, width - 1) + 1)
        requests_B = np.arange(len(offsets_B))
        num_committed_B = verdict.num_committed_B.cpu().numpy()
        is_reached_B = offsets_B < num_committed_B
        has_draft_B = offsets_B < num_drafts_B
        self._look_at_drafts(draft, verdict, requests_B[has_draft_B], offsets_B[has_draft_B])
        place = (requests_B[is_reached_B], offsets_B[is_reached_B])
        self._look_at_tokens(target, draft, verdict, *place, has_draft_B[is_reached_B])
        self._look_at_coins(draft, verdict, num_drafts_B, num_committed_B)

    def _look_at_tokens(
        self,
        target: Rows,
        draft: Draft,
        verdict: Verdict,
        requests_N: np.ndarray,
        offsets_N: np.ndarray,
        has_draft_N: np.ndarray,
    ) -> None:
        if not len(requests_N):
            return
        device = verdict.token_ids_BL.device
        at = (torch.as_tensor(requests_N, device=device), torch.as_tensor(offsets_N, device=device))
        target_NV, tokens_N1 = target.at(*at), verdict.token_ids_BL[at][:, None]
        recorded_N = verdict.behavior_logprobs_BL[at].double()
        tail_NV = target_NV < TAIL * target_NV.amax(dim=1, keepdim=True)
        figures = [
            _scaled(recorded_N),
            _mean_surprisal(target_NV),
            tail_NV.gather(1, tokens_N1)[:, 0].double(),
            (target_NV * tail_NV).sum(dim=1),
            -target_NV.xlogy(target_NV).sum(dim=1),
        ]
        surprisal_N, its_mean_N, is_tail_N, tail_mass_N, entropy_N = torch.stack(figures).cpu().numpy()
        self._add(target_entropy=entropy_N)
        self._bet("surprisal", surprisal_N, its_mean_N)
        self._bet("tail", is_tail_N, tail_mass_N)
        if has_draft_N.any():
            has_N = torch.as_tensor(has_draft_N, device=device)
            drafted = (at[0][has_N], at[1][has_N])
            self._look_at_sets(draft, target_NV[has_N], tokens_N1[has_N], drafted)
            self._look_at_acceptance(draft, verdict, drafted)

    def _look_at_sets(
        self, draft: Draft, target_NV: Tensor, tokens_N1: Tensor, at: tuple[Tensor, Tensor]
    ) -> None:
        """Tokens that the draft's law prefers; of a certain draft, that token."""
        is_draft_NV = torch.zeros_like(target_NV, dtype=torch.bool)
        is_draft_NV.scatter_(1, draft.token_ids_BK[at][:, None], True)
        certain_N = _certain(draft, at[0])
        if not isinstance(draft.law, PointMass):
            draft_NV = _draft_rows(draft, at)
            is_draft_NV = torch.where(certain_N[:, None], is_draft_NV, draft_NV > target_NV)
            drawn_N = ~certain_N
            self._look_at_distance(target_NV[drawn_N], draft_NV[drawn_N], tokens_N1[drawn_N])
        figures = [is_draft_NV.gather(1, tokens_N1)[:, 0].double(), (target_NV * is_draft_NV).sum(dim=1)]
        self._bet("draft_set", *torch.stack(figures).cpu().numpy())

    def _look_at_distance(self, target_NV: Tensor, draft_NV: Tensor, tokens_N1: Tensor) -> None:
        """Total variation, KL of the target law from the draft's, and what both make of the token."""
        logs_NV = draft_NV.log().clamp(min=LEAST_LOG)
        figures = [
            (target_NV - draft_NV).abs().sum(dim=1) / 2,
            target_NV.xlogy(target_NV).sum(dim=1) - (target_NV * logs_NV).sum(dim=1),
            -target_NV.gather(1, tokens_N1)[:, 0].log().clamp(min=LEAST_LOG),
            -logs_NV.gather(1, tokens_N1)[:, 0],
        ]
        self._add(**dict(zip(FIGURES[1:], torch.stack(figures).cpu().numpy(), strict=True)))

    def _look_at_acceptance(self, draft: Draft, verdict: Verdict, at: tuple[Tensor, Tensor]) -> None:
        evidence = verdict.evidence
        assert evidence is not None, "each part of a step has its evidence"
        by_coin_N = ~evidence.by_position_B[at[0]]
        at = (at[0][by_coin_N], at[1][by_coin_N])
        expected_N = (evidence.target_probs_BK[at] / evidence.draft_probs_BK[at]).clamp(max=1.0)
        figures = torch.stack([verdict.is_draft_BL[at].double(), expected_N]).cpu().numpy()
        self._bet("accept", *figures)

    def _look_at_drafts(
        self, draft: Draft, verdict: Verdict, requests_N: np.ndarray, offsets_N: np.ndarray
    ) -> None:
        if isinstance(draft.law, PointMass) or not len(requests_N):
            return
        device = draft.token_ids_BK.device
        requests, offsets = (
            torch.as_tensor(requests_N, device=device),
            torch.as_tensor(offsets_N, device=device),
        )
        drawn_N = ~_certain(draft, requests)
        at = (requests[drawn_N], offsets[drawn_N])
        rows_NV, tokens_N1 = _draft_rows(draft, at), draft.token_ids_BK[at][:, None]
        probs_N = rows_NV.gather(1, tokens_N1)[:, 0]
        highs_N = rows_NV.cumsum(dim=1).gather(1, tokens_N1)[:, 0]
        assert verdict.evidence is not None, "each part of a step has its evidence"
        coins_N = verdict.evidence.coins_BK[at]
        is_inside_N = (coins_N < highs_N) & (coins_N >= highs_N - probs_N)
        figures = [_scaled(probs_N.log()), _mean_surprisal(rows_NV), is_inside_N.double(), probs_N]
        surprisal_N, its_mean_N, inside_N, inside_mean_N = torch.stack(figures).cpu().numpy()
        self._bet("draft", surprisal_N, its_mean_N)
        self._bet("reused", inside_N, inside_mean_N)

    def _look_at_coins(
        self, draft: Draft, verdict: Verdict, num_drafts_B: np.ndarray, num_committed_B: np.ndarray
    ) -> None:
        """The uniform of each request's last token, which no accept coin took; by position all have one."""
        evidence = verdict.evidence
        assert evidence is not None, "each part of a step has its evidence"
        last_B1 = (verdict.num_committed_B - 1).clamp(min=0)[:, None]
        is_drawn_B1 = ~verdict.is_draft_BL.gather(1, last_B1) | evidence.by_position_B[:, None]
        figures = torch.stack([evidence.uniforms_BL.gather(1, last_B1)[:, 0], is_drawn_B1[:, 0].double()])
        figures = torch.cat([figures, _is_last_draft(draft, verdict, last_B1).double()[None]])
        uniforms_B, is_drawn_B, is_draft_B = figures.cpu().numpy()
        is_drawn_B = (is_drawn_B > 0) & (num_committed_B > 0) & np.isfinite(uniforms_B)
        by_position_B = evidence.by_position_B.cpu().numpy()
        is_residual_B = is_drawn_B & ~by_position_B & (num_committed_B <= num_drafts_B)
        self._bet("residual", uniforms_B[is_residual_B], 0.5)
        self._bet("rejected", is_draft_B[is_residual_B], 0.0)
        # By position the last token's place depends on the coins themselves: the first one's does not.
        firsts_B = evidence.uniforms_BL[:, 0].cpu().numpy()
        self._bet("coins", firsts_B[by_position_B & np.isfinite(firsts_B)], 0.5)
        self._bet("coins", uniforms_B[is_drawn_B & ~by_position_B & ~is_residual_B], 0.5)

    def _bet(self, name: str, values_N: np.ndarray, means_N: np.ndarray | float) -> None:
        if len(values_N):
            bets = Bets.on(values_N, means_N - DEAD_BAND, means_N + DEAD_BAND)
            self._seen += Evidence(bets={name: bets})

    def _add(self, **figures_N: np.ndarray) -> None:
        self._seen += Evidence(
            sums={name: (float(values_N.sum()), len(values_N)) for name, values_N in figures_N.items()}
        )


def _is_last_draft(draft: Draft, verdict: Verdict, last_B1: Tensor) -> Tensor:
    """Whether each request's last token is what was drafted for its place."""
    if not draft.token_ids_BK.shape[1]:
        return torch.zeros_like(last_B1[:, 0], dtype=torch.bool)
    drafted_B1 = draft.token_ids_BK.gather(1, last_B1.clamp(max=draft.token_ids_BK.shape[1] - 1))
    return (verdict.token_ids_BL.gather(1, last_B1) == drafted_B1)[:, 0]


def _scaled(logprobs_N: Tensor) -> Tensor:
    return (-logprobs_N).clamp(0.0, BOUND) / BOUND


def _mean_surprisal(rows_NV: Tensor) -> Tensor:
    return (rows_NV * _scaled(rows_NV.log())).sum(dim=1)


def _certain(draft: Draft, requests_N: Tensor) -> Tensor:
    is_certain = draft.is_certain
    if isinstance(is_certain, Tensor):
        return is_certain[requests_N]
    return torch.full_like(requests_N, is_certain, dtype=torch.bool)


def _draft_rows(draft: Draft, at: tuple[Tensor, Tensor]) -> Tensor:
    law = draft.law
    assert not isinstance(law, PointMass), "a point mass has no rows"
    return law.at(*at) if isinstance(law, Rows) else law[at].double()
