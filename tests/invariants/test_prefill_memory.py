"""How much memory a long prompt takes while it is written: that of one chunk, however long it is."""

import os
import subprocess
import sys

import pytest

from blockroll.rollout.engine.chunks import MOST_CELLS
from tests.models import SHAPE

LENGTH = 32_768
SERVE = """
import random, torch
from pathlib import Path
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import admission
from blockroll.rollout.engine.chunks import Bound
from blockroll.types import Plan, Request, Sampling
from tests.models import random_policy
torch.set_num_threads(1)
policy = random_policy(max_position_embeddings={length} + 8)
def taken(length):
    engine = Engine(policy, plan=Plan(0), max_prefill_rows={rows})
    prompt = tuple(random.Random(0).choices(range(4, 24), k=length))
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    engine.submit([Request(request_id="r", prompt_ids=prompt, seed=1, sampling=sampling)])
    while engine.num_requests:
        engine.step()
    # Not getrusage: a process that is started begins with the peak of the one that started it.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10
admission.Bound = lambda rows: Bound(rows, {cells})
before = taken(64)
print(taken({length}) - before)
"""


def bytes_taken(length: int, *, cells: int) -> int:
    """Beyond what a process has that served a short prompt."""
    script = SERVE.format(length=length, cells=cells, rows=1 << 20)
    # Of each array its own mapping, so that what is freed counts no more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stdout)


def most_bytes(length: int) -> int:
    """Keys and values; of one chunk the mask, folded for query heads that share keys, as booleans and as
    floats, and as much again as the booleans while they are made; states of its rows, and slack.
    """
    rows = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4
    folds = SHAPE["num_attention_heads"] // SHAPE["num_key_value_heads"]
    return length * rows + folds * MOST_CELLS * (1 + 4 + 1) + (32 << 20)


@pytest.mark.slow
def test_a_prompt_of_32k_tokens_takes_the_memory_of_one_chunk():
    """One forward of all would have a mask of 1 GiB of booleans, and floats of 8."""
    assert bytes_taken(LENGTH, cells=MOST_CELLS) < most_bytes(LENGTH)


@pytest.mark.slow
def test_planted_a_prompt_in_one_forward_takes_more():
    assert bytes_taken(LENGTH // 4, cells=1 << 40) > most_bytes(LENGTH // 4)
