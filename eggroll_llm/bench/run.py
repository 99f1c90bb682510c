"""The speed of sampling a population next to plain vLLM and to the other ways of doing it, in strict alternation.

Every variant is a process that starts once and then waits. Variants are measured in waves, to bound the memory, and in
rounds: the references, then each variant of the wave, one at a time, so that a machine whose speed drifts treats all
alike, and every ratio is taken within a round. All get the same prompts and generate the same numbers of tokens (no
stopping, no prefix cache). On a GPU the processes of a wave start side by side; nothing is measured meanwhile.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from eggroll_llm.bench import plan
from eggroll_llm.bench.plan import EAGER, Device, Group, Size, Variant
from eggroll_llm.bench.report import Measured, Round, rows, show
from eggroll_llm.bench.subject import Subject, gpu_bytes, kv_cache_bytes
from eggroll_llm.errors import UserError
from eggroll_llm.system.files import write_output_file
from eggroll_llm.system.hardware import serves_on_cpu
from eggroll_llm.system.invocation import child_python

WORKER = "eggroll_llm.bench.worker"
PIPE_WIDTH = 230  # columns of the table where there is no terminal
LAST_LINES = 40  # of what a process has said, shown when it ends early
FREE_SHARE = 0.95  # of a GPU's free memory that processes may fill


def device() -> Device:
    """Return what vLLM is built for here."""
    return "cpu" if serves_on_cpu() else "cuda"


def bench(subject: Subject, size: Size, groups: Sequence[Group], repeats: int, out: Path | None = None) -> bool:
    """Measure the groups, print a table, write JSON to `out`; when interrupted, of what there is so far.

    Returns whether nothing was left out. Raises UserError.
    """
    context = subject.context(size.output_len)
    references, capacity = plan.REFERENCES[device()], _gpu_capacity()
    waves = plan.waves(
        groups, references, lambda variant: gpu_bytes(subject, variant, size.num_prompts, context), capacity
    )
    console, measured = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH), list[Measured]()
    job = job_of(subject, size, context, {workload for workload, _ in waves})
    try:
        with _Pool(job, console, side_by_side=device() == "cuda") as pool:
            for workload, variants in waves:
                measured.append(Measured(workload=workload, variants=variants))
                pool.measure(measured[-1], repeats)
            return not pool.failed
    finally:
        table = rows(measured, subject, size)
        if table:
            show(table, size, console)
        if table and out:
            write_output_file(out, json.dumps(table, indent=1) + "\n")


def job_of(subject: Subject, size: Size, context: int, workloads: Iterable[str]) -> dict[str, Any]:
    """Return what every variant's process is sent, in JSON's types."""
    # vLLM's share of a GPU is not for many processes: each gets the key-value cache that it needs.
    engine = replace(subject.engine, max_sequences=size.num_prompts, gpu_memory_utilization=0.01)
    return {
        "model_dir": str(subject.model_dir),
        "engine": asdict(engine),
        "sigma": subject.sigma,
        "context": context,
        "vllm_args": {
            "kv_cache_memory_bytes": kv_cache_bytes(subject, size.num_prompts, context),
            "gpu_memory_utilization": engine.gpu_memory_utilization,
            "load_format": "dummy" if subject.random_weights else "auto",
        },
        "workloads": {name: _workload(name, subject, size) for name in workloads},
    }


def _workload(name: str, subject: Subject, size: Size) -> dict[str, Any]:
    prompts, lengths = [list(prompt) for prompt in subject.prompts], size.lengths(name)
    return {
        "prompts": [prompts[i % len(prompts)] for i in range(len(lengths))],
        "new_tokens": lengths,
        "temperature": size.temperature,
    }


def _gpu_capacity() -> float:
    """Return the bytes that all processes together may take on the GPU; a CPU's memory is bounded by the groups."""
    if device() == "cpu":
        return math.inf
    import torch

    free, _ = torch.cuda.mem_get_info()
    return FREE_SHARE * free


class Worker:
    """A variant's process."""

    def __init__(self, variant: Variant, job: Mapping[str, Any]) -> None:
        """Start it; its first answer says how the variant runs."""
        command = [*child_python(), "-W", "ignore", "-m", WORKER]
        # With the answers go no remarks: those of a process that vLLM starts say why it did not.
        environment = os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        if threads := job["engine"]["threads"]:  # plain vLLM knows no such setting
            environment["OMP_NUM_THREADS"] = str(threads)
        self.variant = variant
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - vLLM's remarks, shown if it fails
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=environment,
            start_new_session=True,  # a group of its own, with the processes that vLLM starts
        )
        self._send({**job, **asdict(variant)})

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer. Raises UserError when the process has ended."""
        self._send(message)
        return self.answer()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and its output ends too
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer and return it. Raises UserError when the process has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
        status = self._process.wait()
        self._messages.seek(0)
        last = "".join(self._messages.readlines()[-LAST_LINES:])
        self.close()
        raise UserError(f"benchmark: {self.variant.name!r} ended with status {status}:\n{last}")

    def dismiss(self) -> None:
        """End the input, which the process takes for a goodbye."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self, patience: float = 30) -> None:
        """Wait for the end of the process, and after `patience` seconds for no more of it."""
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience)
        self.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._messages):
            if stream is not None:
                stream.close()


class _Pool:
    """The processes that are alive."""

    def __init__(self, job: Mapping[str, Any], console: Console, *, side_by_side: bool) -> None:
        self._job, self._console, self._side_by_side = job, console, side_by_side
        self._alive: dict[Variant, Worker] = {}
        self._about: dict[Variant, dict[str, Any]] = {}
        self.failed: set[Variant] = set()
        """Those that ended by themselves."""

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._close(list(self._alive), patience=0 if error else 30)

    def measure(self, measured: Measured, repeats: int) -> None:
        """Have exactly these variants alive and add `repeats` rounds, after one that warms caches up."""
        self._close([variant for variant in self._alive if variant not in measured.variants])
        self._start([v for v in measured.variants if v not in self._alive and v not in self.failed])
        measured.about |= self._about
        for repeat in range(repeats + 1):
            answers: Round = {}
            if repeat:
                measured.rounds.append(answers)  # of which an interrupted one has what there was time for
            for variant in [variant for variant in measured.variants if variant in self._alive]:
                message = {
                    "workload": measured.workload,
                    "repeat": repeat,
                    "phased": variant.phased and measured.workload == "even",
                }
                with (
                    self._unless_it_fails(variant),
                    self._console.status(f"round {repeat} of {repeats}: {variant.name}"),
                ):
                    answers[variant.name] = self._alive[variant].ask(message)

    def _start(self, variants: Sequence[Variant]) -> None:
        """Start them side by side or one by one; say what cannot be started here."""
        began = time.monotonic()
        for together in [variants] if self._side_by_side else [[variant] for variant in variants]:
            for variant in together:
                self._alive[variant] = Worker(variant, self._job)
            with self._console.status(f"starting {', '.join(variant.name for variant in together)}"):
                for variant in together:
                    with self._unless_it_fails(variant):
                        self._about[variant] = self._alive[variant].answer()
                        if not self._console.is_terminal:  # what is slow or hangs is to be seen in a log
                            self._console.print(f"{variant.name}: ready after {time.monotonic() - began:.0f} s")

    @contextmanager
    def _unless_it_fails(self, variant: Variant) -> Iterator[None]:
        """Leave out a variant whose process ends. Raises UserError when all others are compared with it."""
        try:
            yield
        except UserError as error:
            del self._alive[variant]
            self.failed.add(variant)
            if variant == EAGER:
                raise UserError(f"{error}\nAll others are compared with {EAGER.name!r}") from error
            self._console.print(f"{error}; left out", style="yellow", markup=False)

    def _close(self, variants: Sequence[Variant], patience: float = 30) -> None:
        workers = [self._alive.pop(variant) for variant in variants]
        for worker in workers:
            worker.dismiss()
            if not patience:
                worker.kill()
        for worker in workers:
            worker.close(patience)
