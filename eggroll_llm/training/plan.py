"""Configuration and journal entry -> what noise and update take. Shared by training, resuming and replay."""

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.fitness import Fitness
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.es.optimizer import OptimizerSettings, schedule
from eggroll_llm.records.journal import JournalEntry


def noise_step(config: RunConfig, step: int) -> int:
    """Return the step whose noise `step` uses: the first of its group of `noise_reuse` steps."""
    return step - (step - 1) % config.es.noise_reuse


def sigma_at(config: RunConfig, step: int) -> float:
    """Return sigma at a step (from 1)."""
    es = config.es
    return schedule(es.sigma_schedule, es.sigma, step - 1, config.steps, es.schedule_end)


def learning_rate_at(config: RunConfig, step: int) -> float:
    """Return the learning rate at a step (from 1)."""
    es = config.es
    return schedule(es.learning_rate_schedule, es.learning_rate, step - 1, config.steps, es.schedule_end)


def noise_of(config: RunConfig, step: int) -> NoiseSpec:
    """Return the noise that a step's population is made of."""
    return NoiseSpec(seed=config.seed, step=noise_step(config, step), rank=config.es.rank, sigma=sigma_at(config, step))


def step_entry(config: RunConfig, step: int, fitness: Fitness, *, checksum: str) -> JournalEntry:
    """Return what the journal records of a step."""
    return JournalEntry(
        step=step,
        noise_step=noise_step(config, step),
        fitness=tuple(fitness.fitness_M.tolist()),
        sigma=sigma_at(config, step),
        learning_rate=learning_rate_at(config, step),
        dropped=fitness.dropped,
        checksum=checksum,
    )


def update_spec(config: RunConfig, entry: JournalEntry) -> UpdateSpec:
    """Return the update that a journal entry stands for."""
    return UpdateSpec(
        step=entry.step,
        noise_step=entry.noise_step,
        seed=config.seed,
        rank=config.es.rank,
        sigma=entry.sigma,
        learning_rate=entry.learning_rate,
        fitness_M=entry.fitness,
        antithetic=config.es.antithetic,
        scale=config.es.update_scale,
    )


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """Return the optimizer of a configuration."""
    es = config.es
    return OptimizerSettings(
        name=es.optimizer,
        momentum=es.momentum,
        adam_beta1=es.adam_beta1,
        adam_beta2=es.adam_beta2,
        adam_eps=es.adam_eps,
    )
