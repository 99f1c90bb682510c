"""The ES loop: find out what each member earns, shape it, record the fitness, fold it into the weights.

    rollouts_MPS    = member_m(prompt_p),   W_m = W + sign_m sigma E_k
    rewards_MP      = mean_s score(rollouts_MPS)

or, with fitness_from = "probabilities" (`es.likelihood`), members answer nothing:

    rollouts_PS     = W(prompt_p)
    rewards_MP      = mean_s advantage(score(rollouts_PS)) p_m(rollouts_PS) / p(rollouts_PS)

and then

    fitness_M       = shape(rewards_MP)
    journal         <- fitness_M                    on disk before the weights move
    W               <- W + learning_rate sum_k c_k E_k / ||c||

Departures from the paper are those of `es.fitness` and `es.estimate`. Everything a step needs is a function of (seed,
step), so a run continues from its journal as if it had never stopped. Updates are counted from 1; step 0 is the base
model.

Shapes: M member, K antithetic pair, P prompt, S sample, N scored token.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eggroll_llm.engine.interface import UpdateTimes
from eggroll_llm.engine.sampling import Rollout, sample_population
from eggroll_llm.errors import TrainingError
from eggroll_llm.es.estimate import NonFiniteUpdate, UpdateSpec, check_finite
from eggroll_llm.es.fitness import Fitness, shape_fitness, shape_twins
from eggroll_llm.es.likelihood import Candidates, candidates, divergence, returns
from eggroll_llm.es.plan import StepPlan
from eggroll_llm.records.drawn import Drawn, read_drawn
from eggroll_llm.records.updates import CHECKSUM_EVERY, journal_entry
from eggroll_llm.tasks.order import SkippingOrder
from eggroll_llm.training.harness import Harness
from eggroll_llm.training.plan import plan_of
from eggroll_llm.training.recorder import Metrics, reward_metrics, sampling_metrics, twin_metrics
from eggroll_llm.training.scorer import ScoredRollout, rewards_of

NOTHING_SAMPLED = {
    "completions": 0,
    "tokens/prompt": 0,
    "tokens/generated": 0,
    "throughput/tokens_per_second": 0.0,
    "throughput/generated_per_second": 0.0,
    "time/sample": 0.0,
    "time/reward": 0.0,
    "rewards/failed": 0,
}
"""What the row says of a step that learns from answers of an earlier one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the members of a step have earned."""

    rollouts: Sequence[ScoredRollout]
    """What was sampled for it."""
    fitness: Fitness
    metrics: Metrics
    """What the row of the step says of sampling and rewards."""


class EsTrainer:
    """Trains until a limit of the configuration is reached."""

    def __init__(self, harness: Harness) -> None:
        """Continue after the last step of the journal, whose weights the engine holds."""
        run = harness.run
        self.harness, self.config, self.train_set = harness, harness.config, run.prepared.train
        self.engine, self.scorer, self.recorder = run.engine, run.scorer, run.recorder
        self._drawn = read_drawn(run.recorder.directory.drawn)
        # Answers of a later step are of a run that was cut back.
        unknown = self._drawn is None or self._drawn.step > harness.step + 1
        if self.config.es.answer_reuse > 1 and harness.step and unknown:
            run.display.message(
                f"{run.recorder.directory.drawn}: missing, damaged or of a later step, so the next step draws new "
                "answers: the run will not be what it would have been without the interruption"
            )
        self._order: SkippingOrder | None = None
        if self.config.es.skip_tied:
            self._order = SkippingOrder(len(self.train_set.problems), seed=self.config.seed)
            for entry in run.recorder.journal.entries:
                self._order.saw(self._order.take(self.config.problems_per_step), entry.tied)

    def run(self) -> None:
        """Train to the limit."""
        if self.harness.step == 0:
            self.harness.start()
        elif self.recorder.best_is_due(
            self.harness.step
        ):  # an interruption came between its metrics and its checkpoint
            self.save()
        while not self.harness.finished():
            self._train_step()

    def export(self, directory: Path) -> None:
        """Write the model as it is now, with its model card, into a new directory."""
        self.engine.export(directory)
        self.recorder.describe(self.harness.step, directory)

    def save(self) -> None:
        """Write a checkpoint of the current step and delete old ones."""
        checksum = self.engine.checksum()  # first: of several engines it loses those with other weights
        self.harness.save(self.export, self.engine.state(), {"checksum": checksum})

    def _train_step(self) -> None:
        start = time.perf_counter()
        harness = self.harness
        harness.step += 1
        plan = plan_of(self.config, harness.step)
        indices_P = self._order.take(self.config.problems_per_step) if self._order else harness.problems()
        judge = self._by_rewards if self.config.es.fitness_from == "rewards" else self._by_probabilities
        judged = judge(plan, indices_P)
        fitness = judged.fitness
        self._check_dropped(len(fitness.dropped))

        update = UpdateSpec.of(plan, fitness.fitness_M.tolist())
        self._record(update, fitness)
        if self._order:
            self._order.saw(indices_P, fitness.tied)
        times = self._apply(update)

        metrics = metrics_of(plan, judged, times) | {"time/step": time.perf_counter() - start}
        if self._order:
            metrics |= {"problems/skipped": self._order.skipped}
        harness.end_step(metrics, judged.rollouts, indices_P, tied=fitness.all_tied)
        if self.recorder.checkpoint_due(plan.step):
            self.save()

    def _by_rewards(self, plan: StepPlan, indices_P: Sequence[int]) -> Judged:
        """Let every member answer the problems."""
        es, sampling = self.config.es, self.config.sampling
        noise_time = self.engine.begin(plan.noise, es.population, antithetic=plan.antithetic)
        scored, metrics = self._rollouts(plan, indices_P, range(es.population))
        rewards_MP = rewards_of(scored, sampling.prompts_per_step, sampling.samples_per_prompt).mean(dim=2)
        if es.problems == "per_pair":
            fitness = shape_twins(rewards_MP, es.fitness)
        else:
            fitness = shape_fitness(rewards_MP, es.fitness, antithetic=plan.antithetic)
        metrics |= {**reward_metrics(scored, rewards_MP), "time/noise": noise_time}
        if plan.antithetic:
            metrics |= twin_metrics(scored, es.population)
        return Judged(rollouts=scored, fitness=fitness, metrics=metrics)

    def _by_probabilities(self, plan: StepPlan, indices_P: Sequence[int]) -> Judged:
        """Let the weights answer the problems, unless they have, and ask every member how probable the answers are."""
        es, samples = self.config.es, self.config.sampling.samples_per_prompt
        kept = self._drawn
        drifted: Metrics = {}
        if kept and kept.logprobs and kept.step < plan.step < kept.step + es.answer_reuse:
            if es.max_drift:  # before the members are asked, most of whom would be asked in vain
                drifted = {"weights/drift": self._drift(kept)}
            if not drifted or drifted["weights/drift"] <= es.max_drift:
                fitness, _, metrics = self._ask(plan, kept, torch.tensor(kept.logprobs))
                return Judged(rollouts=[], fitness=fitness, metrics=kept.metrics | metrics)
        scored, metrics = self._rollouts(plan, indices_P, [None])
        (rewards_PS,) = rewards_of(scored, len(indices_P), samples)
        dropped = int((~rewards_PS.isfinite()).sum())
        self.harness.check_dropped(dropped, rewards_PS.numel(), "completions")
        metrics |= {**reward_metrics(scored, rewards_PS), "completions/dropped": dropped}
        token_ids = [rollout.completion.token_ids for rollout in scored]
        drawn = Drawn(
            step=plan.step,
            indices=tuple(indices_P),
            token_ids=tuple(tuple(token_ids[p : p + samples]) for p in range(0, len(token_ids), samples)),
            rewards=tuple(map(tuple, rewards_PS.tolist())),
        )
        fitness, logprob_N, asked = self._ask(plan, drawn)
        if es.answer_reuse > 1:
            said = {key: metrics[key] for key in ("reward/mean", "reward/accuracy", "completions/truncated")}
            self._drawn = dataclasses.replace(drawn, logprobs=tuple(logprob_N.tolist()), metrics=said | NOTHING_SAMPLED)
            self.recorder.keep(self.recorder.directory.drawn, self._drawn)
        return Judged(rollouts=scored, fitness=fitness, metrics=metrics | asked | drifted)

    def _drift(self, kept: Drawn) -> float:
        """Return the divergence of the weights from those that gave the answers."""
        answers = self._candidates(kept)
        now_1N = self.engine.score(answers.completions, [None], self.config.sampling.temperature)
        return divergence(now_1N, torch.tensor(kept.logprobs), answers.count_N)

    def _candidates(self, drawn: Drawn) -> Candidates:
        prompts_P = [self.train_set.prompts[index] for index in drawn.indices]
        return candidates(prompts_P, drawn.token_ids, torch.tensor(drawn.rewards, dtype=torch.float64))

    def _ask(self, plan: StepPlan, drawn: Drawn, before_N: Tensor | None = None) -> tuple[Fitness, Tensor, Metrics]:
        """Return members' fitness, log-probabilities of the answers under the weights now, and what the row says of it.

        `before_N` are those under the weights that drew the answers, unless they are the same.
        """
        start = time.perf_counter()
        es, samples = self.config.es, self.config.sampling.samples_per_prompt
        answers = self._candidates(drawn)
        noise_time = 0.0
        logprob_MN, now_N = torch.zeros(es.population, 0), torch.zeros(0)
        if answers.completions:
            noise_time = self.engine.begin(plan.noise, es.population, antithetic=plan.antithetic)
            judges = [None, *range(es.population)]
            logprobs = self.engine.score(answers.completions, judges, self.config.sampling.temperature)
            logprob_MN, now_N = logprobs[1:], logprobs[0]
        before_N = now_N if before_N is None else before_N
        prompts = len(drawn.indices)
        returns_MP = returns(answers, logprob_MN, before_N, es.weighting, prompts=prompts, samples=samples)
        fitness = shape_fitness(returns_MP, es.fitness, antithetic=plan.antithetic)
        metrics: Metrics = {
            "members/divergence": divergence(logprob_MN, now_N, answers.count_N),
            "tokens/scored": logprob_MN.numel(),
            "time/noise": noise_time,
            "time/score": time.perf_counter() - start - noise_time,
        }
        if es.answer_reuse > 1:
            metrics["weights/drift"] = divergence(now_N[None], before_N, answers.count_N)
        return fitness, now_N, metrics

    def _rollouts(
        self, plan: StepPlan, indices_P: Sequence[int], members: Sequence[int | None]
    ) -> tuple[list[ScoredRollout], Metrics]:
        """Let members answer the problems and score the answers; return them, and what the row says of it."""
        start = time.perf_counter()
        rollouts = self._sample(plan, indices_P, members)
        sampled = time.perf_counter()
        scored = self.harness.score(rollouts)
        metrics = {
            **sampling_metrics(scored, sampled - start),
            "time/sample": sampled - start,
            "time/reward": time.perf_counter() - sampled,
            "rewards/failed": self.scorer.failures,
        }
        return scored, metrics

    def _sample(self, plan: StepPlan, indices_P: Sequence[int], members: Sequence[int | None]) -> list[Rollout]:
        return sample_population(
            self.engine,
            [self.train_set.prompts[index] for index in indices_P],
            members,
            self.config.sampling.samples_per_prompt,
            self.harness.decoding,
            seed=plan.seed,
            step=plan.step,
            own=self.config.sampling.prompts_per_step if self.config.es.problems == "per_pair" else 0,
            on_progress=self.harness.show_sampling,
            on_rollout=self.harness.scoring(indices_P),
        )

    def _check_dropped(self, dropped: int) -> None:
        members = self.config.es.population
        if self.config.es.fitness_from == "rewards":
            self.harness.check_dropped(dropped, members, "members")
        elif 2 * dropped > members:
            raise TrainingError(
                f"step {self.harness.step}: {dropped} of {members} members were dropped for a NaN or infinite "
                "log-probability of an answer: start a new run with a lower es.sigma or es.learning_rate"
            )

    def _record(self, update: UpdateSpec, fitness: Fitness) -> None:
        """Append an update to the journal, every `CHECKSUM_EVERY` steps with a checksum of the weights before it.

        Raises TrainingError for one that could leave the finite range.
        """
        try:
            check_finite(update)
        except NonFiniteUpdate as error:
            remedy = "start a new run with a lower es.learning_rate or a larger es.sigma"
            raise TrainingError(f"{error}: {remedy}") from error
        checksum = self.engine.checksum() if (update.step - 1) % CHECKSUM_EVERY == 0 else ""
        with self.recorder.saving():
            tied = fitness.tied if self._order else ()
            self.recorder.journal.append(journal_entry(update, dropped=fitness.dropped, tied=tied, checksum=checksum))

    def _apply(self, update: UpdateSpec) -> UpdateTimes:
        times = self.engine.update(update)
        if not times.report.finite:
            raise TrainingError(
                f"step {update.step}: weights are no longer finite although the update was: check the memory"
            )
        return times


def metrics_of(plan: StepPlan, judged: Judged, update: UpdateTimes) -> Metrics:
    """Return the row of metrics of a step, its whole time excepted."""
    return {
        **judged.metrics,
        "fitness/std": float(judged.fitness.fitness_M.std(correction=0)),
        "members/dropped": len(judged.fitness.dropped),
        "prompts/tied": len(judged.fitness.tied),
        "time/update": update.update,
        "time/serve": update.serve,
        "update/rms": update.report.rms,
        "update/changed": update.report.changed,
        "weights/rms": update.report.weights_rms,
        "sigma": plan.sigma,
        "learning_rate": plan.learning_rate,
    }
