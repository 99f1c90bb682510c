"""Every setting of a run, typed and documented: the tables of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from eggroll_llm.es.settings import EsSettings, Schedule

METHOD_TABLES = ("es", "grpo")
"""Tables of settings that only the method of that name has."""


OF_EVALUATIONS = ("repetition_penalty", "stop", "thinking_token_budget")
"""Settings of [sampling] that evaluations share with training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How completions are sampled in training."""

    prompts_per_step: Annotated[int, Ge(1)] = 8
    """Problems in a step; all members of a population get the same ones."""
    samples_per_prompt: Annotated[int, Ge(1)] = 1
    """Completions per problem (and member), with GRPO a group; more than 1 needs a temperature above 0."""
    max_tokens: Annotated[int, Ge(1)] = 256
    """Length limit of a completion in tokens."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature; 0 is greedy, so that only the population explores."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Probability mass that nucleus sampling keeps; 1 keeps all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Number of the most probable tokens that sampling keeps; 0 keeps all."""
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Least probability of a token that sampling keeps, as a fraction of the most probable one's; 0 keeps all."""
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Factor against tokens of prompt and answer so far, as in vLLM, also in greedy evaluations; 1 is none."""
    stop: tuple[str, ...] = ()
    """Texts at which a completion ends, in evaluations too, besides those of the task."""
    thinking_token_budget: Annotated[int, Ge(0)] = 0
    """Tokens of a completion in thoughts, in evaluations too, before </think> is forced; 0 sets no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """How chat messages become a prompt, in training and evaluation alike."""

    system: str = ""
    """System prompt, put before the task's messages; empty for none."""
    template_file: str = ""
    """File with a chat template (Jinja) in place of the model's, relative to the recipe's folder; empty for none."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model's chat template, such as enable_thinking = false."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Processes and limits of a user's own score or reward, and of grader "math"; other graders need none."""

    workers: Annotated[int, Ge(1), Le(1024)] = 1
    """Processes that score completions side by side, while others are sampled; each imports the user's file."""
    batch_size: Annotated[int, Ge(1)] = 32
    """Completions in one call of score_batch, for a task that has it, or of the rewards of "dataset" or "verifiers"."""
    timeout_seconds: Annotated[float, Gt(0), Le(86_400)] = 10.0
    """Seconds that a call of score or score_batch may take; then the process is killed and the completion scores 0."""
    memory_gib: Annotated[float, Gt(0)] = 4.0
    """Memory limit of each process in GiB, imports and data included; each process it starts may use as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """Group relative policy optimization by TRL; the size of a group is in [sampling]."""

    learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate of AdamW; method "grpo" needs it."""
    beta: Annotated[float, Ge(0)] = 0.0
    """Weight of the KL divergence from the base model; 0 also saves the memory of its copy."""
    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Clipping range of the probability ratio; has an effect when num_iterations is above 1."""
    epsilon_high: Annotated[float, Ge(0)] = 0.0
    """Upper clipping range; 0 uses epsilon."""
    num_iterations: Annotated[int, Ge(1)] = 1
    """Optimizer steps on the same completions; all of them together are one step of the run."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """What the token loss is averaged over: the step, each completion, the length limit, the micro batch."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides advantages: of the group's rewards, of all rewards, or none."""
    mask_truncated_completions: bool = False
    """Whether completions that the length limit has cut off are left out of the loss."""
    importance_sampling: bool = True
    """Whether to correct for the difference between the engine's and the trainer's probabilities."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Rank of adapters on the linear layers, trained instead of the weights; 0 trains all weights."""
    lora_alpha: Annotated[int, Gt(0)] = 32
    """Scale of the adapters, divided by their rank."""
    micro_batch: Annotated[int, Ge(1)] = 8
    """Completions per forward and backward pass; must divide those of a step. With "bnpo" it changes the loss."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the trainer's passes, "auto" as in [engine]; what it trains and the optimizer are float32."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass to save memory."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """Constant in the denominator of AdamW."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm to which gradients are clipped; 0 disables clipping."""
    learning_rate_schedule: Schedule = "constant"
    """Schedule of the learning rate over the steps."""
    schedule_end: Annotated[float, Ge(0), Le(1)] = 0.1
    """Fraction of the starting value that a schedule reaches at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises to its value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The inference engine and the memory that it takes."""

    slots: Annotated[int, Ge(0)] = 0
    """Adapter slots, one for each member resident at once; 0 uses the population, at most 64. Unused by GRPO."""
    max_sequences: Annotated[int, Ge(0)] = 0
    """Sequences decoded at once; 0 is 128 on a CPU, 512 on a GPU."""
    max_model_len: Annotated[int, Ge(0)] = 0
    """Context length, prompt and completion together, in tokens; 0 derives it from the task."""
    kv_cache_gib: Annotated[float, Gt(0)] = 1.0
    """On a CPU, memory of the key-value cache in GiB; a GPU's is what gpu_memory_utilization leaves."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the served weights; "auto" is bfloat16, but float32 on a CPU without it; float32 is for CPUs."""
    quantization: Literal["none", "fp8"] = "none"
    """8-bit arithmetic of the trained layers: "fp8" rounds rows of weights and of inputs to FP8, each on its scale."""
    offload_masters: bool = False
    """Whether masters and optimizer state of ES are in the host's memory instead of the GPU's, to the same bits."""
    enforce_eager: bool = False
    """On a GPU: whether to run without CUDA graphs. They are captured in seconds, and decoding is slow without them."""
    compile: bool = False
    """On a CPU: whether the model runs through torch.compile, which starts slowly and gains little."""
    gpu_memory_utilization: Annotated[float, Gt(0), Le(1)] = 0.85
    """Fraction of the GPU's memory that the engine may use."""
    timeout_seconds: Annotated[float, Ge(0), Le(1e9)] = 1800.0
    """Seconds without progress, also while starting, after which the process exits with status 124; 0: never."""
    allow_untested_architecture: bool = False
    """Whether to try an architecture that the tests do not compare with transformers."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads of an engine; 0 shares all cores among them. Without a C++ compiler an update's bits depend on it."""
    replicas: Annotated[int, Ge(0), Le(4096)] = 1
    """Engines; more than 1 by Ray (extra "ray"). 0: as many as GPUs of machine or Ray cluster allow, on a CPU one."""
    tensor_parallel: Annotated[int, Ge(1), Le(64)] = 1
    """Devices of an engine, each with a part of the weights, masters and noise: for a model too large for one."""
    min_replicas: Annotated[int, Ge(1)] = 1
    """Engines that a run goes on with; fewer for longer than timeout_seconds end it."""
    restart: Annotated[int, Ge(0)] = 3
    """Replacements of each engine that is lost; 0: none."""
    ray_address: str = ""
    """Ray cluster: "HOST:PORT" or "auto"; empty: that of the variable RAY_ADDRESS, else one of this machine's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on held-out problems during training."""

    every: Annotated[int, Ge(0)] = 10
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    split: Literal["test", "validation"] = "test"
    """Split of the held-out problems: "test", or "validation", the last of "train", excluded from training."""
    problems: Annotated[int, Ge(2)] = 256
    """Held-out problems per evaluation."""
    max_tokens: Annotated[int, Ge(0)] = 0
    """Length limit of a completion in tokens; 0 uses sampling.max_tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints; with method "es" the journal is written at every step in any case."""

    every: Annotated[int, Ge(0)] = 10
    """Steps between checkpoints; 0 writes none. "es" can resume from its journal alone, "grpo" cannot."""
    keep: Annotated[int, Ge(1)] = 2
    """Number of newest checkpoints to keep."""
    best: bool = True
    """Whether to keep a checkpoint of the step with the highest accuracy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is shown and recorded besides the metrics."""

    samples: Annotated[int, Ge(0)] = 2
    """Completions shown per step, and answers per evaluation that go to TensorBoard and W&B as a table."""
    completions: Annotated[int, Ge(0)] = 8
    """Completions per step recorded in completions.jsonl."""
    tensorboard: bool = False
    """Whether metrics also go to TensorBoard."""
    wandb: str = ""
    """Weights & Biases project that metrics also go to; empty for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    model: str = "smollm2-135m-instruct"
    """Model: the embedded default, a directory or GGUF file (from where you stand), hub name, RUN[@STEP] or ADAPTER."""
    task: str
    """Task: "countdown", "gsm8k", "dataset" (file or hub data set), "verifiers" (an environment), or "file.py:NAME"."""
    method: Literal["es", "grpo"] = "es"
    """Training method: evolution strategies, or GRPO (needs the extra "grpo")."""
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    """Seed of everything random in the run."""
    steps: Annotated[int, Ge(0)] = 0
    """Number of updates after which the run ends; 0 sets no limit."""
    minutes: Annotated[float, Ge(0)] = 0.0
    """Training time in minutes, evaluations not counted, after which the run ends; 0 sets no limit."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task, see its documentation."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How chat messages become a prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are sampled in training."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Processes and limits of a user's own score."""
    es: EsSettings = field(default_factory=EsSettings)
    """The evolution strategy, of method "es"."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """Group relative policy optimization, of method "grpo"."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The inference engine and the memory that it takes."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation on held-out problems during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints of the weights."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown and recorded besides the metrics."""

    @property
    def members_answer(self) -> bool:
        """Return whether the members of a population answer the problems; else the weights in training do."""
        return self.method == "es" and self.es.fitness_from == "rewards"

    @property
    def answering(self) -> int:
        """Return how many models answer the problems of a step: the population, or the one that is trained."""
        return self.es.population if self.members_answer else 1

    @property
    def own_problems(self) -> bool:
        """Return whether each pair of twins has problems of its own."""
        return self.method == "es" and self.es.problems == "per_pair"

    @property
    def problems_per_step(self) -> int:
        """Return how many problems all members of a step have together."""
        return self.sampling.prompts_per_step * (self.es.population // 2 if self.own_problems else 1)
