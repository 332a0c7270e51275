"""Train the tiny policy that ships with blockroll, from scratch and from a seed.

    python -m scripts.train_tiny_policy --out one
    python -m scripts.train_tiny_policy --out two --init-from one --seed 1 \
        --causal-steps 0 --joint-steps 800 --learning-rate 1.5e-3
    python -m scripts.train_tiny_policy --out blockroll/policies/tiny_policy --init-from two --seed 2 \
        --causal-steps 0 --joint-steps 1600 --learning-rate 1.5e-3 --stop-accuracy 0.45

Procedural arithmetic (`blockroll.rl_loops.arithmetic`): causal steps first, so that the policy can reason,
then joint steps on TiDAR's doubled sequence, so that it can draft. The second and third run go on from the
one before; the third stops where about half of held-out problems is solved at temperature 1, because RL
needs room. The three take about an hour on two cores. What each run took and reached is written into the
checkpoint's config.
"""

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from blockroll.rl_loops.arithmetic import Problem, problems, reward
from scripts.full_training import full_losses

SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: every text encodes, one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and the mask of scored (completion) tokens."""
    rows, scored = [], []
    for problem in batch:
        prompt = tokenizer(problem.prompt)["input_ids"]
        completion = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor([*prompt, *completion, tokenizer.eos_token_id]))
        scored.append(torch.arange(len(rows[-1])) >= len(prompt))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(scored, batch_first=True, padding_value=False),
    )


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> float:
    """Share of held-out problems solved by one sample each at temperature 1."""
    batch = list(itertools.islice(problems(seed, held_out=True), count))
    tokenizer.padding_side = "left"
    inputs = tokenizer([problem.prompt for problem in batch], return_tensors="pt", padding=True)
    tokenizer.padding_side = "right"
    inputs.pop("token_type_ids", None)
    model.eval()
    out = model.generate(**inputs, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=48)
    model.train()
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(reward(t, p.answer) for t, p in zip(texts, batch, strict=True)) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--causal-steps", type=int, default=1200)
    parser.add_argument("--joint-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--stop-accuracy", type=float, default=1.0, help="held-out accuracy to stop at")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--init-from", type=Path, help="weights to start from instead of random ones")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    earlier = []
    if args.init_from:
        model = LlamaForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
        earlier = model.config.blockroll["training"]
    stream = problems(args.seed, held_out=False)
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    total = args.causal_steps + args.joint_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.learning_rate,
        total_steps=total + 1,
        pct_start=0.05,
        anneal_strategy="cos",
        final_div_factor=100,
    )
    model.train()
    start = time.perf_counter()
    for step in range(total):
        ids, scored = encode(tokenizer, list(itertools.islice(stream, args.batch_size)))
        if step < args.causal_steps:
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = ids.masked_fill(~scored, -100)[:, 1:].flatten()
            causal = torch.nn.functional.cross_entropy(logits, labels)
            draft = torch.tensor(float("nan"))
            loss = causal
        else:
            losses = full_losses(
                model,
                ids,
                scored,
                mask_id=tokenizer.mask_token_id,
                block_size=args.block_size,
                offset=rng.randrange(args.block_size),
            )
            causal, draft, loss = losses.causal, losses.draft, losses.causal + losses.draft
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == total - 1:
            took = time.perf_counter() - start
            print(f"{step:5d} causal {causal:.3f} draft {draft:.3f} {took:6.0f} s", flush=True)
        if step % 100 == 99 or step == total - 1:
            solved = accuracy(model, tokenizer, 200, seed=1)
            print(f"      held-out accuracy at T=1: {solved:.3f}", flush=True)
            model.save_pretrained(args.out.with_name(args.out.name + "-latest"))
            if step >= args.causal_steps and solved >= args.stop_accuracy:
                break
        if step == args.causal_steps - 1:
            model.save_pretrained(args.out.with_name(args.out.name + "-causal"))
    model.config.blockroll = {
        "conversion": "full",
        "mask_token_id": tokenizer.mask_token_id,
        "block_sizes": [args.block_size],
        "layouts": ["two_forward"],
        "training": [
            *earlier,
            {
                "seed": args.seed,
                "causal_steps": args.causal_steps,
                "joint_steps": step + 1 - args.causal_steps,
                "scheduled_steps": total,
                "batch_size": args.batch_size,
                "learning_rate": args.learning_rate,
                "minutes": round((time.perf_counter() - start) / 60, 1),
                "held_out_accuracy": accuracy(model, tokenizer, 1000, seed=2),
            },
        ],
    }
    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps(model.config.blockroll, indent=2))


if __name__ == "__main__":
    main()
