"""transformers, measured beside blockroll's plans on the same work."""

import dataclasses
import threading
from importlib.metadata import version

import pytest
import torch

from blockroll.bench.bench import TRANSFORMERS, run_bench
from blockroll.bench.reference import REFERENCES, ReferenceTask, generate_stock
from blockroll.bench.subjects import ReferenceSubject
from blockroll.policies.loading import load_model, resolve_checkpoint
from blockroll.types import PLAIN, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_tokens
from tests.models import prompts
from tests.unit.bench import OPTIONS

# 5.4 fails as soon as OpenTelemetry is installed; 5.24 was seen to work.
MAY_LACK_CONTINUOUS_BATCHING = tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)


def test_transformers_is_measured_on_the_same_prompts(saved):
    policy, path = saved
    rows = run_bench(policy, prompts(5), [PLAIN], OPTIONS, policy_path=path, against=("generate",))

    stock = [row for row in rows if row.plan == TRANSFORMERS]
    assert [row.batch for row in stock] == [1, 3]
    for row in stock:
        assert row.num_tokens > 0
        assert row.speedup_over_plain is not None
        assert row.acceptance_rate is None


def test_stock_generate_draws_the_greedy_tokens_that_plain_draws(saved):
    policy, path = saved
    requests = make_requests(prompts(6), Sampling(temperature=0.0, max_tokens=8))
    plain = run(policy, requests, PLAIN)

    stock = generate_stock(
        load_model(resolve_checkpoint(path)),
        [request.prompt_ids for request in requests],
        max_tokens=8,
        temperature=0.0,
        eos_token_ids=policy.eos_token_ids,
        seed=0,
    )

    assert_same_tokens(plain, {r.request_id: ids for r, ids in zip(requests, stock, strict=True)}, policy)


def test_every_way_of_transformers_is_measured_or_says_why_not(saved):
    policy, path = saved
    threads = set(threading.enumerate())
    options = dataclasses.replace(OPTIONS, batches=(1, 2), ignore_eos=True)
    rows = run_bench(policy, prompts(5), [PLAIN], options, policy_path=path, against=tuple(REFERENCES))

    cells = {(row.plan, row.batch): row for row in rows}
    names = ["transformers_generate", "transformers_continuous_batching", "transformers_assisted(10)"]
    assert list(cells) == [(name, batch) for batch in (1, 2) for name in ("plain", *names)]
    for (plan, batch), row in cells.items():
        if plan == names[2] and batch == 2:
            assert "batch_size = 1" in row.skipped
            assert row.tokens_per_s is row.speedup_over_plain is row.latency_ms_p50 is None
        elif plan == names[1] and MAY_LACK_CONTINUOUS_BATCHING and row.skipped is not None:
            assert row.tokens_per_s is None
        else:
            assert row.skipped is None
            assert row.mean_length == 6.0
            assert row.latency_ms_p50 <= row.latency_ms_p99
            assert row.acceptance_rate is None
            assert row.law == "target"
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("name", REFERENCES)
def test_every_way_of_transformers_draws_the_greedy_tokens_that_plain_draws(saved, name):
    if name == "continuous_batching" and MAY_LACK_CONTINUOUS_BATCHING:
        pytest.skip("older releases of transformers cannot always decode continuously")
    policy, path = saved
    texts = prompts(1 if name == "assisted" else 6)
    requests = make_requests(texts, Sampling(temperature=0.0, max_tokens=8))
    plain = run(policy, requests, PLAIN)
    task = ReferenceTask(
        batch=6, longest_prompt=12, max_tokens=8, temperature=0.0, eos_token_ids=policy.eos_token_ids
    )
    random_state = torch.get_rng_state()
    reference = REFERENCES[name](load_model(resolve_checkpoint(path)), task)
    try:
        for seed in (0, 1):
            completions = {
                completion.index: tuple(completion.token_ids)
                for completion in reference.complete(texts, seed=seed)
            }
            drawn = {request.request_id: completions[index] for index, request in enumerate(requests)}
            assert_same_tokens(plain, drawn, policy)
    finally:
        reference.close()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_a_reference_refuses_is_a_reason_in_its_own_words():
    def refuse():
        raise RuntimeError("no such device")

    subject = ReferenceSubject("transformers_wild", refuse)

    assert subject.warm_up([]) == "RuntimeError: no such device"
    subject.close()
