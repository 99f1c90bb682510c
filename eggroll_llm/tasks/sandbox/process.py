"""A user's `score` in its own process: if it hangs, exits or runs out of memory, only that completion scores 0.

The process (`worker`) imports the user's files as they were first read. It loads the problems of a user's own task
itself, and a completion is sent with the index of its problem, so problems may hold what JSON cannot; at the start both
sides check that they loaded the same problems. For a data set, a completion is sent with its problem. Many completions
are sent at once and answered one by one, each within the time limit; the process has a memory limit. When it is late or
exits, it is killed with everything it has started, the completion it was scoring fails, and a new process continues
with the next one. It ends with this process, however that ends.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.errors import TaskError
from eggroll_llm.system.hardware import GIB
from eggroll_llm.tasks.sandbox.child import GARBLED, Child, EndedError
from eggroll_llm.tasks.task import SPLITS, Answer, Problem, Sandboxed, Split, Verdict
from rewards import Score

START_SECONDS = 300.0  # patience with what the user's file imports and loads


class UserProcess(AbstractContextManager["UserProcess"]):
    """The process of a user's task, started on first use. Use as a context manager or call `close`."""

    def __init__(self, task: Sandboxed, limits: RewardConfig, cancel: int | None = None) -> None:
        """When the file descriptor `cancel` becomes readable, whatever waits for the process raises CancelledError."""
        self._task, self._limits = task, limits
        self._places = {
            id(problem): {"split": split, "index": i}
            for split in SPLITS
            for i, problem in enumerate(task.problems(split) if task.reloads else ())
        }
        self._child = Child(cancel)
        self._takes_ids = task.takes_ids
        self.hashes: Mapping[str, str] = task.hashes
        """Of the problems that the process has loaded itself."""

    def judge(self, answers: Sequence[Answer], *, voted: bool) -> Iterator[Verdict]:
        """Yield the verdict on each answer; consume it to the end. `voted` asks for votes too.

        Raises TaskError when the task cannot be loaded in the process, or is not the same there.
        """
        lines = [self._line(answer, voted) for answer in answers]
        done = 0
        while done < len(lines):
            self.start()
            try:
                for reply in self._child.talk(lines[done:], self._limits.timeout_seconds):
                    verdict = self._verdict(reply)
                    done += 1
                    if verdict.out_of_memory:
                        self.close()
                        yield verdict
                        break
                    yield verdict
            except EndedError as error:
                self.close()
                done += 1
                yield Verdict(failure=f"score() {error}")

    def judge_batch(self, answers: Sequence[Answer], *, voted: bool) -> Iterator[Verdict]:
        """Yield the verdicts of one call of score_batch, or of single calls where that call fails. Raises TaskError."""
        lines = [self._line(answer, voted, batch=len(answers) - i) for i, answer in enumerate(answers)]
        self.start()
        try:
            replies = list(self._child.talk(lines, self._limits.timeout_seconds))
            verdicts = [self._verdict(reply) for reply in replies]
        except EndedError:
            verdicts = []
        if not verdicts or any(verdict.out_of_memory for verdict in verdicts):
            self.close()
        if not verdicts or any(reply.get("again") for reply in replies):
            return self.judge(answers, voted=voted)
        return iter(verdicts)

    def start(self) -> None:
        """Start the process unless it is ready, and wait until it has loaded the task. Raises TaskError as `judge`."""
        if self._child.is_ready:
            return
        self.close()
        task = self._task
        hello = task.hello() | {"memory": min(int(self._limits.memory_gib * GIB), 2**62)}
        try:
            self._child.start()
            (ready,) = self._child.talk([_json(hello)], START_SECONDS)
            if failed := ready.get("failed"):
                raise TaskError(f"{task.label}: in the scoring process (reward.memory_gib = {self._gib}): {failed}")
            self.hashes = ready
            if task.hashes and ready != task.hashes:
                raise TaskError(
                    f"{task.label}: problems() returns different problems each time. Make it deterministic: seed "
                    "random choices, sort sets and directory listings, and do not change the files that it reads."
                )
        except EndedError as error:
            self.close()
            raise TaskError(
                f"{task.label}: loading it again in the scoring process (reward.memory_gib = {self._gib}) {error}. "
                "Make it load there as it does here."
            ) from error
        except BaseException:
            self.close()
            raise

    def problems(self, split: Split) -> list[Problem]:
        """Return the problems of a split, for a task that only such a process can load. Raises TaskError as `judge`."""
        self.start()
        problems: list[Problem] = []
        left = 1
        while left:
            try:
                (reply,) = self._child.talk([_json({"problems": [split, len(problems)]})], START_SECONDS)
            except EndedError as error:
                raise TaskError(f"{self._task.label}: while its problems were read, it {error}.") from error
            problems += reply["problems"]
            left = reply["left"]
        return problems

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process with what it has started; a second call does nothing."""
        self._child.close()

    def _line(self, answer: Answer, voted: bool, batch: int = 0) -> bytes:
        task = self._task
        problem = self._places[id(answer.problem)] if task.reloads else {"problem": dict(answer.problem)}
        request = {**problem, "text": answer.text, "options": answer.options, "voted": voted}
        ids = {"ids": list(answer.token_ids)} if self._takes_ids else {}
        return _json(request | ids | ({"batch": batch} if batch else {}))

    def _verdict(self, reply: dict[str, Any]) -> Verdict:
        try:
            vote, out_of_memory = reply["vote"], bool(reply.get("out_of_memory"))
            if "failed" in reply:
                hint = f" (reward.memory_gib = {self._gib})" if out_of_memory else ""
                return Verdict(failure=f"{reply['failed']}{hint}", vote=vote, out_of_memory=out_of_memory)
            reward, correct, detail, parts = reply["score"]
            values = {str(name): None if value is None else float(value) for name, value in parts.items()}
            return Verdict(score=Score(float(reward), bool(correct), str(detail), values), vote=vote)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise EndedError(GARBLED) from error

    @property
    def _gib(self) -> str:
        return f"{self._limits.memory_gib:g}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
