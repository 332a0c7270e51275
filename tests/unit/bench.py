"""A small measurement, for tests of the bench."""

from blockroll.bench.bench import BenchOptions
from blockroll.bench.workload import Workload
from blockroll.types import PLAIN, Plan

OPTIONS = BenchOptions(batches=(1, 3), repeats=2, rollouts=4, max_tokens=(6,))
PLANS = [PLAIN, Plan(4)]
WORKLOAD = Workload(batch=3, temperature=1.0, prompt_tokens=None, max_tokens=6)
