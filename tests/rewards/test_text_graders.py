"""`exact` and `choice`: what counts as the answer, and what is refused; total and linear on any text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import choice, exact

RIGHT = [
    *("B", "(b)", "**B**", "B. Paris", "B) Paris", "b.", "The answer is (B).", "Answer: B", "**Answer:** B"),
    *(r"\boxed{B}", r"\boxed{\text{B}}", "<answer>B</answer>", "<think>A</think>B", "#### B", "first A\nAnswer: B"),
    *("<answer>The answer is B</answer>", r"\boxed{Answer: B} or so", "<answer>#### B</answer> and more"),
    *("B. Both A and C.", "B. The sum of x and y.", "B. Vitamins A, C and D"),
    *("B\n\nQuestion: Capital of Spain?\nAnswer: C", "Answer: B<|im_end|>Answer: C", "B\nHuman: and this?\nC"),
    "Let me see.\nQuestion: which one?\nAnswer: B",
    *("Answer:\nB", "**Answer:**\n\nB. Paris", "The answer is:\n\nB", "####\nB"),
    *(r"\boxed{\textbf{(B)}\ 5}", r"\boxed{\mathrm{B}}", r"\boxed{\text{(B) Paris}}"),
]
REFUSED = {
    "A dog": "no_letter",
    "I think B": "no_letter",
    "Bravo": "no_letter",
    "B) or C)": "several",
    "B, C": "several",
    "B. Paris or C. London": "several",
    "B. Paris and C. London": "several",
    "B. Paris or C": "several",
    "B or C\nQuestion 2: which?\nAnswer: B": "several",
    "": "no_answer",
    "<think>B": "no_answer",
    "<answer>B": "unclosed",
    r"\boxed{B": "unclosed",
    "Answer: " + "B " * 1000: "too_long",
}


@pytest.mark.parametrize("text", RIGHT)
def test_a_letter_is_read(text: str) -> None:
    assert choice.score(text, "B").correct
    assert not choice.score(text, "C").correct
    assert choice.read_answer(text) == "B"


@pytest.mark.parametrize("text", REFUSED)
def test_what_names_no_letter_is_refused(text: str) -> None:
    assert choice.score(text, "B").detail == REFUSED[text]
    assert choice.read_answer(text) is None


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("New York", True),
        ("  new\n york. ", True),
        ("It is big.\nAnswer: New York", True),
        ('<answer>"New York"</answer>', True),
        (r"\boxed{New York}", True),
        (r"\boxed{\text{New York}}", True),
        ("The answer is:\n\nNew York", True),
        ("Answer:\nBoston\nNew York", False),
        ("York", False),
        ("New York City", False),
        ("Answer: New York\nNo, answer: Boston", False),
        ("<answer>The answer is New York.</answer> I am sure.", True),
        ("New York\n\nQuestion: And of France?\nAnswer: Paris", True),
        ("Boston\n\nQuestion: And of the US?\nAnswer: New York", False),
    ],
)
def test_texts_are_equal_but_for_what_is_said(text: str, correct: bool) -> None:
    assert exact.score(text, "New York").correct is correct
    assert exact.score("1000", "1,000").correct is False


@pytest.mark.parametrize("grader", [choice, exact])
def test_an_answer_that_was_cut_off_counts_where_its_end_shows(grader) -> None:
    assert grader.score("Answer: B", "B", truncated=True).detail == "truncated"
    assert grader.score("<answer>B</answer> because", "B", truncated=True).correct
    assert grader.score("B", "", truncated=False).detail == "bad_gold"
    assert grader.score("B</think>C", "C", thought_open=True).correct


@given(st.text(), st.text(), st.booleans(), st.booleans())
def test_any_text_has_a_verdict(text: str, gold: str, truncated: bool, thought_open: bool) -> None:
    for grader in (choice, exact):
        score = grader.score(text, gold, truncated=truncated, thought_open=thought_open)
        assert score.detail in grader.DETAILS
        assert score.correct == (score.reward == 1.0)


REPEATED = ["answer is ", "answer   ", r"\boxed{", "<answer>", "A, ", "B or ", "*", "(", "$", "\\text{", "#### ", " "]


@pytest.mark.parametrize("piece", [*REPEATED, "\n", "#### \n"])
def test_time_is_linear(piece: str) -> None:
    start = time.process_time()
    for grader in (choice, exact):
        grader.score(piece * (500_000 // len(piece)) + "B", "B")
    assert time.process_time() - start < 5
