"""What an engine asks of whoever drafts for it: the seam that every source of drafts stands behind.

A plan names its drafter (`Plan.drafter`); the engine is handed drafters and knows none of them. What drafts
cost is the plan's to say (`forwards_per_step`, `rows_per_forward`), where they are verified its kind.

Shapes: B running requests, K drafted tokens, L = K + 1 rows to verify, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blockroll.kernels.rows import Logits, PackedLogits
from blockroll.kernels.transfer import sent
from blockroll.policies.base import Policy, VerifiesPacked
from blockroll.rollout.engine.cache.contract import Ahead, Cache, Window
from blockroll.rollout.engine.outcome import Outcome
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import Draft, Plan, Rollout, Verdict

NO_ORIGIN = (0, 0, 0)  # of drafts that no row of the policy gave, or nobody asks where


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """A step that is not read, of the same plan, before the one to draft for."""

    rows_B: Tensor  # int64, in which of its rows each request is
    ahead: Ahead  # what it puts behind the rows that are committed
    left: object  # what `Drafter.leave` gave


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStep:
    """The step to draft for. Request i stands in slot i of the cache, committed up to its anchor."""

    plan: Plan
    batch: Sequence[RunningRequest]
    policy: Policy
    cache: Cache
    first_logits: Tensor | None  # float32 (B, K + 1, V), where the prefill brought them along
    lengths: Sequence[int] | None = None  # most drafts of each request, by its outlook; None: K
    anchors_B: Tensor | None = None  # int64, where they are on the device already
    behind: Behind | None = None  # what stands before it and is not read; None: nothing

    def anchors(self, first: int = 0) -> Tensor:
        """The last committed tokens of the requests from `first` on, int64 (B, 1)."""
        if self.anchors_B is not None:
            return self.anchors_B[first:, None]
        return sent([[running.anchor] for running in self.batch[first:]], self.policy.device)

    def window(self, num_rows: int, *, first: int = 0, num_pending: int = 0) -> Window:
        """Of the requests from `first` on, for so many rows behind those before their anchors."""
        ahead = None if self.behind is None else self.behind.ahead
        return self.cache.window(first, len(self.batch), num_rows, num_pending=num_pending, ahead=ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRows:
    """Rows of a forward, from which each request's own draft law and coins draw its drafts."""

    logits: Tensor  # float32 (B, K, V); two-forward (B, K + 1, V), the anchor's causal row first
    num_drafts_B: Tensor  # int64, 0..K
    # By request, for the audit: tokens of the text that its rows know, slot of the first, masks in the block.
    # Behind a step that is not read nobody asks for them, and `NO_ORIGIN` stands there.
    origins: Sequence[tuple[int, int, int]]
    num_drafts: Sequence[int] | None = None  # num_drafts_B, where the host knows it without a look


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifying:
    """What the forward that verifies gave."""

    # Float32, causal: row i is the law of the token behind row i. Packed where the window was.
    logits_BLV: Logits
    leftover: object = None  # for `Drafter.leave`


class Drafter(ABC):
    """Drafts a step's tokens. It changes no text, and the cache only by uncommitted rows of its forwards.

    Drafts may depend on committed tokens, and on drafts that are settled: never on a coin of this step, nor
    on a draft that is not settled yet. Then, whatever they are, tokens follow the law that requests ask for.
    A draft that is drawn must not know what the same seed has drawn before, by the same attempts; a point
    mass may: no token depends on it.

    What a drafter remembers of a request from step to step it keeps itself, by `request_id`, and brings up to
    date from the committed text when it proposes: other plans may have decoded steps between, and a step that
    raised is run again. `keep` is for what only the next step, by the same drafter, can use. One object
    serves one engine.
    """

    name: str  # by which plans ask for it
    # Whether it drafts for steps while the one before is not read. Then `propose` goes by `anchors`, `window`
    # and `behind` of its step: what else the host knows of the requests is a step old.
    can_overlap = False

    def finished(self, rollout: Rollout) -> None:
        """A request has left, for whatever reason, aborts too: forget its state, or learn from its text.

        Told before the rollout is returned, whichever plans decoded it. If this raises, the step raises, and
        the next one tells it again, also where an interrupt came behind it.
        """
        return

    def check(self, plan: Plan, policy: Policy) -> None:
        """Raise InvalidInput for a plan this policy cannot follow; warn where it will draft badly."""
        return

    def num_masks_at_start(self, plan: Plan) -> int | None:
        """Masks that texts which begin together should bring along in their prefill; None: nothing."""
        return None

    def outlook(
        self, batch: Sequence[RunningRequest], most: int, least_chance: float
    ) -> Sequence[Sequence[float]] | None:
        """What to expect of drafts for these requests, before a plan is chosen; None: it cannot say.

        By request, for its first draft, its second and so on, up to `most`: the chance that it and all before
        it are accepted. It ends where that falls under `least_chance`. From committed tokens alone.
        """
        return None

    def start(self, step: DraftStep) -> bool:
        """Run what requests need that no step before has drafted for; whether that took a forward."""
        return False

    @abstractmethod
    def propose(self, step: DraftStep) -> DraftRows | Draft:
        """The drafts of a step, and by which law they are drawn.

        Rows, K of them: the engine draws from them, by each request's draft law. A Draft: tokens that were
        drawn already, with the law that they were really drawn from (POINT_MASS for tokens that were looked
        up). Such a draft has no rows to mix, so a mixed law is the target's where it stands. A request may
        have fewer drafts than K, or none; behind them any token id of the vocabulary stands. InvalidDraft
        comes out of the step for anything else, and then nothing was committed. Whoever counts on the host
        says the counts there too (`num_drafts`): only then are rows packed without a wait for a device.

        A Draft is as wide as its longest needs, K at most: what it is wider, the step may compute for all.
        Of width 0 it makes the step a plain one.
        """

    def verify(self, step: DraftStep, ids_BL: Tensor, window: Window) -> Verifying:
        """The forward over anchors and drafts; one that drafts in the same forward leaves something over.

        A packed window lets a policy leave out the rows behind a request's drafts; one that computes them
        all the same has only the others written.
        """
        packing, policy = window.packing, step.policy
        if packing is None or not isinstance(policy, VerifiesPacked):
            return Verifying(logits_BLV=policy.verify_logits(ids_BL, window))
        return Verifying(
            logits_BLV=PackedLogits(
                logits_NV=policy.verify_packed(ids_BL, packing, window),
                starts_B=packing.starts_B,
                num_rows_B=packing.num_rows_B,
                width=packing.width,
            )
        )

    def leave(self, step: DraftStep, leftover: object, verdict: Verdict) -> object:
        """What is left over for the next step, once the verdict is there, on the device alone."""
        return leftover

    def levels(self, step: DraftStep) -> Sequence[int | None]:
        """By request, the level of the proposal that its drafts came from; None: they came from none.

        Asked when the step is read, with what `keep` gave for the step before still in place.
        """
        return [None] * len(step.batch)

    def keep(self, step: DraftStep, left: object, outcome: Outcome) -> Sequence[object | None]:
        """By request, what `RunningRequest.proposal` holds once the verdict is final; None: nothing.

        `left` is what `leave` gave, `outcome` the verdict on the host: to ask tensors would be one wait more.
        """
        return [None] * len(step.batch)
