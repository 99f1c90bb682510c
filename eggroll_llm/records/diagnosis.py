"""Whether a run learns anything: rows of metrics -> what is wrong, in words, and which setting mends it.

Pure: the loop asks after every step, the summary, the report and the model card at the end. Each check has one constant
and says nothing below it:

    no signal       steps in which every reward was the same, so nothing could be learned
    tied            problems that all members earned the same on, in steps that had others (twins with problems of their
                    own mostly earn the same)
    form            twins of which one is right, and of the other the form was refused
    cut off         answers that the length limit ended
    unscored        answers on which the user's score() failed
    step size       RMS of an update next to the RMS of the base model's weights
    sigma           the perturbation next to the same
    members         accuracy of the members next to that of the weights that they perturb
    worse           accuracy below the base model's, by McNemar's exact test on the same problems

The members' accuracy is of training problems and the weights' of held-out ones; the members of a step share its
problems. So each problem of a step counts once in the interval of the members, however many answered it, and only the
loss of a third (of half, where members answer at a temperature) with intervals apart is reported. Of the evaluations
around those steps the lowest is taken.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.records.accuracy import accuracy_text, mcnemar, p_text, percent, points, two_shares, wilson
from eggroll_llm.system.jsonl import number, whole

Row = Mapping[str, Any]
Severity = Literal["note", "warning", "failure"]

RECENT = 10  # last steps that a share is taken over
TIED_IN_A_ROW = 3  # steps without signal in a row, in a run that continues
TIED_SHARE = 0.2  # of all steps
TIED_PROBLEMS = 0.8  # of the problems: recipes learn with 0.75
REFUSED = 0.5  # of the twins of which one is right
ENOUGH_TWINS = 30  # to speak of their share
LOST, LOST_WHEN_HOT = 1 / 3, 1 / 2  # of the weights' accuracy, by members; at a temperature, which costs some, too
CUT_OFF = 0.3  # of the answers
UNSCORED = 0.1  # of the answers
# Random changes of rank 16 to SmolLM2-135M by 3, 5, 10 and 20 % of its weights' RMS take its loss on plain text from
# 2.45 to 2.46, 2.51, 2.9 and 6.9. Its recipe has a step of 0.3 % and a sigma of 2 %.
LARGE_STEP = 0.05  # update over weights
DESTRUCTIVE = 0.2  # the same, of an update or a perturbation
GOOD_STEP, GOOD_SIGMA = 0.003, 0.02  # what is recommended instead
# Nats a token from the base model, where nothing was gained: near is rounding of bfloat16 or little more, and far ten
# times what the random part of all updates should cost (docs/tuning.md).
NEAR, FAR, GOOD_DRIFT = 0.01, 0.5, 0.05
SHORT_PATH = 5e-5  # sum of all updates over weights: bfloat16 keeps 1/256
SIGNIFICANT = 0.01  # p of a loss, which is tested after each evaluation
CHANCE = 0.05  # p of a change at the end
ALL_RIGHT = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that keeps a run from learning."""

    kind: str
    severity: Severity
    """"failure": nothing was learned, or the weights are damaged; "note": said at the end only."""
    text: str
    """What was seen, with numbers."""
    remedy: str
    """Which settings to change from which values."""
    level: int = 1
    """Rises when it gets much worse."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}: {self.remedy}"


def diagnose(config: RunConfig, rows: Sequence[Row], *, ended: bool = False) -> list[Finding]:
    """Return what is wrong, failures first; `ended` adds what only shows at the end of a run.

    Rows are those of metrics.jsonl, from the base model's evaluation on; checks whose values are missing are skipped.
    """
    run = _Course(config, rows)
    checks = [run.worse_than_base(), run.step_size(), run.sigma_size(), run.members_worse(), run.cut_off()]
    checks += [run.unscored(), run.no_signal(ended=ended) or run.tied_problems(), run.refused_form()]
    if ended:
        checks += [run.short_path(), run.no_gain()]
    found = [finding for finding in checks if finding]
    if any(finding.severity == "failure" for finding in found):  # says more than a note
        found = [finding for finding in found if finding.severity != "note"]
    return sorted(found, key=lambda finding: finding.severity != "failure")


def news(said: Mapping[str, int], found: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are new or much worse than when they were `said` (level by kind)."""
    return [finding for finding in found if finding.level > said.get(finding.kind, 0)]


def p_value(base: Row, last: Row) -> float:
    """Return that of an evaluation against the base model's: of pairs where they were counted, else of two shares."""
    won, lost = number(last, "eval/won"), number(last, "eval/lost")
    if min(won, lost) >= 0 and won + lost <= whole(last, "eval/problems"):
        return mcnemar(int(won), int(lost))
    shares, counts = zip(
        *((number(row, "eval/accuracy"), whole(row, "eval/problems")) for row in (base, last)), strict=True
    )
    return two_shares(shares, counts)


class _Course:
    """The rows of a run, sorted out."""

    def __init__(self, config: RunConfig, rows: Sequence[Row]) -> None:
        self.config, self.es = config, config.method == "es"
        self.steps = [row for row in rows if row["step"]]
        self.recent = self.steps[-RECENT:]
        self.evaluations = [row for row in rows if math.isfinite(number(row, "eval/accuracy"))]
        self.base = self.evaluations[0] if self.evaluations and not self.evaluations[0]["step"] else None
        sizes = (number(row, "weights/rms") for row in self.steps)
        self.weights_rms = next((size for size in sizes if size > 0), math.nan)
        """Of the base model: destroyed weights are larger."""

    def no_signal(self, *, ended: bool) -> Finding | None:
        """Steps whose rewards were all equal."""
        tied = [self._tied(row) for row in self.steps]
        count, steps = sum(tied), len(tied)
        in_a_row = next((i for i, one in enumerate(reversed(tied)) if not one), steps)
        nothing = ended and count == steps > 0
        if not nothing and (count < TIED_IN_A_ROW or (in_a_row < TIED_IN_A_ROW and count < TIED_SHARE * steps)):
            return None
        same = "all members" if self.config.members_answer else "all answers to a problem"
        where = f"all {steps} steps" if count == steps else f"{count} of {steps} steps"
        text = f"nothing was learned in {where}, because {same} got the same reward"
        level = 1 + int(math.log(max(count / TIED_IN_A_ROW, 1), 4))
        severity: Severity = "failure" if nothing else "warning"
        return Finding(kind="no signal", severity=severity, text=text, remedy=self._more_signal(tied), level=level)

    def tied_problems(self) -> Finding | None:
        """Problems whose rewards were all equal, in steps that had others."""
        share = tied_share(self.config, self.recent)
        if self.config.own_problems or len(self.recent) < RECENT or not share >= TIED_PROBLEMS:
            return None
        same = "all members" if self.config.members_answer else "all answers"
        return Finding(
            kind="tied",
            severity="warning",
            text=f"{percent(share)} of the last problems taught nothing, because {same} got the same reward",
            remedy=self._more_signal([True] * len(self.steps)),
        )

    def refused_form(self) -> Finding | None:
        """Twins that differ because the form of one answer was refused."""
        share = unread_share(self.recent)
        differ = sum(n for row in self.recent if math.isfinite(n := _differing(row)))
        if differ < ENOUGH_TWINS or not share >= REFUSED:
            return None
        return Finding(
            kind="form",
            severity="warning",
            text=f"of the last twins of which one was right, the other's form was refused in {percent(share)}, "
            "whatever its answer was worth",
            remedy="show the form in the prompt (examples, or chat.system), or take a grader or "
            f"sampling.max_tokens (now {self.config.sampling.max_tokens}) that accepts more",
        )

    def cut_off(self) -> Finding | None:
        """Answers that the length limit ended."""
        share = share_of(self.recent, "completions/truncated")
        if not share >= CUT_OFF:
            return None
        limit = self.config.sampling.max_tokens
        text = f"{percent(share)} of the last answers were cut off at sampling.max_tokens = {limit}"
        remedy = f"raise it, for instance to {4 * limit}, or let the task's stop strings or prompt end answers earlier"
        if self.base and self.config.eval.max_tokens in (0, limit):
            before = number(self.base, "eval/truncated")
            if before < share / 3:
                text += f", compared with {percent(before)} of the base model's"
                remedy = f"{self._smaller()}, which makes answers run on"
        return Finding(kind="cut off", severity="warning", text=text, remedy=remedy, level=1 + (share > 2 * CUT_OFF))

    def unscored(self) -> Finding | None:
        """Answers on which a user's score() failed."""
        answers, failed = _sum(self.recent, "completions"), _sum(self.recent, "rewards/failed")
        if not answers or failed < UNSCORED * answers:
            return None
        return Finding(
            kind="unscored",
            severity="warning",
            text=f"score() failed on {percent(failed / answers)} of the last answers, which count as 0",
            remedy="fix it: completions.jsonl holds the first such answer of each step",
        )

    def step_size(self) -> Finding | None:
        """Updates that are large next to the weights."""
        sizes = [size for row in self.recent if (size := number(row, "update/rms")) > 0]
        ratio = statistics.median(sizes) / self.weights_rms if sizes else math.nan
        if not ratio >= LARGE_STEP:
            return None
        key, rate = self._rate()
        text = f"an update changes the weights by {_times(ratio)} their own size (RMS)"
        destroyed = ratio >= DESTRUCTIVE and not self._gained()
        return Finding(
            kind="step size",
            severity="failure" if destroyed else "warning",
            text=text + (", which destroys a model" if destroyed else ""),
            remedy=f"start again with {key} lowered from {rate:g} to about {rate * GOOD_STEP / ratio:.0e}",
            level=1 + int(math.log10(min(ratio, 1e9) / LARGE_STEP)),
        )

    def sigma_size(self) -> Finding | None:
        """A perturbation that is large next to the weights."""
        sigma = self.config.es.sigma
        if not self.es or not sigma / self.weights_rms >= DESTRUCTIVE:
            return None
        return Finding(
            kind="sigma",
            severity="warning",
            text=f"es.sigma = {sigma:g} is {_times(sigma / self.weights_rms)} the weights' own size (RMS), so members "
            "are noise",
            remedy=f"start again with about {GOOD_SIGMA * self.weights_rms:.0e}",
        )

    def members_worse(self) -> Finding | None:
        """Members that solve far less than the weights they perturb."""
        if not self.config.members_answer or not self.recent:
            return None
        before = [row for row in self.evaluations if row["step"] < self.recent[0]["step"]][-1:]
        during = [row for row in self.evaluations if row["step"] >= self.recent[0]["step"]]
        if not before:
            return None
        reference = min(before + during, key=lambda row: number(row, "eval/accuracy"))
        expected, held_out = number(reference, "eval/accuracy"), whole(reference, "eval/problems")
        problems = len(self.recent) * self.config.problems_per_step
        reached = share_of(self.recent, "reward/accuracy")
        temperature = self.config.sampling.temperature
        lost = 1 - reached / expected if expected else 0.0
        apart = wilson(reached, problems)[1] < wilson(expected, held_out)[0]
        if not (lost > (LOST_WHEN_HOT if temperature else LOST) and apart):
            return None
        hot = f" (at temperature {temperature:g})" if temperature else ""
        sigma = self.config.es.sigma
        return Finding(
            kind="members",
            severity="warning",
            text=f"members solve {percent(reached)} of the training problems{hot}, the weights that they perturb "
            f"solve {percent(expected)} of the held-out ones",
            remedy=f"es.sigma = {sigma:g} is probably too large: try {sigma / (4 if lost > 0.5 else 2):.1g}",
        )

    def worse_than_base(self) -> Finding | None:
        """An accuracy that fell below the base model's."""
        if not self.base:
            return None
        last, best = self.evaluations[-1], max(self.evaluations, key=lambda row: number(row, "eval/accuracy"))
        before, now = number(self.base, "eval/accuracy"), number(last, "eval/accuracy")
        if now >= before or (p := p_value(self.base, last)) >= SIGNIFICANT:
            return None
        key, rate = self._rate()
        remedy = f"start again with {key} lowered from {rate:g}, or change reward or length limit"
        if best["step"]:
            remedy = f"take step {best['step']} (--at best), which reached {_accuracy(best)}, or {remedy}"
        return Finding(
            kind="worse",
            severity="failure",
            text=f"the model got worse: from {_accuracy(self.base)} before training to {_accuracy(last)} after step "
            f"{last['step']}, {p_text(p)}",
            remedy=remedy,
            level=1 + (now < before / 2),
        )

    def short_path(self) -> Finding | None:
        """Updates that together are lost in the rounding of the served weights."""
        path = _sum(self.steps, "update/rms") / self.weights_rms
        if len(self.steps) < RECENT or not 0 < path < SHORT_PATH:
            return None
        key, rate = self._rate()
        return Finding(
            kind="short path",
            severity="failure",
            text=f"nothing was learned: all updates together moved the weights by {path:.0e} of their own size (RMS)",
            remedy=f"raise {key} from {rate:g} to about {rate * GOOD_STEP * len(self.steps) / path:.0e}",
        )

    def no_gain(self) -> Finding | None:
        """An accuracy that may be the base model's."""
        last = self.evaluations[-1] if self.evaluations else None
        if not self.base or not last or last is self.base or (p := p_value(self.base, last)) < CHANCE:
            return None
        gain = number(last, "eval/accuracy") - number(self.base, "eval/accuracy")
        text = f"accuracy changed by {points(gain)} points, which chance explains ({p_text(p)})"
        remedy = "train for longer, or evaluate on more problems (eval.problems)"
        drift, (key, rate) = number(last, "base/divergence"), self._rate()
        if drift < NEAR or drift > FAR:
            text += f", and the weights are {drift:.2g} nats a token from the base model"
            factor = min(max(math.sqrt(GOOD_DRIFT / max(drift, 1e-9)), 1 / 4), 4)
            change = "lower" if drift > FAR else "raise"
            remedy = f"{change} {key} from {rate:g} to about {rate * factor:.1g}"
        return Finding(kind="no gain", severity="note", text=text, remedy=remedy)

    def _gained(self) -> bool:
        """Return whether accuracy rose above the base model's, by more than chance explains."""
        if not self.base:
            return False
        last = self.evaluations[-1]
        rose = number(last, "eval/accuracy") > number(self.base, "eval/accuracy")
        return rose and p_value(self.base, last) < CHANCE

    def _tied(self, row: Row) -> bool:
        if self.es:
            return number(row, "fitness/std") == 0
        return number(row, "prompts/tied") >= self.config.sampling.prompts_per_step

    def _more_signal(self, tied: Sequence[bool]) -> str:
        sampling = self.config.sampling
        without = [row for row, one in zip(self.steps, tied, strict=True) if one][-RECENT:]
        easier = "or choose problems that the model solves now and then"
        if share_of(without, "reward/accuracy") >= ALL_RIGHT:
            return "every answer was right: choose harder problems"
        if self.sigma_size() or self.members_worse():
            hopeless = self.base and not number(self.base, "eval/accuracy")
            smaller = f"lower es.sigma (now {self.config.es.sigma:g}), with which members solve nothing"
            return f"{smaller}, {easier}" if hopeless else smaller
        if share_of(without, "completions/truncated") > 2 * CUT_OFF:
            return f"raise sampling.max_tokens (now {sampling.max_tokens}): the answers were cut off"
        if not self.config.members_answer:
            return (
                f"raise sampling.samples_per_prompt (now {sampling.samples_per_prompt}), sampling.prompts_per_step "
                f"(now {sampling.prompts_per_step}) or sampling.temperature (now {sampling.temperature:g}), {easier}"
            )
        return (
            f"raise es.sigma (now {self.config.es.sigma:g}) so that answers differ, or sampling.prompts_per_step "
            f"(now {sampling.prompts_per_step}), {easier}"
        )

    def _rate(self) -> tuple[str, float]:
        table = self.config.es if self.es else self.config.grpo
        return f"{self.config.method}.learning_rate", table.learning_rate

    def _smaller(self) -> str:
        key, rate = self._rate()
        sigma = f"es.sigma (now {self.config.es.sigma:g}) or " if self.es else ""
        return f"lower {sigma}{key} (now {rate:g})"


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(value for row in rows if math.isfinite(value := number(row, key)))


def tied_share(config: RunConfig, rows: Sequence[Row]) -> float:
    """Return the share of the problems of steps whose rewards were all equal; NaN of none."""
    counts = [count for row in rows if math.isfinite(count := number(row, "prompts/tied"))]
    return sum(counts) / (len(counts) * config.problems_per_step) if counts else math.nan


def unread_share(rows: Sequence[Row]) -> float:
    """Return the share, of twins of which one is right, of those whose other's form was refused; NaN of none."""
    pairs = [(number(row, "twins/unread"), _differing(row)) for row in rows]
    pairs = [(share, count) for share, count in pairs if math.isfinite(share * count)]
    total = sum(count for _, count in pairs)
    return sum(share * count for share, count in pairs) / total if total else math.nan


def _differing(row: Row) -> float:
    """Return how many answers of twins differ in whether they are right."""
    return number(row, "twins/differ") * number(row, "completions") / 2


def share_of(rows: Sequence[Row], key: str) -> float:
    """Return the mean of a share of completions over steps; NaN of none."""
    pairs = [(number(row, key), number(row, "completions")) for row in rows]
    pairs = [(share, count) for share, count in pairs if math.isfinite(share * count)]
    total = sum(count for _, count in pairs)
    return sum(share * count for share, count in pairs) / total if total else math.nan


def _accuracy(row: Row) -> str:
    return accuracy_text(number(row, "eval/accuracy"), whole(row, "eval/problems"))


def _times(ratio: float) -> str:
    if ratio < 1:
        return f"{100 * ratio:.0f} % of"
    return f"{ratio:,.0f} times" if 100 <= ratio < 1e6 else f"{ratio:.3g} times"
