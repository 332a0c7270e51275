"""Rows of a run that a guard watched, as metrics.jsonl has them, without the run."""

import math

TESTS = (
    "calibration/surprisal",
    "calibration/draft_set",
    "calibration/tail",
    "calibration/accept",
    "calibration/reused",
    "calibration/draft",
    "calibration/coins",
    "calibration/residual",
    "calibration/ratio",
    "reward",
    "acceptance",
    "learner",
)
SAID = (
    "reward: log e 3.2 over 3.0 (alpha 0.05) after 880 values, against: the mixed law earns no less than the "
    "lossless one, but for 0.01: from the next step on rollouts are drawn from the policy alone"
)


def plain_row(step, **changes):
    """A step of a run without a guard."""
    row = {
        "step": step,
        "reward": 0.4 + 0.2 * step / (step + 20),
        "frac_reward_zero_std": 0.25,
        "plan": "two_forward(8)",
        "rollout/acceptance_rate": 0.7 - 0.1 * step / (step + 50),
        "rollout/tokens_per_forward": 2.5,
        "rollout/generated_tok_s": 1900.0,
        "rollout/duration_s": 2.0,
        "step_time": 3.0,
        "perf/weight_sync_s": 0.02,
        "sync/version": float(step),
        "sync/engines_stale": 0.0,
        "rollout/failed_total": 0.0,
        "reward/failed_total": 0.0,
        "update/skipped_total": 0.0,
        "sync/checksum_fail_total": 0.0,
        "engine/redispatch_total": 0.0,
    }
    return {**row, **changes}


def guarded_rows(steps=60, fired_at=40):
    """Reward falls under the law in use until its test speaks after step `fired_at`, then recovers."""
    highest = dict.fromkeys(TESTS, 0.0)
    return [_guarded_row(step, fired_at, highest) for step in range(1, steps + 1)]


def _guarded_row(step, fired_at, highest):
    is_lossless = step > fired_at
    drop = 0.004 * fired_at * math.exp((fired_at - step) / 6) if is_lossless else 0.004 * step
    row = plain_row(
        step,
        **{
            "guard/mode": "lossless" if is_lossless else "as_asked",
            "guard/action": "lossless" if step == fired_at else None,
            "guard/said": SAID if step == fired_at else None,
            "drift/fallback_total": float(step >= fired_at),
            "drift/alpha_spent": 0.005 if step >= fired_at else 0.0,
            "shadow/share": 0.1,
            "shadow/num_rollouts": 22.0,
            "shadow/duration_s": 0.2,
            "shadow/reward": 0.6,
            "shadow/reward_in_use": 0.6 - drop,
        },
    )
    row["reward"] -= drop
    for i, test in enumerate(TESTS):
        rate = 3.2 / fired_at if test == "reward" else 0.02 * math.sin(i)
        log_e = rate * min(step, fired_at if test == "reward" else step) + 0.3 * math.sin(step / 3 + i)
        if test == "reward":
            log_e = rate * min(step, fired_at)
        highest[test] = max(highest[test], log_e)
        threshold = 3.0 if test == "reward" else 14.5
        row |= {
            f"drift/{test}/log_e": log_e,
            f"drift/{test}/log_e_max": highest[test],
            f"drift/{test}/threshold": threshold,
            f"drift/{test}/n": float(22 * step),
        }
    width = 0.5 / math.sqrt(step)
    row |= {
        "drift/reward/mean": -drop,
        "drift/reward/cs_low": -drop - width,
        "drift/reward/cs_high": -drop + width,
    }
    for position in range(1, 9):
        share = 0.92**position * (0.95 - 0.1 * step / (step + 50))
        row[f"rollout/spec_accept_rate_pos_{position}"] = share
    return row
