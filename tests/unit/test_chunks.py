"""Who joins, and whose rows a chunk is of: integers, over thousands of random schedules."""

import random
from dataclasses import dataclass, field

import pytest

from blockroll.rollout.engine.chunks import MOST_CELLS, Bound, Turns
from blockroll.rollout.engine.scheduler import Scheduler


def test_short_prompts_are_ended_before_a_long_one_and_never_twice_in_a_row():
    turns, bound = Turns(), Bound(100)
    held, lacking = [0, 0, 0], [1000, 30, 40]
    first = turns.choose(held, lacking, bound)
    assert (first.texts, first.num_rows, first.is_whole) == ((1, 2), 40, True)
    second = turns.choose([0, 0, 0], [1000, 30, 40], bound)  # two others, as short
    assert (second.texts, second.num_rows, second.is_whole) == ((0,), 100, False)
    third = turns.choose([100, 0], [900, 100], bound)
    assert (third.texts, third.is_whole) == ((1,), True)


def test_what_fits_one_chunk_is_one_chunk():
    choice = Turns().choose([0, 16, 0], [20, 4, 30], Bound(90))
    assert (choice.texts, choice.num_rows, choice.is_whole) == ((0, 1, 2), 30, True)
    choice = Turns().choose([0, 16, 0], [20, 4, 30], Bound(89))
    assert (choice.texts, choice.num_rows) == ((0, 1), 20)


@pytest.mark.parametrize("num_held", [0, 1, 500, 4096, 30_000, 1 << 20, 1 << 25])
def test_no_chunk_has_more_rows_or_cells_than_its_bound_but_one_row_always_fits(num_held):
    bound = Bound(4096)
    rows = bound.rows_behind(num_held)
    assert 1 <= rows <= 4096
    assert rows == 1 or rows * (num_held + rows) <= MOST_CELLS
    assert bound.has(1, rows, num_held + rows)
    if rows < 4096:
        assert not bound.has(1, rows + 1, num_held + rows + 1)
    assert Bound(1).has(1, 1, 1 << 40)


@dataclass
class Asked:
    """A request of a random schedule. Siblings have one prompt: the rows of one are those of all."""

    name: str
    priority: int
    prompt: int
    arrival: int
    num_lacking: int
    due: int | None = None  # chunks until it runs at the latest; None: not known
    num_chunks: int = 0


@dataclass
class World:
    """Steps a scheduler as an engine does, with a model of the cache beside it, and checks every step."""

    rng: random.Random
    scheduler: Scheduler
    is_aging: bool = True  # whether the same long prompt is not passed over again and again
    asked: dict[str, Asked] = field(default_factory=dict)
    slots: list[str] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    num_asked: int = 0

    def __post_init__(self):
        self.rows, self.turns = self.rng.randint(4, 40), Turns()
        self.priorities = self.rng.choice([(0,), (0,), (0, 0, 1), (-1, 0, 5)])

    def submit(self):
        prompt = self.num_asked
        self.lengths[prompt] = self.rng.choice([0, 1, 3, 10, 60]) * self.rng.randint(0, 3)
        for _ in range(self.rng.choice([1, 1, 4])):
            name = f"r{self.num_asked}"
            self.num_asked += 1
            priority = self.rng.choice(self.priorities)
            self.asked[name] = Asked(name, priority, prompt, self.num_asked, self.lengths[prompt])
            self.scheduler.submit(name, priority=priority)

    def step(self):
        waiting = self.scheduler.waiting
        joined = self.scheduler.join()
        assert joined == waiting[: len(joined)]
        ranks = [(-self.asked[name].priority, self.asked[name].arrival) for name in waiting]
        assert ranks == sorted(ranks), "somebody was passed over"
        self.slots += joined
        if self.scheduler.joining:
            self.chunk()
        self.check()

    def chunk(self):
        num_running, joining = len(self.scheduler.running), self.scheduler.joining
        order = [joining[place] for place in self.scheduler.ranks(joining)]
        leaders = {}
        for name in order:
            leaders.setdefault(self.asked[name].prompt, name)
        lacking = {name: self.lacking(name) for name in leaders.values() if self.lacking(name)}
        whole = [name for name in joining if not self.lacking(name)]
        if lacking:
            self.set_due(list(lacking))
            held = [self.lengths[self.asked[name].prompt] - number for name, number in lacking.items()]
            if not self.is_aging:
                self.turns = Turns()
            choice = self.turns.choose(held, list(lacking.values()), Bound(self.rows))
            assert len(choice.texts) * choice.num_rows <= self.rows, "more than one chunk in a step"
            for number in choice.texts:
                name = list(lacking)[number]
                written = min(choice.num_rows, lacking[name])
                for sibling in self.asked.values():
                    if sibling.prompt == self.asked[name].prompt:
                        sibling.num_lacking -= written
            whole = [name for name in joining if not self.lacking(name)]
        places = [joining.index(name) for name in whole]
        order = [*places, *(place for place in range(len(joining)) if place not in places)]
        self.scheduler.arrange(num_running, order)
        self.slots[num_running:] = [joining[place] for place in order]
        self.scheduler.start(len(whole))
        self.began += whole

    def lacking(self, name):
        return self.asked[name].num_lacking

    def set_due(self, order):
        """Where all have one priority: twice the chunks of those before it and its own."""
        if len(set(self.priorities)) > 1:
            return
        ahead = 0
        for name in order:
            each = self.asked[name]
            ahead += 2 * -(-each.num_lacking // self.rows)
            each.due = ahead if each.due is None else each.due
            each.num_chunks += 1
            assert each.num_chunks <= each.due, f"{name} starves"

    def leave(self, name):
        """As the cache moves rows: the last that runs into the hole, the last of all behind it."""
        num_running = len(self.scheduler.running)
        slot = self.scheduler.drop(name)
        del self.asked[name]
        if slot is None:
            return
        assert self.slots[slot] == name
        if slot < num_running - 1:
            self.slots[slot], self.slots[num_running - 1] = self.slots[num_running - 1], name
        target = max(slot, num_running - 1)
        self.slots[target] = self.slots[-1]
        self.slots.pop()

    def forget(self):
        """The weights have changed: what joins waits again, from its first row."""
        self.scheduler.send_back()
        del self.slots[len(self.scheduler.running) :]
        for each in self.asked.values():
            each.num_lacking, each.due, each.num_chunks = self.lengths[each.prompt], None, 0

    def check(self):
        self.scheduler.check_integrity()
        running, joining = self.scheduler.running, self.scheduler.joining
        assert (*running, *joining) == tuple(self.slots)
        assert {*running, *joining, *self.scheduler.waiting} == self.asked.keys()
        assert len(self.began) == len(set(self.began)), "a request began twice"


def run_schedule(seed, **options):
    rng = random.Random(seed)
    world = World(rng, Scheduler(max_batch_size=rng.randint(1, 12)), **options)
    num_steps = rng.randint(1, 30)
    while num_steps or world.asked:
        num_steps = max(num_steps - 1, 0)
        if num_steps and rng.random() < 0.4:
            world.submit()
        world.step()
        for name in world.scheduler.running:
            if rng.random() < 0.3:
                world.leave(name)
        if world.asked and rng.random() < 0.1:
            world.leave(rng.choice(list(world.asked)))
        if rng.random() < 0.02:
            world.forget()
        world.check()


def run_schedules(count, **options):
    for seed in range(count):
        run_schedule(seed, **options)


def test_random_schedules_lose_nobody_and_keep_slots_priorities_and_turns():
    run_schedules(3000)


def test_planted_a_long_prompt_that_is_passed_over_again_and_again_is_noticed():
    with pytest.raises(AssertionError, match="starves"):
        run_schedules(2000, is_aging=False)


def test_planted_a_hole_that_the_last_of_all_fills_is_noticed(monkeypatch):
    vacate = Scheduler._vacate

    def careless(self, name):
        ids, num_running = self._slots
        slot = vacate(self, name)
        if slot is not None and slot < num_running:
            left = [each for each in ids if each != name]
            left[slot:slot] = left[-1:]
            self._slots = type(self._slots)(tuple(left[: len(ids) - 1]), num_running - 1)
        return slot

    monkeypatch.setattr(Scheduler, "_vacate", careless)
    with pytest.raises(AssertionError):
        run_schedules(100)


def test_a_budget_ends_admission_at_the_first_that_does_not_fit():
    """Nobody behind it is let past: what is large would wait for ever."""
    scheduler, room = Scheduler(max_batch_size=4), {"a": 3, "b": 5, "c": 1}
    for name in room:
        scheduler.submit(name)
    left = 6

    def has_room(name):
        nonlocal left
        left -= room[name]
        return left >= 0

    assert scheduler.join(has_room) == ("a",)
    assert scheduler.waiting == ("b", "c")


def test_what_is_sent_back_waits_before_all_that_came_later_in_its_priority():
    scheduler = Scheduler(max_batch_size=3)
    for name, priority in (("low", 0), ("a", 1), ("b", 1), ("c", 1)):
        scheduler.submit(name, priority=priority)
    assert scheduler.join() == ("a", "b", "c")
    scheduler.arrange(0, (2, 0, 1))
    scheduler.start(1)
    scheduler.submit("d", priority=1)
    scheduler.send_back(1)
    assert (scheduler.running, scheduler.joining) == (("c",), ("a",))
    assert scheduler.waiting == ("b", "d", "low")
    scheduler.check_integrity()
