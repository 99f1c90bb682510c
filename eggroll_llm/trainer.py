"""The ES loop: sample a population, score it, shape the rewards, record the fitness, fold it into the weights.

    completions_MPS = member_m(prompt_p),   W_m = W + sign_m sigma E_k
    rewards_MP      = mean_s score(completions_MPS)
    fitness_M       = shape(rewards_MP)
    journal         <- fitness_M                    on disk before the weights move
    W               <- W + learning_rate sum_k c_k E_k / ||c||

Departures from the paper are those of `fitness` and `update`. Whatever a step needs is a function of (seed, step), so
that a run continues from its journal as if it had never stopped. Updates are counted from 1; step 0 is the base model.

Shapes: M member, K antithetic pair, P prompt, S sample.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eggroll_llm.card import write_card
from eggroll_llm.checkpoint import checkpoint_path, prune, save_checkpoint
from eggroll_llm.config import RunConfig
from eggroll_llm.errors import TaskError, TrainingError
from eggroll_llm.evaluate import Evaluation, evaluate
from eggroll_llm.fitness import Fitness, shape_fitness
from eggroll_llm.journal import Journal
from eggroll_llm.problems import problems_of_step
from eggroll_llm.prompts import ProblemSet, set_hash
from eggroll_llm.run_dir import RunDir
from eggroll_llm.run_weights import best_step, write_provenance
from eggroll_llm.sampler import Completion, Decoding, sample_population
from eggroll_llm.scoring import Scorer
from eggroll_llm.specs import noise_of, step_entry, update_spec
from eggroll_llm.tasks import Problem, Score
from eggroll_llm.trackers import Trackers
from eggroll_llm.update import NonFiniteUpdate, UpdateSpec, check_finite

CHECKSUM_EVERY = 10  # steps between checksums of the weights in the journal
TIED_STEPS_WARNING = 3  # steps in a row without any difference between members before the user is told


class Display(Protocol):
    """Where progress is shown."""

    def sampling(self, label: str, done: int, total: int) -> None:
        """Show how far the sampling of a step or an evaluation is."""

    def step(self, row: dict[str, Any], samples: Sequence[dict[str, Any]], *, seconds_left: float | None) -> None:
        """Show a finished step."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Show an evaluation."""

    def message(self, text: str) -> None:
        """Show a sentence."""


class EsTrainer:
    """Trains until a limit of the configuration is reached."""

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        scorer: Scorer,
        train: ProblemSet,
        held_out: ProblemSet,
        stop: tuple[str, ...],
        run: RunDir,
        journal: Journal,
        display: Display,
        *,
        metrics: Sequence[Mapping[str, Any]] = (),
        trackers: Trackers | None = None,
    ) -> None:
        """Continue after the last step of the journal, whose weights `engine` holds and `metrics` are the rows of."""
        self.config, self.engine, self.scorer, self.display = config, engine, scorer, display
        self.train_set, self.held_out = train, held_out
        self.run_dir, self.journal, self.trackers = run, journal, trackers
        self.step, self.wall_time = journal.last_step, float(metrics[-1]["wall_time"]) if metrics else 0.0
        self.best = best_step(metrics)
        sampling = config.sampling
        self.decoding = Decoding(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p, stop=stop
        )
        self.greedy = Decoding(max_tokens=config.eval.max_tokens or sampling.max_tokens, stop=stop)
        self._tied_in_a_row = 0

    def run(self) -> Evaluation | None:
        """Train to the limit and return the last evaluation; None when a resumed run had reached it already."""
        evaluation = None
        if self.step == 0:
            evaluation = self._evaluate()
            self._log({"step": 0, "wall_time": 0.0} | _evaluation_row(evaluation))
        elif self._best_is_due():  # an interruption came between its metrics and its checkpoint
            self.save()
        while not self._finished():
            evaluation = self._train_step()
        return evaluation

    def _finished(self) -> bool:
        out_of_steps = bool(self.config.steps) and self.step >= self.config.steps
        return out_of_steps or (bool(self.config.minutes) and self.wall_time >= 60 * self.config.minutes)

    def _train_step(self) -> Evaluation | None:
        start = time.perf_counter()
        self.step += 1
        config, step = self.config, self.step
        indices_P = problems_of_step(
            len(self.train_set.problems), config.sampling.prompts_per_step, seed=config.seed, step=step
        )
        problems_P = [self.train_set.problems[index] for index in indices_P]

        noise_seconds = self.engine.begin(noise_of(config, step), config.es.population, antithetic=config.es.antithetic)
        sampling_start = time.perf_counter()
        completions_MPS = sample_population(
            self.engine,
            [self.train_set.prompts[index] for index in indices_P],
            config.es.population,
            config.sampling.samples_per_prompt,
            self.decoding,
            seed=config.seed,
            step=step,
            on_progress=lambda done, total: self.display.sampling(f"step {step}", done, total),
        )
        sampling_seconds = time.perf_counter() - sampling_start

        reward_start = time.perf_counter()
        self.scorer.start_counting()
        scores_MPS = [
            [[self.scorer.score(c, problem) for c in row_S] for row_S, problem in zip(row_PS, problems_P, strict=True)]
            for row_PS in completions_MPS
        ]
        if step == 1:
            self.scorer.check(of=" of the first step")
        rewards_MP = _rewards(scores_MPS)
        fitness = shape_fitness(rewards_MP, config.es.fitness, antithetic=config.es.antithetic)
        _check_dropped(fitness, step)
        reward_seconds = time.perf_counter() - reward_start

        entry = step_entry(config, step, fitness, checksum=self._due_checksum())
        update = update_spec(config, entry)
        _check_update(update)
        self.journal.append(entry)
        times = self.engine.update(update)
        if not times.report.finite:
            raise TrainingError(f"step {step}: weights are no longer finite although the update was: check the memory")
        step_seconds = time.perf_counter() - start
        self.wall_time += step_seconds

        samples = _samples(step, problems_P, indices_P, completions_MPS, scores_MPS)
        row = {
            "step": step,
            "wall_time": self.wall_time,
            **_reward_row(scores_MPS, rewards_MP),
            "fitness/std": float(fitness.fitness_M.std(correction=0)),
            "members/dropped": len(fitness.dropped),
            "rewards/failed": self.scorer.failures,
            "prompts/tied": fitness.tied_prompts,
            **_throughput_row(completions_MPS, sampling_seconds),
            "time/noise": noise_seconds,
            "time/sample": sampling_seconds,
            "time/reward": reward_seconds,
            "time/update": times.update,
            "time/serve": times.serve,
            "time/step": step_seconds,
            "update/rms": times.report.rms,
            "update/changed": times.report.changed,
            "sigma": entry.sigma,
            "learning_rate": entry.learning_rate,
        }
        self.display.step(row, samples[: config.log.samples], seconds_left=self._seconds_left())
        self._warn_when_tied(fitness)
        evaluation = self._evaluate() if self._evaluation_due() else None
        if evaluation:
            row |= _evaluation_row(evaluation)
        self.run_dir.append_completions(samples[: config.log.completions])
        self._log(row)
        if self._checkpoint_due() or self._best_is_due():
            self.save()
        return evaluation

    def _log(self, row: dict[str, Any]) -> None:
        self.run_dir.append_metrics(row)
        self.best = best_step([*([self.best] if self.best else []), row])
        if self.trackers:
            self.trackers.log(row)

    def export(self, directory: Path) -> None:
        """Write the model as it is now, with its model card, into a new directory."""
        self.engine.export(directory)
        assert self.journal.header is not None
        write_provenance(directory, step=self.step, base_model=self.journal.header.base_model)
        write_card(
            directory,
            config=self.config,
            base_model=self.journal.header.base_model,
            step=self.step,
            metrics=self.run_dir.read_metrics(),
            journal=self.journal.path,
        )

    def save(self) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        save_checkpoint(
            self.run_dir.checkpoints,
            self.step,
            self.export,
            self.engine.state(),
            {"wall_time": self.wall_time, "checksum": self.engine.checksum()},
        )
        best = checkpoint_path(self.run_dir.checkpoints, self.best["step"] if self.best else 0)
        prune(self.run_dir.checkpoints, self.config.checkpoint.keep, [best] if self.config.checkpoint.best else [])

    def _evaluate(self) -> Evaluation:
        evaluation = evaluate(
            self.engine,
            self.scorer,
            self.held_out,
            self.greedy,
            lambda done, total: self.display.sampling("evaluation", done, total),
        )
        settings = {
            "task": self.config.task,
            "split": self.config.eval.split,
            "step": self.step,
            "prompts": set_hash(self.held_out.hashes),
            "max_tokens": self.greedy.max_tokens,
            "temperature": self.greedy.temperature,
        }
        self.run_dir.write_evaluation(self.step, settings, evaluation.samples)
        self.display.evaluation(self.step, evaluation)
        return evaluation

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self._finished() or (bool(every) and self.step % every == 0)

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint.every
        return bool(every) and self.step % every == 0

    def _best_is_due(self) -> bool:
        """Whether the best step so far is this one, and has no checkpoint yet. The base model needs none."""
        return (
            self.config.checkpoint.best
            and self.best is not None
            and 0 < self.best["step"] == self.step
            and not checkpoint_path(self.run_dir.checkpoints, self.step).is_dir()
        )

    def _due_checksum(self) -> str:
        """The weights before a step are recorded now and then, for replays to be checked against."""
        return self.engine.checksum() if (self.step - 1) % CHECKSUM_EVERY == 0 else ""

    def _seconds_left(self) -> float | None:
        """Estimate from the limit that will be reached first."""
        estimates = []
        if self.config.steps:
            estimates.append(self.wall_time / self.step * (self.config.steps - self.step))
        if self.config.minutes:
            estimates.append(60 * self.config.minutes - self.wall_time)
        return max(0.0, min(estimates)) if estimates else None

    def _warn_when_tied(self, fitness: Fitness) -> None:
        self._tied_in_a_row = self._tied_in_a_row + 1 if fitness.all_tied else 0
        if self._tied_in_a_row == TIED_STEPS_WARNING:
            self.display.message(
                f"all members got the same rewards in {TIED_STEPS_WARNING} steps, so nothing is learned: "
                f"raise es.sigma (now {self.config.es.sigma:g}) so that answers differ, or sampling.prompts_per_step, "
                "or choose a task that the model solves now and then"
            )


def _rewards(scores_MPS: Sequence[Sequence[Sequence[Score]]]) -> Tensor:
    """Return rewards_MP, float64: the mean over samples."""
    rewards_MPS = [[[score.reward for score in row_S] for row_S in row_PS] for row_PS in scores_MPS]
    return torch.tensor(rewards_MPS, dtype=torch.float64).mean(dim=2)


def _check_update(update: UpdateSpec) -> None:
    """Refuse an update that could leave the finite range, before it is in the journal."""
    try:
        check_finite(update)
    except NonFiniteUpdate as error:
        raise TrainingError(f"{error}: start a new run with a lower es.learning_rate or a larger es.sigma") from error


def _check_dropped(fitness: Fitness, step: int) -> None:
    members = len(fitness.fitness_M)
    if 2 * len(fitness.dropped) > members:
        raise TaskError(
            f"step {step}: {len(fitness.dropped)} of {members} members were dropped for a NaN or infinite reward: "
            "make score() return finite rewards"
        )


def _reward_row(scores_MPS: Sequence[Sequence[Sequence[Score]]], rewards_MP: Tensor) -> dict[str, float]:
    finite = rewards_MP[rewards_MP.isfinite()]
    scores = [score for row_PS in scores_MPS for row_S in row_PS for score in row_S]
    return {
        "reward/mean": float(finite.mean()) if len(finite) else math.nan,
        "reward/accuracy": sum(score.correct for score in scores) / len(scores),
    }


def _throughput_row(completions_MPS: Sequence[Sequence[Sequence[Completion]]], seconds: float) -> dict[str, float]:
    completions = [completion for row_PS in completions_MPS for row_S in row_PS for completion in row_S]
    generated = sum(len(completion.token_ids) for completion in completions)
    prompt = sum(completion.prompt_tokens for completion in completions)
    return {
        "completions": len(completions),
        "completions/truncated": sum(completion.truncated for completion in completions) / len(completions),
        "tokens/prompt": prompt,
        "tokens/generated": generated,
        "throughput/tokens_per_second": (prompt + generated) / seconds,
        "throughput/generated_per_second": generated / seconds,
    }


def _evaluation_row(evaluation: Evaluation) -> dict[str, float]:
    return {
        "eval/accuracy": evaluation.accuracy,
        "eval/stderr": evaluation.stderr,
        "eval/problems": evaluation.problems,
        "eval/reward": evaluation.reward,
        "eval/truncated": evaluation.truncated,
        "time/eval": evaluation.seconds,
    }


def _samples(
    step: int,
    problems_P: Sequence[Problem],
    indices_P: Sequence[int],
    completions_MPS: Sequence[Sequence[Sequence[Completion]]],
    scores_MPS: Sequence[Sequence[Sequence[Score]]],
) -> list[dict[str, Any]]:
    """Return rows of completions for the log: a different member for each problem, going round the population."""
    members, prompts = len(completions_MPS), len(problems_P)
    rows = []
    for i in range(members * prompts):
        p = i % prompts
        m = (step + i + i // prompts) % members
        completion, score = completions_MPS[m][p][0], scores_MPS[m][p][0]
        rows.append(
            {
                "step": step,
                "member": m,
                "problem": problems_P[p].get("id", indices_P[p]),
                "completion": completion.text,
                "truncated": completion.truncated,
                "reward": score.reward,
                "correct": score.correct,
                "detail": score.detail,
            }
        )
    return rows
