"""TRL's `GRPOTrainer` with our engine where it has vLLM. Only this folder imports TRL; `grpo` does when it runs.

TRL 1.16 offers two ways to roll out elsewhere. A `rollout_func` gets no importance-sampling correction: that belongs to
`use_vllm`. So `Rollouts` takes the place of TRL's `VLLMGeneration`, the object with `sync_weights` and `generate`
behind `use_vllm`, and everything else is TRL's own code: when weights are synchronised, what is done with
log-probabilities, advantages, loss, micro batches, clipping, optimizer. What is replaced besides:

* The sampler: each batch holds the problems of `problems_of_step`, each `samples_per_prompt` times in a row.
* The tokens of the prompts: `Prompter`'s, which ES sees too. To TRL a prompt is the number of a problem.
* The scheduler: `es.plan.schedule`, the one of ES, times a linear warm-up.
* The pass over prompts: completions of a problem in a micro batch share one, forward and backward, as they share a
  prefix in vLLM (`score_completions`): 64 answers of a few tokens to 8 prompts of 84 take a third of the time.
* The padding: TRL fills every completion up to the longest of the step, here it is up to the longest of a micro batch.
* The order of completions, which TRL shuffles before it cuts them into micro batches: those of a prompt stay together,
  short before long, so that more of a prompt and less padding is shared (`side_by_side`). Only "bnpo", whose loss
  depends on the micro batches, keeps the shuffle. TRL's figures `entropy`, `kl` and `clip_ratio` are means of micro
  batches, whatever their length, so short completions weigh more in them than in TRL's own order.
* Where the head is applied: to the tokens of completions alone, as TRL does on CUDA. Elsewhere it would score those of
  the prompts as well, and drop the result: on CPU up to half of a pass, with a small model and a large vocabulary.
* How the head's gradients are added up on CPU: by bfloat16 instructions, to the same float32 sums (`add_product`).
* The weights beneath adapters: in bfloat16 where that changes no bit (`narrow_beneath_adapters`).
* Model cards, telemetry and printing are switched off: ours are used.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch

import eggroll_llm.engine.vllm  # noqa: F401  # TRL imports vLLM, whose environment this sets
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.plan import schedule
from eggroll_llm.models.targets import TARGET_MODULES
from eggroll_llm.system.hardware import return_freed_memory
from eggroll_llm.tasks.order import problems_of_step
from eggroll_llm.tasks.prompts import ProblemSet
from eggroll_llm.training.grpo_trl.passes import narrow_beneath_adapters, score_completions, side_by_side
from eggroll_llm.training.grpo_trl.rollouts import Rollouts

with warnings.catch_warnings():
    # That vLLM is newer than TRL knows: its vLLM code is not used, and the engine pins its own version.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions", category=UserWarning)
    from trl import GRPOConfig, GRPOTrainer

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.utils import logging as transformers_logging
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils

trl_utils._use_triton = lambda device: True  # in that module it means nothing but where the head is applied

NO_LIMIT = 10**7  # steps of a run that ends by the clock
_NUMPY_SEEDS = 2**32


class StepSampler(torch.utils.data.Sampler[int]):
    """Indices of the problems of every step, as TRL's `RepeatSampler` would repeat them, made when they are asked for.

    A step's batch comes once per micro batch and iteration, as TRL looks at the first only and keeps its completions.
    """

    def __init__(self, config: RunConfig, problems: int, steps: int, repeats: int) -> None:
        self._config, self._problems, self._steps, self._repeats = config, problems, steps, repeats

    def __iter__(self) -> Iterator[int]:
        sampling = self._config.sampling
        for step in range(1, self._steps + 1):
            indices_P = problems_of_step(self._problems, sampling.prompts_per_step, seed=self._config.seed, step=step)
            batch = [index for index in indices_P for _ in range(sampling.samples_per_prompt)]
            for _ in range(self._repeats):
                yield from batch

    def __len__(self) -> int:
        sampling = self._config.sampling
        return self._steps * self._repeats * sampling.prompts_per_step * sampling.samples_per_prompt


class Hooks(TrainerCallback):
    """Tells the run when its steps begin and end; a step has `num_iterations` optimizer steps."""

    def __init__(self, iterations: int, begin: Callable[[int], None], end: Callable[[dict[str, float]], bool]) -> None:
        """`end` gets TRL's metrics and returns whether training stops."""
        self._iterations, self._begin, self._end = iterations, begin, end

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called before the first micro batch of an optimizer step."""
        if state.global_step % self._iterations == 0:
            self._begin(state.global_step // self._iterations + 1)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Called after the last optimizer step of a step, and once more at the end of training."""
        if "loss" in logs:
            control.should_training_stop = self._end(logs)


class EngineGrpoTrainer(GRPOTrainer):
    """GRPO on our engine."""

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        tokenizer: Any,
        train: ProblemSet,
        rollouts: Rollouts,
        reward: Callable[..., list[float | None]],
        hooks: Hooks,
        directory: Path,
        *,
        use_cpu: bool,
    ) -> None:
        self._run_config, self._train_prompts = config, train.prompts
        super().__init__(
            model,
            reward_funcs=[reward],
            args=arguments(config, directory, use_cpu=use_cpu),
            train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(train.prompts))]}),
            processing_class=tokenizer,
            callbacks=[hooks],
            peft_config=adapters(config),
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.args.bf16 and config.grpo.lora_rank:
            narrow_beneath_adapters(self.model)
        rollouts.model = self.model
        self.vllm_generation, self.use_vllm, self._last_loaded_step = rollouts, True, -1

    def sync_weights(self) -> None:
        """Serve the weights now rather than before the next sampling, for an evaluation between."""
        self.vllm_generation.sync_weights()
        self._last_loaded_step = self.state.global_step

    def write_state(self, directory: Path) -> None:
        """Write what transformers needs to resume, in its own format, into a new folder of `directory`."""
        before, self.args.output_dir = self.args.output_dir, str(directory)
        try:
            self._save_checkpoint(self.model, None)
        finally:
            self.args.output_dir = before
        for pickled in directory.glob(
            "*/training_args.bin"
        ):  # the only file that takes running code to read: not needed
            pickled.unlink()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Follow the schedule of the run, whose step is `num_iterations` optimizer steps."""
        grpo, steps = self._run_config.grpo, self._run_config.steps

        def factor(done: int) -> float:
            step = done // grpo.num_iterations
            warm = min(1.0, (step + 1) / (grpo.warmup_steps + 1))
            return warm * schedule(grpo.learning_rate_schedule, 1.0, step, steps, grpo.schedule_end)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write none: ours lies beside every model."""

    def _send_telemetry(self) -> None:
        pass

    def _get_train_sampler(self, dataset: Sized | None = None) -> StepSampler:
        steps = self.args.max_steps // self.num_iterations
        repeats = self.num_iterations * self.args.steps_per_generation
        return StepSampler(self._run_config, len(self._train_prompts), steps, repeats)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Return the completions of a step, without those that the length limit cut off, where they are to be masked.

        TRL recognises them by their last token, which can be any where a completion ended at a stop text.
        """
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._run_config.grpo.mask_truncated_completions:
            whole = [not rollout.completion.truncated for rollout in self.vllm_generation.last]
            batch["completion_mask"] *= torch.tensor(whole, device=batch["completion_mask"].device)[:, None]
            batch["num_items_in_batch"] = batch["completion_mask"].sum()
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.loss_type == "bnpo":
            return super()._prepare_inputs(generation_batch)
        before, grpo_trainer.shuffle_sequence_dict = grpo_trainer.shuffle_sequence_dict, side_by_side
        try:
            return super()._prepare_inputs(generation_batch)
        finally:
            grpo_trainer.shuffle_sequence_dict = before

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return log-probabilities and entropies of completions (B, T); TRL's own where nothing is shared."""
        shares = input_ids.size(1) > logits_to_keep + 1 and not options.get("compute_aux_loss")
        if not shares or self.args.gradient_checkpointing:  # with which transformers keeps no cache
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **options
            )
        sizes = batch_size or len(input_ids)
        outputs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        with self.accelerator.autocast():
            for ids, mask in zip(input_ids.split(sizes), attention_mask.split(sizes), strict=True):
                return_freed_memory()  # no two passes are of the same size
                outputs.append(score_completions(model, ids, mask, logits_to_keep))
        logps, entropies = zip(*outputs, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self._train_prompts[int(prompt)]) for prompt in prompts], None, {}


def arguments(config: RunConfig, directory: Path, *, use_cpu: bool) -> GRPOConfig:
    """Return TRL's settings; those that are not mentioned keep TRL's defaults."""
    grpo, sampling = config.grpo, config.sampling
    completions = sampling.prompts_per_step * sampling.samples_per_prompt
    settings = GRPOConfig(
        output_dir=str(directory),
        use_cpu=use_cpu,
        bf16=grpo.dtype == "bfloat16",  # mixed precision: what is trained stays float32
        seed=config.seed % _NUMPY_SEEDS,
        max_steps=(config.steps or NO_LIMIT) * grpo.num_iterations,
        per_device_train_batch_size=grpo.micro_batch,
        gradient_accumulation_steps=completions // grpo.micro_batch,  # an optimizer step sees all completions
        num_generations=sampling.samples_per_prompt,
        num_iterations=grpo.num_iterations,
        max_completion_length=sampling.max_tokens,
        temperature=sampling.temperature,
        learning_rate=grpo.learning_rate,
        beta=grpo.beta,
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon_high or None,
        loss_type=grpo.loss_type,
        scale_rewards=grpo.scale_rewards,
        vllm_importance_sampling_correction=grpo.importance_sampling,
        weight_decay=grpo.weight_decay,
        adam_beta1=grpo.adam_beta1,
        adam_beta2=grpo.adam_beta2,
        adam_epsilon=grpo.adam_eps,
        max_grad_norm=grpo.max_grad_norm,
        gradient_checkpointing=grpo.gradient_checkpointing,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_steps=grpo.num_iterations,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    settings._n_gpu = min(1, settings.n_gpu)  # the others are the engines'; transformers would share the model out
    return settings


def adapters(config: RunConfig) -> Any:
    """Return peft's settings for adapters on the layers that ES perturbs; None without adapters."""
    if not config.grpo.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.grpo.lora_rank,
        lora_alpha=config.grpo.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
    )


def quiet() -> None:
    """Leave the output to our display: no progress bars, and no remarks on choices that are made here on purpose."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)


def load_model(directory: Path) -> tuple[Any, Any]:
    """Return the model with float32 weights, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
