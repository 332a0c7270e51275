"""Texts that a bench asks about: sums that are worked out, and GSM8K questions from a user's file."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prompts import PromptEncoder

GSM8K_FIELD = "question"


def worked_prompts(policy: HFPolicy, count: int) -> list[tuple[int, ...]]:
    """Sums behind two that are worked out, as tokens."""
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    return [encode(text) for text in worked_arithmetic(count)]


def gsm8k_prompts(policy: HFPolicy, path: Path) -> list[tuple[int, ...]]:
    """The questions of a GSM8K file as tokens, as a user's message where there is a chat template."""
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    has_template = getattr(policy.tokenizer, "chat_template", None) is not None
    return [
        encode([{"role": "user", "content": question}] if has_template else question)
        for question in gsm8k_questions(path)
    ]


def worked_arithmetic(count: int, *, seed: int = 0) -> list[str]:
    """Sums of three numbers, each behind two others that are worked out step by step.

    A pretrained model goes on as it was shown. Equal arguments give equal texts, and a larger `count` begins
    with those of a smaller one.
    """
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        sums = [[draw.randint(10, 99) for _ in range(3)] for _ in range(3)]
        shown = "".join(f"{asked(*each)}{worked(*each)}\n\n" for each in sums[:2])
        texts.append(shown + asked(*sums[2]))
    return texts


def asked(a: int, b: int, c: int) -> str:
    """A problem."""
    return f"Problem: {a} + {b} + {c}\nSolution:"


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
