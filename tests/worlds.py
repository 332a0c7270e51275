"""Worlds for planners: what steps take and commit is given, so that no test reads a clock."""

import random

from blockroll.rollout.engine.plans import NextStep, StepsTaken
from blockroll.types import PLAIN, Plan

TWO_4, TWO_8, TWO_16 = Plan(4), Plan(8), Plan(16)
FUSED_8 = Plan(8, (0, 8))
PLANS = (PLAIN, TWO_4, TWO_8, TWO_16, FUSED_8)
LOOKED_UP = tuple(Plan(size, drafter="history") for size in (1, 2, 4, 8, 16))


class World:
    """Steps that take and commit what they are told to, with noise that repeats."""

    def __init__(self, *, draft_agrees=0.8, row_cost=0.02, noise=0.0, seed=0, chances=(), look_s=0.0):
        self.draft_agrees = draft_agrees  # chance that a draft is accepted, if those before it were
        self.row_cost = row_cost  # of one more row of one request, where a forward costs 1
        self.noise = noise
        self.warm = set()
        self.rng = random.Random(seed)
        self.chances = chances  # what history expects of each request
        self.look_s = look_s  # of a request
        self.num_looks = 0
        self.lengths = []  # of the latest step

    def seconds(self, plan, batch_size, context=64):
        rows = (
            plan.rows_per_forward * batch_size
            if plan.drafter != "history" or not self.lengths
            else batch_size + sum(self.lengths)
        )
        return 1e-3 * plan.forwards_per_step * (1 + self.row_cost * rows) * (1 + context / 4096)

    def tokens(self, plan):
        return sum(self.draft_agrees**i for i in range(plan.num_drafts + 1))

    def speed(self, plan, batch_size):
        return batch_size * self.tokens(plan) / self.seconds(plan, batch_size)

    def draw_tokens(self, plan, length):
        if length is not None:
            coin = self.rng.random()
            return 1 + sum(coin < chance for chance in self.chances[:length])
        count = 1
        while count <= plan.num_drafts and self.rng.random() < self.draft_agrees:
            count += 1
        return count

    def outlook(self, batch_size, most, least_chance):
        self.num_looks += 1
        kept = [chance for chance in self.chances[:most] if chance >= least_chance]
        return [kept] * batch_size

    def run(self, planner, num_steps, batch_size, context=72):
        """The plans of so many steps; the first of each plan and batch takes twice as long."""
        chosen = []
        while len(chosen) < num_steps:
            before = self.num_looks
            choice = planner.choose(
                NextStep(
                    batch_size=batch_size,
                    context=context,
                    least_saved=4,
                    outlook=lambda name, *asked: self.outlook(batch_size, *asked),
                )
            )
            plan, self.lengths = choice.plan, choice.lengths
            held = min(choice.num_steps, num_steps - len(chosen))
            planner.observe(
                StepsTaken(
                    plan=plan,
                    batch_size=batch_size,
                    step_seconds=[self.draw_seconds(plan, batch_size, context) for _ in range(held)],
                    choice_seconds=self.look_s * batch_size * (self.num_looks - before),
                    num_tokens=sum(
                        self.draw_tokens(plan, self.lengths and self.lengths[slot])
                        for _ in range(held)
                        for slot in range(batch_size)
                    ),
                )
            )
            chosen += [plan] * held
        return chosen

    def draw_seconds(self, plan, batch_size, context):
        seconds = self.seconds(plan, batch_size, context) * self.rng.uniform(1, 1 + self.noise)
        if (plan, batch_size) in self.warm:
            return seconds
        self.warm.add((plan, batch_size))
        return 2 * seconds
