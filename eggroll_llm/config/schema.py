"""Every setting of a run, typed and documented: the tables of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from eggroll_llm.es.settings import EsSettings, Schedule

METHOD_TABLES = ("es", "grpo")
"""Tables of settings that only the method of that name has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How completions are sampled in training."""

    prompts_per_step: Annotated[int, Ge(1)] = 8
    """Problems in a step; all members of a population get the same ones."""
    samples_per_prompt: Annotated[int, Ge(1)] = 1
    """Completions per problem (and member), which with GRPO are a group; more than 1 needs a temperature above 0."""
    max_tokens: Annotated[int, Ge(1)] = 256
    """Length limit of a completion in tokens."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """Sampling temperature; 0 decodes greedily, the population being the exploration."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Probability mass that nucleus sampling keeps; 1 keeps all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """How chat messages become a prompt, for tasks that ask in chat messages; in training and evaluation alike."""

    system: str = ""
    """System prompt, put before the task's messages; empty for none."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model's chat template, such as enable_thinking = false."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """Limits of a user's own score, which runs in a process of its own; built-in graders need none."""

    timeout_seconds: Annotated[float, Gt(0), Le(86_400)] = 10.0
    """Seconds that the score of one completion may take; then its process is killed, and the completion counts as 0."""
    memory_gib: Annotated[float, Gt(0)] = 4.0
    """Memory in GiB that the process may take, with what it imports and loads; each that it starts may take as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """Group relative policy optimization by TRL, with its defaults; the size of a group is in [sampling]."""

    learning_rate: Annotated[float, Ge(0)] = 0.0
    """Learning rate of AdamW; method "grpo" needs it."""
    beta: Annotated[float, Ge(0)] = 0.0
    """Weight of the divergence from the base model; 0 leaves it out, and the copy of the base model with it."""
    epsilon: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Clipping range of the probability ratio, which moves away from 1 when num_iterations is above 1."""
    epsilon_high: Annotated[float, Ge(0)] = 0.0
    """Upper clipping range where it differs; 0 takes epsilon."""
    num_iterations: Annotated[int, Ge(1)] = 1
    """Optimizer steps on the same completions; all of them together are one step of the run."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """What the loss of tokens is averaged over: all of the step, each completion, the length limit, a micro batch."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """By which standard deviation advantages are divided: of the problem's rewards, of all, or by none."""
    importance_sampling: bool = True
    """Whether the difference between the engine's probabilities and the trainer's is corrected for."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Rank of adapters on the linear layers, trained instead of the weights; 0 trains all weights."""
    lora_alpha: Annotated[int, Gt(0)] = 32
    """Scale of the adapters, divided by their rank."""
    micro_batch: Annotated[int, Ge(1)] = 8
    """Completions in a forward and backward pass; divides those of a step. For memory, but for "bnpo" the loss too."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the trainer's arithmetic, "auto" as in [engine]; its weights and the optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass to save memory."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay of the second moment."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """Constant in the denominator of AdamW."""
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    """Norm to which gradients are clipped; 0 clips none."""
    learning_rate_schedule: Schedule = "constant"
    """Course of the learning rate over the steps."""
    schedule_end: Annotated[float, Ge(0), Le(1)] = 0.1
    """Fraction of the starting value that a schedule reaches at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises to its value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The inference engine and the memory that it takes."""

    slots: Annotated[int, Ge(0)] = 0
    """Members resident at once; 0 takes the population, at most 64. GRPO has none."""
    max_sequences: Annotated[int, Ge(1)] = 128
    """Sequences decoded at once."""
    max_model_len: Annotated[int, Ge(0)] = 0
    """Longest prompt and completion together in tokens; 0 takes it from the task."""
    kv_cache_gib: Annotated[float, Gt(0)] = 1.0
    """Memory of the key-value cache in GiB."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the served weights; "auto" is bfloat16, but float32 on a CPU without bfloat16 instructions."""
    enforce_eager: bool = False
    """On a GPU: whether to run without CUDA graphs. They are captured in seconds, and decoding is slow without them."""
    compile: bool = False
    """On a CPU: whether the model runs through torch.compile, which starts slowly and gains little."""
    gpu_memory_utilization: Annotated[float, Gt(0), Le(1)] = 0.85
    """Fraction of the GPU's memory that the engine may use."""
    timeout_seconds: Annotated[float, Ge(0), Le(1e9)] = 1800.0
    """Seconds without progress of the engine, or in its start, after which the process ends (status 124); 0: none."""
    allow_untested_architecture: bool = False
    """Whether to try a model of an architecture whose members the tests have not compared with transformers."""
    threads: Annotated[int, Ge(0)] = 0
    """CPU threads of an engine; 0 shares all cores among them. Without a C++ compiler an update's bits depend on it."""
    replicas: Annotated[int, Ge(0), Le(4096)] = 1
    """Engines; more than 1 by Ray (extra "ray"). 0: one for each GPU of the machine or Ray cluster, on a CPU one."""
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
    """Where they come from: "test", or "validation", the last problems of "train", which are then not trained on."""
    problems: Annotated[int, Ge(2)] = 256
    """Held-out problems per evaluation."""
    max_tokens: Annotated[int, Ge(0)] = 0
    """Length limit of a completion in tokens; 0 takes that of sampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints; with method "es" the journal is written at every step whatever this says."""

    every: Annotated[int, Ge(0)] = 10
    """Steps between checkpoints; 0 writes none, as the journal of "es" rebuilds every step; "grpo" resumes from one."""
    keep: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept."""
    best: bool = True
    """Whether the step of the highest accuracy gets a checkpoint, which is kept until there is a better one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is shown and recorded besides the metrics."""

    samples: Annotated[int, Ge(0)] = 2
    """Completions shown per step."""
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
    """Model to train: the embedded default, a local directory, or a name on the Hugging Face hub."""
    task: str
    """Task: "countdown", "gsm8k", or "file.py:NAME" next to the recipe."""
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
    """Limits of a user's own score."""
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
