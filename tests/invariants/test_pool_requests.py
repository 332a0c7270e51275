"""What one request brings along is that request's failure: its call, its group and other calls go on."""

import dataclasses
import re

import pytest

from blockroll import RolloutPool
from blockroll.errors import InvalidInput
from blockroll.rollout.pool import router
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.invariants.test_calls import asked, check_complete, is_idle
from tests.invariants.test_pool import SAMPLING, local_pool
from tests.invariants.test_request_faults import Anything, Ends, Starts
from tests.models import prompts

CANNOT_START = {
    "a constraint that raises": (
        {"constraint": Starts(Ends("no such tool"))},
        "InvalidInput: request 'bad' has a constraint that cannot start: Ends",
    ),
    "a constraint without a guide": (
        {"constraint": Starts(None)},
        "InvalidInput: request 'bad' .* gave no guide",
    ),
    "stop strings without a tokenizer": ({"stop": ("zz",)}, "InvalidInput: request 'bad' has stop strings"),
}


@pytest.mark.parametrize("fault", CANNOT_START)
def test_a_request_that_no_replica_can_start_ends_by_name_and_alone(fault):
    options, message = CANNOT_START[fault]
    with local_pool(requests_per_replica=4) as pool:
        requests = [dataclasses.replace(each, group_id="g") for each in asked(6, seed=1)]
        bad = dataclasses.replace(
            requests[2], request_id="bad", sampling=dataclasses.replace(requests[2].sampling, **options)
        )
        others = pool.generate(asked(6, seed=2))
        finished = [next(others)]
        rollouts = list(pool.generate([*requests[:2], bad, *requests[2:]]))
        (failed,) = (each for each in rollouts if each.error)
        check_complete(requests, [each for each in rollouts if each is not failed])
        assert (failed.request, failed.finish_reason, failed.token_ids) == (bad, "error", ())
        assert re.match(message, failed.error), failed.error
        check_complete(asked(6, seed=2), [*finished, *others])
        assert is_idle(pool)


def test_a_request_that_cannot_go_on_elsewhere_keeps_what_it_had_committed():
    """Its constraint walks along what was committed before the next replica can take it, and raises."""
    with local_pool() as pool:
        plain = make_requests(prompts(2), Sampling(max_tokens=40, ignore_eos=True))
        (whole,) = pool.generate([plain[0]])
        begun = dataclasses.replace(
            whole.as_prefix(),
            **{
                column: getattr(whole, column)[:9]
                for column in ("token_ids", "policy_logprobs", "behavior_logprobs", "policy_versions")
            },
        )
        sampling = dataclasses.replace(plain[0].sampling, constraint=Anything("advance", after=0))
        bad = dataclasses.replace(plain[0], sampling=sampling, prefix=begun)
        rollouts = {each.request: each for each in pool.generate([bad, plain[1]])}
        failed = rollouts[bad]
        assert failed.error == "RequestFailed: it cannot be started: Ends('advance') for request 'r0'"
        assert (failed.finish_reason, failed.token_ids) == ("error", whole.token_ids[:9])
        assert rollouts[plain[1]].error is None


def test_where_groups_were_is_remembered_of_so_many_and_no_more(monkeypatch):
    monkeypatch.setattr(router, "_MOST_HOMES", 8)
    with local_pool() as pool:
        for turn in range(3):
            requests = [
                dataclasses.replace(each, group_id=f"{turn} {index}")
                for index, each in enumerate(make_requests(prompts(7), SAMPLING))
            ]
            list(pool.generate(requests))
        assert list(pool._router._homes) == ["1 6", *(f"2 {index}" for index in range(7))]


def test_a_text_that_the_cache_has_no_room_for_is_refused_before_anything_starts():
    with RolloutPool.from_pretrained("tiny", device="cpu", plan="plain", max_cache_rows=96) as pool:
        fits = pool.requests(["1+1="], Sampling(max_tokens=16))
        too_long = [dataclasses.replace(fits[0], request_id="long", sampling=Sampling(max_tokens=200))]
        with pytest.raises(InvalidInput, match=r"may become a text of \d+ tokens, .*memory_fraction"):
            pool.generate([*fits, *too_long])
        assert [rollout.finish_reason for rollout in pool.generate(fits)] != ["error"]
