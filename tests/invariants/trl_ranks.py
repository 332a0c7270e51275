"""What one rank of a distributed trainer does in test_trl_ranks.py; started by torchrun or accelerate."""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed
import trl
from accelerate import DistributedType, PartialState
from datasets import Dataset

from blockroll.config import AlignmentConfig, DraftConfig, RolloutConfig, WatchConfig
from blockroll.errors import ReplicaError
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.trl import GRPOTrainer, GuardCallback

FAILING_REWARD = False
FAILURES = {
    "replica": ReplicaError("replica 0 died: planted"),
    "memory": torch.OutOfMemoryError("planted"),
    "interrupt": KeyboardInterrupt("planted"),
}


def even_share(completion_ids, trainer_state, **_):
    if trainer_state.global_step == 1 and FAILING_REWARD:
        raise LookupError("no such answer: planted")
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Deaf(GuardCallback):
    """Planted: does nothing of what rank 0 decides."""

    def _follow(self, mode):
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--placement", default="colocated")
    parser.add_argument("--fail-on", type=int, default=-1, help="the rank whose replica dies in step 1")
    parser.add_argument("--failure", default="replica", choices=FAILURES, help="what it dies of")
    parser.add_argument(
        "--fail-sync-on", type=int, default=-1, help="the rank that gets no weights in step 1"
    )
    parser.add_argument("--hang-on", type=int, default=-1, help="the rank that waits in step 1 to be killed")
    parser.add_argument(
        "--fail-reward-on", type=int, default=-1, help="the rank whose reward raises in step 1"
    )
    parser.add_argument("--fail-prompts-on", type=int, default=-1, help="the rank with a prompt that is none")
    parser.add_argument("--fail-row-on", type=int, default=-1, help="the rank that gets a row without prompt")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--align", action="store_true", help="with an adapter that starts from nothing")
    parser.add_argument("--history", action="store_true", help="draft from history, and save every step")
    parser.add_argument("--share", action="store_true", help="the histories of all ranks")
    parser.add_argument(
        "--guard", help="a mixed law, of which rank 1 reports wrong log-probabilities, and what is then done"
    )
    parser.add_argument("--deaf-on", type=int, default=-1, help="the rank that does not follow its guard")
    parser.add_argument("--resume", help="the checkpoint to go on from")
    given = parser.parse_args()
    torch.set_num_threads(1)
    problems = list(itertools.islice(arithmetic.problems(0, held_out=False), 32))
    args = trl.GRPOConfig(
        output_dir=str(given.folder / "out"),
        per_device_train_batch_size=6,  # 3 groups of 4 over 2 ranks: one group lies on both
        num_generations=4,
        max_steps=3,
        max_completion_length=48,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=given.bf16,
        save_strategy="steps" if given.history or given.guard else "no",
        save_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        **({"vllm_importance_sampling_mode": "token_truncate"} if given.guard else {}),
        **({"fsdp": True, "fsdp_config": {"version": 2}} if given.fsdp else {}),
    )
    if given.fsdp:
        # accelerate takes FSDP for accelerators only; torch's own FSDP2, which it then calls, works on CPUs.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    rank = PartialState().process_index
    watch = WatchConfig(calibration=given.guard or "off", learner="off")
    trainer = GRPOTrainer(
        str(TINY_POLICY_DIR),
        reward_funcs=even_share,
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": p.prompt, "answer": p.answer, "source": "sums"} for p in problems]
        ),
        rollout=RolloutConfig(
            plan="history(4)" if given.history else "two_forward",
            placement=given.placement,
            num_replicas=2,
            threads_per_replica=1,
            share_history=given.share,
            mix_weight=0.5 if given.guard else 1.0,
            watch_every=1 if given.guard else None,
        ),
        callbacks=[(Deaf if rank == given.deaf_on else GuardCallback)(watch)] if given.guard else None,
        alignment=AlignmentConfig(draft=DraftConfig(rank=4, layouts=("two_forward",)))
        if given.align
        else None,
    )
    global FAILING_REWARD
    FAILING_REWARD = rank == given.fail_reward_on
    drawn: list[list[int]] = []
    drafts: list[tuple[int, int]] = []  # accepted and verified, of each rollout
    laws: list[float] = []  # the weight of each rollout's law
    generate = trainer.rollouts.placement.generate

    def recording(requests):
        if rank == given.fail_on and trainer.state.global_step == 1:
            raise FAILURES[given.failure]
        if rank == given.hang_on and trainer.state.global_step == 1:
            (given.folder / "hanging").touch()
            time.sleep(300)
        for rollout in generate(requests):
            drawn.append(list(rollout.token_ids))
            drafts.append((rollout.stats.num_accepted, rollout.stats.num_drafted))
            laws.append(rollout.law.weight)
            if given.guard and rank == 1:
                wrong = tuple(value + 0.3 for value in rollout.policy_logprobs)
                rollout = dataclasses.replace(rollout, policy_logprobs=wrong)
            yield rollout

    trainer.rollouts.placement.generate = recording
    fingerprint = trainer.rollouts.placement.fingerprint

    def failing():
        if rank == given.fail_sync_on and trainer.state.global_step == 1:
            raise torch.OutOfMemoryError("planted")
        return fingerprint()

    trainer.rollouts.placement.fingerprint = failing
    tokenize, score = trainer._tokenize_prompts, trainer._generate_and_score_completions

    def tokenizing(prompts):
        if rank == given.fail_prompts_on and trainer.state.global_step == 1:
            raise UnicodeError("planted")
        return tokenize(prompts)

    def scoring(rows):
        if rank == given.fail_row_on and trainer.state.global_step == 1:
            rows = [{"answer": row["answer"]} for row in rows]
        return score(rows)

    trainer._tokenize_prompts, trainer._generate_and_score_completions = tokenizing, scoring
    trainer.train(resume_from_checkpoint=given.resume)
    adapter = trainer.rollouts.placement.policy.adapter if given.align else None
    report = {
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "drawn": drawn,
        "drafts": drafts,
        "laws": laws,
        "mode": trainer._guard.mode if given.guard else None,
        "adapter": [float(each.double().abs().sum()) for each in adapter.parameters()] if adapter else [],
        "shares": getattr(trainer.rollouts.placement, "_shares", None),
    }
    (given.folder / f"rank{rank}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
