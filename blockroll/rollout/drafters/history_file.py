"""A history in one file: texts by prompt as token ids, and whose vocabulary it is.

Texts that run when it is written are left out, and so are counts of acceptance, which are learned again in a
few steps.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.base import Policy
from blockroll.rollout.drafters.history import MAX_TOKENS, ROW_COST, HistoryDrafts, vocabulary_of

FORMAT = "blockroll history 2"
# Of prompts: length and number of texts. Of texts: length. Of both: tokens, a prompt's before its texts'.
_DTYPES = {
    "prompt_lengths": torch.int64,
    "num_texts": torch.int64,
    "text_lengths": torch.int64,
    "tokens": torch.int32,
}


def save_history(drafter: HistoryDrafts, path: str | Path, policy: Policy) -> None:
    """Write it, the whole file or nothing. `policy` is the one that it drafts for.

    CheckpointError where the file cannot be written.
    """
    path = Path(path)
    known = ((texts.prompt, [*texts.ended]) for texts in drafter.index.prompts)
    prompts = [(prompt, texts) for prompt, texts in known if texts]
    tokens = itertools.chain.from_iterable((prompt, *texts) for prompt, texts in prompts)
    columns = {
        "prompt_lengths": [len(prompt) for prompt, _ in prompts],
        "num_texts": [len(texts) for _, texts in prompts],
        "text_lengths": [len(text) for _, texts in prompts for text in texts],
        "tokens": [*itertools.chain.from_iterable(tokens)],
    }
    tensors = {name: torch.tensor(column, dtype=_DTYPES[name]) for name, column in columns.items()}
    metadata = {"format": FORMAT, "vocabulary": vocabulary_of(policy), "checksum": _checksum(tensors)}
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(safetensors.torch.save(tensors, metadata))
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"the history cannot be written to {path}: {error}") from None


def load_history(
    path: str | Path, policy: Policy, *, max_tokens: int = MAX_TOKENS, row_cost: float = ROW_COST
) -> HistoryDrafts:
    """A drafter that knows the texts of a file; of more than `max_tokens`, those used last.

    CheckpointError where it cannot be read or is not as it was written, InvalidInput where it is of another
    tokenizer or vocabulary than the policy's.
    """
    drafter = HistoryDrafts(max_tokens=max_tokens, row_cost=row_cost)
    drafter.vocabulary, tensors = _read(Path(path))
    if drafter.vocabulary != vocabulary_of(policy):
        raise InvalidInput(
            f"the history in {path} is of another tokenizer or vocabulary than this policy's; give the "
            "policy that wrote it, or move it away and begin with none"
        )
    columns = {name: tensor.tolist() for name, tensor in tensors.items()}
    _check(Path(path), columns, policy.vocab_size)
    token_ids: Iterator[int] = iter(columns["tokens"])
    lengths: Iterator[int] = iter(columns["text_lengths"])
    for num_prompt, num_texts in zip(columns["prompt_lengths"], columns["num_texts"], strict=True):
        prompt_ids = [*itertools.islice(token_ids, num_prompt)]
        for length in itertools.islice(lengths, num_texts):
            drafter.index.add(prompt_ids, itertools.islice(token_ids, length))
    return drafter


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if {name: tensor.dtype for name, tensor in tensors.items() if tensor.dim() == 1} != _DTYPES:
        raise _damaged(path, f"it holds {sorted(tensors)}, not lists {sorted(_DTYPES)} of integers")
    if metadata.get("checksum") != _checksum(tensors) or "vocabulary" not in metadata:
        raise _damaged(path, "its checksum is not that of what it holds")
    return metadata["vocabulary"], tensors


def _check(path: Path, columns: dict[str, list[int]], vocab_size: int) -> None:
    """Whoever can write a checksum can write anything under it."""
    lengths = columns["prompt_lengths"], columns["num_texts"], columns["text_lengths"]
    num_tokens = sum(columns["prompt_lengths"]) + sum(columns["text_lengths"])
    if min(map(min, filter(None, lengths)), default=0) < 0 or (
        len(columns["prompt_lengths"]) != len(columns["num_texts"])
        or sum(columns["num_texts"]) != len(columns["text_lengths"])
        or num_tokens != len(columns["tokens"])
    ):
        raise _damaged(path, "its lengths contradict each other")
    strange = next((each for each in columns["tokens"] if not 0 <= each < vocab_size), None)
    if strange is not None:
        raise _damaged(path, f"it holds the token {strange}, outside the vocabulary of {vocab_size}")


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, what: str) -> CheckpointError:
    reason = " ".join(what.split())
    return CheckpointError(
        f"{path} is no history that can be read: {reason}; take an earlier one, or move it "
        "away and begin with none"
    )
