"""The recipe of the shipped policy starts as documented, and its loss is what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scripts.full_training import doubled_mask, full_losses
from tests.models import MASK_ID, random_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_documented_command_starts_from_the_repository_root():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, "-m", "scripts.train_tiny_policy", "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "python -m scripts.train_tiny_policy --out one" in shown
    assert "--stop-accuracy" in shown


def test_the_clean_half_is_trained_as_any_causal_model_and_meets_no_mask():
    model = random_model()
    ids = torch.randint(4, 24, (3, 14), generator=torch.Generator().manual_seed(0))
    scored = torch.arange(14).expand(3, -1) >= 5
    losses = full_losses(model, ids, scored, mask_id=MASK_ID, block_size=4, offset=2)
    logits = model(ids, use_cache=False).logits[:, 4:-1]
    assert losses.causal.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten()).item(), abs=1e-5
    )
    assert losses.draft.isfinite()
    assert not doubled_mask(14, 4, 2)[:14, 14:].any()
