"""What an audit says of drafting: acceptance by position, residual draws, perplexity by place in a step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockroll.rollout.audit.files import read_audit
from blockroll.rollout.audit.writer import ACCEPTED, KINDS, RECOVERED
from blockroll.samplers.check import check_redraw_uniforms

_LEAST_REDRAWS = 20  # for a verdict on their uniforms


def audit_stats(paths: Sequence[Path]) -> dict[str, Any]:
    """Counts and shares of all files together."""
    files = [read_audit(path) for path in paths]
    rows = np.concatenate([file.numbers_N for file in files])
    names = {name for file in files for name in file.requests}
    servings = {
        (file.session, int(serial)) for file in files for serial in np.unique(file.numbers_N["serial"])
    }
    return {
        "rows": len(rows),
        "requests": len(servings),
        "ids": len(names),  # fewer, where ids were served again
        "kinds": {name: int((rows["kind"] == code).sum()) for code, name in enumerate(KINDS)},
        "by_offset": [_at(rows[rows["offset"] == offset]) for offset in range(int(rows["offset"].max()) + 1)],
        "residual_uniforms": _redraws(rows),
    }


def _at(rows: np.ndarray) -> dict[str, Any]:
    """Of the tokens that stand so far into their step."""
    drafted = rows["draft"] >= 0
    num_drafts = int(drafted.sum())
    num_accepted = int((rows["kind"] == ACCEPTED).sum())
    return {
        "tokens": len(rows),
        "drafts": num_drafts,
        "acceptance": num_accepted / num_drafts if num_drafts else None,
        # A higher figure further into a step would say that drafting changes the text.
        "perplexity": math.exp(-float(rows["policy_logprob"].mean())) if len(rows) else None,
    }


def _redraws(rows: np.ndarray) -> dict[str, Any] | None:
    """Whether the uniforms that replaced rejected drafts are uniform given the rejection.

    By position they need not be: the coin that draws the token is the one that its draft is compared by.
    """
    uniforms = rows["uniform"][(rows["kind"] == RECOVERED) & (rows["by_position"] == 0)]
    if len(uniforms) < _LEAST_REDRAWS:
        return None
    finding = check_redraw_uniforms(torch.from_numpy(uniforms.copy()))
    return {"passed": finding.passed, "found": str(finding)}
