"""Any text whatever: no exception, a score in the documented set, under 50 ms, time linear in the length."""

import ast
import functools
import random
import re
import time
from collections.abc import Callable
from fractions import Fraction

import pytest
from fuzz_graders import published
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rewards import Score, countdown, gsm8k

WORDS = [
    *(
        "#### ",
        "\\boxed{",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "The answer is ",
        "Answer: ",
        "answer ",
    ),
    *(
        "\nQuestion:",
        "\nQ",
        "\nuser\n",
        "Human:",
        "_of_turn>",
        "INST]",
        "[THINK]",
        "</s>",
        "\\text{",
        "{,}",
        "<<",
        ">>",
        "or ",
        "million",
        " thousand",
        " 000",
        "- ",
        "cm^2",
        "<18>",
        "e5",
        "4+5=9",
        "18",
        "1,234",
        ".5",
    ),
]
MARKS = list("-$%=()[}\\\n */x+~|_^\u0663½\u200b\ud800\x00")
PIECES = [*WORDS, *MARKS]
TEXTS = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))

GRADERS: dict[str, Callable[[str], Score]] = {
    "countdown": lambda text: countdown.score(text, [4, 5], 9),
    "countdown line": lambda text: countdown.score(text, [4, 5], 9, answer_format="line"),
    "robust": lambda text: gsm8k.score(text, "18"),
    "robust, truncated": lambda text: gsm8k.score(text, "18", truncated=True),
    "strict": lambda text: gsm8k.score(text, "18", method="strict"),
    "strict_cot": lambda text: gsm8k.score(text, "18", method="strict_cot"),
    "flexible": lambda text: gsm8k.score(text, "18", method="flexible"),
}
GRADERS["countdown, thought open"] = lambda text: countdown.score(text, [4, 5], 9, thought_open=True)
GRADERS["robust, thought open"] = lambda text: gsm8k.score(text, "18", thought_open=True)
READERS: dict[str, Callable[[str], str | None]] = {
    "countdown answer": countdown.read_answer,
    "countdown answer, line": lambda text: countdown.read_answer(text, answer_format="line"),
    "robust answer": gsm8k.read_answer,
    "robust answer, truncated": lambda text: gsm8k.read_answer(text, truncated=True),
    "strict answer": lambda text: gsm8k.read_answer(text, method="strict"),
    "strict_cot answer": lambda text: gsm8k.read_answer(text, method="strict_cot"),
    "flexible answer": lambda text: gsm8k.read_answer(text, method="flexible"),
}
"""What the graders read with."""
ALL: dict[str, Callable[[str], object]] = {**GRADERS, **READERS}


def seconds(name: str, text: str, runs: int = 5) -> float:
    """Processor time of the fastest run: other processes on the machine do not count."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        ALL[name](text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("name", GRADERS)
@given(text=TEXTS)
@example(text="")
@example(text="#### " + "9" * 5000)
@example(text="<answer>" + "(" * 600 + "</answer>")
def test_any_text_is_graded(name, text):
    score = GRADERS[name](text)
    details = (countdown if name.startswith("countdown") else gsm8k).DETAILS
    allowed = {1.0, 0.1, 0.0} if name.startswith("countdown") else {1.0, 0.0}
    assert isinstance(score, Score)
    assert score.reward in allowed
    assert score.correct == (score.reward == 1.0) == (score.detail == "correct")
    assert score.detail in details
    assert seconds(name, text, runs=1) < 0.05 or seconds(name, text) < 0.05


@pytest.mark.parametrize("name", READERS)
@given(text=TEXTS)
@example(text="")
@example(text="#### " + "9" * 5000)
@example(text="<answer>" + "(" * 600 + "</answer>")
def test_any_text_has_an_answer_or_none(name, text):
    answer = READERS[name](text)
    assert answer is None or isinstance(answer, str)
    assert seconds(name, text, runs=1) < 0.05 or seconds(name, text) < 0.05


ENDS = [("#### ", ""), ("\\boxed{", "}"), ("<answer>", "</answer>"), ("#### 18\n", "")]


def is_linear(name: str, short: str, long: str) -> bool:
    """A quadratic grader takes 400 times as long for 20 times the length; a few milliseconds are anything."""
    once = seconds(name, long, runs=1)
    return once < 0.05 or once < 60 * seconds(name, short, runs=3) or seconds(name, long) < 60 * seconds(name, short)


@pytest.mark.parametrize(("name", "ends"), [*((name, ("", "")) for name in GRADERS), *(("robust", e) for e in ENDS)])
def test_time_is_linear_whatever_is_repeated(name, ends):
    for piece in PIECES:
        short, long = (ends[0] + piece * (size // len(piece)) + ends[1] for size in (20_000, 400_000))
        assert is_linear(name, short, long), piece


@pytest.mark.parametrize("end", ["", " x18", "!"])
def test_the_longest_text_that_is_read_as_a_number_takes_milliseconds(end):
    for piece in (*PIECES, "9", "9,", "9 000", "9 million ", "a}", " x", "&lt;", "\\text{a}", "\u00a0"):
        text = f"#### {piece * (980 // len(piece))}{end}"
        assert seconds("robust", text) < 0.02, piece


@pytest.mark.parametrize("turn", ["\nQ: ", "</s>", "18 Question 2: "])
@pytest.mark.parametrize("block", ["x\nAnswer:\n\n", "The answer is \n- ", "\t!!!\n- !\n- The answer is \n- "])
def test_markers_without_a_number_take_little_time_in_front_of_each_of_many_turns(block, turn):
    for size, limit in ((10_000, 0.05), (100_000, 0.1)):
        segment = (block * (size // len(block) + 1))[: size // 16]
        assert seconds("robust", turn.join([segment] * 16)) < limit


@functools.cache
def mixed(seed: int) -> str:
    """A megabyte of a few pieces in random order: what opens and never closes, with something to search in between."""
    rng = random.Random(seed)
    some = rng.sample(PIECES, rng.choice([2, 3, 5, len(PIECES)]))
    return "".join(rng.choices(some, k=1_000_000))[:1_000_000]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRADERS)
def test_time_is_linear_in_mixed_text_up_to_a_megabyte(name, seed):
    text = mixed(seed)
    assert len(text) == 1_000_000
    assert is_linear(name, text[:50_000], text)


def test_a_quadratic_grader_would_be_noticed(monkeypatch):
    monkeypatch.setitem(ALL, "quadratic", lambda text: sum(range(12 * (len(text) // 1000) ** 2)))
    assert not is_linear("quadratic", "a" * 50_000, "a" * 1_000_000)


@given(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=6), data=st.data())
def test_countdown_agrees_with_exact_evaluation(numbers, data):
    """Random expressions over the numbers have the value that Python's own parser gives in fractions."""
    text = str(numbers[0])
    for number in numbers[1:]:
        sign = data.draw(st.sampled_from("+-*/"))
        text = data.draw(
            st.sampled_from([f"{text}{sign}{number}", f"({text}){sign}{number}", f"{number}{sign}(-{text})"])
        )
        # Two signs in a row are refused, and they are not what is tested here.
        text = text.replace("(--", "(-(-") + ")" if "(--" in text else text
    try:
        value = fraction(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        assert countdown.score(f"<answer>{text}</answer>", numbers, 1).detail == "division_by_zero"
        return
    target = str(value.numerator) if value.denominator == 1 else f"{float(value):.12f}"
    assert countdown.score(f"<answer>{text}</answer>", numbers, target).correct
    off_by_one = value.numerator + 1 if value.denominator == 1 else f"{float(value) + 1:.12f}"
    assert countdown.score(f"<answer>{text}</answer>", numbers, off_by_one).detail == "wrong_value"


def fraction(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return -fraction(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = fraction(node.left), fraction(node.right)
    if isinstance(node.op, ast.Div):
        return left / right
    return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]


@given(
    whole=st.integers(-(10**9), 10**9),
    fraction=st.sampled_from(["", ".0", ".50", ".25"]),
    zeros=st.integers(0, 3),
)
def test_gsm8k_reads_every_plain_number_in_every_marker(whole, fraction, zeros):
    gold, same, other = f"{whole}{fraction}", f"{whole:,}{fraction or '.'}", f"{whole + 1}{fraction}"
    same += "0" * zeros if fraction else ""
    for marked in (
        "#### {}",
        "\\boxed{{{}}}",
        "<answer>{}</answer>",
        "The answer is {}.",
        "Answer: {}",
        "#### **{}**",
    ):
        assert gsm8k.score(marked.format(same), gold).correct, marked
        assert not gsm8k.score(marked.format(other), gold).correct, marked


MARKERS = ("#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}.", "Answer: {}", "Answer:\n- {}\n")
WRAPPINGS = (
    *(
        "{}",
        "**{}**",
        "${}",
        "\\$ {}",
        "<{}>",
        "[{}]",
        "{} dollars",
        "{} mm",
        "{} cm^2",
        "{}%",
        "x = {}",
        "$ {} $",
        "USD {}",
    ),
    *(
        "\\text{{{}}}",
        "{}\\text{{ km}}",
        "{}\\ \\mathrm{{m}}^{{2}}",
        "9 * 2 = {}",
        "{}, because 4 < 5",
        "{} (see above)",
    ),
)
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u207b\ufe58\ufe63\uff0d\u2796"
SPACES = (" ", "\u00a0", "\u2009", "\u202f", "\\,", "&nbsp;", ",", "{,}", "")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
TURNS = (
    *(
        "\nHuman: {}",
        "\n\nUser: {}\nAssistant: ok",
        "\nuser\n{}\nassistant\n",
        "<|im_end|>\n<|im_start|>user\n{}",
        "</s>{}",
    ),
    *(
        "\n\n### Question 2\n{}",
        "\n\nProblem 3: {}",
        "\n\nQ: {}",
        "<end_of_turn>\n<start_of_turn>user\n{}",
        "\n\n**User:** {}",
    ),
    *("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}", " [INST] {} [/INST]", "\n\n### Instruction:\n{}"),
)


@given(
    value=st.integers(0, 10**13),
    negative=st.booleans(),
    dash=st.sampled_from(DASHES),
    space=st.sampled_from(SPACES),
    marker=st.sampled_from(MARKERS),
    wrapping=st.sampled_from(WRAPPINGS),
)
def test_gsm8k_reads_the_number_with_its_sign_whatever_is_around_it(value, negative, dash, space, marker, wrapping):
    """Right answers are read, and no wrapping, dash or space makes another number of any."""
    written = f"{value:,}".replace(",", space)
    # On the line after a marker the number comes first, in front of any word.
    assume("\n" not in marker or not re.search("[A-Za-z]", wrapping.partition("{}")[0]))
    text = marker.format(wrapping.format(dash + written if negative else written))
    assert gsm8k.read_answer(text) == str(-value if negative else value), text


@given(
    thousandths=st.integers(0, 10**7),
    scale=st.sampled_from(sorted(SCALES)),
    dash=st.sampled_from(["", *DASHES]),
    marker=st.sampled_from(MARKERS),
    wrapping=st.sampled_from(["{}", "${}", "{} dollars", "**{}**", "= {}", "{} (exactly)"]),
)
def test_gsm8k_multiplies_by_the_scale_word(thousandths, scale, dash, marker, wrapping):
    value = Fraction(thousandths, 1000) * 10 ** SCALES[scale] * (-1 if dash else 1)
    text = marker.format(wrapping.format(f"{dash}{thousandths / 1000:.3f} {scale}"))
    found = gsm8k.read_answer(text)
    assert found is not None, text
    assert Fraction(found) == value, text


@given(
    answer=st.sampled_from(["17", "18", "$18", "18 eggs", "17 or 18", "about 18", "1.8 million", "-18", "18k", "<18>"]),
    marker=st.sampled_from(MARKERS),
    turn=st.sampled_from(TURNS),
    second=st.sampled_from(["", " ", "\n"]),
    invented=TEXTS,
    cut=st.booleans(),
)
def test_an_invented_next_turn_changes_nothing(answer, marker, turn, second, invented, cut):
    """Whatever it says; and it shows that the answer before it was complete."""
    text = marker.format(answer)
    followed = text + turn.format(f"Tom has 3. #### 3 <answer>4*5</answer> {invented}") + second
    assume("think" not in followed and "THINK" not in followed)
    assert gsm8k.read_answer(followed, truncated=cut) == gsm8k.read_answer(text)


@given(expression=st.sampled_from(["4+5", "4*5", "4+", "9", " "]), turn=st.sampled_from(TURNS), invented=TEXTS)
def test_an_invented_next_turn_changes_nothing_in_countdown(expression, turn, invented):
    text = f"So <answer>{expression}</answer>"
    followed = text + turn.format(f"Make 9. <answer>5+4</answer> {invented}")
    assume("think" not in followed and "THINK" not in followed)
    assert countdown.score(followed, [4, 5], 9) == countdown.score(text, [4, 5], 9)


@given(text=TEXTS, cut=st.booleans(), answer_format=st.sampled_from(["tag", "line"]))
def test_a_thought_that_the_prompt_opened_counts_like_one_of_the_completion(text, cut, answer_format):
    with_tag = f"<think>{text}"
    assert gsm8k.read_answer(text, truncated=cut, thought_open=True) == gsm8k.read_answer(with_tag, truncated=cut)
    assert countdown.read_answer(text, answer_format=answer_format, thought_open=True) == countdown.read_answer(
        with_tag, answer_format=answer_format
    )


@given(text=TEXTS, marker=st.sampled_from(MARKERS))
def test_a_later_thought_changes_no_answer(text, marker):
    answered = f"{marker.format(18)}\n"
    for thought in (f"<think>{text.replace('/think', '')}", "<think>#### 17 <answer>4*5</answer></think> Good."):
        assert gsm8k.read_answer(answered + thought, truncated=True) == gsm8k.read_answer(answered) == "18"
        assert countdown.score(f"<answer>4+5</answer>{thought}", [4, 5], 9).correct


@given(text=TEXTS, answer=st.sampled_from(["18", "1,234", "#### 18", "so $5.\n#### 5.", "abc", "", "1234."]))
@example(text="1,234.", answer="1234")
@example(text="a -$5, -7-", answer="-7")
def test_strict_and_flexible_are_the_published_filters(text, answer):
    for method in ("strict", "strict_cot", "flexible"):
        assert gsm8k.score(text, answer, method=method).correct == published(method, text, answer)
