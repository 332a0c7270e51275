"""A sweep from the command line."""

import json

import pytest

from blockroll.policies.loading import TINY_POLICY_DIR
from tests.command_line import blockroll

pytestmark = pytest.mark.skipif(
    not (TINY_POLICY_DIR / "tokenizer.json").is_file(), reason="needs the shipped policy's tokenizer"
)


def test_bench_sweeps_and_says_what_is_fastest(policy_path, tmp_path):
    path, picture = tmp_path / "sweep.jsonl", tmp_path / "sweep.png"
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}+1=?", "answer": i + 1}) + "\n" for i in range(5))
    )
    result = blockroll(
        "bench", "--sweep", "--policy", policy_path, "--plans", "two_forward,history(2)",
        "--task", "arithmetic",
        "--prompts", tmp_path / "own.jsonl", "--mix-weight", "1,0.5", "--draft-temperature", "0.5,1",
        "--num-prompts", 4, "--samples", 3, "--max-tokens", 4, "--json", path, "--picture", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["plan"], row["mix_weight"], row["draft_temperature"]) for row in rows] == [
        ("plain", 1.0, None),
        *(("two_forward(4)", weight, drafts) for drafts in (0.5, 1.0) for weight in (1.0, 0.5)),
        ("history(2)", 1.0, None),
    ]
    assert {row["num_prompts"] for row in rows} == {4}
    assert [line for line in result.stdout.splitlines() if line.startswith("Temperature 1: the fastest")]
    assert "plain" in result.stdout
    assert sum(row["is_marked"] for row in rows) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
