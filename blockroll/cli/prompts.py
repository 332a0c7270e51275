"""The user's own prompts: `--prompts FILE`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

JSON_LINES = (".jsonl", ".json")
FILE_HELP = (
    "a .jsonl file with a `prompt` per line (text, messages or token ids), or any other file: "
    "one prompt a line"
)

PromptsOption = Annotated[Path | None, typer.Option(help=f"{FILE_HELP[:1].upper()}{FILE_HELP[1:]}.")]


def prompts_from(path: Path, policy: "HFPolicy") -> list[tuple[int, ...]]:
    """The prompts of a file as tokens; InvalidInput names the line that holds none."""
    from blockroll.policies.prompts import PromptEncoder
    from blockroll.rl_loops.prompts import read_prompts

    if not path.is_file():
        raise InvalidInput(f"--prompts {path}: there is no such file; give {FILE_HELP}")
    prompts: list[Any]
    try:
        is_json = path.suffix in JSON_LINES
        prompts = list(read_prompts(path)) if is_json else path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"--prompts {path} is no UTF-8 text (byte {error.start}); give {FILE_HELP}"
        ) from None
    except OSError as error:
        raise InvalidInput(f"--prompts {path} cannot be read: {error.strerror}") from None
    named = [(number, prompt) for number, prompt in enumerate(prompts, start=1) if prompt and prompt != "\r"]
    if not named:
        raise InvalidInput(f"--prompts {path} holds no prompt; give {FILE_HELP}")
    encode = PromptEncoder(policy.tokenizer, vocab_size=policy.vocab_size)
    return [encode(prompt, name=f"prompt {number} of {path}") for number, prompt in named]
