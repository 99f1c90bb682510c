"""Sigma and learning rate before a run, by measuring what random members do to answers of the weights.

    answers    = W(prompts), at temperature 1 and at most TOKENS long: the divergence is then an unbiased estimate
    d(sigma)   = mean divergence of members of that sigma from W on the answers' tokens, by `Engine.score`

until a sigma is found whose divergence is close to the target; with the next smaller one (half of it, if none was
measured) that determines the law of `es.sizes`, and what follows from it. All sigmas have the same noise, so that
their divergences compare; nothing is graded, and nothing depends on time.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.engine.interface import Engine, Request, Scored
from eggroll_llm.engine.sampling import decoding_of, plain, sampling_seed
from eggroll_llm.engine.start import start_engine
from eggroll_llm.errors import ConfigError, ModelError, TrainingError
from eggroll_llm.es.likelihood import divergence
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.sizes import DIVERGENCE, Law, Measured, learning_rate_for, next_sigma
from eggroll_llm.tasks.order import problems_of_step
from eggroll_llm.training.budget import check_memory
from eggroll_llm.training.prepare import Prepared, prepare

MEMBERS = 4
"""Random members of each sigma: the divergence of one varies by a third, and so the sigma found by a twelfth."""
TOKENS = 64
"""Length limit of an answer."""
ALL_TOKENS = 512
"""Of the answers together, at most: as many problems as that takes."""
PROBLEMS = 32
"""At most: short answers cost their prompts, and more of them would not make up for the few members."""
START = 1e-3
"""The first sigma."""
ATTEMPTS = 6
"""Sigmas at most until one is close; each is up to eight times the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was measured, and what follows."""

    sigma: float
    learning_rate: float
    law: Law
    measured: tuple[Measured, ...]
    """In the order of sigma."""
    answers: int
    tokens: int
    """Tokens of all answers."""


def tune(config: RunConfig, recipe_dir: Path, working: Callable[[str], None]) -> Tuned:
    """Start the engine of a run and return sizes for its members and updates; `working` gets what is being done.

    Raises:
        ConfigError: of another method, or without a number of steps.
        TrainingError: the model does not change as random changes of its weights should make it.
        UserError: whatever keeps a run from starting.
    """
    if config.method != "es":
        raise ConfigError(f'method = "{config.method}": only the sigma and learning rate of "es" are found here')
    if not config.steps:
        raise ConfigError(
            "steps = 0: the learning rate depends on the number of steps. Give the number that the run will have: "
            "--steps N (train --dry-run estimates the time of a step)"
        )
    es = dataclasses.replace(config.es, population=MEMBERS, antithetic=True)
    engine_config = dataclasses.replace(config.engine, slots=MEMBERS, replicas=1, min_replicas=1)
    prepared = prepare(dataclasses.replace(config, es=es, engine=engine_config), recipe_dir)
    check_memory(prepared)
    working("starting the engine")
    ready = prepared.config
    engine = start_engine(prepared.model_dir, ready.engine, es=ready.es, model=ready.model)
    try:
        working("answering")
        answers = _answers(engine, prepared)
        law, measured = _measure(engine, answers, ready, working)
    except ModelError as error:
        raise ModelError(f"{error}: set es.sigma and es.learning_rate by hand") from error
    finally:
        engine.close()
    return Tuned(
        sigma=law.sigma,
        learning_rate=learning_rate_for(law.sigma, config.es, config.steps),
        law=law,
        measured=measured,
        answers=len(answers),
        tokens=sum(len(token_ids) for _, token_ids in answers),
    )


def _answers(engine: Engine, prepared: Prepared) -> list[Scored]:
    """Return prompts and answers of the weights."""
    config, prompts = prepared.config, prepared.train.prompts
    decoding = plain(decoding_of(config.sampling, prepared.task.stop), max_tokens=TOKENS)
    count = min(len(prompts), PROBLEMS, ALL_TOKENS // decoding.max_tokens)
    problems = problems_of_step(len(prompts), count, seed=config.seed, step=1)
    requests = [
        Request(prompt_ids=prompts[problem], seed=sampling_seed(config.seed, 0, i, 0))
        for i, problem in enumerate(problems)
    ]
    completions = engine.generate(requests, decoding)
    return [
        (request.prompt_ids, completion.token_ids) for request, completion in zip(requests, completions, strict=True)
    ]


def _measure(
    engine: Engine, answers: list[Scored], config: RunConfig, working: Callable[[str], None]
) -> tuple[Law, tuple[Measured, ...]]:
    """Return the law near the target, and all measurements."""

    def at(sigma: float) -> Measured:
        working(f"members of sigma {sigma:.2g}")
        engine.begin(NoiseSpec(seed=config.seed, step=1, rank=config.es.rank, sigma=sigma), MEMBERS)
        base_N, *logprob_MN = engine.score(answers, [None, *range(MEMBERS)])
        far = [divergence(logprob_N[None], base_N) for logprob_N in logprob_MN]
        return Measured(sigma=sigma, divergence=sum(far) / MEMBERS)

    measured = [at(START)]
    while not measured[-1].close and len(measured) < ATTEMPTS:
        measured.append(at(next_sigma(measured[-1])))
    last = measured[-1]
    below = [one for one in measured if one.sigma < last.sigma]
    if not below:
        below = [at(last.sigma / 2)]
        measured += below
    try:
        law = Law.through(max(below, key=lambda one: one.sigma), last)
    except ValueError:
        law = None
    if not law or not last.close:
        tried = ", ".join(f"{one.divergence:.2g} at sigma {one.sigma:.2g}" for one in measured)
        raise TrainingError(
            f"no sigma was found whose members are {DIVERGENCE:g} nats a token from the weights ({tried}): check the "
            "model, or try --engine.dtype float32, whose rounding does not hide small changes"
        )
    return law, tuple(sorted(measured, key=lambda one: one.sigma))
