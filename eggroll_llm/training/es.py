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

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from eggroll_llm.engine.interface import Completion
from eggroll_llm.engine.sampling import sample_population
from eggroll_llm.errors import TaskError, TrainingError
from eggroll_llm.es.estimate import NonFiniteUpdate, UpdateSpec, check_finite
from eggroll_llm.es.fitness import Fitness, shape_fitness
from eggroll_llm.tasks.order import problems_of_step
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.tasks.task import Score
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.harness import Loop, reward_row, sample_rows, throughput_row
from eggroll_llm.training.plan import journal_entry, plan_of
from eggroll_llm.training.scorer import answered, unusable

Item = TypeVar("Item")
CHECKSUM_EVERY = 10  # steps between checksums of the weights in the journal


class EsTrainer:
    """Trains until a limit of the configuration is reached."""

    def __init__(self, loop: Loop, train: ProblemSet) -> None:
        """Continue after the last step of the journal, whose weights the engine holds."""
        self.loop, self.train_set = loop, train
        self.config, self.engine, self.scorer, self.journal = loop.config, loop.engine, loop.scorer, loop.journal

    def run(self) -> Evaluation | None:
        """Train to the limit and return the last evaluation; None when a resumed run had reached it already."""
        evaluation = None
        if self.loop.step == 0:
            evaluation = self.loop.start()
        elif self.loop.best_is_due():  # an interruption came between its metrics and its checkpoint
            self.save()
        while not self.loop.finished():
            evaluation = self._train_step()
        return evaluation

    def _train_step(self) -> Evaluation | None:
        start = time.perf_counter()
        self.loop.step += 1
        config, step = self.config, self.loop.step
        indices_P = problems_of_step(
            len(self.train_set.problems), config.sampling.prompts_per_step, seed=config.seed, step=step
        )

        plan = plan_of(config, step)
        noise_seconds = self.engine.begin(plan.noise, config.es.population, antithetic=plan.antithetic)
        sampling_start = time.perf_counter()
        completions_MPS = sample_population(
            self.engine,
            [self.train_set.prompts[index] for index in indices_P],
            config.es.population,
            config.sampling.samples_per_prompt,
            self.loop.decoding,
            seed=config.seed,
            step=step,
            on_progress=lambda done, total: self.loop.sampling(self.loop.step_label, done, total),
        )
        sampling_seconds = time.perf_counter() - sampling_start

        reward_start = time.perf_counter()
        self.scorer.start_counting()
        pairs = [
            answered(self.train_set, index, completion)
            for row_PS in completions_MPS
            for row_S, index in zip(row_PS, indices_P, strict=True)
            for completion in row_S
        ]
        scores = iter(self.scorer.score_all(pairs))
        scores_MPS = [[[next(scores) for _ in row_S] for row_S in row_PS] for row_PS in completions_MPS]
        if step == 1:
            self.scorer.check(of=" of the first step")
        rewards_MP = _rewards(scores_MPS)
        fitness = shape_fitness(rewards_MP, config.es.fitness, antithetic=config.es.antithetic)
        _check_dropped(fitness, step, self.scorer.first_dropped)
        reward_seconds = time.perf_counter() - reward_start

        update = UpdateSpec.of(plan, fitness.fitness_M.tolist())
        _check_update(update)
        checksum = self._due_checksum()
        with self.loop.saving():
            self.journal.append(journal_entry(update, dropped=fitness.dropped, checksum=checksum))
        times = self.engine.update(update)
        if not times.report.finite:
            raise TrainingError(f"step {step}: weights are no longer finite although the update was: check the memory")
        step_seconds = time.perf_counter() - start
        self.loop.wall_time += step_seconds

        graded_MP = [list(map(_shown, *rows)) for rows in zip(completions_MPS, scores_MPS, strict=True)]
        completions_MP = [[completion for completion, _ in row_P] for row_P in graded_MP]
        scores_MP = [[score for _, score in row_P] for row_P in graded_MP]
        samples = sample_rows(step, "member", self.train_set, indices_P, completions_MP, scores_MP)
        row = {
            "step": step,
            "wall_time": self.loop.wall_time,
            **reward_row(_flat(scores_MPS), rewards_MP),
            "fitness/std": float(fitness.fitness_M.std(correction=0)),
            "members/dropped": len(fitness.dropped),
            "rewards/failed": self.scorer.failures,
            "prompts/tied": fitness.tied_prompts,
            **throughput_row(_flat(completions_MPS), sampling_seconds),
            "time/noise": noise_seconds,
            "time/sample": sampling_seconds,
            "time/reward": reward_seconds,
            "time/update": times.update,
            "time/serve": times.serve,
            "time/step": step_seconds,
            "update/rms": times.report.rms,
            "update/changed": times.report.changed,
            "weights/rms": times.report.weights_rms,
            "sigma": plan.sigma,
            "learning_rate": plan.learning_rate,
        }
        evaluation = self.loop.end_step(row, samples, tied=fitness.all_tied)
        if self.loop.checkpoint_due():
            self.save()
        return evaluation

    def export(self, directory: Path) -> None:
        """Write the model as it is now, with its model card, into a new directory."""
        self.engine.export(directory)
        self.loop.describe(directory)

    def save(self) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        self.loop.save(self.export, self.engine.state(), {"checksum": self.engine.checksum()})

    def _due_checksum(self) -> str:
        """The weights before a step are recorded now and then, for replays to be checked against."""
        return self.engine.checksum() if (self.loop.step - 1) % CHECKSUM_EVERY == 0 else ""


def _flat(items_MPS: Sequence[Sequence[Sequence[Item]]]) -> list[Item]:
    return [item for row_PS in items_MPS for row_S in row_PS for item in row_S]


def _shown(completions_S: Sequence[Completion], scores_S: Sequence[Score]) -> tuple[Completion, Score]:
    """Return what the log shows of several samples: the first that could not be scored, or the first."""
    graded_S = list(zip(completions_S, scores_S, strict=True))
    return next((pair for pair in graded_S if unusable(pair[1].reward, pair[1].detail)), graded_S[0])


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


def _check_dropped(fitness: Fitness, step: int, first: str) -> None:
    members = len(fitness.fitness_M)
    if 2 * len(fitness.dropped) > members:
        raise TaskError(
            f"step {step}: {len(fitness.dropped)} of {members} members were dropped for a NaN or infinite reward: "
            f"make score() return finite rewards; the first: {first}"
        )
