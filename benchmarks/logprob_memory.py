"""Memory of log-probabilities and their gradients, by tokens and vocabulary: all logits at once, and bounded.

    python -m benchmarks.evidence kernels logprob_memory

What a learner's output head holds in one forward and backward: peak memory beyond states and weight, with
the gradients of both in it, each measured in a process of its own, with few tokens and with many. Memory per
token is the difference. On a GPU it is the allocator's peak, and Triton's kernels take part; on a CPU it is
what the operating system says the process held.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.rows import ROOT, Row
from blockroll.config import TrainConfig
from blockroll.kernels.choice import using
from blockroll.kernels.selective_logprob import OutputHead, logprob_of_logits, selective_logprob

VOCABULARIES = (4_096, 32_000, 151_936)
WIDTH = 128
MEMORY_MB = TrainConfig().logits_memory_mb
AT_ONCE, IN_PIECES, FUSED = "all logits at once", "pieces of bounded memory", "Triton"
TOKENS = {AT_ONCE: (256, 512), IN_PIECES: (4_096, 8_192), FUSED: (4_096, 8_192)}


def logprob_memory(
    vocabularies: tuple[int, ...] = VOCABULARIES, tokens: dict[str, tuple[int, int]] | None = None
) -> list[Row]:
    """A row for each way and vocabulary."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        _row(way, vocab_size, few_many, device)
        for way, few_many in (tokens or TOKENS).items()
        if way != FUSED or device == "cuda"
        for vocab_size in vocabularies
    ]


def _row(way: str, vocab_size: int, few_many: tuple[int, int], device: str) -> Row:
    few, many = few_many
    peaks = [_measured_apart(way, vocab_size, num_tokens, device) for num_tokens in few_many]
    return {
        "what": "memory of log-probabilities",
        "way": way,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "vocabulary": vocab_size,
        "width": WIDTH,
        "memory_mb": None if way == AT_ONCE else MEMORY_MB,
        "tokens": few_many,
        "peak_bytes": peaks,
        "bytes_per_token": (peaks[1] - peaks[0]) / (many - few),
    }


def _measured_apart(way: str, vocab_size: int, num_tokens: int, device: str) -> int:
    given = json.dumps([way, vocab_size, num_tokens, device])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.logprob_memory", given],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return int(done.stdout)


def peak_bytes(way: str, vocab_size: int, num_tokens: int, device: str) -> int:
    """What one forward and backward adds to the memory of this process, or of its GPU, at most."""
    torch.set_num_threads(1)
    states = torch.randn(num_tokens, WIDTH, device=device, requires_grad=True)
    weight = torch.randn(vocab_size, WIDTH, device=device, requires_grad=True)
    tokens = torch.arange(num_tokens, device=device) % vocab_size
    temperature = torch.ones(num_tokens, device=device)
    _run(way, states[:1], weight[:64], tokens[:1] % 64, temperature[:1])  # so that libraries are loaded
    before = _forget_peak(device)
    _run(way, states, weight, tokens, temperature)
    return _peak(device) - before


def _run(
    way: str, states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor
) -> None:
    head = OutputHead(weight_VW=weight)
    if way == AT_ONCE:
        laws = logprob_of_logits(head.logits(states), tokens, temperature)
    else:
        with using("triton" if way == FUSED else "reference"):
            laws = selective_logprob(states, head, tokens, temperature, memory_bytes=MEMORY_MB << 20)
    torch.autograd.grad(laws.logprobs_N.sum(), [states, weight])


def _forget_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux's highest resident size begins anew
    return _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) << 10


if __name__ == "__main__":
    print(peak_bytes(*json.loads(sys.argv[1])))
