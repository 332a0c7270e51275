"""What this package relies on in TRL: the releases it was tested with, and the parts of trainers it uses.

Some of these parts are private. Outside the range importing this package fails; inside it, a trainer that
lacks one of them is refused by name. What a trainer's arguments ask of generation stands in `arguments.py`.
"""

from collections.abc import Iterable
from typing import Any

from packaging.version import Version

from blockroll.errors import MissingDependency

try:
    import trl
except ImportError as missing:
    raise MissingDependency("TRL is not installed; install it with pip install 'blockroll[trl]'") from missing

OLDEST, FIRST_UNTESTED = "1.16", "1.17"
# Attributes of every trainer after its construction, and methods that ours take the place of.
TRAINER_PARTS = (
    "accelerator",
    "args",
    "eos_token_ids",
    "max_completion_length",
    "min_p",
    "model",
    "num_generations",
    "reward_funcs",
    "processing_class",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "use_vllm",
    "_calculate_rewards",
    "_dist",
    "_generate",
    "_generate_single_turn",
    "_metrics",
    "_tokenize_prompts",
    "_tokenizer",
)
GRPO_PARTS = (
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "_compute_loss",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
)


def require_tested(version: str) -> None:
    """MissingDependency unless this TRL release is in the tested range."""
    if not Version(OLDEST) <= Version(version) < Version(FIRST_UNTESTED):
        raise MissingDependency(
            f"blockroll's trainers need trl>={OLDEST},<{FIRST_UNTESTED}, installed is {version}: they use "
            f"private parts of TRL's own. Install one in the range, or pass blockroll.RolloutPool to your "
            "own generation code"
        )


def require_parts(trainer: Any, parts: Iterable[str]) -> None:
    """MissingDependency naming what a trainer lacks."""
    missing = [part for part in parts if getattr(trainer, part, None) is None and not _is_optional(part)]
    if missing:
        raise MissingDependency(
            f"TRL {trl.__version__} has a {type(trainer).__name__} without {', '.join(missing)}, which "
            f"blockroll relies on; use trl>={OLDEST},<{FIRST_UNTESTED} as it was released"
        )


def _is_optional(part: str) -> bool:
    return part in ("min_p", "repetition_penalty", "top_k", "top_p")  # None is a value they may have


require_tested(trl.__version__)
