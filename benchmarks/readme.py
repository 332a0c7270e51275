"""What was measured, written from committed rows and from nothing else.

    python -m benchmarks.readme        rewrite the README's section, docs/measured.md and the pictures

A test holds both texts against the rows, but for the marks of what is stale.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import (
    readme_drafts,
    readme_kernels,
    readme_law,
    readme_learning,
    readme_pages,
    readme_peers,
    readme_pictures,
    readme_shows,
    readme_speed,
    readme_trl,
    readme_watch,
    stale,
)
from benchmarks.rows import ROOT, has_rows, read

PAGE = ROOT / "docs" / "measured.md"
KERNELS = ROOT / "docs" / "kernels.md"


class Section(NamedTuple):
    """A section of the page; without rows it is left out."""

    name: str  # of the result file
    title: str
    text: Callable[[], str]


SECTIONS = (
    Section("speed_auto", "Speed: the plan that chooses itself", readme_speed.auto_table),
    Section("speed_drafts", "Speed: drafts of a policy trained for them", readme_speed.speed_table),
    Section(
        "speed_before_after",
        "Speed: two commits, side by side",
        lambda: readme_speed.before_after_table(read("speed_before_after")),
    ),
    Section(
        "speed_peers",
        "Speed: a real model beside transformers and vLLM",
        lambda: readme_peers.peers_page(read("speed_peers"), picture="images/speed_peers.png"),
    ),
    Section(
        "speed_peers_avx512",
        "Speed: the same on a processor whose AVX-512 multiplies in bfloat16",
        lambda: readme_peers.peers_page(read("speed_peers_avx512")),
    ),
    Section(
        "speed_peers_float32",
        "Speed: the same in float32, on a processor without a matrix unit",
        lambda: readme_peers.peers_page(read("speed_peers_float32")),
    ),
    Section(
        "speed_grouped",
        "Speed: grouped rollouts of a real model",
        lambda: readme_shows.grouped_table(read("speed_grouped")),
    ),
    Section(
        "speed_grid",
        "Speed: the plan that chooses itself, by batch and context",
        lambda: readme_shows.grid_table(read("speed_grid")),
    ),
    Section(
        "speed_longtail",
        "Speed: the long tail of a batch",
        lambda: readme_shows.longtail_table(read("speed_longtail")),
    ),
    Section(
        "speed_pages",
        "Speed and memory: a cache in slots and in pages",
        lambda: readme_pages.pages_table(read("speed_pages")),
    ),
    Section(
        "kernels_logprob_memory",
        "Memory of a learner's log-probabilities",
        lambda: readme_kernels.logprob_memory_table(read("kernels_logprob_memory")),
    ),
    Section("drafts_conversions", "What an adapter drafts", readme_drafts.drafts_table),
    Section("drafts_smollm2", "SmolLM2-135M-Instruct, converted by adapter", readme_drafts.smollm2_table),
    Section(
        "law_equality",
        "Drafts that never change a token",
        lambda: readme_shows.equality_table(read("law_equality")),
    ),
    Section("law_texts", "The law, at full size", readme_law.law_list),
    Section("learning_plans", "GRPO: plain and drafted rollouts", readme_learning.learning_table),
    Section("learning_laws", "GRPO: the target law and a mixed law", readme_learning.laws_table),
    Section(
        "watch_harm",
        "The guard: a law that earns less",
        lambda: readme_watch.harm_table(read("watch_harm")),
    ),
    Section(
        "watch_acceptance",
        "Acceptance against reward, under RL",
        lambda: readme_watch.acceptance_table(read("watch_acceptance")),
    ),
    Section(
        "watch_power",
        "The guard: how soon it speaks",
        lambda: readme_watch.power_table(read("watch_power")),
    ),
    Section(
        "watch_false_alarms",
        "The guard: how often it speaks without cause",
        lambda: readme_watch.false_alarms_table(read("watch_false_alarms")),
    ),
    Section(
        "watch_silent",
        "The guard: sound runs",
        lambda: readme_watch.silent_table(read("watch_silent")),
    ),
    Section(
        "watch_cost",
        "The guard: what it costs",
        lambda: readme_watch.cost_table(read("watch_cost")),
    ),
    Section("constraints_outputs", "Constrained outputs", readme_drafts.constraints_table),
    Section("audit_cost", "What the audit costs", readme_speed.audit_table),
    Section(
        "trl_stock_bf16",
        "TRL: the stock trainer and ours, in TRL's default precision",
        lambda: readme_trl.stock_table(read("trl_stock_bf16"), "float32 weights under bfloat16 autocast"),
    ),
    Section(
        "trl_stock",
        "TRL: the stock trainer and ours, in float32",
        lambda: readme_trl.stock_table(read("trl_stock"), "float32"),
    ),
    Section(
        "trl_alignment",
        "TRL: drafts that follow the policy",
        lambda: readme_trl.alignment_table(read("trl_alignment")),
    ),
    Section(
        "trl_smollm2",
        "TRL: SmolLM2-135M-Instruct",
        lambda: readme_trl.smollm2_trl_table(read("trl_smollm2")),
    ),
    Section(
        "trl_grpo",
        "GRPO of a real model: TRL's trainer, ours in its place, our loop",
        lambda: readme_shows.grpo_table(read("trl_grpo")),
    ),
)
FINDINGS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("law_equality", lambda: readme_shows.equality_finding(read("law_equality"))),
    ("law_texts", readme_law.law_finding),
    ("drafts_conversions", readme_drafts.drafts_finding),
    ("drafts_smollm2", readme_drafts.smollm2_finding),
    ("learning_laws", readme_learning.laws_finding),
    ("watch_acceptance", lambda: readme_watch.acceptance_finding(read("watch_acceptance"))),
    ("watch_harm", lambda: readme_watch.harm_finding(read("watch_harm"))),
    ("constraints_outputs", readme_drafts.constraints_finding),
    ("audit_cost", readme_speed.audit_finding),
    ("trl_stock", lambda: readme_trl.stock_finding(read("trl_stock"), read("trl_stock_bf16"))),
    ("trl_alignment", lambda: readme_trl.alignment_finding(read("trl_alignment"))),
)


def measured_section() -> str:
    """Everything the README says in numbers."""
    findings = "\n".join(text() for name, text in FINDINGS if has_rows(name))
    peers = read("speed_peers") if has_rows("speed_peers") else []
    first = (
        readme_peers.readme_section(peers) if readme_peers.has_grouped(peers) else readme_speed.auto_table()
    )
    return f"{first}\n\n{findings}"


def measured_page() -> str:
    """Everything that was measured."""
    return "\n\n".join(
        (
            "# Measured",
            "Every figure is written from committed rows, `benchmarks/results/`, by `python -m "
            "benchmarks.readme`; `make evidence SUBJECT=...` measures them again. CPU, float32, the shipped "
            "policy of 1.6M parameters unless said otherwise. Ranges are of repeats or seeds; two that "
            "overlap show no difference.",
            "Each section names the last commit that had changed `blockroll/` when its rows were measured. "
            "It is stale if a package that its subject depends on has changed since (`benchmarks/stale.py`).",
            *(
                f"## {section.title}\n\n{stale.mark(section.name, read(section.name))}\n\n{section.text()}"
                for section in SECTIONS
                if has_rows(section.name)
            ),
        )
    )


def with_section(readme: str) -> str:
    """The README with its measured section as the rows have it."""
    return put_between(readme, "measured", measured_section())


def with_table(page: str) -> str:
    """The page of the kernels with the table of those that were compiled."""
    return put_between(page, "compiled", readme_kernels.compiled_table(read("kernels_compiled")))


def put_between(text: str, name: str, made: str) -> str:
    """A text with what was made between its marks of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    assert text.count(begin) == text.count(end) == 1, f"the text must have {begin} and {end} once"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


if __name__ == "__main__":
    readme_pictures.draw_all()
    PAGE.write_text(measured_page() + "\n")
    readme_path = ROOT / "README.md"
    readme_path.write_text(with_section(readme_path.read_text()))
    if has_rows("kernels_compiled"):
        KERNELS.write_text(with_table(KERNELS.read_text()))
