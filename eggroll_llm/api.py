"""Train, evaluate and plot from Python. Everything public here is importable from `eggroll_llm` itself.

    from eggroll_llm import evaluate, load_recipe, plot, train

    recipe = load_recipe("recipes/addition_smollm2.toml", {"steps": 20})
    run = train(recipe, "runs/notebook", on_step=lambda row: print(row["step"], row.get("reward/mean")))
    plot(run.path)
    evaluate(run.path, limit=256)["results"]

The commands do the same. The functions raise `UserError` for mistakes that the caller can fix. Only one engine
may be alive in a process; `train` and `evaluate` close theirs before they return.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eggroll_llm.config.flags import flag_text
from eggroll_llm.config.schema import RunConfig
from eggroll_llm.system import installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eggroll_llm.records.run_dir import OnExisting
    from eggroll_llm.training.callbacks.base import Callback, OnStep
    from eggroll_llm.training.harness import Display
    from eggroll_llm.training.session import Outcome


def load_recipe(path: Path | str, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the checked configuration of a TOML recipe, its paths made absolute.

    `settings` override the recipe's, by dotted name: `{"steps": 20, "es.sigma": 1e-3}`; paths in them begin in the
    working directory. Raises ConfigError.
    """
    installed.check("load_recipe", *installed.ENGINE)
    from eggroll_llm.tasks.paths import absolute_value
    from eggroll_llm.training.prepare import load_absolute

    own = {key: absolute_value(key, value, Path.cwd()) for key, value in (settings or {}).items()}
    return load_absolute(path, _flags(own))


def train(
    config: RunConfig | Path | str,
    run_dir: Path | str,
    *,
    on_existing: "OnExisting" = "fail",
    on_step: "OnStep | None" = None,
    callbacks: "Sequence[Callback]" = (),
    display: "Display | None" = None,
) -> "Outcome":
    """Train to the limit of the configuration, write `final/` into the run directory and return the outcome.

    `config` is what `load_recipe` returns, or the path of a recipe. `on_existing` says what to do about an existing run
    directory: "fail", "resume" or "overwrite". `on_step` gets the row of metrics of each finished step, and of step 0,
    the evaluation of the base model; `callbacks` get samples and evaluations, too. What they raise ends the run, which
    can be resumed; StopTraining ends it as its limit would.
    Progress goes to the terminal or to `display`. Raises UserError.
    """
    installed.check("train", *installed.ENGINE)
    from eggroll_llm.training import session
    from eggroll_llm.training.callbacks.base import FunctionOfStep

    config = config if isinstance(config, RunConfig) else load_recipe(config)
    every = [*callbacks, *([FunctionOfStep(on_step)] if on_step else [])]
    with _shown(display) as shown:
        return session.train(config, Path.cwd(), Path(run_dir), on_existing, shown, callbacks=every)


def evaluate(
    model: Path | str,
    *,
    task: str | None = None,
    recipe: RunConfig | Path | str | None = None,
    at: str | int = "final",
    settings: Mapping[str, Any] | None = None,
    limit: int = 0,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    stop: Sequence[str] | None = None,
    thinking_token_budget: int | None = None,
    max_tokens: int = 0,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    display: "Display | None" = None,
) -> dict[str, Any]:
    """Evaluate a model or a run on a task's test split; return the figures, under the keys of lm-evaluation-harness.

    `model` is a name, a model directory or a run directory, whose model is taken `at` "final", "best" or a step. A run
    is evaluated on its own task, and any model on that of a `recipe` (or its path), unless another is named. `settings`
    are those of the tables [task_options], [chat], [engine] and [reward], by dotted name. `limit` takes that many
    problems, 0 all.
    Where they are None, `stop` (texts at which answers end besides the task's), `repetition_penalty` and
    `thinking_token_budget` are those of the recipe or the run. Raises UserError.
    """
    installed.check("evaluate", *installed.ENGINE)
    from eggroll_llm.tasks.paths import absolute_task
    from eval.evaluation import evaluate_subject, settings_for
    from eval.subject import find_subject
    from eval.summary import summarize

    how = settings_for(
        find_subject(str(model), str(at)),
        _flags(settings),
        task=absolute_task(task, Path.cwd()) if task else None,
        recipe=recipe if recipe is None or isinstance(recipe, RunConfig) else load_recipe(recipe),
        shots=num_fewshot,
        apply_chat_template=apply_chat_template,
        limit=limit,
        max_tokens=max_tokens,
        samples=samples,
        temperature=temperature,
        seed=seed,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=(stop,) if isinstance(stop, str) else None if stop is None else tuple(stop),
        thinking_token_budget=thinking_token_budget,
    )
    with _shown(display) as shown:
        results = evaluate_subject(
            how,
            Path.cwd(),
            None,
            on_progress=lambda done, total: shown.sampling("eval", done, total),
            say=shown.message,
        )
    return summarize(results, [samples] if samples > 1 else [])


def plot(*runs: Path | str) -> "Figure":
    """Return a matplotlib figure of the accuracy and the reward of runs over their steps, seeds of a run as a band."""
    from eval.plots import overview_figure
    from eval.runs import group_seeds, read_runs

    return overview_figure(group_seeds(read_runs(runs)))


def _flags(settings: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return settings as the command line has them: text, which is read by the type of the setting."""
    return [(key, flag_text(key, value)) for key, value in (settings or {}).items()]


def _shown(display: "Display | None") -> AbstractContextManager["Display"]:
    from eggroll_llm.cli.display import ConsoleDisplay

    return nullcontext(display) if display else ConsoleDisplay()
