"""Processes that score answers while whoever wants the scores does something else, such as sampling more of them.

Each process has a thread that hands it answers and waits for its verdicts, so a process that is late, ends or starts
again holds up neither the caller nor the other processes. A process takes answers when it has none left: a fraction of
those that wait, so that all end together whatever an answer takes. Which process an answer goes to is left to chance;
verdicts come with the answer's number, and a batch for `score_batch` is made of neighbours by number, so the order in
which answers arrive decides nothing. What waits here are answers that the caller has anyway.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from eggroll_llm.config.schema import RewardConfig
from eggroll_llm.tasks.sandbox.child import CancelledError
from eggroll_llm.tasks.sandbox.process import UserProcess
from eggroll_llm.tasks.task import Answer, Sandboxed, Verdict

_AT_ONCE = 64
"""Answers that are sent to a process together; those after one that it dies of are sent again."""

_Share = list[tuple[int, Answer]]


class Judging:
    """Answers that are judged together. Made by `ScorePool.begin`; used by one thread."""

    def __init__(self, pool: "ScorePool", *, voted: bool, size: int) -> None:
        """Judge batches of `size`, 1 for single answers. `voted` asks for votes too."""
        self.voted = voted
        self.shares: deque[_Share] = deque()
        """Batches that wait for a process."""
        self.judged: list[tuple[int, Verdict]] = []
        """Verdicts that wait for the caller."""
        self.unanswered = 0
        self._pool, self._size = pool, size
        self._incomplete: dict[int, _Share] = {}

    def put(self, number: int, answer: Answer) -> None:
        """Have an answer judged. Numbers start from 0, leave none out at the end, and come in any order."""
        batch = self._incomplete.setdefault(number // self._size, [])
        batch.append((number, answer))
        if len(batch) == self._size:
            self._pool.submit(self, self._incomplete.pop(number // self._size))

    def ready(self) -> list[tuple[int, Verdict]]:
        """Return the verdicts that have come since, by number, without waiting. Raises TaskError as `start`."""
        return self._pool.take(self)

    def rest(self) -> Iterator[tuple[int, Verdict]]:
        """Yield all verdicts that have not been returned, as they come; no more is put. Raises TaskError as `start`."""
        for group in sorted(self._incomplete):
            self._pool.submit(self, self._incomplete.pop(group))
        while judged := self._pool.take(self, wait=True):
            yield from judged


class ScorePool(AbstractContextManager["ScorePool"]):
    """The processes of a user's task, started on first use. Use as a context manager or call `close`."""

    def __init__(self, task: Sandboxed, limits: RewardConfig) -> None:
        self._task, self._limits = task, limits
        self._batched = task.batched
        self._lock = threading.Lock()
        self._work, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        self._cancel: int | None = None
        self._judging: Judging | None = None
        self._closing, self._loading = False, 0
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Start the processes, if they were not, and wait until each has loaded the task.

        Raises TaskError when the task cannot be loaded there, or is not the same.
        """
        if self._threads and not self._failure:
            return
        self.close()
        try:
            self._cancel = os.eventfd(0)
            self._closing, self._failure, self._loading = False, None, self._limits.workers
            for _ in range(self._limits.workers):
                process = UserProcess(self._task, self._limits, self._cancel)
                # The kernel kills a process with the thread that started it: each thread starts its own.
                self._threads.append(threading.Thread(target=self._serve, args=(process,), name="score", daemon=True))
                self._threads[-1].start()
            with self._lock:
                self._done.wait_for(lambda: not self._loading or self._failure)
                self._check()
        except BaseException:
            self.close()
            raise

    def begin(self, *, voted: bool) -> Judging:
        """Return a new set of answers; what was not judged of the last is dropped. Raises TaskError as `start`."""
        if self._judging and self._judging.unanswered:
            self.close()
        self.start()
        self._judging = Judging(self, voted=voted, size=self._limits.batch_size if self._batched else 1)
        return self._judging

    def judge(self, answers: Sequence[Answer], *, voted: bool) -> Iterator[Verdict]:
        """Yield the verdict on each answer, in their order. Raises TaskError as `start`."""
        if not answers:
            return
        judging, found = self.begin(voted=voted), dict[int, Verdict]()
        for numbered in enumerate(answers):
            judging.put(*numbered)
        following = 0
        for number, verdict in judging.rest():
            found[number] = verdict
            while following in found:
                yield found.pop(following)
                following += 1

    def submit(self, judging: Judging, share: _Share) -> None:
        """Let a process judge a batch."""
        share.sort(key=lambda numbered: numbered[0])
        with self._lock:
            judging.shares.append(share)
            judging.unanswered += len(share)
            self._work.notify()

    def take(self, judging: Judging, *, wait: bool = False) -> list[tuple[int, Verdict]]:
        """Return the verdicts that have come; with `wait` at least one, unless there are no more to come."""
        with self._lock:
            if wait:
                self._done.wait_for(lambda: judging.judged or not judging.unanswered or self._failure)
            self._check()
            judged, judging.judged = judging.judged, []
        return judged

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes with what they have started; a second call finishes one that was interrupted."""
        with self._lock:
            self._closing, self._judging = True, None
            self._work.notify_all()
        if self._cancel is not None:
            os.eventfd_write(self._cancel, 1)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._threads.clear()
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            os.close(cancel)

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _serve(self, process: UserProcess) -> None:
        """Be the thread of a process."""
        try:
            with process:
                process.start()
                with self._lock:
                    self._loading -= 1
                    self._done.notify()
                while work := self._next():
                    self._judge(process, *work)
        except CancelledError:
            pass
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
                self._done.notify()

    def _next(self) -> tuple[Judging, _Share] | None:
        """Wait for answers and return some; None when the pool is closed."""
        with self._lock:
            self._work.wait_for(lambda: self._closing or (self._judging and self._judging.shares))
            if self._closing or self._judging is None:
                return None
            shares = self._judging.shares
            parts = 2 * self._limits.workers - 1
            count = 1 if self._batched else min(_AT_ONCE, -(-len(shares) // parts))
            return self._judging, [numbered for _ in range(count) for numbered in shares.popleft()]

    def _judge(self, process: UserProcess, judging: Judging, share: _Share) -> None:
        judge = process.judge_batch if self._batched else process.judge
        verdicts = judge([answer for _, answer in share], voted=judging.voted)
        for (number, _), verdict in zip(share, verdicts, strict=True):
            with self._lock:
                judging.judged.append((number, verdict))
                judging.unanswered -= 1
                self._done.notify()
