"""The contract a policy must keep for its rollouts to be lossless, measured on one checkpoint.

A few random prompts go through the real policy and a real cache, and each rule of the contract becomes one
measured figure beside the largest (or least) that is allowed. It judges the forwards of a policy; laws and
samplers are not its business. The policy is left bit for bit as it was.

Shapes: B prompts, K drafted tokens, L = K + 1 rows of a block (an anchor and its drafts), V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockroll.kernels.block_attention import RowLayout
from blockroll.policies.hf import HFPolicy
from blockroll.policy_check.probe import LIKELY, PolicyProbe, cache_gap, make_probe, num_tokens, other_masks

DEFAULT_DRAFTS = 4  # of a policy that was trained for no number of drafts
STALE_POISON = 30.0  # finite, because a dense mask multiplies unseen values by zero
DRAFT_MARGIN = 10  # times the bound: what drafts are does not touch the law of what is committed
LEAST_CHANGE = 1e-3  # of logits that must differ


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One rule of the contract and its evidence."""

    name: str
    passed: bool
    measured: float | None  # None: the check raised, `detail` holds the error
    allowed: float | None  # the largest `measured` that passes, or the least if `is_minimum`
    is_minimum: bool = False
    detail: str = ""  # what was compared, and what to do if it failed

    @property
    def comparison(self) -> str:
        """Measured beside allowed, for people."""
        if self.measured is None or self.allowed is None:
            return "error"
        return f"{self.measured:.1e} (at {'least' if self.is_minimum else 'most'} {self.allowed:.2g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReport:
    """What was measured on one policy, and what was not."""

    subject: str  # family, dtype, device and number of drafts
    results: tuple[CheckResult, ...]
    not_checked: tuple[str, ...]  # a sentence each, with the reason

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(result.name for result in self.results if not result.passed)

    @property
    def conclusion(self) -> str:
        """One sentence for whoever wants to train on this policy's rollouts."""
        if self.passed:
            return f"The policy keeps the contract: all {len(self.results)} checks passed."
        return (
            f"The policy breaks the contract: {len(self.failures)} of {len(self.results)} checks failed "
            f"({'; '.join(self.failures)}). Do not train on its rollouts."
        )

    def __str__(self) -> str:
        lines = [f"Policy check of {self.subject}"]
        for result in self.results:
            lines.append(f"  {'ok  ' if result.passed else 'FAIL'}  {result.name}: {result.comparison}")
            lines += [f"        {result.detail}"] if result.detail else []
        lines += [f"  not checked: {sentence}" for sentence in self.not_checked]
        return "\n".join([*lines, self.conclusion])


@torch.inference_mode()
def check_policy(
    policy: HFPolicy,
    *,
    num_drafts: int | None = None,
    prompts: Sequence[Sequence[int]] = (),
    seed: int = 0,
) -> PolicyReport:
    """Measure whether a policy's forwards let rollouts be lossless, on its own device and in its own dtype.

    `num_drafts` is K of the blocks; None takes what the policy was trained for. `prompts` are token ids to
    check it on in place of random ones: the longest, the shortest and some between, six at most; they decide
    whether windows and scaled positions are reached. Equal seeds give equal random tokens. A check
    that raises has failed. Equal log-probabilities may lie 1e-4 apart in float32; below
    float32 0.25, and there rare tokens are left out. Where rounding alone moves the model's own forward by a
    third of that or more, three times its rounding is allowed. Nothing may decode with the policy meanwhile.
    InvalidInput: K is below 1, or the context has no room for the longest prompt and two blocks.
    """
    if num_drafts is None:
        num_drafts = policy.trained_drafts or DEFAULT_DRAFTS
    probe = make_probe(policy, num_drafts=num_drafts, prompts=prompts, seed=seed)
    checks = _CHECKS | (_DRAFT_CHECKS if policy.can_draft else {})
    return PolicyReport(
        subject=f"{policy.model.config.model_type} in {probe.dtype_name} on {policy.device}, "
        f"blocks of {num_drafts} drafts",
        results=tuple(_run(name, check, probe) for name, check in checks.items()),
        not_checked=tuple(_not_checked(probe)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evidence:
    """What a check measured; the fields are those of CheckResult."""

    measured: float
    allowed: float
    detail: str = ""
    is_minimum: bool = False
    is_valid: bool = True  # False: failed whatever was measured, for the reason in `detail`

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        holds = self.measured >= self.allowed if self.is_minimum else self.measured <= self.allowed
        return holds and self.is_valid


def _run(name: str, check: Callable[[PolicyProbe], _Evidence], probe: PolicyProbe) -> CheckResult:
    try:
        evidence = check(probe)
    except Exception as error:  # noqa: BLE001 - a broken policy may raise anything; it fails the check by name
        detail = f"{type(error).__name__}: {error}"
        return CheckResult(name=name, passed=False, measured=None, allowed=None, detail=detail)
    return CheckResult(
        name=name,
        passed=evidence.passed,
        measured=evidence.measured,
        allowed=evidence.allowed,
        is_minimum=evidence.is_minimum,
        detail=evidence.detail,
    )


def _not_checked(probe: PolicyProbe) -> Iterator[str]:
    policy = probe.policy
    longest = max(map(len, probe.prefixes)) + 2 * probe.width
    yield f"texts longer than {longest} tokens; the context holds {policy.max_length}"
    if not probe.is_window_reached:
        yield f"attention beyond the sliding window of {probe.window} tokens; no prompt was longer"
    if not policy.can_draft:
        yield "drafts and proposals; the policy has neither a draft adapter nor a mask token"
    if policy.tokenizer is None:
        yield "whether the tokenizer fits; the policy was loaded without one"
    if not probe.is_float32:
        yield (
            f"the bounds of float32, and tokens less likely than {LIKELY:g}; {probe.dtype_name} rounds too "
            "coarsely: check the weights in float32 too"
        )


def _logprob_evidence(probe: PolicyProbe, logits: Tensor, reference: Tensor, detail: str) -> _Evidence:
    measured = probe.logprob_gap(logits, reference)
    return _Evidence(measured=measured, allowed=probe.logprob_bound, detail=detail)


def _verify_equals_stock(probe: PolicyProbe) -> _Evidence:
    logits_BLV = probe.verify(probe.prefilled(), probe.block_BL)
    longest = max(map(len, probe.prefixes))
    detail = (
        f"log-probabilities over 0 to {longest} cached tokens, against {probe.policy.stock_attention}; "
        f"rounding alone moves them by {probe.rounding:.1e}"
    )
    if probe.window is not None:
        reached = "reached" if probe.is_window_reached else "not reached"
        detail += f"; sliding window of {probe.window} {reached}"
    return _logprob_evidence(probe, logits_BLV, probe.stock_logits_BLV, detail)


def _row_equals_itself_alone(probe: PolicyProbe) -> _Evidence:
    together_BLV = probe.verify(probe.prefilled(), probe.block_BL)
    alone = [
        probe.verify(probe.prefilled([prefix]), probe.block_BL[row : row + 1])
        for row, prefix in enumerate(probe.prefixes)
    ]
    return _logprob_evidence(probe, together_BLV, torch.cat(alone), "log-probabilities")


def _chunked_prefill_equals_whole(probe: PolicyProbe) -> _Evidence:
    cache = probe.empty_cache(len(probe.prefixes))
    halves = [len(prefix) // 2 for prefix in probe.prefixes]
    probe.extend(cache, [prefix[:half] for prefix, half in zip(probe.prefixes, halves, strict=True)])
    probe.extend(cache, [prefix[half:] for prefix, half in zip(probe.prefixes, halves, strict=True)])
    return _Evidence(
        measured=cache_gap(cache, probe.prefilled()),
        allowed=probe.cache_bound,
        detail="keys and values, as a share of the layer's largest",
    )


def _cache_equals_recompute(probe: PolicyProbe) -> _Evidence:
    """Two steps, as an engine takes them; in each, every prompt accepts another number of drafts."""
    policy, texts = probe.policy, [list(prefix) for prefix in probe.prefixes]
    cache = probe.prefilled()
    for step, block_BL in enumerate(probe.blocks_SBL):
        size, width = block_BL.shape
        if not policy.can_draft:
            probe.verify(cache, block_BL)
        elif step == 0:
            probe.draft(cache, block_BL[:, 0], probe.num_drafts)
            probe.verify(cache, block_BL)
        else:
            policy.fused_rows(block_BL, (0, probe.num_drafts), cache.window(0, size, 3 * width))
        kept = [(row + step * probe.num_drafts) % width + 1 for row in range(size)]
        rows = [row[:num_kept] for row, num_kept in zip(block_BL.tolist(), kept, strict=True)]
        cache.commit(0, rows)
        for text, row in zip(texts, rows, strict=True):
            text += row
    return _Evidence(
        measured=cache_gap(cache, probe.prefilled(texts)),
        allowed=probe.cache_bound,
        detail=f"after two steps of 0 to {probe.num_drafts} accepted drafts; a share of the layer's largest",
    )


def _vocabulary_fits(probe: PolicyProbe) -> _Evidence:
    policy = probe.policy
    num_rows = probe.verify(probe.prefilled(), probe.block_BL[:, :1]).shape[-1]
    size = num_tokens(policy)
    named = [*policy.eos_token_ids, *([] if policy.mask_token_id is None else [policy.mask_token_id])]
    homeless = max(0, (size or 0) - num_rows) + sum(token_id >= num_rows for token_id in named)
    detail = f"{num_rows} logits"
    if size is not None:
        detail += f" for {size} tokens of the tokenizer"
    detail += f"; end tokens {list(policy.eos_token_ids)}"
    if not policy.eos_token_ids:
        detail += ": no rollout would ever end; set eos_token_id in the generation config"
    if homeless:
        detail += f"; {homeless} tokens have no logits: resize the embeddings or take the right tokenizer"
    if num_rows != policy.vocab_size:
        detail += f"; the config says {policy.vocab_size}"
    is_valid = bool(policy.eos_token_ids) and num_rows == policy.vocab_size
    return _Evidence(measured=float(homeless), allowed=0.0, detail=detail, is_valid=is_valid)


def _fused_verify_equals_stock(probe: PolicyProbe) -> _Evidence:
    cache, (size, width) = probe.prefilled(), probe.block_BL.shape
    levels = (0, probe.num_drafts)
    fused = probe.policy.fused_rows(probe.block_BL, levels, cache.window(0, size, 3 * width))
    detail = f"with proposals for 0 and {probe.num_drafts} accepted drafts in the same forward"
    return _logprob_evidence(probe, fused.verify_logits_BLV, probe.stock_logits_BLV, detail)


def _causal_rows_ignore_masks(probe: PolicyProbe) -> _Evidence:
    """The causal rows of a draft, a verify and a fused forward, twice: masks and stale rows differ."""
    policy, (size, width) = probe.policy, probe.block_BL.shape

    def causal_rows_and_drafts(stale: float) -> tuple[Tensor, Tensor]:
        cache = probe.prefilled()
        cache.fill_stale(stale)
        draft_BLV = probe.draft(cache, probe.block_BL[:, 0], probe.num_drafts)
        cache.fill_stale(stale)
        verify_BLV = probe.verify(cache, probe.block_BL)
        cache.fill_stale(stale)
        window = cache.window(0, size, 3 * width)
        fused = policy.fused_rows(probe.block_BL, (0, probe.num_drafts), window)
        return torch.cat([draft_BLV[:, :1], verify_BLV, fused.verify_logits_BLV], dim=1), draft_BLV[:, 1:]

    causal_rows, drafts = causal_rows_and_drafts(0.0)
    with other_masks(policy):
        other_rows, other_drafts = causal_rows_and_drafts(STALE_POISON)
    is_valid = not torch.equal(drafts, other_drafts)
    detail = "logits, with other masks and poisoned stale rows"
    if not is_valid:
        detail = "other masks changed no draft: drafts are not made from the masks that were changed"
    allowed = 0.0
    if any(name.endswith("experts") for name, _ in policy.model.named_modules()):
        allowed = probe.at_least_rounding(1e-5) if probe.is_float32 else probe.logprob_bound
        detail += "; experts get groups of other sizes, so their sums round differently"
    measured = float((causal_rows - other_rows).abs().max())
    return _Evidence(measured=measured, allowed=allowed, detail=detail, is_valid=is_valid)


def _anchor_keys_see_no_mask(probe: PolicyProbe) -> _Evidence:
    anchors_B1 = probe.block_BL[:, :1]
    drafted, causal = probe.prefilled(), probe.prefilled()
    probe.draft(drafted, anchors_B1[:, 0], probe.num_drafts)
    probe.verify(causal, anchors_B1)
    for cache in (drafted, causal):
        cache.commit(0, anchors_B1.tolist())
    detail = "keys and values a draft forward writes for it, as a share of the layer's largest"
    return _Evidence(measured=cache_gap(drafted, causal), allowed=probe.cache_bound, detail=detail)


def _anchor_law_equals_stock(probe: PolicyProbe) -> _Evidence:
    behind_cache_BLV = probe.draft(probe.prefilled(), probe.block_BL[:, 0], probe.num_drafts)
    whole_BLV = probe.draft_whole_texts(probe.num_drafts)
    detail = (
        "log-probabilities, behind cached rows and of whole texts; a step settles its first token by them"
    )
    rows_BLV = torch.cat([behind_cache_BLV[:, :1], whole_BLV[:, :1]])
    return _logprob_evidence(probe, rows_BLV, probe.stock_logits_BLV[:, :1].repeat(2, 1, 1), detail)


def _drafts_look_both_ways(probe: PolicyProbe) -> _Evidence:
    """Slot 0, with the later masks in sight and hidden; shapes are equal, so rounding is too."""
    policy, anchors_B = probe.policy, probe.block_BL[:, 0]
    num_masks = probe.num_drafts + 1  # at least two
    both_ways_BLV = probe.draft(probe.prefilled(), anchors_B, num_masks)
    alone = RowLayout(num_clean=1, width=1, levels=(0,) * num_masks)  # each mask sees the anchor and itself
    window = probe.prefilled().window(0, len(anchors_B), num_masks + 1)
    alone_BLV = policy.logits(policy.hidden(anchors_B[:, None], alone, window))
    return _Evidence(
        measured=float((both_ways_BLV[:, 1] - alone_BLV[:, 1]).abs().max()),
        allowed=LEAST_CHANGE,
        detail="change of the first draft's logits when the later masks are hidden from it",
        is_minimum=True,
    )


def _proposals_equal_fresh_drafts(probe: PolicyProbe) -> _Evidence:
    policy, block_BL = probe.policy, probe.block_BL
    size, width = block_BL.shape
    levels = tuple(range(width))
    window = probe.prefilled().window(0, size, width * (width + 1))
    fused = policy.fused_rows(block_BL, levels, window)
    cache = probe.prefilled()
    probe.verify(cache, block_BL)
    cache.commit(0, block_BL.tolist())
    proposals, fresh_drafts = [], []
    # From the last level down: a draft forward overwrites the rows from its anchor on.
    for level in reversed(levels):
        for slot, prefix in enumerate(probe.prefixes):
            cache.keep(slot, len(prefix) + level)
        fresh_drafts.append(probe.draft(cache, block_BL[:, level], width)[:, 1:])
        proposals.append(policy.proposal_logits(fused.proposal_states_BPLW[:, level]))
    detail = f"log-probabilities of {width} masks after 0 to {probe.num_drafts} accepted drafts"
    measured = probe.logprob_gap(torch.cat(proposals), torch.cat(fresh_drafts))
    return _Evidence(measured=measured, allowed=DRAFT_MARGIN * probe.logprob_bound, detail=detail)


_CHECKS: dict[str, Callable[[PolicyProbe], _Evidence]] = {
    "verify rows equal the stock forward": _verify_equals_stock,
    "a batch row equals itself alone": _row_equals_itself_alone,
    "chunked prefill equals whole prefill": _chunked_prefill_equals_whole,
    "the cache after partial accepts equals a recompute": _cache_equals_recompute,
    "vocabulary and end tokens fit": _vocabulary_fits,
}
_DRAFT_CHECKS: dict[str, Callable[[PolicyProbe], _Evidence]] = {
    "fused verify rows equal the stock forward": _fused_verify_equals_stock,
    "causal rows ignore what masks hold": _causal_rows_ignore_masks,
    "the anchor's keys see no mask": _anchor_keys_see_no_mask,
    "the anchor's law equals the stock forward": _anchor_law_equals_stock,
    "drafts look both ways": _drafts_look_both_ways,
    "proposals equal fresh drafts": _proposals_equal_fresh_drafts,
}
