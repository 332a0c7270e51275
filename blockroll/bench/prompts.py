"""Texts that a bench asks about: sums that are worked out, and GSM8K questions from a user's file."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prompts import PromptEncoder

GSM8K_FIELD = "question"
NUM_SHOWN = 4  # sums that are worked out before the one that is asked

Sum = tuple[int, int, int]


def worked_prompts(policy: HFPolicy, count: int) -> list[tuple[int, ...]]:
    """Sums behind some that are worked out, as tokens: as turns of a conversation where there is a template.

    Equal counts give equal prompts, and a larger count begins with those of a smaller one.
    """
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    write = worked_turns if _has_template(policy) else worked_text
    return [encode(write(sums)) for sums in drawn_sums(count)]


def gsm8k_prompts(policy: HFPolicy, path: Path) -> list[tuple[int, ...]]:
    """The questions of a GSM8K file as tokens, as a user's message where there is a chat template."""
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    has_template = _has_template(policy)
    return [
        encode([_turn("user", question)] if has_template else question) for question in gsm8k_questions(path)
    ]


def _has_template(policy: HFPolicy) -> bool:
    return getattr(policy.tokenizer, "chat_template", None) is not None


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def drawn_sums(count: int, *, seed: int = 0) -> list[list[Sum]]:
    """For each prompt the sums that are shown, and the one that is asked."""
    draw = random.Random(seed)
    return [
        [(draw.randint(10, 99), draw.randint(10, 99), draw.randint(10, 99)) for _ in range(NUM_SHOWN + 1)]
        for _ in range(count)
    ]


def worked_turns(sums: Sequence[Sum]) -> list[dict[str, str]]:
    """All but the last answered step by step: a model that follows instructions answers that likewise."""
    turns = []
    for each in sums[:-1]:
        turns += [_turn("user", problem(*each)), _turn("assistant", worked(*each).strip())]
    return [*turns, _turn("user", problem(*sums[-1]))]


def worked_text(sums: Sequence[Sum]) -> str:
    """The same as one text, which a pretrained model goes on with."""
    return "".join(f"{asked(*each)}{worked(*each)}\n\n" for each in sums[:-1]) + asked(*sums[-1])


def problem(a: int, b: int, c: int) -> str:
    """What is asked."""
    return f"Problem: {a} + {b} + {c}"


def asked(a: int, b: int, c: int) -> str:
    """A problem, and where its solution begins."""
    return f"{problem(a, b, c)}\nSolution:"


def worked(a: int, b: int, c: int) -> str:
    """Its solution, step by step."""
    return (
        f" First we add {a} and {b}, which gives {a + b}. Then we add {c} to {a + b}, which gives "
        f"{a + b + c}. The answer is {a + b + c}."
    )


def gsm8k_questions(path: Path) -> Iterator[str]:
    """The `question` of each line of a GSM8K file, in order; InvalidInput names the file or the line."""
    advice = f'give a file of GSM8K, an object like {{"{GSM8K_FIELD}": "How many ...?"}} a line'
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}; {advice}") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        question = row.get(GSM8K_FIELD) if isinstance(row, dict) else None
        if not isinstance(question, str) or not question:
            raise InvalidInput(f"line {number} of {path} holds no text named {GSM8K_FIELD}; {advice}")
        yield question
        found = True
    if not found:
        raise InvalidInput(f"{path} holds no question; {advice}")
