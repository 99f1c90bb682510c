"""The options of task "dataset"."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    """Options of task "dataset"."""

    dataset: str = ""
    """File of JSONL, JSON, CSV, TSV or parquet, or folder of such, relative to the recipe's folder; or a name on the
    Hugging Face hub."""
    subset: str = ""
    """Configuration of a hub data set, such as "main"; the folder of that name in a folder."""
    train_split: str = "train"
    """Split to train on. A single file is all of it."""
    test_split: str = ""
    """Split to evaluate on; empty takes "test", else "validation", else a share of the training rows."""
    test_file: str = ""
    """File to evaluate on, instead of a split."""
    test_share: float = 0.1
    """Share of the training rows that is held out where there is nothing else to evaluate on."""
    seed: int = 0
    """Seed that chooses the rows held out, independent of the seed of the run."""
    prompt_column: str = ""
    """Column with the prompt, a text or chat messages; empty finds one by its name. A dot leads into an object."""
    template: str = ""
    """Prompt with columns in braces, "{question}\\nAnswer:", instead of a column. {{ and }} are braces."""
    prompt_style: Literal["chat", "text"] = "chat"
    """Whether a prompt that is text becomes a user's chat message, or is text to complete."""
    answer_column: str = ""
    """Column with the right answer, for graders by name; empty finds one by its name."""
    kind_column: str = ""
    """Column with the kind of a problem, such as its level: accuracy is also shown for each; empty: none."""
    rewards: str | tuple[str, ...] = ()
    """What an answer earns: a grader ("gsm8k", "math", "exact", "choice", "countdown"), "file.py:function" with the
    arguments of a TRL reward, or several. Accuracy counts the answers that get 1 from the first."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in their sum; empty weighs all by 1."""
    completions: Literal["auto", "text", "messages"] = "auto"
    """What functions get: texts, or lists of messages; "auto" is messages where the prompt column holds messages."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends."""
    skip_bad_rows: bool = False
    """Whether rows that cannot be used are left out; otherwise they are an error."""
