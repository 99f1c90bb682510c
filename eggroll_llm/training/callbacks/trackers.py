"""Copies of the metrics, and of a few answers, for TensorBoard and Weights & Biases. Neither can stop a run.

Both get every finite number of metrics.jsonl and, with each evaluation, a table of the first `log.samples` held-out
problems. A resumed run continues its earlier log: TensorBoard forgets the steps that are done again, W&B keeps them and
gets the ones it lacks. The first failure of a tracker becomes one warning and switches it off.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.config.schema import LogConfig
from eggroll_llm.records.answers import TASK, Sample, held
from eggroll_llm.system.files import write_text
from eggroll_llm.system.installed import import_failure
from eggroll_llm.system.jsonl import parse_json, to_json
from eggroll_llm.system.terminal import inert, inert_lines
from eggroll_llm.training.callbacks.base import Callback

WANDB_ID = "wandb-id"  # file of a run directory, so that a resumed run continues its earlier log
SAMPLES = "eval/samples"  # name of the table
COLUMNS = ("problem", "answer", "reward", "correct")
TEXT_CHARACTERS = 2000  # of an answer

Row = Mapping[str, Any]


def trackers(
    config: LogConfig, run_dir: Path, settings: Row, earlier: Sequence[Row], warn: Callable[[str], None]
) -> list[Callback]:
    """Return the trackers that the configuration names; they start with the first step that they get.

    `settings` are recorded with the run, `earlier` are the rows of metrics of earlier processes; `warn` is called at
    most once a tracker.
    """
    found: list[Callback] = []
    if config.tensorboard:
        found.append(_Guarded("tensorboard", lambda step: _TensorBoard(run_dir, step, config.samples), warn))
    if config.wandb:
        found.append(_Guarded("wandb", lambda _: _Wandb(config, run_dir, settings, earlier), warn))
    return found


class _Guarded(Callback):
    """A tracker that starts when it is first called, and that is off after its first failure."""

    def __init__(self, name: str, start: Callable[[int], Callback], warn: Callable[[str], None]) -> None:
        self._name, self._start, self._warn = name, start, warn
        self._tracker: Callback | None = None
        self._off = False

    def on_evaluation(self, step: int, metrics: Row, samples: Sequence[Sample]) -> None:
        self._call(step, lambda tracker: tracker.on_evaluation(step, metrics, samples))

    def on_step(self, step: int, metrics: Row) -> None:
        self._call(step, lambda tracker: tracker.on_step(step, metrics))

    def on_end(self) -> None:
        if self._tracker:
            self._call(0, lambda tracker: tracker.on_end())

    def _call(self, step: int, call: Callable[[Callback], None]) -> None:
        if self._off:
            return
        try:
            self._tracker = self._tracker or self._start(step)
            call(self._tracker)
        except (Exception, SystemExit) as error:  # some clients give up by SystemExit
            cause = import_failure(error) if isinstance(error, ImportError) else ""
            cause = cause or f"{type(error).__name__}: {str(error) or 'no message'}".replace("\n", " ")
            self._warn(f"{self._name} is off for the rest of the run, metrics.jsonl is still written: {cause}")
            self._off = True


class _TensorBoard(Callback):
    def __init__(self, run_dir: Path, step: int, samples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a killed process had logged and a resumed one does again are there once.
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)
        self._samples = samples

    def on_evaluation(self, step: int, metrics: Row, samples: Sequence[Sample]) -> None:
        if self._samples:
            self._writer.add_text(SAMPLES, _markdown(samples[: self._samples]), step)

    def on_step(self, step: int, metrics: Row) -> None:
        for key, value in _numbers(metrics).items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def on_end(self) -> None:
        self._writer.close()


class _Wandb(Callback):
    """A step of W&B's is one of ours. It drops what comes for a step before its next one, `run.step`."""

    def __init__(self, config: LogConfig, run_dir: Path, settings: Row, earlier: Sequence[Row]) -> None:
        import wandb

        self._table, self._samples = wandb.Table, config.samples
        self._run = wandb.init(
            project=config.wandb,
            id=_run_id(run_dir / WANDB_ID),
            resume="allow",  # continue the run of that id, or create it
            name=run_dir.name,
            dir=str(run_dir),
            config=parse_json(to_json(settings)),  # half surrogate pairs and numbers that are not finite replaced
            settings=wandb.Settings(console="off"),
        )
        self._next: int = self._run.step
        for row in earlier:  # which a killed process had not uploaded, or which were made without W&B
            self.on_step(row["step"], row)

    def on_evaluation(self, step: int, metrics: Row, samples: Sequence[Sample]) -> None:
        if self._samples and step >= self._next:
            rows = [
                [inert_lines(text, TEXT_CHARACTERS) for text in _texts(sample)] + _grades(sample)
                for sample in samples[: self._samples]
            ]
            self._run.log({SAMPLES: self._table(columns=list(COLUMNS), data=rows)}, step=step)

    def on_step(self, step: int, metrics: Row) -> None:
        if step >= self._next:
            self._run.log(_numbers(metrics), step=step)

    def on_end(self) -> None:
        self._run.finish()


def _numbers(row: Row) -> dict[str, int | float]:
    """Return the finite numbers of a row of metrics."""
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _texts(sample: Sample) -> list[str]:
    return [json.dumps(held({"id": sample.id, **sample.doc}), ensure_ascii=False), sample.completion.strip()]


def _grades(sample: Sample) -> list[Any]:
    score = sample.scores[TASK]
    return [score.reward if math.isfinite(score.reward) else None, score.correct]


def _markdown(samples: Sequence[Sample]) -> str:
    """Return a table in which no text is Markdown or HTML: all but letters, digits and spaces is a numbered entity."""

    def cell(value: object) -> str:
        text = inert(str(value), TEXT_CHARACTERS)
        return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)

    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[cell(value) for value in (*_texts(sample), *_grades(sample))] for sample in samples]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _run_id(path: Path) -> str:
    """Return the run's id at Weights & Biases: the one in the file, or a new one, which is put there."""
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = secrets.token_hex(8)
        write_text(path, f"{known}\n")
    return known
