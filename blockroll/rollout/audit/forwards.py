"""The fresh forwards of an audit check: causal rows of whole texts, and the drafts of every step beside them.

Shapes: B texts, G blocks of a text, K drafted tokens, M masks, T tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from blockroll.policies.draft_training import MaskBlocks, TextKeys, clean_pass, mask_pass
from blockroll.rollout.audit.rows import AuditedRequest

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

MAX_LOGITS = 1 << 26  # of one forward: rows times vocabulary
_MAX_MASK = 1 << 26  # entries of a forward's attention mask


def causal_logits(policy: "HFPolicy", texts: Sequence[Sequence[int]]) -> tuple[list[torch.Tensor], TextKeys]:
    """Float32 logits (T, V) of each text, by one causal forward of all; and the keys of their rows."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    hidden_BTW, keys = clean_pass(policy, ids_BT.to(policy.device), lengths_of(policy, texts))
    logits_BTV = policy.logits(hidden_BTW).cpu()
    return [logits_TV[: len(text)] for logits_TV, text in zip(logits_BTV, texts, strict=True)], keys


def lengths_of(policy: "HFPolicy", texts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([len(text) for text in texts], device=policy.device)


def first_drafts(request: AuditedRequest, indices: np.ndarray) -> dict[int, int]:
    """Of each step, by its attempt, the first of these rows that had a draft from mask rows."""
    drafted = indices[request.numbers["num_masks"][indices] > 0]
    attempts, first = np.unique(request.numbers["attempt"][drafted], return_index=True)
    return dict(zip(attempts.tolist(), drafted[first].tolist(), strict=True))


def draft_logits(
    policy: "HFPolicy",
    keys: TextKeys,
    lengths_B: torch.Tensor,
    requests: Sequence[AuditedRequest],
    firsts: Sequence[Mapping[int, int]],
) -> list[dict[int, tuple[int, torch.Tensor]]]:
    """By attempt, the first row of each step, and the logits (K, V) of its drafts from that row's on.

    A step's masks stand behind the tokens they knew and see each other alone: blocks of one width run side by
    side, over the keys of their texts.
    """
    num_tokens = int(lengths_B.max())
    found: list[dict[int, tuple[int, torch.Tensor]]] = [{} for _ in requests]
    steps = defaultdict(list)
    for row, (request, by_attempt) in enumerate(zip(requests, firsts, strict=True)):
        for attempt, first in by_attempt.items():
            steps[int(request.numbers["num_masks"][first])].append((row, attempt, first))
    for width, of_width in steps.items():
        waiting = [[each for each in of_width if each[0] == row] for row in range(len(requests))]
        per_block = len(requests) * width
        num_blocks = max(
            1, min(MAX_LOGITS // (per_block * policy.vocab_size), _blocks(per_block, num_tokens))
        )
        for start in range(0, max(map(len, waiting)), num_blocks):
            part = [each[start : start + num_blocks] for each in waiting]
            anchors_BG = torch.zeros((len(requests), max(map(len, part))), dtype=torch.int64)
            for row, of_row in enumerate(part):
                for block, (_, _, first) in enumerate(of_row):
                    anchors_BG[row, block] = int(requests[row].numbers["context"][first]) - 1
            blocks = MaskBlocks(anchors_BG=anchors_BG.to(policy.device), num_drafts=width, first_slot=0)
            states_BMW = mask_pass(policy, blocks, keys, lengths_B)
            logits_BMV = policy.logits(states_BMW).cpu()
            logits_BGKV = logits_BMV.view(len(requests), -1, width, logits_BMV.shape[-1])
            for row, of_row in enumerate(part):
                for block, (_, attempt, first) in enumerate(of_row):
                    # Slots of a step are consecutive; the file may begin in its middle.
                    numbers = requests[row].numbers
                    before = int(numbers["slot"][first]) - int(numbers["offset"][first])
                    found[row][attempt] = first, logits_BGKV[row, block, before:]
    return found


def _blocks(rows_per_block: int, num_tokens: int) -> int:
    """Blocks of one forward whose attention mask, rows times all keys, is not too large."""
    blocks = max(1, _MAX_MASK // (rows_per_block * num_tokens))
    while blocks > 1 and blocks * rows_per_block * (num_tokens + blocks * rows_per_block) > _MAX_MASK:
        blocks //= 2
    return blocks
