"""Requests inside vLLM: added by key, handed over as it has room for them, matched with their outputs by id."""

from collections.abc import Callable, Generator, Mapping
from itertools import count, islice
from typing import Any

from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Request
from eggroll_llm.engine.vllm.failures import calling
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.errors import EngineError
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.system.hardware import serves_on_cpu


class RequestQueue:
    """The requests of an engine that are not answered yet. What vLLM raises in a step becomes an EngineError."""

    def __init__(self, llm: LLMEngine, watchdog: Watchdog, config: EngineConfig) -> None:
        self._llm, self._watchdog = llm, watchdog
        self._in_flight, self._burst = _admission(config)
        self._patience = 2 * config.max_sequences * config.max_model_len
        self._calls, self._version = count(), "base"
        self._open: dict[str, tuple[int, Callable[[RequestOutput], Any]]] = {}  # by vLLM's id, in order
        self._waiting: dict[str, tuple[Request, Callable[[Request], SamplingParams]]] = {}  # not with vLLM yet
        self._asked = 0  # since nothing was open
        self._steps = 0  # since a request was answered

    def name_members(self, noise: NoiseSpec) -> None:
        """Give the members of requests that `poll` hands over from now on the names of another step."""
        self._version = f"{noise.seed}-{noise.step}-{noise.sigma}-{next(self._calls)}"

    def add(
        self,
        requests: Mapping[int, Request],
        params: Callable[[Request], SamplingParams],
        read: Callable[[RequestOutput], Any],
    ) -> None:
        """Take requests, by keys that are not in use; `poll` returns what `read` makes of their outputs."""
        if not self._open:
            self._asked = self._steps = 0
        self._asked += len(requests)
        for key, request in requests.items():
            request_id = f"{next(self._calls)}"
            self._open[request_id] = key, read
            self._waiting[request_id] = request, params

    def poll(self) -> list[tuple[int, Any]]:
        """Compute one step with what was added; return (key, what `read` makes of it) of what it finished.

        The first output of a request counts, and others, or of requests that are not open, are left out.
        """
        try:
            with calling("sampling", self._llm, self._watchdog):
                # vLLM looks through all that wait, at every step, when slots are short: so few wait at a time.
                unfinished = self._llm.get_num_unfinished_requests()
                room = self._in_flight - unfinished
                for request_id in list(islice(self._waiting, room if room >= self._burst else 0)):
                    request, params = self._waiting.pop(request_id)
                    prompt: Any = {"prompt_token_ids": list(request.prompt_ids)}
                    adapter = self._adapter(request.member)
                    self._llm.add_request(request_id, prompt, params(request), lora_request=adapter)
                # A step computes a token of those in flight at least, unless vLLM has lost them.
                self._steps += 1
                if self._steps > self._patience or not self._llm.has_unfinished_requests():
                    raise EngineError(
                        f"the inference engine left {len(self._open)} of {self._asked} requests unanswered"
                    )
                outputs = self._llm.step()
        except EngineError:
            self._open.clear()  # an engine that failed is asked for nothing more
            self._waiting.clear()
            raise
        answered: list[tuple[int, Any]] = []
        for output in outputs:
            if output.finished and output.request_id in self._open:
                key, read = self._open.pop(output.request_id)
                self._steps = 0
                answered.append((key, read(output)))
        return answered

    def drain(self) -> Generator[tuple[int, Any]]:
        """Poll until nothing is open; what is unfinished when this is closed is aborted."""
        try:
            while self._open:
                yield from self.poll()
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget whatever was added and is not answered."""
        if unanswered := list(self._open):
            self._open.clear()
            self._waiting.clear()
            with self._watchdog:
                self._llm.abort_request(unanswered)

    def _adapter(self, member: int | None) -> LoRARequest | None:
        """The name is part of the prefix cache's key, so it changes with the noise and the weights."""
        if member is None:
            return None
        name = f"{self._version}-{member}"
        return LoRARequest(name, member + 1, f"eggroll://{name}")


def _admission(config: EngineConfig) -> tuple[int, int]:
    """Return how many requests vLLM holds at most, and how many it has to lack before it gets more.

    A step with a prompt in it is no CUDA graph, which takes twice as long: of 384 sequences of 150 tokens two or three
    end at every step, and if others took their places at once, hardly a step would be one.
    """
    if serves_on_cpu() or config.enforce_eager:
        return 2 * config.max_sequences, 1
    return config.max_sequences, max(1, config.max_sequences // 8)
