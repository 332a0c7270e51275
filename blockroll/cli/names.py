"""Names of options as other libraries have them, answered with ours."""

import difflib
from typing import Any

from blockroll.config.checks import FOREIGN_NAMES

COMMAND_NAMES = {  # what commands call otherwise than configs do
    "model": "policy",
    "checkpoint": "policy",
    "model_name_or_path": "policy",
    "policy": "model",
    "n": "num_samples",
    "num_generations": "num_samples",
    "lora": "adapter",
    "batch_size": "batch",
    "batches": "batch",
    "prompt_file": "prompts",
    "prompts_file": "prompts",
    "output": "out",
    "output_dir": "out",
    "output_file": "json",
    "num_replicas": "replicas",
    "k": "plans",
}
ADVICE = {
    "logprobs": "every token has its log-probabilities: --json prints them",
    "prompt_logprobs": "prompts are not scored; --json prints the log-probabilities of every new token",
    "do_sample": "--temperature 0 is greedy, any other samples",
    "greedy": "--temperature 0 is greedy",
    "prompt": 'the prompt stands by itself: blockroll generate "TEXT"',
    "tensor_parallel_size": "a policy must fit one device; replicas share the requests",
    "stream": "samples are streamed unless --json is given",
}


def meant_option(option: str, ctx: Any) -> str:
    """What to write instead of an option that a command does not have; `ctx` is the command's context."""
    key = option.lstrip("-").replace("-", "_")
    options = [name for parameter in ctx.command.params for name in parameter.opts if name.startswith("--")]
    for names in (COMMAND_NAMES, FOREIGN_NAMES):
        ours = "--" + names.get(key, "").replace("_", "-")
        if ours in options:
            return f"here it is {ours}"
    takes_config = any(parameter.name in ("config", "options") for parameter in ctx.command.params)
    if takes_config and ("." in key or option.startswith("--")):
        own = difflib.get_close_matches(option, options, n=1)
        name = option.lstrip("-").partition("=")[0]
        dotted = f"options of the config are written without dashes, as {name.replace('-', '_')}=VALUE"
        return f"did you mean {own[0]}? {dotted}" if own else dotted
    if key in ADVICE:
        return ADVICE[key]
    near = difflib.get_close_matches(option, options, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"{ctx.command_path} --help lists those it has"
