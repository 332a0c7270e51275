"""Prompts that no completion fits behind: found when a TRL trainer is made, left out of a stream."""

import pytest
from datasets import Dataset, IterableDataset

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer, prompt_lengths
from tests.trl_trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
SHORT = RolloutConfig(plan="plain", max_length=96)
QUICK = {"max_completion_length": 4, "max_steps": 2, "per_device_train_batch_size": 4}


@pytest.mark.parametrize("as_messages", [False, True])
def test_a_prompt_that_no_completion_fits_behind_is_found_by_its_row_when_the_trainer_is_made(
    tmp_path, as_messages
):
    short = RolloutConfig(plan="plain", max_length=256)
    texts = ["1+1=", "2+2=", "3+" * 300, "4+4=", "5+" * 400]
    prompts = [[{"role": "user", "content": text}] if as_messages else text for text in texts]
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = Dataset.from_list([{"prompt": prompt, "answer": 2} for prompt in prompts])
    expected = r"2 of 5 rows of (train|eval)_dataset .* first is row 2, the longest row 4 with"
    for given in ({"train_dataset": rows}, {"eval_dataset": {"held_out": rows}}):
        expected_here = expected if "train_dataset" in given else r"2 of 5 rows of eval_dataset\['held_out'\]"
        with pytest.raises(InvalidInput, match=expected_here):
            trainer(tmp_path, processing_class=tokenizer, rollout=short, **given)


def stream(texts):
    def rows():
        yield from ({"prompt": text, "answer": 2} for text in texts)

    return IterableDataset.from_generator(rows)


def streaming(folder, texts, cls=GRPOTrainer, **arguments):
    rows = stream(texts)
    return trainer(folder, cls, rollout=SHORT, train_dataset=rows, options=QUICK, **arguments)


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_a_stream_goes_on_without_the_prompts_that_no_completion_fits_behind(tmp_path, cls, caplog):
    asked = []

    def reward(prompts, completions, **_):
        asked.extend(prompts)
        return [float(len(text)) for text in completions]

    texts = ["1+1=", "2+" * 100, "3+3=", "4+" * 100, "5+5="]
    made = streaming(tmp_path, texts, cls, reward_funcs=reward)
    made.args.shuffle_dataset = made.shuffle_dataset = False
    made.train()
    assert asked == ["1+1="] * 4 + ["3+3="] * 4
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert line.startswith("prompt 2 that train_dataset gave has 20")


def test_a_stream_of_which_nothing_fits_ends_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_lengths, "_MOST_LEFT_OUT", 5)
    made = streaming(tmp_path, ["1+" * 100] * 9)
    with pytest.raises(InvalidInput, match="like the 4 before it"):
        made.train()


def test_a_dataset_that_is_given_to_an_evaluation_is_looked_at_before_it(tmp_path):
    rows = Dataset.from_list([{"prompt": text, "answer": 2} for text in ("1+1=", "2+" * 100)])
    made = trainer(tmp_path, rollout=SHORT, options=QUICK)
    with pytest.raises(InvalidInput, match="1 of 2 rows of eval_dataset"):
        made.evaluate(rows)
    assert made.rollouts.version == -1
