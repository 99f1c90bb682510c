"""How many sequences fit into a memory, in a step of ES and in one of GRPO? `python recipes/claims/generations.py`.

Every point is a process that takes one training step in which that many sequences are computed at once, and its result
is the most memory that it had: resident, or on CUDA what torch allocated. All have the same model, prompt and length.

    ES          a member answers for each sequence: weights, masters, factors and key-value cache of all of them
    GRPO        one backward pass over all of them: weights, their served copy, gradients, Adam and activations; the
                answers are sampled 16 at a time, and the passes over their one prompt are shared
    GRPO, checkpointing    the same with activations computed again in the backward pass
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eggroll_llm import train
from eggroll_llm.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    GrpoConfig,
    RunConfig,
    SamplingConfig,
)
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system.hardware import resolve_dtype
from rewards import Score

SEQUENCES = {
    "ES": (64, 128, 256, 512),
    "GRPO": (8, 16, 32, 48),
    "GRPO, checkpointing": (16, 32, 64, 96),
}
LENGTH = 64
CACHED = 128 * 30 * 2 * 3 * 64
"""Values in the embedded model's cache of 128 tokens, the least that holds prompt and answer."""


class Counting:
    """Numbers to be continued, which no model ends before its limit."""

    def problems(self, split: str) -> list[dict[str, Any]]:
        """Return a few."""
        first = {"train": 10, "test": 50}[split]
        return [{"id": str(n), "n": n} for n in range(first, first + 4)]

    def prompt(self, problem: dict[str, Any]) -> str:
        """Return the beginning."""
        return ", ".join(str(problem["n"] + i) for i in range(6)) + ","

    def score(self, completion: str, problem: dict[str, Any]) -> Score:
        """Return something that differs between answers."""
        return Score(reward=len(set(completion.split())) / LENGTH, correct=False, detail="")


def configuration(method: str, sequences: int) -> RunConfig:
    """Return a run of one step."""
    es = method == "ES"
    at_once = sequences if es else 16
    size = 4 if resolve_dtype("auto") == "float32" else 2
    return RunConfig(
        task=f"{Path(__file__).resolve()}:Counting",
        method="es" if es else "grpo",
        steps=1,
        sampling=SamplingConfig(
            prompts_per_step=1,
            samples_per_prompt=1 if es else sequences,
            max_tokens=LENGTH,
            temperature=0.0 if es else 1.0,
        ),
        es=EsSettings(population=sequences, sigma=0.001, learning_rate=0.0001) if es else EsSettings(),
        grpo=GrpoConfig(
            learning_rate=0.0 if es else 1e-6,
            micro_batch=8 if es else sequences,
            gradient_checkpointing=method.endswith("checkpointing"),
        ),
        engine=EngineConfig(
            slots=sequences if es else 0, max_sequences=at_once, kv_cache_gib=size * CACHED * (at_once + 1) / 2**30
        ),
        eval=EvalConfig(every=0, problems=2),
        checkpoint=CheckpointConfig(every=0, best=False),
    )


def point(method: str, sequences: int, folder: Path) -> None:
    """Take the step, write what it took to point.json and leave, without the model at its end."""

    def on_step(row: Mapping[str, Any]) -> None:
        if row["step"] == 0:
            return
        cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if cuda else row["memory/peak_gib"] * 2**30
        result = {"method": method, "sequences": sequences, "peak_gib": round(peak / 2**30, 3)}
        result |= {"tokens": row["tokens/generated"], "seconds": round(time.process_time(), 1), "cuda": cuda}
        (folder / "point.json").write_text(json.dumps(result), encoding="utf-8")
        sys.exit()

    train(configuration(method, sequences), folder, on_step=on_step)


def main() -> None:
    """Measure all points, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", choices=SEQUENCES, nargs="+", default=[*SEQUENCES])
    parser.add_argument("--sequences", type=int, nargs="+", help="instead of those of each method")
    parser.add_argument("--out", type=Path, default=Path("build/claims"), help="folder of the result")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        return point(options.methods[0], options.sequences[0], options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    found, run = [], options.out / "generations"
    for method in options.methods:
        for sequences in options.sequences or SEQUENCES[method]:
            shutil.rmtree(run, ignore_errors=True)
            one = ["--point", "--methods", method, "--sequences", str(sequences), "--out", str(run)]
            subprocess.run([sys.executable, __file__, *one], check=True, stdout=subprocess.DEVNULL)
            found.append(json.loads((run / "point.json").read_text(encoding="utf-8")))
            print(json.dumps(found[-1]), flush=True)
    shutil.rmtree(run)
    text = json.dumps({"length": LENGTH, "points": found}, indent=1)
    (options.out / "generations.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
