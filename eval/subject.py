"""The model to evaluate: by name, or from a run at its end, at its best step or at a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from eggroll_llm.config.recipe import load_recipe
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.errors import ConfigError
from eggroll_llm.models.architectures import check_tested
from eggroll_llm.models.files import architecture_of, check_model
from eggroll_llm.models.resolve import resolve_model
from eggroll_llm.records.weights import named_run, weights_at


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and what its run says about how it was trained."""

    name: str
    """As the user named it."""
    model_dir: Path
    config: RunConfig | None
    """Configuration of the run; None for a plain model."""
    selected_on: int = 0
    """Test problems on whose answers this step was chosen as the best of its run; 0 for none."""


def find_subject(name: str, at: str = "final") -> Subject:
    """Return the model of a run `at` "final", "best" or a step, or the model of that name. Raises UserError."""
    found = named_run(name, at)
    if found is None:
        if at != "final":
            raise ConfigError(f"--at {at}: {name} is not a run directory, so it has no steps: leave --at out")
        model_dir = resolve_model(name)
        check_tested(architecture_of(model_dir), model_dir, allow_untested=True)
        return Subject(name=name, model_dir=model_dir, config=None)
    run, at = found
    directory, step = weights_at(run, at)
    check_model(directory)
    shown = str(run.path) if at == "final" else f"{run.path} (step {step})"
    config = load_recipe(run.config)
    selected_on = config.eval.problems if at == "best" and config.eval.split == "test" else 0
    return Subject(name=shown, model_dir=directory.resolve(), config=config, selected_on=selected_on)
