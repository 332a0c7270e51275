"""The examples that end each command's help."""

EXAMPLES = {
    "": (
        "blockroll demo",
        'blockroll generate "12+35-7=?" --mark',
        "blockroll doctor --model DIR",
    ),
    "demo": ("blockroll demo", "blockroll demo --steps 5 --backend local"),
    "generate": (
        'blockroll generate "12+35-7=?" --mark',
        'blockroll generate "Name a prime." --policy DIR --chat --temperature 0.7 --num-samples 4',
        'blockroll generate "1+1=?" --regex "[0-9]+" --json',
        'blockroll generate "Hello" --policy DIR --adapter ADAPTER --plan auto',
    ),
    "train": (
        "blockroll train my.yaml train.steps=100",
        "blockroll train policy.path=DIR task=my_module:task rollout.max_tokens=256 name=first",
        "blockroll train --resume runs/first train.steps=200",
        "blockroll train my.yaml --metrics-port 9464",
        "blockroll train my.yaml --show-config",
    ),
    "convert": (
        "blockroll convert --policy DIR --prompts prompts.jsonl --out adapter",
        "blockroll convert --policy DIR --out adapter --max-minutes 30 draft.rank=16 draft.block_sizes=[4,8]",
        "blockroll convert --resume adapter",
    ),
    "bench": (
        "blockroll bench --plans plain,two_forward --batch 1,8,64 --json rows.json --against generate",
        "blockroll bench --policy DIR --adapter ADAPTER --plans plain,auto --prompts prompts.jsonl",
        "blockroll bench --prompts random --prompt-tokens 64,512 --ignore-eos",
        "blockroll bench --policy DIR --workload grouped --prompts worked --plans plain,auto --against vllm",
        "blockroll bench --sweep --task arithmetic --plans two_forward,history --picture frontier.png",
        "blockroll bench --sweep --task mine:task --prompts prompts.jsonl --json runs/first/sweep.jsonl",
    ),
    "report": (
        "blockroll report runs/demo",
        "blockroll report --live runs/demo",
        "blockroll report --grafana blockroll.json",
    ),
    "doctor": (
        "blockroll doctor",
        "blockroll doctor --model DIR --adapter ADAPTER",
        "blockroll doctor --model DIR policy.dtype=bfloat16 rollout.max_batch_size=256",
        "blockroll doctor --model DIR --prompts prompts.jsonl --json",
    ),
    "audit show": ("blockroll audit show runs/demo", 'blockroll audit show runs/demo "train step 1/0/0"'),
    "audit check": ("blockroll audit check runs/demo", "blockroll audit check runs/demo --level 1 --json"),
    "audit stats": ("blockroll audit stats runs/demo --json",),
}


def epilog(command: str) -> str:
    """The examples of a command, one a line however narrow the terminal is."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[command])
