"""The ES loop: sample a population, score it, shape the rewards, record the fitness, fold it into the weights.

    rollouts_MPS    = member_m(prompt_p),   W_m = W + sign_m sigma E_k
    rewards_MP      = mean_s score(rollouts_MPS)
    fitness_M       = shape(rewards_MP)
    journal         <- fitness_M                    on disk before the weights move
    W               <- W + learning_rate sum_k c_k E_k / ||c||

Departures from the paper are those of `es.fitness` and `es.estimate`. Everything a step needs is a function of (seed,
step), so a run continues from its journal as if it had never stopped. Updates are counted from 1; step 0 is the base
model.

Shapes: M member, K antithetic pair, P prompt, S sample.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eggroll_llm.engine.interface import UpdateTimes
from eggroll_llm.engine.sampling import Rollout, sample_population
from eggroll_llm.errors import TaskError, TrainingError
from eggroll_llm.es.estimate import NonFiniteUpdate, UpdateSpec, check_finite
from eggroll_llm.es.fitness import Fitness, shape_fitness
from eggroll_llm.es.plan import StepPlan
from eggroll_llm.training.evaluation import Evaluation
from eggroll_llm.training.harness import Harness
from eggroll_llm.training.plan import journal_entry, plan_of
from eggroll_llm.training.recorder import Metrics, reward_metrics, sampling_metrics
from eggroll_llm.training.scorer import ScoredRollout, rewards_of

CHECKSUM_EVERY = 10  # steps between checksums of the weights in the journal


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """The outcome of a step; times are in seconds."""

    plan: StepPlan
    rollouts: Sequence[ScoredRollout]
    rewards_MP: Tensor
    fitness: Fitness
    failed: int
    """Completions that the grader failed on."""
    update: UpdateTimes
    noise_time: float
    sample_time: float
    reward_time: float
    step_time: float


class EsTrainer:
    """Trains until a limit of the configuration is reached."""

    def __init__(self, harness: Harness) -> None:
        """Continue after the last step of the journal, whose weights the engine holds."""
        run = harness.run
        self.harness, self.config, self.train_set = harness, harness.config, run.prepared.train
        self.engine, self.scorer, self.recorder = run.engine, run.scorer, run.recorder

    def run(self) -> Evaluation | None:
        """Train to the limit and return the last evaluation; None when a resumed run had reached it already."""
        evaluation = None
        if self.harness.step == 0:
            evaluation = self.harness.start()
        elif self.recorder.best_is_due(
            self.harness.step
        ):  # an interruption came between its metrics and its checkpoint
            self.save()
        while not self.harness.finished():
            evaluation = self._train_step()
        return evaluation

    def export(self, directory: Path) -> None:
        """Write the model as it is now, with its model card, into a new directory."""
        self.engine.export(directory)
        self.recorder.describe(self.harness.step, directory)

    def save(self) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        self.harness.save(self.export, self.engine.state(), {"checksum": self.engine.checksum()})

    def _train_step(self) -> Evaluation | None:
        start = time.perf_counter()
        es, harness = self.config.es, self.harness
        harness.step += 1
        plan, indices_P = plan_of(self.config, harness.step), harness.problems()
        noise_time = self.engine.begin(plan.noise, es.population, antithetic=plan.antithetic)

        sampling = time.perf_counter()
        rollouts = self._sample(plan, indices_P)

        scoring = time.perf_counter()
        scored = harness.score(rollouts)
        rewards_MP = rewards_of(scored, len(indices_P), self.config.sampling.samples_per_prompt).mean(dim=2)
        fitness = shape_fitness(rewards_MP, es.fitness, antithetic=plan.antithetic)
        _check_dropped(fitness, plan.step, self.scorer.first_dropped)

        updating = time.perf_counter()
        update = UpdateSpec.of(plan, fitness.fitness_M.tolist())
        self._record(update, fitness.dropped)
        times = self._apply(update)

        outcome = StepOutcome(
            plan=plan,
            rollouts=scored,
            rewards_MP=rewards_MP,
            fitness=fitness,
            failed=self.scorer.failures,
            update=times,
            noise_time=noise_time,
            sample_time=scoring - sampling,
            reward_time=updating - scoring,
            step_time=time.perf_counter() - start,
        )
        evaluation = harness.end_step(metrics_of(outcome), scored, indices_P, tied=fitness.all_tied)
        if self.recorder.checkpoint_due(plan.step):
            self.save()
        return evaluation

    def _sample(self, plan: StepPlan, indices_P: Sequence[int]) -> list[Rollout]:
        return sample_population(
            self.engine,
            [self.train_set.prompts[index] for index in indices_P],
            range(self.config.es.population),
            self.config.sampling.samples_per_prompt,
            self.harness.decoding,
            seed=plan.seed,
            step=plan.step,
            on_progress=self.harness.show_sampling,
            on_rollout=self.harness.scoring(indices_P),
        )

    def _record(self, update: UpdateSpec, dropped: tuple[int, ...]) -> None:
        """Append an update to the journal, every `CHECKSUM_EVERY` steps with a checksum of the weights before it."""
        _check_update(update)
        checksum = self.engine.checksum() if (update.step - 1) % CHECKSUM_EVERY == 0 else ""
        with self.recorder.saving():
            self.recorder.journal.append(journal_entry(update, dropped=dropped, checksum=checksum))

    def _apply(self, update: UpdateSpec) -> UpdateTimes:
        times = self.engine.update(update)
        if not times.report.finite:
            raise TrainingError(
                f"step {update.step}: weights are no longer finite although the update was: check the memory"
            )
        return times


def metrics_of(outcome: StepOutcome) -> Metrics:
    """Return the row of metrics of a step."""
    plan, fitness, update = outcome.plan, outcome.fitness, outcome.update
    return {
        **reward_metrics(outcome.rollouts, outcome.rewards_MP),
        "fitness/std": float(fitness.fitness_M.std(correction=0)),
        "members/dropped": len(fitness.dropped),
        "rewards/failed": outcome.failed,
        "prompts/tied": fitness.tied_prompts,
        **sampling_metrics(outcome.rollouts, outcome.sample_time),
        "time/noise": outcome.noise_time,
        "time/sample": outcome.sample_time,
        "time/reward": outcome.reward_time,
        "time/update": update.update,
        "time/serve": update.serve,
        "time/step": outcome.step_time,
        "update/rms": update.report.rms,
        "update/changed": update.report.changed,
        "weights/rms": update.report.weights_rms,
        "sigma": plan.sigma,
        "learning_rate": plan.learning_rate,
    }


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
