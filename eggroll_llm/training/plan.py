"""Configuration -> plan of a step: training, resuming and replay share it."""

from eggroll_llm.config.schema import RunConfig
from eggroll_llm.es.plan import StepPlan, plan_step


def plan_of(config: RunConfig, step: int) -> StepPlan:
    """Return the plan of a step (from 1) of a run."""
    return plan_step(config.es, seed=config.seed, step=step, steps=config.steps)
