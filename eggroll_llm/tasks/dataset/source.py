"""Where the rows of task "dataset" come from: one file, a folder of files by split, or the Hugging Face hub.

A folder has its files where the hub's repositories have them: `train.jsonl`, `train-00000-of-00002.parquet`,
`data/train.csv`, `main/train.parquet` with `subset = "main"`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eggroll_llm.errors import TaskError
from eggroll_llm.system.installed import remedy
from eggroll_llm.tasks.dataset.options import DatasetOptions
from eggroll_llm.tasks.order import split_off
from eggroll_llm.tasks.read import ENDINGS, Row, load_file, load_hub
from eggroll_llm.tasks.task import Place

_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_TESTS = ("test", "validation")
"""Splits to evaluate on, by preference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """All rows, as they are."""

    train: Sequence[Row]
    test: Sequence[Row]
    told: str
    """Where they come from, in words."""


def is_path(dataset: str, base_dir: Path) -> bool:
    """Return whether a data set is a file or folder, there or not, and no name on the hub."""
    return (
        (base_dir / dataset).exists()
        or dataset.startswith((".", "/", "~"))
        or dataset.endswith(ENDINGS)
        or not _HUB_NAME.fullmatch(dataset)
    )


def load_splits(options: DatasetOptions, base_dir: Path, place: Place) -> Splits:
    """Return the rows to train and to evaluate on. Raises TaskError when they are missing or cannot be read."""
    if not options.dataset:
        raise TaskError(
            f"{place('dataset')}: dataset is missing. Name a file, a folder or a data set of the hub in [task_options]."
        )
    if not 0 < options.test_share < 1:
        raise TaskError(f"{place('test_share')}: test_share = {options.test_share:g} is not between 0 and 1.")
    if options.test_file and options.test_split:
        raise TaskError(f"{place('test_split')}: test_split and test_file both say what to evaluate on. Remove one.")
    path = base_dir / os.path.expanduser(options.dataset)
    if not is_path(options.dataset, base_dir):
        train, test, name = _from_hub(options, place)
    elif path.is_dir():
        train, test, name = _from_folder(path, options, place)
    elif path.is_file() and (options.test_split or options.train_split != "train"):
        key = "test_split" if options.test_split else "train_split"
        raise TaskError(f"{place(key)}: {path} is one file, which has no splits. Remove {key}.")
    else:
        train, test, name = load_file(path), [], ""
    if options.test_file:
        test, name = load_file(base_dir / options.test_file), options.test_file
    if test:
        return Splits(train=train, test=test, told=f"{options.dataset}, evaluated on {name}")
    rest, held = split_off(train, options.test_share, seed=options.seed)
    if not held:
        raise TaskError(f"{place('dataset')}: {options.dataset} has {len(train)} rows, too few to hold any out.")
    told = f"{options.dataset}, {options.test_share * 100:g} % of whose rows are held out (seed {options.seed})"
    return Splits(train=rest, test=held, told=told)


def _from_folder(folder: Path, options: DatasetOptions, place: Place) -> tuple[list[Row], list[Row], str]:
    """Return train, test and the name of the latter, which may be empty."""

    def rows(split: str) -> list[Row]:
        return [row for file in _files(folder, split, options.subset) for row in load_file(file)]

    train = rows(options.train_split)
    if not train:
        found = sorted(file.relative_to(folder).as_posix() for end in ENDINGS for file in folder.rglob(f"*{end}"))
        raise TaskError(
            f"{place('dataset')}: {folder} has no {options.train_split}.jsonl, .json, .csv, .tsv or .parquet"
            + (f" in {options.subset}" if options.subset else "")
            + f"; it has {', '.join(found[:8]) or 'no such files at all'}. Name one of the files, or set train_split "
            "or subset."
        )
    for name in [options.test_split] if options.test_split else _TESTS:
        if name != options.train_split and (test := rows(name)):
            return train, test, name
    if options.test_split:
        raise TaskError(f"{place('test_split')}: {folder} has no files of split {options.test_split!r}.")
    return train, [], ""


def _files(folder: Path, split: str, subset: str) -> list[Path]:
    """Return the files of a split, in order: those of the first place that has any."""
    for place in [folder / subset] if subset else [folder, folder / "data"]:
        for ending in ENDINGS:
            if (one := place / f"{split}{ending}").is_file():
                return [one]
            if several := sorted(place.glob(f"{_escaped(split)}-[0-9]*{ending}")):
                return several
    return []


def _escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _from_hub(options: DatasetOptions, place: Place) -> tuple[list[Row], list[Row], str]:
    name, subset, instead = options.dataset, options.subset or None, "give dataset as a local file or folder"

    def rows(split: str) -> list[Row]:
        table = load_hub(name, split, subset, instead=instead)
        return [(f"{name} {split}[{i}]", dict(row)) for i, row in enumerate(table)]

    train = rows(options.train_split)
    if options.test_split:
        return train, rows(options.test_split), options.test_split
    if options.test_file:
        return train, [], ""
    splits = _splits_on_hub(name, subset)
    test = next((split for split in _TESTS if split in splits and split != options.train_split), "")
    return train, rows(test) if test else [], test


def _splits_on_hub(name: str, subset: str | None) -> Sequence[str]:
    try:
        import datasets
    except ImportError:
        raise TaskError(f"{name} is on the hub, which needs the package datasets. {remedy('datasets')}.") from None
    try:
        return list(datasets.get_dataset_split_names(name, subset))
    except Exception as error:  # the hub's client raises anything
        cause = str(error).partition("\n")[0]
        raise TaskError(
            f"{name}: its splits cannot be listed ({type(error).__name__}: {cause:.200}). Set test_split."
        ) from error
