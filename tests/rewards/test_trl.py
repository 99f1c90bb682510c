import pytest

from rewards import Score, countdown, gsm8k
from rewards.trl import reward_function


def test_columns_go_to_the_grader_row_by_row():
    reward = reward_function(countdown.score)
    completions = ["<answer>4+5</answer>", "<answer>4*5</answer>", "nothing"]
    columns = {"numbers": [[4, 5], [4, 5], [4, 5]], "target": [9, 9, 9]}
    assert reward(prompts=["p"] * 3, completions=completions, completion_ids=[[1]] * 3, **columns) == [
        1.0,
        0.1,
        0.0,
    ]


def test_messages_are_graded_by_their_last_content():
    reward = reward_function(gsm8k.score)
    completions = [
        [{"role": "assistant", "content": "#### 17"}, {"role": "assistant", "content": "#### 18"}],
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "#### 1"}, {"type": "text", "text": "8"}],
            }
        ],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert reward(prompts=[[]] * 4, completions=completions, answer=["18"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_options_are_fixed_and_the_name_is_the_graders():
    reward = reward_function(gsm8k.score, method="flexible")
    assert reward(["p"], ["18 eggs"], answer=["18"]) == [1.0]
    assert reward.__name__ == "gsm8k_reward"
    given = reward_function(countdown.score, numbers=[1, 2], format_reward=0.5)
    assert given(["p"], ["<answer>2-1</answer>"], target=[3]) == [0.5]


def test_any_function_with_a_score_will_do():
    def score(completion: str, word: str) -> Score:
        return Score(float(len(completion) - len(word)), False, "length")

    assert reward_function(score)(["p", "p"], ["abc", "d"], word=["a", "bc"]) == [2.0, -1.0]


def test_wrong_columns_are_named():
    reward = reward_function(gsm8k.score)
    with pytest.raises(ValueError, match="gsm8k_reward needs the column 'answer'"):
        reward(["p"], ["18"], gold=["18"])
    with pytest.raises(ValueError, match="'answer' has 1 values for 2 completions"):
        reward(["p", "p"], ["18", "18"], answer=["18"])


def test_a_thought_that_the_prompt_opened_is_seen_where_it_can_be():
    reward = reward_function(gsm8k.score)
    begun = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "<think>\nOkay"}]
    prompts = ["How many?", "How many?\n<think>\n", begun, begun[:1], []]
    for completion, rewards in (("#### 18", [1, 0, 0, 1, 1]), ("#### 17</think>\n#### 18", [1, 1, 1, 1, 1])):
        assert reward(prompts=prompts, completions=[completion] * 5, answer=["18"] * 5) == rewards
    given = reward_function(countdown.score, thought_open=True)
    assert given(begun[:1], ["<answer>4+5</answer>"], numbers=[[4, 5]], target=[9]) == [0.0]
