"""GRPO, the baseline with gradients: TRL's `GRPOTrainer` on our engine, in a run like one of ES.

    completions_PS ~ pi(prompt_p),   rewards_PS = score(completions_PS)
    A_ps    = (rewards_ps - mean_s rewards_ps) / (std_s rewards_ps + 1e-4)
    ratio_t = pi_theta(token_t) / pi_old(token_t)
    loss    = - mean_t min(ratio_t A, clip(ratio_t, 1 - epsilon, 1 + epsilon_high) A) + beta KL(theta, base)
    theta   <- AdamW(clip_norm(grad loss))

Shao et al. 2024, DeepSeekMath (arXiv 2402.03300). Departures, which are TRL's defaults: the mean is over all tokens of
a step (`loss_type = "dapo"`), the paper's over those of a completion and then over completions ("grpo"); beta is 0, the
paper's 0.04; the divergence is weighted by the ratio, which makes its gradient unbiased. The engine samples in its own
number format, so pi_old is not quite the distribution sampled from: TRL weights each completion by
pi_old(completion) / pi_engine(completion), and drops it above 3 (`importance_sampling`).

When all completions of every problem got the same reward, A is 0 and the step learns nothing, but weights may move: by
AdamW's moments from earlier steps, by weight decay, and by the divergence where beta is above 0. TRL does this, and the
baseline must not differ from TRL. (ES changes nothing then.)

Shared with ES: problems and their order, prompts as tokens, scores, sampling seeds, evaluation, limits and files. A
step is one batch of completions with all its optimizer steps, so step n of both methods has seen the same problems.
There is no journal: a run resumes from its last checkpoint, whose folder `trainer/` is in transformers' own format, and
repeats later steps; transformers reads that folder with `weights_only`, which runs no code.

Shapes: P prompt, S sample.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eggroll_llm.engine.sampling import OnRollout
from eggroll_llm.errors import ModelError, TrainingError
from eggroll_llm.models.export import export_model
from eggroll_llm.models.files import tensor_shapes
from eggroll_llm.records.checkpoint import Checkpoint, checkpoint_path, is_valid
from eggroll_llm.system.hardware import keep_freed_memory, return_freed_memory, serves_on_cpu
from eggroll_llm.system.terminal import inert
from eggroll_llm.training.harness import Harness
from eggroll_llm.training.recorder import Metrics, reward_metrics, sampling_metrics
from eggroll_llm.training.scorer import ScoredRollout, rewards_of

if TYPE_CHECKING:
    from torch import Tensor

STATE = "trainer"
"""Folder of a checkpoint with transformers' own files."""
_LESS_MEMORY = (
    "Resume with grpo.gradient_checkpointing = true or a lower engine.gpu_memory_utilization, or start a new run with "
    "a lower grpo.micro_batch."
)
TRL_METRICS = ("loss", "grad_norm", "learning_rate", "entropy", "kl", "reward_std", "clip_ratio/", "sampling/")
"""Metrics of TRL (or prefixes of their names) that ES does not have; they keep their names."""


class GrpoTrainer:
    """Trains until a limit of the configuration is reached."""

    def __init__(self, harness: Harness, *, checkpoint: Checkpoint | None = None) -> None:
        """Continue after `checkpoint`, at whose step `harness` stands; the engine may hold any weights."""
        from eggroll_llm.training.grpo_trl import trainer
        from eggroll_llm.training.grpo_trl.rollouts import Rollouts

        trainer.quiet()
        keep_freed_memory()
        run, config = harness.run, harness.config
        self.harness, self.config, self.checkpoint = harness, config, checkpoint
        self.engine, self.scorer, self.recorder = run.engine, run.scorer, run.recorder
        self.model_dir = run.prepared.model_dir
        self.rollouts = Rollouts(run.engine, config, harness.decoding, harness.show_sampling, self._scoring)
        model, tokenizer = trainer.load_model(self.model_dir)
        self.trl = trainer.EngineGrpoTrainer(
            config,
            model,
            tokenizer,
            run.prepared.train,
            self.rollouts,
            self._reward,
            trainer.Hooks(config.grpo.num_iterations, self._begin_step, self._end_step),
            self.recorder.directory.checkpoints,
            use_cpu=serves_on_cpu(),
        )
        self._step_start = self._reward_seconds = 0.0
        self._scored: list[ScoredRollout] = []

    def run(self) -> None:
        """Train to the limit."""
        from torch import OutOfMemoryError

        optimizer_steps = self.harness.step * self.config.grpo.num_iterations
        state = str(self.checkpoint.path / STATE / f"checkpoint-{optimizer_steps}") if self.checkpoint else None
        if self.harness.step == 0:
            self.harness.start()
        if not self.harness.finished():
            try:
                self.trl.train(resume_from_checkpoint=state)
            except OutOfMemoryError as error:
                said = f"the GPU has too little memory for the passes of GRPO: {inert(str(error), 300)} {_LESS_MEMORY}"
                raise TrainingError(self.harness.stopped_by(said)) from error
            # There is no journal to come back by: without it, a finished run that is resumed would be done again.
            if not is_valid(checkpoint_path(self.recorder.directory.checkpoints, self.harness.step)):
                self.save()
        elif state:
            self.trl._load_from_checkpoint(state)

    def export(self, directory: Path) -> None:
        """Write the model as it is now, with its model card, into a new directory."""
        export_model(self.model_dir, directory, self._stored_tensors(), self.engine.dtype)
        self.recorder.describe(self.harness.step, directory)

    def save(self) -> None:
        """Write a checkpoint of the current step and delete old ones."""

        def write(directory: Path) -> None:
            self.export(directory)
            (directory / STATE).mkdir()
            self.trl.write_state(directory / STATE)

        self.harness.save(write, {}, {})

    def _begin_step(self, step: int) -> None:
        self._step_start = time.perf_counter()
        self.harness.step = self.rollouts.step = step
        self.rollouts.sampling_seconds = self.rollouts.sync_seconds = 0.0

    def _scoring(self) -> OnRollout:
        return self.harness.scoring(self.harness.problems())

    def _reward(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """Score the engine's answers, each up to a stop string; None gives a completion no advantage."""
        start = time.perf_counter()
        rollouts = self.rollouts.last
        assert [list(rollout.completion.token_ids) for rollout in rollouts] == [list(ids) for ids in completion_ids]
        assert [
            int(prompt) for prompt in prompts[:: self.config.sampling.samples_per_prompt]
        ] == self.harness.problems()
        self._scored = self.harness.score(rollouts)
        rewards = [r.score.reward if math.isfinite(r.score.reward) else None for r in self._scored]
        self.harness.check_dropped(rewards.count(None), len(rewards), "completions")
        self._reward_seconds = time.perf_counter() - start
        return rewards

    def _end_step(self, logs: Mapping[str, float]) -> bool:
        """Record a step from TRL's metrics of it; whether it was the last."""
        self._check_finite(logs)
        self.trl.sync_weights()
        return_freed_memory()
        seconds = time.perf_counter() - self._step_start
        indices_P = self.harness.problems()
        metrics = self._metrics(logs, len(indices_P), seconds)
        tied = metrics["prompts/tied"] == len(indices_P)
        self.harness.end_step(metrics, self._scored, indices_P, tied=tied)
        if self.recorder.checkpoint_due(self.harness.step):
            self.save()
        return self.harness.finished()

    def _metrics(self, logs: Mapping[str, float], prompts: int, seconds: float) -> Metrics:
        rollouts, report = self.rollouts, self.rollouts.report
        assert report is not None  # the weights were served before the step too
        (rewards_PS,) = rewards_of(self._scored, prompts, self.config.sampling.samples_per_prompt)
        return {
            **reward_metrics(self._scored, rewards_PS),
            "completions/dropped": int((~rewards_PS.isfinite()).sum()),
            "rewards/failed": self.scorer.failures,
            "prompts/tied": sum(len(set(filter(math.isfinite, row))) <= 1 for row in rewards_PS.tolist()),
            **sampling_metrics(self._scored, rollouts.sampling_seconds),
            "time/sample": rollouts.sampling_seconds,
            "time/reward": self._reward_seconds,
            "time/update": seconds - rollouts.sampling_seconds - self._reward_seconds - rollouts.sync_seconds,
            "time/serve": rollouts.sync_seconds,
            "time/step": seconds,
            "update/rms": report.rms,
            "update/changed": report.changed,
            "weights/rms": report.weights_rms,
            **{name: value for name, value in logs.items() if name.startswith(TRL_METRICS)},
        }

    def _check_finite(self, logs: Mapping[str, float]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingError(
                    f"step {self.harness.step}: {name} is {logs[name]}, so the weights are lost: start a new run "
                    "with a lower grpo.learning_rate"
                )

    def _stored_tensors(self) -> "dict[str, Tensor]":
        """Return the tensors of the base checkpoint as they are now. Raises ModelError when one is not trained."""
        from eggroll_llm.training.grpo_trl.rollouts import checkpoint_tensors

        tensors = checkpoint_tensors(self.trl.model)
        stored = tensor_shapes(self.model_dir)
        if missing := sorted(stored.keys() - tensors.keys()):
            raise ModelError(
                f"{self.model_dir}: {missing[0]!r} has another name in transformers: this model cannot be trained with "
                "GRPO yet; use a Llama- or Qwen-shaped model"
            )
        return {name: tensors[name].detach().cpu() for name in stored}
