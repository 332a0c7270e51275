"""Procedural arithmetic with written-out steps: the task of the tiny policy, its demo and its tests.

A problem is a prompt `12+35-7=?` whose solution walks left to right, one operation per line, and
ends with the answer after a hash. Problems are drawn from a seed; a checksum of the prompt decides
once and for all whether a problem is held out, so that training can never see an evaluation problem.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_OPERAND = 999
PRODUCT_SHARE = 0.35  # of operations whose value so far allows a product
HELD_OUT_SHARE = 10  # one prompt in ten


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One arithmetic problem as text."""

    prompt: str  # "12+35-7=?\n"
    solution: str  # "12+35=47\n47-7=40\n#40"
    answer: int


def draw_problem(rng: random.Random) -> Problem:
    """Two or three operations from left to right; no value on the way is negative.

    Operands have at most three digits; products are by one digit, of a value of at most three.
    """
    total = rng.randint(10, MAX_OPERAND)
    expression, lines = str(total), []
    for _ in range(rng.choice((2, 2, 3))):
        operand = rng.randint(1, MAX_OPERAND)
        if total <= MAX_OPERAND and rng.random() < PRODUCT_SHARE:
            operand = rng.randint(2, 9)
            sign, result = "*", total * operand
        elif operand <= total and rng.random() < 0.5:
            sign, result = "-", total - operand
        else:
            sign, result = "+", total + operand
        lines.append(f"{total}{sign}{operand}={result}\n")
        expression += f"{sign}{operand}"
        total = result
    return Problem(prompt=f"{expression}=?\n", solution="".join(lines) + f"#{total}", answer=total)


def is_held_out(problem: Problem) -> bool:
    """Whether the problem belongs to the evaluation split."""
    return zlib.crc32(problem.prompt.encode()) % HELD_OUT_SHARE == 0


def problems(seed: int | str, *, held_out: bool) -> Iterator[Problem]:
    """An endless stream of one split's problems; equal seeds give equal streams."""
    rng = random.Random(f"arithmetic-{seed}")
    while True:
        problem = draw_problem(rng)
        if is_held_out(problem) == held_out:
            yield problem


def reward(completion: str, answer: int) -> float:
    """1.0 if the text after the last hash is the answer, else 0.0."""
    return float(completion.rpartition("#")[2].strip() == str(answer) and "#" in completion)
