"""What a request needs to run: its stop rule and a walk through its constraint."""

import secrets

from blockroll.errors import BlockrollError, InvalidInput
from blockroll.policies.base import Policy
from blockroll.policies.ends import special_token_ids
from blockroll.rollout.engine.ends import Decode, StopRule
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import Guide, Request


class Starter:
    """Makes running requests, for one policy and its limits."""

    def __init__(
        self, policy: Policy, limits: Limits, decode: Decode | None, *, numbers_servings: bool = False
    ) -> None:
        """`decode` gives the text that stop strings are looked for in; None: the policy's own tokenizer's.

        `numbers_servings` gives each serving of a seed attempts of its own. Where looked-up drafts and drawn
        ones take turns, a text that the seed drew before may be a draft, and decides where steps begin: it
        must not know the coins that the drawn ones are about to meet.
        """
        self._policy, self._limits, self._numbers_servings = policy, limits, numbers_servings
        self._decode = _text_of(policy) if decode is None else decode

    def start(self, request: Request) -> RunningRequest:
        """The request behind its prefix, if it has one. InvalidInput if it cannot be served."""
        if request.sampling.stop and self._decode is None:
            raise InvalidInput(
                f"request {request.request_id!r} has stop strings, but the engine has no tokenizer"
            )
        running = RunningRequest(request, self._stop_rule(request), self.guide(request))
        if self._numbers_servings:
            running.first_attempt = secrets.randbits(30)
        return running

    def guide(self, request: Request) -> Guide | None:
        """A walk through the constraint of its own, from its first token."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        name = f"request {request.request_id!r}"
        try:
            guide = constraint.start(self._policy.vocab_size, self._policy.tokenizer, self._ends(request))
        except BlockrollError:
            raise
        except Exception as error:
            raise InvalidInput(f"{name} has a constraint that cannot start: {error!r}") from error
        if guide is None:
            raise InvalidInput(f"{name} has a constraint whose start() gave no guide; it must return one")
        return guide

    def _ends(self, request: Request) -> frozenset[int]:
        """Tokens that end a text and are no part of it: the policy's, and stop tokens that are special."""
        ends, stop = frozenset(self._policy.eos_token_ids), frozenset(request.sampling.stop_token_ids)
        return ends if stop <= ends else ends | (stop & special_token_ids(self._policy.tokenizer))

    def _stop_rule(self, request: Request) -> StopRule:
        ends = () if request.sampling.ignore_eos else self._policy.eos_token_ids
        return StopRule(
            stop_token_ids=frozenset((*ends, *request.sampling.stop_token_ids)),
            end_token_ids=self._ends(request),
            stop=request.sampling.stop,
            min_tokens=request.sampling.min_tokens,
            max_tokens=min(request.sampling.max_tokens, self._limits.room(len(request.prompt_ids))),
            decode=self._decode,
        )


def _text_of(policy: Policy) -> Decode | None:
    """Text of tokens, special ones included: a stop string may be one of them."""
    tokenizer = policy.tokenizer
    if tokenizer is None:
        return None
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))
