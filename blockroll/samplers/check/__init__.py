"""A correctness kit for samplers: do tokens follow the law they are said to follow, and how sure is that?

It knows no engine. Each check takes functions or recorded draws and hands back a `Finding`: a figure, its
limit, the deviation it would have seen, and a sentence. `print(finding)` reads; `finding.passed` decides.

    from blockroll.samplers.check import Sampler, Tables, check_draws, check_sampler

    tables = Tables(
        vocab_size=3,
        target_weights=lambda history: [[6, 3, 1], [1, 2, 4], [2, 2, 3]][len(history) % 3],
        draft_weights=lambda history, offset: [1, 3, 6],
    )
    # Exact, for a sampler that takes its uniforms.
    print(check_sampler(Sampler(my_draw_draft, my_verify), tables, num_drafts=2))
    # Chi-square, for a black box, with the size of what it would have seen.
    print(check_draws(my_tokens, my_law))

| has your sampler ...                 | then                                                  |
|--------------------------------------|-------------------------------------------------------|
| uniforms as arguments                | `check_sampler`, `check_logprobs`, `check_rows`       |
| an inverse-CDF draw                  | `check_stratified`                                    |
| torch.rand and torch.multinomial     | wrap it in `Watch(uniforms)`, then as above           |
| a vocabulary of a real model         | `check_rows`, `check_closed_form`                     |
| draws only, and their law            | `check_draws`; texts, a law per token: `check_tokens` |
| draws only, and plain decoding       | `check_same_law`                                      |
| a drafter that returns its law       | `check_draft_law`                                     |
| recorded coins                       | `check_coins`, `check_redraw_uniforms`                |

`docs/correctness-kit.md` says what each needs, and what it can't see.
"""

from blockroll.samplers.check.closed_form import Arithmetic, arithmetic_of, check_closed_form
from blockroll.samplers.check.coins import (
    Coin,
    check_coins,
    check_redraw_uniforms,
    equal_coins_limit,
    redraw_uniforms,
)
from blockroll.samplers.check.draws import check_draft_law, check_draws, check_same_law, check_tokens
from blockroll.samplers.check.exact import check_logprobs, check_sampler
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.stratified import check_rows, check_stratified, stratified
from blockroll.samplers.check.tables import PRODUCTION, Sampler, Tables
from blockroll.samplers.check.watch import Watch

__all__ = [
    "PRODUCTION",
    "Arithmetic",
    "Coin",
    "Finding",
    "Sampler",
    "Tables",
    "Watch",
    "arithmetic_of",
    "check_closed_form",
    "check_coins",
    "check_draft_law",
    "check_draws",
    "check_logprobs",
    "check_redraw_uniforms",
    "check_rows",
    "check_same_law",
    "check_sampler",
    "check_stratified",
    "check_tokens",
    "equal_coins_limit",
    "redraw_uniforms",
    "stratified",
]
