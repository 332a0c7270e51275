"""What is said and drawn of a real model beside transformers and vLLM."""

from benchmarks import readme_pictures
from benchmarks.readme_peers import even_table, grouped_table, has_grouped, peers_page, readme_section

SETTING = {"dtype": "bfloat16", "threads": 1, "machine": "a machine", "temperature": 1.0, "max_tokens": 4}
SETTING |= {"repeats": 2, "transformers_version": "5", "commit": "abc", "batch": 8, "skipped": None}
SETTING |= {"prompts": "chat", "workload": "even", "siblings": None, "epochs": None, "cpu": "a processor"}
SETTING |= {"version": None, "setup_s": 1.0, "tokens_per_s_by_epoch": None}
VLLM = {"version": "vllm 0.32.0", "setup_s": 90.0}
GROUPED = {"prompts": "worked", "workload": "grouped", "siblings": 8, "epochs": 2}


def row(plan, *speeds, cpu=None, by_epoch=None, **others):
    return {
        **SETTING,
        "plan": plan,
        "tokens_per_s": sum(speeds) / len(speeds),
        "tokens_per_s_all": speeds,
        "tokens_per_cpu_s": sum(cpu or speeds) / len(speeds),
        "tokens_per_cpu_s_all": cpu or speeds,
        "tokens_per_s_by_epoch": by_epoch,
        **others,
    }


EVEN_ROWS = [
    row("plain", 10.0, 20.0, cpu=(30.0, 30.0)),
    row("auto", 20.0, 40.0),
    row("transformers_generate", 10.0, 10.0),
    row("vllm", 20.0, 20.0, cpu=(60.0, 20.0), **VLLM),
    {**row("vllm_ngram(5)", 1.0), "skipped": "it died", "tokens_per_s": None, "tokens_per_s_all": []},
]
GROUPED_ROWS = [
    row("plain", 10.0, 20.0, by_epoch=[12.0, 18.0], **GROUPED),
    row("auto", 30.0, 60.0, by_epoch=[30.0, 63.0], **GROUPED),
    row("vllm", 20.0, 20.0, by_epoch=[20.0, 20.0], **GROUPED, **VLLM),
    row("vllm_ngram(5)", 30.0, 30.0, by_epoch=[30.0, 30.0], **GROUPED, **VLLM),
    {**row("vllm_suffix", 1.0, **GROUPED), "skipped": "it died", "tokens_per_s": None},
]


def test_the_table_of_even_texts_says_ratios_of_repeats_and_what_was_not_measured():
    table = even_table(EVEN_ROWS)
    assert (
        "| 8 | `vllm` | 20 | 40 | 0.75x (0.50 to 1.00) | 1.00x (0.50 to 1.50) | 1.50x (1.00 to 2.00) |"
        in (table)
    )
    assert "| 8 | `plain` | 15 | 30 |  |  | 2.00x (2.00 to 2.00) |" in table
    assert "| 8 | `vllm_ngram(5)` | not measured: it died |" in table
    assert "up to 90 s, are not counted" in table
    assert "vllm 0.32.0" in table


def test_the_table_of_groups_names_the_best_of_vllm_and_each_epoch():
    table = grouped_table(GROUPED_ROWS)
    assert (
        "| worked arithmetic | 1 | 8 | 15 | 45 | 3.00x (3.00 to 3.00) | 2.50x, 3.50x | 20 "
        "| 2.25x (1.50 to 3.00) | `vllm_ngram(5)` 30 | 1.50x (1.00 to 2.00) |"
    ) in table
    assert "Not measured: `vllm_suffix`: it died." in table
    without_vllm = grouped_table(GROUPED_ROWS[:2])
    assert "| not measured | not measured | not measured |  |" in without_vllm


def test_a_single_repeat_has_a_ratio_and_no_range():
    rows = [
        row("plain", 10.0, by_epoch=[10.0, 10.0], **GROUPED),
        row("auto", 30.0, by_epoch=[20.0, 60.0], **GROUPED),
    ]
    assert "| 10 | 30 | 3.00x | 2.00x, 6.00x |" in grouped_table(rows)


def test_the_page_and_the_readme_show_what_there_are_rows_of():
    assert not has_grouped(EVEN_ROWS)
    assert "images/speed_peers.png" not in peers_page(EVEN_ROWS, picture="images/speed_peers.png")
    both = [*EVEN_ROWS, *GROUPED_ROWS]
    assert peers_page(both, picture="images/speed_peers.png").count("images/speed_peers.png") == 1
    section = readme_section(both)
    assert "at batch 8 1.50x (1.00 to 2.00) of `generate` and 0.75x (0.50 to 1.00) of vLLM" in section


def test_the_picture_is_drawn_of_whatever_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_pictures, "IMAGES", tmp_path)
    for rows in ([*EVEN_ROWS, *GROUPED_ROWS], GROUPED_ROWS[:2]):
        readme_pictures.draw_peers(rows)
        (picture,) = tmp_path.glob("speed_peers.png")
        picture.unlink()
