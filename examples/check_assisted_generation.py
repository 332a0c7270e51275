"""The correctness kit on somebody else's sampler: does transformers' assisted generation keep its law?

    python -m examples.check_assisted_generation
    python -m examples.check_assisted_generation --tokens 8192 --out benchmarks/results/law_assisted.jsonl

Assisted generation is documented to keep the distribution of plain sampling. Its parts are checked as they
are: `_speculative_sampling` exactly on tables and in closed form at real vocabularies; `generate` on texts
of small models, token by token against the model's own law; and the laws that its candidate generators
return against the drafts they really drew. The models are random: how far off a law is says nothing of any
real model, but a law that is returned and was not drawn from is wrong for all. Needs transformers 5.24 or
later.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
    PreTrainedModel,
)
from transformers.generation.utils import _speculative_sampling

from blockroll.samplers import draft_probs, draw_draft
from blockroll.samplers.check import (
    Arithmetic,
    Finding,
    Sampler,
    Tables,
    Watch,
    check_closed_form,
    check_draft_law,
    check_redraw_uniforms,
    check_sampler,
    check_tokens,
    redraw_uniforms,
)
from blockroll.types import Draft, Verdict

SEED = 3
SIZE = 16  # vocabulary of the small models
TEXT = 256  # tokens of one text, at most
PROMPT = (1, 2, 3)
TABLES = {
    "opposite laws": Tables(
        vocab_size=3,
        target_weights=lambda history: [[6, 3, 1], [1, 6, 3], [3, 1, 6]][sum(history) % 3],
        draft_weights=lambda history, i: [1, 3, 6],
    ),
    "laws with zeros": Tables(
        vocab_size=3,
        target_weights=lambda history: [[0, 3, 1], [1, 0, 3], [3, 1, 0]][len(history) % 3],
        draft_weights=lambda history, i: [[2, 0, 1], [1, 2, 0], [0, 1, 2]][(len(history) + i) % 3],
    ),
    "four tokens, tempered": Tables(
        vocab_size=4,
        target_weights=lambda history: [5, 1 + len(history), 2, 1 + sum(history)],
        draft_weights=lambda history, i: [1 + i, 4, 2, 3],
        temperature=0.7,
        draft_temperature=1.3,
    ),
}


class Setting(NamedTuple):
    """One way to call generate; `claims_target` is what its documentation says of the result."""

    name: str
    model: PreTrainedModel
    options: dict[str, Any]
    claims_target: bool = True


def speculative_sampling(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """transformers' own function, request by request, under the uniforms it is given."""
    tokens_BL, count_B = torch.zeros(uniforms_BL.shape, dtype=torch.int64), []
    draft_BKV = draft_probs(draft, target_probs_BLV.shape[-1])
    for row, uniforms_L in enumerate(uniforms_BL.tolist()):
        ids_1K, draft_1KV = draft.token_ids_BK[row, None], draft_BKV[row, None]
        with Watch(uniforms_L):
            valid, _ = _speculative_sampling(
                ids_1K, draft_1KV.log(), ids_1K.shape[1], target_probs_BLV[row, None].log()
            )
        tokens_BL[row, : valid.shape[1]] = valid[0]
        count_B.append(valid.shape[1])
    committed_B = torch.tensor(count_B)
    return Verdict(
        token_ids_BL=tokens_BL,
        num_committed_B=committed_B,
        is_draft_BL=torch.arange(tokens_BL.shape[1]) < committed_B[:, None] - 1,
        behavior_logprobs_BL=target_probs_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1).log(),
    )


def on_tables() -> Iterator[Finding]:
    """Exactly, in float64."""
    for name, tables in TABLES.items():
        for num_drafts in (1, 2):
            sampler = Sampler(draw_draft, speculative_sampling)
            yield check_sampler(sampler, tables, num_drafts, name=f"_speculative_sampling, {name}")


def in_closed_form() -> Iterator[Finding]:
    """In float32, as generate calls it; its coins are held against the quotient of its two softmaxes."""
    generator = torch.Generator().manual_seed(SEED)
    for size in (32_000, 151_936):
        target_V = 3 * torch.randn(size, generator=generator)
        draft_V = target_V + 0.7 * torch.randn(size, generator=generator)
        p_V, q_V = target_V.softmax(-1), draft_V.softmax(-1)
        rejected = (p_V - q_V).argmin()[None, None]
        with Watch([1.0, 0.5]) as seen:
            _speculative_sampling(rejected, draft_V[None, None], 1, target_V.expand(1, 2, -1))
        arithmetic = Arithmetic(
            draft_cumulative_V=q_V.double().cumsum(-1),
            accept_V=(p_V / q_V).clamp(max=1),
            final_cumulative_V=seen.cumulative[0].flatten(),
        )
        yield check_closed_form(arithmetic, target_V, name="_speculative_sampling, float32 closed form")


def redraws(count: int) -> Iterator[Finding]:
    """The uniforms of its redraws, worked out from the tokens of the real thing under its own randomness."""
    generator = torch.Generator().manual_seed(SEED)
    target_V, draft_V = (2 * torch.randn(2, SIZE, generator=generator)).softmax(-1)
    torch.manual_seed(SEED)
    redrawn = []
    for drafted in torch.multinomial(draft_V, count, replacement=True):
        valid, num_matches = _speculative_sampling(
            drafted[None, None], draft_V.log()[None, None], 1, target_V.log().expand(1, 2, -1)
        )
        if num_matches == 0:
            redrawn.append(valid[0, 0])
    laws = (law_V.expand(len(redrawn), -1) for law_V in (target_V, draft_V))
    yield check_redraw_uniforms(
        redraw_uniforms(torch.stack(redrawn), *laws), name="_speculative_sampling, redraws"
    )


def llama(num_layers: int, seed: int) -> PreTrainedModel:
    """A random model with laws that are neither flat nor peaked, and without an end token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gemma() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Gemma 4 and the assistant that drafts from its keys and values."""

    def config(**options: Any) -> Gemma4TextConfig:
        return Gemma4TextConfig(
            vocab_size=SIZE,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            global_head_dim=8,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=0,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.3,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **options,
        )

    torch.manual_seed(SEED)
    model = Gemma4ForCausalLM(config())
    assistant = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(text_config=config(num_kv_shared_layers=2), backbone_hidden_size=16)
    )
    return model.eval(), assistant.eval()


def dflash() -> PreTrainedModel:
    """A drafter of whole blocks from the target's hidden states, of the one family that has any."""
    torch.manual_seed(SEED)
    config = MuseGlimmerAssistantConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        block_size=5,
        mask_token_id=0,
        target_layer_ids=[0, 1],
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return MuseGlimmerAssistantModel(config).eval()


def settings() -> list[Setting]:
    """Every way to be assisted that small models of this version allow."""
    target, assistant = llama(2, SEED), llama(1, SEED + 1)
    gemma_target, gemma_assistant = gemma()
    for drafter in (assistant, gemma_assistant):
        drafter.generation_config.num_assistant_tokens = 4
    helped = {"assistant_model": assistant}
    dflash_helped = {"assistant_model": dflash(), "speculation_type": "dflash"}
    gemma_helped = {"assistant_model": gemma_assistant}
    return [
        Setting("plain", target, {}),
        Setting("assistant", target, helped),
        Setting("assistant, temperature 0.7", target, {**helped, "temperature": 0.7}),
        Setting("assistant, top_k 4", target, {**helped, "top_k": 4}),
        Setting("assistant, top_p 0.8", target, {**helped, "top_p": 0.8}),
        Setting("early exit", target, {"assistant_early_exit": 1}),
        Setting("prompt lookup", target, {"prompt_lookup_num_tokens": 4}),
        Setting("prompt lookup, top_k 4", target, {"prompt_lookup_num_tokens": 4, "top_k": 4}),
        Setting("DFlash", target, dflash_helped),
        Setting("DFlash, top_k 4", target, {**dflash_helped, "top_k": 4}),
        Setting("ensemble weight 0.5", target, {**helped, "assistant_ensemble_weight": 0.5}, False),
        Setting("Gemma 4 plain", gemma_target, {}),
        Setting("Gemma 4 assistant", gemma_target, gemma_helped),
        Setting("Gemma 4 assistant, top_k 4", gemma_target, {**gemma_helped, "top_k": 4}),
    ]


def generation(setting: Setting, num_tokens: int) -> Iterator[Finding]:
    """Tokens against the model's own law of each, and every draft against the law returned with it."""
    tokens, laws = [], []
    torch.manual_seed(SEED)
    options = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **setting.options}
    length = min(TEXT, num_tokens)
    with recorded(setting.model) as drafts:
        for _ in range(-(-num_tokens // length)):
            text_1T = setting.model.generate(
                torch.tensor([PROMPT]), do_sample=True, max_new_tokens=length, pad_token_id=0, **options
            )
            with torch.no_grad():
                logits_TV = setting.model(text_1T).logits[0, len(PROMPT) - 1 : -1]
            tokens.append(text_1T[0, len(PROMPT) :])
            laws.append(processed(logits_TV, options["temperature"], options["top_k"], options["top_p"]))
    yield check_tokens(torch.cat(tokens), torch.cat(laws), name=f"{setting.name}: tokens")
    if drafts:
        yield check_draft_law(drafts.__getitem__, len(drafts), name=f"{setting.name}: returned draft law")


def first_draft(setting: Setting, num_prompts: int = 16) -> Iterator[Finding]:
    """Where drafts are no draws at all: the exact law of the token that a first draft leads to, at worst.

    The draft is one token for certain, and what is done about it takes the law returned with it for true.
    """
    found = []
    for start in range(num_prompts):
        prompt = torch.tensor([[start % SIZE, 2, (5 * start) % SIZE]])
        torch.manual_seed(SEED)
        with recorded(setting.model) as drafts, torch.no_grad():
            text_1T = setting.model.generate(
                prompt, do_sample=True, max_new_tokens=6, pad_token_id=0, top_k=0, **setting.options
            )
            target_V = setting.model(text_1T[:, :4]).logits[0, -1]
        target, claimed = target_V.double().softmax(-1), draft_probs(drafts[0], len(target_V))[0, 0]
        drafted = torch.zeros(SIZE, dtype=torch.float64)
        drafted[drafts[0].token_ids_BK[0, 0]] = 1
        arithmetic = Arithmetic(
            draft_cumulative_V=drafted.cumsum(-1),
            accept_V=(target / claimed).clamp(max=1),
            final_cumulative_V=(target - claimed).clamp(min=0).cumsum(-1),
        )
        found.append(
            check_closed_form(arithmetic, target_V, name=f"{setting.name}: first draft, closed form")
        )
    yield max(found, key=lambda finding: finding.statistic)


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Draft]]:
    """Every draft that comes with a law, as the model's own candidate generator returns it."""
    make, drafts = model._get_candidate_generator, []

    def make_recorded(**options: Any) -> Any:
        generator = make(**options)
        propose = generator.get_candidates

        def get_candidates(input_ids: Tensor, **outputs: Any) -> tuple[Tensor, Tensor | None]:
            candidate_ids, logits_1KV = propose(input_ids, **outputs)
            if logits_1KV is not None:
                drafted_1K = candidate_ids[:, input_ids.shape[1] :]
                probs_1KV, num_drafts_1 = logits_1KV.double().softmax(-1), torch.tensor([drafted_1K.shape[1]])
                drafts.append(Draft(token_ids_BK=drafted_1K, law=probs_1KV, num_drafts_B=num_drafts_1))
            return candidate_ids, logits_1KV

        generator.get_candidates = get_candidates
        return generator

    model._get_candidate_generator = make_recorded
    try:
        yield drafts
    finally:
        del model._get_candidate_generator


def processed(logits_TV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The law generate is asked for, float64: temperature, then the top_k best, then the best up to top_p."""
    probs_TV, ids_TV = (logits_TV.double() / temperature).softmax(-1).sort(dim=-1, descending=True)
    probs_TV[:, top_k or SIZE :] = 0
    probs_TV /= probs_TV.sum(-1, keepdim=True)
    probs_TV[probs_TV.cumsum(-1) - probs_TV >= top_p] = 0
    probs_TV /= probs_TV.sum(-1, keepdim=True)
    return torch.zeros_like(probs_TV).scatter(-1, ids_TV, probs_TV)


def findings(num_tokens: int) -> Iterator[tuple[str, Finding]]:
    """Every finding, and what is claimed: `target`, or `other` where no target law is promised."""
    for finding in (*on_tables(), *in_closed_form(), *redraws(num_tokens)):
        yield "target", finding
    for setting in settings():
        if setting.name == "Gemma 4 assistant":
            yield from (("target", finding) for finding in first_draft(setting))
        for finding in generation(setting, num_tokens):
            is_tokens = finding.check.endswith("tokens")
            yield "target" if setting.claims_target or not is_tokens else "other", finding


def provenance() -> dict[str, Any]:
    """Of what, where and by which code the rows are."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "seed": SEED,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "commit": commit.stdout.strip() or None,
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each way to generate")
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON lines")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows, of_all_rows = [], {**provenance(), "tokens_per_setting": args.tokens}
    print(f"transformers {transformers.__version__}")
    for claim, finding in findings(args.tokens):
        print(finding if claim == "target" else f"{finding} (no target law is promised here)", flush=True)
        rows.append({**finding.row(), "claim": claim, **of_all_rows})
    broken = [row["check"] for row in rows if not row["passed"] and row["claim"] == "target"]
    print(f"{len(broken)} of {len(rows)} checks contradict a law that is claimed: {broken or 'none'}")
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    main()
