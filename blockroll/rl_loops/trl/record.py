"""`output_dir/blockroll/`: every logged step as a line of metrics.jsonl, and at the end report.html."""

from pathlib import Path
from typing import Any

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.rl_loops.report import write_trainer_report
from blockroll.rl_loops.tracking import JsonLines, read_lines, truncate_lines
from blockroll.rollout.audit.files import audit_mark
from blockroll.rollout.pool.pool import RolloutPool

FOLDER = "blockroll"


def audit_folder(args: Any, rollout: RolloutConfig | RolloutPool) -> Path | None:
    """Where a trainer's audit is written, if it is; None for a pool that is given, which has its own."""
    if isinstance(rollout, RolloutPool):
        return None
    return Path(rollout.audit_dir or Path(args.output_dir) / FOLDER / "audit")


def check_audit_is_new(folder: Path | None) -> None:
    """InvalidInput if what another run has drawn lies where this one's audit would."""
    if folder is not None and audit_mark(folder):
        raise InvalidInput(
            f"{folder} holds the audit of another run, whose requests have the names that this one's would "
            "have: resume that run (resume_from_checkpoint), move the folder away, or set another output_dir "
            "or RolloutConfig(audit_dir=...)"
        )


class Record:
    """What a trainer leaves beside its checkpoints. Rank 0 writes it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._folder = Path(trainer.args.output_dir) / FOLDER
        self._has_begun = False

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line; a run that goes on from a checkpoint takes the place of the lines behind it."""
        path = self._folder / "metrics.jsonl"
        if not self._has_begun:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                truncate_lines(path, int(metrics["step"]) - 1)
            self._has_begun = True
        lines = JsonLines(path)
        lines.log(metrics)
        lines.close()

    def write_report(self) -> Path | None:
        """The page, if a step was logged."""
        path = self._folder / "metrics.jsonl"
        if not path.is_file() or not any("reward" in row for row in read_lines(path)):
            return None
        trainer, args = self._trainer, self._trainer.args
        model = trainer.model.config._name_or_path or type(trainer.model).__name__
        return write_trainer_report(
            self._folder,
            name=Path(args.output_dir).resolve().name,
            about=f"{type(trainer).__name__} on {model}, {trainer.state.global_step} steps",
            setting={
                "policy": f"{model}, {trainer.accelerator.num_processes} processes, seed {args.seed}",
                "rollouts": f"T {trainer.temperature:g}, up to {trainer.max_completion_length} tokens, "
                f"{trainer.num_generations} for each prompt, law {trainer.rollouts.asked.law.name}",
                "update": f"learning rate {args.learning_rate:g}, {args.per_device_train_batch_size} "
                f"completions a device and pass, {args.gradient_accumulation_steps} passes an update",
            },
        )
