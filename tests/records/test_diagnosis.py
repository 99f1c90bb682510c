"""What is said about rows of metrics: each fault is named with its setting, and a sound run gets no warning."""

import dataclasses
from typing import Any

import pytest

from eggroll_llm.config.schema import EvalConfig, GrpoConfig, RunConfig, SamplingConfig
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.records.diagnosis import Finding, diagnose, news
from eggroll_llm.records.figures import figures

ES = RunConfig(
    task="countdown",
    steps=50,
    es=EsSettings(sigma=0.004, learning_rate=5e-4),
    sampling=SamplingConfig(prompts_per_step=8, max_tokens=12),
)
GRPO = dataclasses.replace(
    ES,
    method="grpo",
    grpo=GrpoConfig(learning_rate=3e-6),
    sampling=SamplingConfig(prompts_per_step=8, samples_per_prompt=4, max_tokens=12, temperature=1.0),
)
JUDGING = dataclasses.replace(
    GRPO, method="es", es=dataclasses.replace(ES.es, fitness_from="probabilities"), grpo=GrpoConfig()
)
Row = dict[str, Any]


def step(number: int, **changes: Any) -> Row:
    """A step of a sound run."""
    row = {
        "step": number, "completions": 256, "completions/truncated": 0.02, "rewards/failed": 0, "fitness/std": 1.0,
        "prompts/tied": 1, "reward/accuracy": 0.22, "update/rms": 5e-4, "weights/rms": 0.19,
        "twins/differ": 0.2, "twins/unread": 0.1,
    }  # fmt: skip
    return row | {key.replace("__", "/"): value for key, value in changes.items()}


def evaluated(accuracy: float, **changes: Any) -> Row:
    row = {"eval/accuracy": accuracy, "eval/problems": 512, "eval/truncated": 0.01}
    return row | {key.replace("__", "/"): value for key, value in changes.items()}


BASE = {"step": 0} | evaluated(0.25)
LEARNED = evaluated(0.5, eval__won=150, eval__lost=22)


def course(steps: int = 20, last: Row = LEARNED, **changes: Any) -> list[Row]:
    """Rows of a run whose steps are all alike, evaluated before and after."""
    rows = [BASE, *(step(n, **changes) for n in range(1, steps + 1))]
    return [*rows[:-1], rows[-1] | last]


def found(rows: list[Row], config: RunConfig = ES, *, ended: bool = True) -> dict[str, Finding]:
    return {finding.kind: finding for finding in diagnose(config, rows, ended=ended)}


@pytest.mark.parametrize("config", [ES, GRPO], ids=["es", "grpo"])
def test_nothing_is_said_of_a_run_that_learns(config: RunConfig) -> None:
    rows = course()
    for length in range(len(rows) + 1):
        assert diagnose(config, rows[:length]) == []
    assert diagnose(config, rows, ended=True) == []


def test_twins_with_problems_of_their_own_may_earn_the_same() -> None:
    own = dataclasses.replace(ES, es=dataclasses.replace(ES.es, problems="per_pair"))
    rows = course(prompts__tied=int(0.8 * own.problems_per_step) + 1)
    assert diagnose(own, rows, ended=True) == []
    assert [key for key in figures(own, rows) if "tied" in key] == ["problems on which both twins tied"]


def test_nothing_is_said_of_what_was_not_recorded() -> None:
    """Rows of an older version, or with values that were not finite."""
    for rows in (
        [],
        [BASE],
        [{"step": 0}, {"step": 1}],
        [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "eval/accuracy": 0.26}],
        [BASE, *({"step": n, **dict.fromkeys(step(1).keys() - {"step"})} for n in range(1, 20))],
    ):
        assert [f for f in diagnose(ES, rows, ended=True) if f.severity != "note"] == []


def test_the_evaluation_of_an_older_run_is_compared_without_pairs() -> None:
    assert found(course(last=evaluated(0.05)))["worse"].severity == "failure"
    assert "worse" not in found(course(last=evaluated(0.23)))


@pytest.mark.parametrize(("config", "tied"), [(ES, {"fitness__std": 0.0}), (GRPO, {"prompts__tied": 8})])
def test_steps_without_signal(config: RunConfig, tied: Row) -> None:
    """Three in a row while it runs, a fifth of them at any time, all of them at the end, however few."""
    rows = [BASE, *(step(n, **tied) for n in range(1, 6))]
    assert [bool(found(rows[: n + 1], config, ended=False)) for n in range(6)] == [False] * 3 + [True] * 3
    assert found(rows[:2], config)["no signal"].severity == "failure"
    assert "in all 5 steps" in found(rows, config)["no signal"].text
    some = [BASE, *(step(n, **(tied if n % 4 == 0 else {})) for n in range(1, 21))]
    assert "in 5 of 20 steps" in found(some, config)["no signal"].text
    assert found(some, config)["no signal"].severity == "warning"
    few = [BASE, *(step(n, **(tied if n % 8 == 0 else {})) for n in range(1, 101))]
    assert "no signal" not in found(few, config)


def test_the_remedy_of_tied_rewards_depends_on_why_they_tie() -> None:
    def remedy(config: RunConfig = ES, **changes: Any) -> str:
        return found([BASE, *(step(n, fitness__std=0.0, **changes) for n in range(1, 6))], config)["no signal"].remedy

    assert remedy(update__rms=0.0).startswith("raise es.sigma (now 0.004)")
    assert remedy(reward__accuracy=1.0) == "every answer was right: choose harder problems"
    assert remedy(completions__truncated=1.0).startswith("raise sampling.max_tokens (now 12)")
    assert remedy(reward__accuracy=0.0).startswith("lower es.sigma (now 0.004)")  # the weights solve a quarter
    huge = dataclasses.replace(ES, es=dataclasses.replace(ES.es, sigma=1e3))
    assert remedy(huge).startswith("lower es.sigma (now 1000)")
    assert remedy(huge, completions__truncated=1.0).startswith("lower es.sigma (now 1000)")
    assert remedy(huge).endswith("with which members solve nothing")
    hopeless = found([BASE | evaluated(0.0), *(step(n, fitness__std=0.0) for n in range(1, 6))], huge)["no signal"]
    assert hopeless.remedy.endswith("or choose problems that the model solves now and then")  # it solves none itself


def test_answers_that_are_cut_off() -> None:
    finding = found(course(completions__truncated=1.0, last=LEARNED | {"eval/truncated": 1.0}))["cut off"]
    assert finding.text.startswith("100.0 % of the last answers were cut off at sampling.max_tokens = 12")
    every = [BASE | {"eval/truncated": 0.9}, *course(completions__truncated=1.0)[1:]]
    assert found(every)["cut off"].remedy.startswith("raise it, for instance to 48")
    # The base model's answers end by themselves: a longer limit is no remedy.
    assert finding.remedy.startswith("lower es.sigma (now 0.004) or es.learning_rate (now 0.0005)")
    longer = dataclasses.replace(ES, eval=EvalConfig(max_tokens=100))
    assert found(course(completions__truncated=1.0), longer)["cut off"].remedy.startswith("raise it")
    assert "cut off" not in found(course(completions__truncated=0.2))
    assert "cut off" not in found([*course(15, completions__truncated=1.0), *(step(n) for n in range(16, 30))])


def test_a_score_that_fails() -> None:
    assert found(course(rewards__failed=64))["unscored"].text.startswith("score() failed on 25.0 %")
    assert "unscored" not in found(course(rewards__failed=5))


@pytest.mark.parametrize("config", [ES, GRPO], ids=["es", "grpo"])
@pytest.mark.parametrize(
    ("rms", "severity"), [(0.002, None), (0.0114, "warning"), (0.05, "failure"), (1.0, "failure"), (1e6, "failure")]
)
def test_the_size_of_a_step_next_to_the_weights(config: RunConfig, rms: float, severity: str | None) -> None:
    """0.19 is theirs. The remedy is a step of 0.3 %; that the weights have grown by the updates does not hide it."""
    rows = course(last=evaluated(0.25), update__rms=rms)
    rows = [row | {"weights/rms": 0.19 + rms * row["step"]} if row["step"] > 1 else row for row in rows]
    finding = found(rows, config, ended=False).get("step size")
    assert (finding and finding.severity) == severity
    if finding:
        rate = float(finding.remedy.rpartition("about ")[2])
        now = 5e-4 if config.method == "es" else 3e-6
        assert f"{config.method}.learning_rate lowered from {now:g}" in finding.remedy
        assert rate / now == pytest.approx(0.003 * 0.19 / rms, rel=0.5)


def test_a_model_that_learned_is_not_called_destroyed() -> None:
    finding = found(course(update__rms=0.05))["step size"]
    assert finding.severity == "warning"
    assert "destroys" not in finding.text


def test_updates_that_are_lost_in_rounding() -> None:
    assert found(course(update__rms=1e-9))["short path"].severity == "failure"
    assert "raise es.learning_rate from 0.0005" in found(course(update__rms=1e-9))["short path"].remedy
    assert "short path" not in found(course(update__rms=1e-9), ended=False)
    assert "short path" not in found(course(update__rms=3e-6))


def test_members_far_worse_than_the_weights_that_they_perturb() -> None:
    """None of 16 problems where a quarter is solved; a step of eight problems says too little yet."""
    rows = [BASE, *(step(n, reward__accuracy=0.0) for n in range(1, 6))]
    assert [bool(found(rows[: n + 1], ended=False)) for n in range(6)] == [False, False, True, True, True, True]
    assert "es.sigma = 0.004 is probably too large: try 0.001" in found(rows)["members"].remedy
    assert "members" not in found(course(reward__accuracy=0.15))
    # Weights that are destroyed themselves are not the members' fault.
    assert "members" not in found(course(5, reward__accuracy=0.0, last=evaluated(0.0)))
    assert "members" not in found(rows, GRPO)
    assert "members" not in found(rows, JUDGING)  # the answers are the weights' own


@pytest.mark.parametrize(("temperature", "reached"), [(0.0, 0.3), (1.0, 0.2)])
def test_members_that_lose_a_third_and_no_less(temperature: float, reached: float) -> None:
    """Of 50 %; and half at a temperature, which costs accuracy by itself."""
    config = dataclasses.replace(ES, sampling=dataclasses.replace(ES.sampling, temperature=temperature))
    base = {"step": 0} | evaluated(0.5)
    rows = [base, *course(40, reward__accuracy=reached, last=evaluated(0.5))[1:]]
    assert "es.sigma = 0.004" in found(rows, config)["members"].remedy
    if not temperature:
        assert found(rows, config)["members"].remedy.endswith("try 0.002")
    rows = [base, *course(40, reward__accuracy=reached + 0.1, last=evaluated(0.5))[1:]]
    assert "members" not in found(rows, config)


def test_most_problems_tie() -> None:
    """Steps that have some signal; recipes learn with three quarters of their problems tied."""
    assert found(course(prompts__tied=7))["tied"].text.startswith("87.5 % of the last problems taught nothing")
    assert found(course(prompts__tied=7))["tied"].remedy.startswith("raise es.sigma (now 0.004)")
    assert "tied" not in found(course(prompts__tied=6))
    assert "tied" not in found(course(9, prompts__tied=7))
    assert found(course(fitness__std=0.0, prompts__tied=8)).keys() == {"no signal"}


def test_twins_that_differ_in_form() -> None:
    """Of 10 steps with 128 pairs of answers each."""
    assert found(course(twins__unread=0.6))["form"].text.endswith(
        "was refused in 60.0 %, whatever its answer was worth"
    )
    assert "form" not in found(course(twins__unread=0.4))
    assert "form" not in found(course(twins__unread=0.6, twins__differ=0.02))  # 26 pairs


def test_without_a_gain_the_distance_from_the_base_model_says_which_way() -> None:
    def note(distance: float) -> str:
        last = evaluated(0.26, eval__won=5, eval__lost=1, base__divergence=distance)
        return str(found(course(last=last))["no gain"])

    assert note(0.002).endswith(
        "and the weights are 0.002 nats a token from the base model: raise es.learning_rate from 0.0005 to about 0.002"
    )
    assert note(0.8).endswith(
        "0.8 nats a token from the base model: lower es.learning_rate from 0.0005 to about 0.0001"
    )
    assert note(0.05).endswith("train for longer, or evaluate on more problems (eval.problems)")
    assert diagnose(ES, course(last=LEARNED | {"base/divergence": 3.0}), ended=True) == []


def test_a_run_in_numbers() -> None:
    rows = course(last=LEARNED | {"base/divergence": 0.07})
    rows[-1] |= {"twins/differ": 0.4, "twins/unread": 0.9, "members/divergence": 0.03, "prompts/tied": 3}
    assert figures(ES, rows) == {
        "problems on which all rewards tied": "15.0 %",
        "training problems solved by members": "22.0 %",
        "held-out problems solved by the weights, step 20": "50.0 % [45.7, 54.3]",
        "answers of twins of which one is right": "22.0 %",
        "of those, the other's form was refused": "24.5 %",
        "answers cut off": "2.0 %",
        "divergence of members from the weights": "0.03 nats a token",
        "divergence of weights from the base model": "0.07 nats a token",
    }
    assert figures(ES, [BASE]) == {}
    assert figures(ES, [{"step": 1}]) == {}


def test_answers_that_tie_where_members_only_judge_them() -> None:
    finding = found(course(fitness__std=0.0), JUDGING)["no signal"]
    assert finding.text == "nothing was learned in all 20 steps, because all answers to a problem got the same reward"
    assert finding.remedy.startswith("raise sampling.samples_per_prompt (now 4)")


def test_a_model_that_got_worse() -> None:
    rows = course(last=evaluated(0.1, eval__won=5, eval__lost=82))
    finding = found(rows)["worse"]
    assert finding.severity == "failure"
    assert finding.text.startswith(
        "the model got worse: from 25.0 % [21.4, 28.9] before training to 10.0 % [7.7, 12.9]"
    )
    assert finding.remedy.startswith("start again with es.learning_rate lowered from 0.0005")
    better = [*rows[:10], rows[10] | LEARNED, *rows[11:]]
    assert found(better)["worse"].remedy.startswith("take step 10 (--at best), which reached 50.0 %")
    noise = found(course(last=evaluated(0.24, eval__won=30, eval__lost=35)))
    assert noise.keys() == {"no gain"}
    assert noise["no gain"].text == "accuracy changed by −1.0 points, which chance explains (p = 0.62)"
    assert "no gain" not in found(course(last=evaluated(0.24, eval__won=30, eval__lost=35)), ended=False)


def test_sound_runs_are_not_called_worse_by_chance() -> None:
    """The same accuracy, each problem won or lost by a coin: at most one test in a hundred finds a loss."""
    from scipy import stats

    changed = 60
    losses = sum(
        stats.binom.pmf(lost, changed, 0.5)
        for lost in range(changed + 1)
        if "worse"
        in found(course(last=evaluated(0.25 - (2 * lost - changed) / 512, eval__won=changed - lost, eval__lost=lost)))
    )
    assert 0 < losses <= 0.005  # of two sides that of losses


def test_a_warning_comes_once_and_again_when_it_is_much_worse() -> None:
    rows = [BASE, *(step(n, fitness__std=0.0) for n in range(1, 101))]
    said: dict[str, int] = {}
    at = []
    for length in range(1, 102):
        for finding in news(said, diagnose(ES, rows[:length])):
            said[finding.kind] = finding.level
            at.append(length - 1)
    assert at == [3, 12, 48]


def test_failures_come_first_and_notes_only_alone() -> None:
    rows = course(completions__truncated=0.5, update__rms=1.0, last=evaluated(0.25, eval__won=1, eval__lost=1))
    severities = [finding.severity for finding in diagnose(ES, rows, ended=True)]
    assert severities == ["failure", "warning"]
