"""The user's own prompts: `--prompts FILE`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy
    from blockroll.rl_loops.tasks import Row

JSON_LINES = (".jsonl", ".json")
FILE_HELP = (
    "a .jsonl file with a `prompt` per line (text, messages or token ids), or any other file: "
    "one prompt a line"
)

PromptsOption = Annotated[Path | None, typer.Option(help=f"{FILE_HELP[:1].upper()}{FILE_HELP[1:]}.")]


def prompts_from(path: Path, policy: "HFPolicy") -> list[tuple[int, ...]]:
    """The prompts of a file as tokens; InvalidInput names the line that holds none."""
    from blockroll.policies.prompts import PromptEncoder

    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    return [encode(row["prompt"], name=f"prompt {number} of {path}") for number, row in rows_from(path)]


def rows_from(path: Path) -> list[tuple[int, "Row"]]:
    """Number and row of each prompt of a file, with its other columns where it has some."""
    from blockroll.rl_loops.prompts import read_rows

    if not path.is_file():
        raise InvalidInput(f"--prompts {path}: there is no such file; give {FILE_HELP}")
    rows: list[Row]
    try:
        if path.suffix in JSON_LINES:
            rows = list(read_rows(path))
        else:
            rows = [{"prompt": line} for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"--prompts {path} is no UTF-8 text (byte {error.start}); give {FILE_HELP}"
        ) from None
    except OSError as error:
        raise InvalidInput(f"--prompts {path} cannot be read: {error.strerror}") from None
    named = [(number, row) for number, row in enumerate(rows, start=1) if row["prompt"] not in ("", "\r")]
    if not named:
        raise InvalidInput(f"--prompts {path} holds no prompt; give {FILE_HELP}")
    return named
