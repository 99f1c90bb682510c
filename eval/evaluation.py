"""Evaluates a model on a task's test split, from the command line's settings to graded samples.

With a file, every graded completion is written to disk at once, and an interrupted evaluation continues from it. With
the same settings, problems and seeds it gets the same samples, within the limits that `training.evaluation` states.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from eggroll_llm.bounds import violations
from eggroll_llm.config.flags import apply_overrides, flags_by_key
from eggroll_llm.config.parse import field_types, parse_table
from eggroll_llm.config.recipe import sourced
from eggroll_llm.config.rules import validate
from eggroll_llm.config.schema import OF_EVALUATIONS, ChatConfig, EngineConfig, RewardConfig, RunConfig, SamplingConfig
from eggroll_llm.config.toml import Origin, Sourced
from eggroll_llm.engine.interface import Decoding, Progress
from eggroll_llm.engine.sampling import added, decoding_of
from eggroll_llm.engine.start import start_engine
from eggroll_llm.errors import ConfigError
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.files import context_limit, model_identity
from eggroll_llm.records.answers import Sample, SampleFile, sample_line
from eggroll_llm.records.baseline import Constant
from eggroll_llm.system.hardware import resolve_dtype, resolve_sequences, serves_on_cpu
from eggroll_llm.system.versions import BITS_DEPEND_ON, package_versions
from eggroll_llm.tasks.chat import check_chat, check_thoughts, is_chat
from eggroll_llm.tasks.constant import best_constant
from eggroll_llm.tasks.paths import PATH_OPTIONS
from eggroll_llm.tasks.prompts import ProblemSet, Prompter, needed_context, set_hash
from eggroll_llm.tasks.task import sandboxed
from eggroll_llm.training.evaluation import Grader, answer, grade_again
from eggroll_llm.training.scorer import Scorer
from eval import lm_eval
from eval.questions import Protocol, Questions, lm_eval_questions, task_questions
from eval.subject import Subject

ASKING = {"prompt_style", "shots", "template", "stop"}
GRADING = {"grader", "format_reward", "rewards", "reward_weights", "completions"}
"""Options that change how problems are asked or graded, and not which."""
DEFAULT_MAX_TOKENS = 320
"""Length limit of an answer where neither a run, a recipe nor a protocol sets one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated, and how."""

    subject: Subject
    task: str
    protocol: Protocol
    """Whose prompts and graders: lm-evaluation-harness's, or those used in training."""
    task_options: Mapping[str, Any]
    shots: int | None = None
    """Worked examples; None takes the protocol's number."""
    apply_chat_template: bool = False
    """Whether the prompts of lm-eval go through the model's chat template."""
    limit: Annotated[int, Ge(0)] = 0
    """Number of problems, from the start of the test split; 0 takes all."""
    samples: Annotated[int, Ge(1)] = 1
    """Completions per problem."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are sampled; its numbers of prompts and samples are a training's, and unused."""
    seed: int = 0
    """Seed of sampling."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    trained_chat: ChatConfig | None = None
    """Those of the run or recipe, if there is one."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Graded completions of an evaluation, with what they depend on."""

    settings: Settings
    questions: Questions
    samples: Sequence[Sample]
    """By problem and sample."""
    facts: Mapping[str, Any]
    """Everything that the completions depend on, as JSON values."""
    constant: Constant | None
    """The best constant answer to the problems, as the task grades it; None where the task has none."""


@dataclass(frozen=True, kw_only=True)
class Changeable:
    """The tables of settings that can be given as flags."""

    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task."""
    chat: ChatConfig = field(default_factory=ChatConfig)
    """How chat messages become a prompt."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Processes and limits of a user's own score."""


def settings_for(
    subject: Subject,
    flags: Sequence[tuple[str, str]],
    *,
    task: str | None = None,
    recipe: RunConfig | None = None,
    protocol: Protocol | None = None,
    **how: Any,
) -> Settings:
    """Return the settings: from the flags, and otherwise from the recipe or the run. Raises ConfigError.

    GSM8K requested by name is lm-eval's; a run without `task` is evaluated on the task it was trained on. The paths in
    `recipe` are absolute.
    """
    config = recipe or subject.config
    name = task or (config.task if config else "")
    if not name:
        raise ConfigError(
            f"{subject.name}: which task? Add --recipe RECIPE.toml, or --task gsm8k, countdown, dataset, verifiers or "
            "file.py:NAME"
        )
    protocol = protocol or ("lm-eval" if task in lm_eval.TASKS else "task")
    if protocol == "lm-eval" and name not in lm_eval.TASKS:
        raise ConfigError(f"--protocol lm-eval: only gsm8k and gsm8k_cot have it, not {name}: leave the flag out")
    if protocol == "task" and (how.get("shots") is not None or how.get("apply_chat_template")):
        raise ConfigError("--num-fewshot and --apply-chat-template belong to --protocol lm-eval: leave them out")
    given = {key: value for key, value in how.items() if value is not None}
    sampling = {key: given.pop(key) for key in field_types(SamplingConfig) if key in given}
    limit = lm_eval.MAX_TOKENS if protocol == "lm-eval" else DEFAULT_MAX_TOKENS
    base: dict[str, Any] = {}
    if config is not None:
        same_data = name == config.task or (name, config.task) == ("gsm8k_cot", "gsm8k")
        options = dict(config.task_options) if same_data else {}
        if protocol == "lm-eval":
            options = {key: value for key, value in options.items() if key == "data_dir"}
        engine = dataclasses.asdict(config.engine) | {"max_model_len": 0}
        base = {"task_options": options, "engine": engine, "reward": dataclasses.asdict(config.reward)}
        base["chat"] = dataclasses.asdict(config.chat)
        if protocol == "task" and name == config.task:
            limit = config.eval.max_tokens or config.sampling.max_tokens
            sampling = {key: getattr(config.sampling, key) for key in OF_EVALUATIONS} | sampling
    sampling["max_tokens"] = sampling.get("max_tokens") or limit
    changed = parse_table(Changeable, apply_overrides(Changeable, base, flags), Origin(name="flags"))
    if config is not None and subject.config is not None:
        trained, asked = subject.config.task_options, {**config.task_options, **changed.task_options}
        deciding = (trained.keys() | asked.keys()) - ASKING - GRADING
        others = any(trained.get(key) != asked.get(key) for key in deciding)
        if not same_data or subject.config.task != config.task or others:
            subject = dataclasses.replace(subject, selected_on=0)
    settings = Settings(
        subject=subject,
        task=name,
        protocol=protocol,
        task_options=sourced(changed.task_options, Sourced.origin, flags),
        chat=changed.chat,
        trained_chat=config.chat if config else None,
        engine=changed.engine,
        reward=changed.reward,
        sampling=SamplingConfig(**sampling),
        **given,
    )
    if settings.samples > 1 and settings.sampling.temperature == 0:
        raise ConfigError(
            f"--samples {settings.samples}: greedy decoding gives the same answer every time: add --temperature 0.7"
        )
    for found in violations(settings):
        raise ConfigError(f"--{found.field} {found.value}: {found.problem}")
    own = {f"sampling.{name}": f"--{name.replace('_', '-')}" for name in field_types(SamplingConfig)}
    ranges = RunConfig(
        task="-",
        steps=1,
        es=EsSettings(sigma=1.0, learning_rate=1.0),
        chat=settings.chat,
        sampling=settings.sampling,
        engine=settings.engine,
        reward=settings.reward,
    )
    validate(ranges, Origin(name="flags", flags=own | flags_by_key(flags)))
    return settings


def questions_for(settings: Settings, base_dir: Path) -> Questions:
    """Load the task. Raises UserError."""
    if settings.protocol == "lm-eval":
        task: lm_eval.LmEvalTask = "gsm8k" if settings.task == "gsm8k" else "gsm8k_cot"
        return lm_eval_questions(
            task,
            settings.task_options,
            base_dir,
            limit=settings.limit,
            shots=settings.shots,
            chat=settings.apply_chat_template,
        )
    return task_questions(settings.task, settings.task_options, base_dir, limit=settings.limit, limits=settings.reward)


def evaluate_subject(
    settings: Settings,
    base_dir: Path,
    path: Path | None = None,
    *,
    overwrite: bool = False,
    on_progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Ask the model the questions and grade its answers; continue what `path` holds already. Raises UserError.

    `say` gets a sentence when the task's grader fails for the first time.
    """
    questions = questions_for(settings, base_dir)
    asked = _ask(settings, questions)
    facts = _facts(settings, questions, asked)
    total = len(asked.problems.problems) * settings.samples
    with contextlib.ExitStack() as stack:
        if questions.scorer:
            questions.scorer.say = say
            stack.enter_context(questions.scorer)
        file = stack.enter_context(SampleFile(path, facts, overwrite=overwrite)) if path else None
        own = sandboxed(questions.source)
        if file and not (own and own.takes_ids):  # tokens are not stored
            _grade_again(file, asked.problems, questions.graders)
        samples: dict[tuple[int, int], Sample] = file.samples if file else {}

        def keep(sample: Sample) -> None:
            if file:
                file.append(sample)
            else:
                samples[sample.problem, sample.sample] = sample
            on_progress(len(samples), total)

        if len(samples) < total:
            thinking = settings.sampling.thinking_token_budget > 0
            subject = settings.subject
            model = "" if subject.config else subject.name  # a hub name is enough for other machines
            engine = start_engine(subject.model_dir, asked.engine, thinking=thinking, model=model, say=say)
            stack.callback(engine.close)
            answer(
                engine,
                asked.problems,
                questions.graders,
                asked.decoding,
                keep,
                samples=settings.samples,
                seed=settings.seed,
                done=set(samples),
            )
        if questions.scorer and questions.scorer.scored == total:  # else some were graded before
            questions.scorer.check(of="")
        constant = _constant(questions, stack)
    ordered = [samples[key] for key in sorted(samples)]
    return Results(settings=settings, questions=questions, samples=ordered, facts=facts, constant=constant)


def _constant(questions: Questions, stack: contextlib.ExitStack) -> Constant | None:
    task = questions.source
    scorer = questions.scorer or stack.enter_context(Scorer(task))
    return best_constant(task, task.problems("train"), questions.problems, scorer.judge)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """Questions in tokens, and the engine and decoding that answer them."""

    problems: ProblemSet
    decoding: Decoding
    engine: EngineConfig


def _ask(settings: Settings, questions: Questions) -> _Asked:
    """Turn the questions into tokens. Raises ConfigError when the model cannot be asked them."""
    model_dir = settings.subject.model_dir
    prompter = Prompter(model_dir, _chat(settings, questions))
    if settings.apply_chat_template and not prompter.has_chat_template:
        raise ConfigError(f"--apply-chat-template: {model_dir} has no chat template: leave the flag out")
    published = settings.protocol == "lm-eval"
    check_chat(prompter, questions.prompts, *(["add --apply-chat-template"] if published else []))
    check_thoughts(prompter, settings.sampling.thinking_token_budget, "--thinking-token-budget")
    kinds = [questions.source.kind(problem) for problem in questions.problems]
    problems = prompter.encode_all(questions.problems, questions.prompts, kinds=kinds, bos_by_text=published)
    eos = prompter.tokenizer.eos_token
    decoding = dataclasses.replace(
        decoding_of(settings.sampling, (*questions.stop, eos) if published and eos else questions.stop),
        special_tokens=published,
    )
    context = needed_context(
        [problems],
        decoding.max_tokens,
        settings.engine.max_model_len,
        context_limit(model_dir),
        length_key="--max-tokens",
        context_key="--engine.max_model_len",
        shorten="lower --num-fewshot" if published else "shorten the prompts",
    )
    sequences = resolve_sequences(settings.engine.max_sequences)
    engine = dataclasses.replace(settings.engine, slots=1, max_model_len=context, max_sequences=sequences)
    return _Asked(problems=problems, decoding=decoding, engine=engine)


def _chat(settings: Settings, questions: Questions) -> ChatConfig:
    """Return the settings of [chat] but for those of the run, where the prompts are plain text."""
    plain = settings.chat == settings.trained_chat and not is_chat(questions.prompts)
    return ChatConfig() if plain else settings.chat


def _chat_facts(chat: ChatConfig) -> dict[str, Any]:
    """Return the settings but for where a template lies: the prompts say what it makes of them."""
    return {key: value for key, value in dataclasses.asdict(chat).items() if key != "template_file"}


def _grade_again(file: SampleFile, problems: ProblemSet, graders: Mapping[str, Grader]) -> None:
    """Graders and gold answers may have been corrected since the completions were sampled."""
    graded = {(s.problem, s.sample): s for s in grade_again(file.samples.values(), problems, graders)}
    again = [graded[key] for key in file.samples]
    if [*map(sample_line, again)] != [*map(sample_line, file.samples.values())]:
        file.replace(again)


def _facts(settings: Settings, questions: Questions, asked: _Asked) -> dict[str, Any]:
    decoding = asked.decoding
    return {
        "model": model_identity(settings.subject.model_dir),
        "task": questions.task,
        "version": questions.version,
        "protocol": settings.protocol,
        # Where the data lie is not part of it: the prompts say what they are.
        "task_options": {
            key: value for key, value in settings.task_options.items() if key not in PATH_OPTIONS.get(settings.task, ())
        },
        "num_fewshot": questions.shots,
        "apply_chat_template": settings.apply_chat_template,
        **({} if (chat := _chat(settings, questions)) == ChatConfig() else {"chat": _chat_facts(chat)}),
        "problems": len(asked.problems.problems),
        "prompts": set_hash(asked.problems.hashes),
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        **added(decoding),
        "stop": list(decoding.stop),
        "samples": settings.samples,
        "seed": settings.seed if decoding.temperature else None,
        "dtype": resolve_dtype(settings.engine.dtype),
        "enforce_eager": settings.engine.enforce_eager,
        **({} if settings.engine.quantization == "none" else {"quantization": settings.engine.quantization}),
        "device": "cpu" if serves_on_cpu() else "cuda",
        "packages": package_versions(*BITS_DEPEND_ON),
    }
