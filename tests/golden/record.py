"""Records rollouts of fixed plans on the shipped policy and on random ones of every family."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from blockroll import Engine, HFPolicy, JsonSchema, Law, Plan, Regex, Request, Rollout, Sampling
from tests.models import FAMILIES, adapted_policy, prompts, random_policy

PATH = Path(__file__).with_name("rollouts.jsonl")
PLANS = ("plain", "two_forward(8)", "fused(8,[0,4,8])", "two_forward(3)")
TEXTS = ("12+35-7=?\n", "8*4=?\n", "(3+4)*5=?\n", "99-1=?\n")
SAMPLINGS = {
    "target": Sampling(max_tokens=48),
    "cool": Sampling(temperature=0.6, max_tokens=48),
    "greedy": Sampling(temperature=0, max_tokens=32),
    "mixed": Sampling(law=Law(0.5), max_tokens=48),
    "point drafts": Sampling(draft_temperature=0, max_tokens=48),
    "truncated": Sampling(top_k=20, top_p=0.9, min_p=0.02, max_tokens=48),
    "penalized": Sampling(
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={40: 1.0},
        max_tokens=48,
    ),
    "masked": Sampling(min_tokens=20, bad_words_ids=((52,), (51, 53)), max_tokens=40),
    "stop string": Sampling(stop=("=",), max_tokens=48),
    "processors": Sampling(
        logits_processors=tuple(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])), max_tokens=32
    ),
    "regex": Sampling(constraint=Regex("[0-9]{1,3}(\\+[0-9]{1,3}){0,3}"), max_tokens=32),
    "schema": Sampling(constraint=JsonSchema({"enum": ["yes", "no", "maybe"]}), max_tokens=32),
}


def rollouts(policy: HFPolicy, plan: str, requests: list[Request]) -> list[Rollout]:
    """In the order of the requests; three run at a time, so that slots change hands."""
    engine = Engine(
        policy,
        plan=Plan.parse(plan, default_drafts=policy.trained_drafts or 1),
        max_batch_size=3,
        decode=policy.decode if policy.tokenizer is not None else None,
    )
    engine.submit(requests)
    finished = {}
    while engine.num_requests:
        finished |= {rollout.request.request_id: rollout for rollout in engine.step().finished}
    return [finished[request.request_id] for request in requests]


def cases() -> Iterator[tuple[str, HFPolicy, list[Rollout]]]:
    """Name, policy and rollouts of everything recorded."""
    tiny = HFPolicy.from_pretrained("tiny", device="cpu")
    for plan in PLANS:
        for name, sampling in SAMPLINGS.items():
            requests = [
                Request(
                    request_id=f"{name}-{index}",
                    prompt_ids=tuple(tiny.tokenizer(text)["input_ids"]),
                    seed=1_000 * index + 7,
                    sampling=sampling,
                )
                for index, text in enumerate(TEXTS)
            ]
            yield f"tiny {plan} {name}", tiny, rollouts(tiny, plan, requests)
    for family in FAMILIES:
        for kind, make in (("full", random_policy), ("adapter", adapted_policy)):
            policy = make(family)
            for plan in ("plain", "two_forward(4)", "fused(4,[0,2,4])"):
                requests = [
                    Request(
                        request_id=f"r{index}",
                        prompt_ids=prompt,
                        seed=index,
                        sampling=Sampling(max_tokens=24, law=Law(0.7) if index % 2 else Law()),
                    )
                    for index, prompt in enumerate(prompts(5))
                ]
                yield f"{family} {kind} {plan}", policy, rollouts(policy, plan, requests)
                resumed = [
                    replace(
                        request, prefix=rollout.as_prefix(), sampling=replace(request.sampling, max_tokens=32)
                    )
                    for request, rollout in zip(requests, rollouts(policy, plan, requests), strict=True)
                    if rollout.finish_reason == "length"
                ]
                yield f"{family} {kind} {plan} resumed", policy, rollouts(policy, plan, resumed)


def as_row(name: str, rollout: Rollout) -> dict[str, object]:
    """What must stay the same of one rollout."""
    return {
        "case": name,
        "request": rollout.request.request_id,
        "tokens": rollout.token_ids,
        "policy_logprobs": [round(value, 6) for value in rollout.policy_logprobs],
        "behavior_logprobs": [round(value, 6) for value in rollout.behavior_logprobs],
        "finish_reason": rollout.finish_reason,
        "counts": counts(rollout),
    }


def counts(rollout: Rollout) -> list[int]:
    """The work behind a rollout."""
    stats = rollout.stats
    return [stats.num_forwards, stats.num_verify_steps, stats.num_drafted, stats.num_accepted]


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    with PATH.open("w") as file:
        for name, _, recorded in cases():
            file.writelines(json.dumps(as_row(name, rollout)) + "\n" for rollout in recorded)


if __name__ == "__main__":
    main()
