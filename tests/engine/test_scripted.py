"""The engine's side of vLLM, with a stand-in that answers as a script says: outputs find their request, or none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.interface import Completion, Decoding, Request
from eggroll_llm.engine.vllm import requests as requests_module
from eggroll_llm.engine.vllm.engine import VllmEngine
from eggroll_llm.engine.vllm.requests import RequestQueue
from eggroll_llm.engine.watchdog import Watchdog
from eggroll_llm.errors import EngineError, ModelError
from eggroll_llm.es.estimate import NonFiniteUpdate
from eggroll_llm.system.invocation import command

pytestmark = pytest.mark.vllm

DECODING = Decoding(max_tokens=3)
REQUESTS = [Request(prompt_ids=(10 + p, 1), member=m) for m in (0, 1, 2, None) for p in range(3)]
IN_FLIGHT = 5


class ScriptedLlm:
    """Takes requests as vLLM does and hands the right outputs of those that wait to a script, which may spoil them."""

    def __init__(self, script: Callable[[list[Any]], list[Any]]) -> None:
        self.script = script
        self.waiting: dict[str, Any] = {}
        self.most_waiting = 0
        self.given: list[int] = []
        """How many waited at each step."""
        self.aborted: list[str] = []
        self.forgets = True
        """Whether a request that the script gave no output counts as finished."""

    def get_num_unfinished_requests(self) -> int:
        return len(self.waiting)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None) -> None:
        member = None if lora_request is None else lora_request.lora_int_id - 1
        self.waiting[request_id] = output(request_id, token_ids(prompt["prompt_token_ids"], member))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def step(self) -> list[Any]:
        self.given.append(len(self.waiting))
        given = self.script(list(self.waiting.values()))
        answered = {each.request_id for each in given if each.finished}
        self.waiting = {} if self.forgets else {k: v for k, v in self.waiting.items() if k not in answered}
        return given

    def abort_request(self, request_ids: Sequence[str]) -> None:
        self.aborted += request_ids
        self.waiting = {}


def token_ids(prompt_ids: Sequence[int], member: int | None) -> tuple[int, ...]:
    """What the right answer to a request is: no two requests have the same."""
    return (prompt_ids[0], 99 if member is None else member)


def output(request_id: str, tokens: Sequence[int], *, finished: bool = True, reason: str | None = "stop") -> Any:
    sample = SimpleNamespace(text="", token_ids=list(tokens), finish_reason=reason, logprobs=None)
    return SimpleNamespace(request_id=request_id, finished=finished, prompt_token_ids=[1, 1], outputs=[sample])


class Words:
    """Text rules of a tokenizer whose tokens are numbers."""

    def stop_token_ids(self, stop: Sequence[str]) -> list[int]:
        return []

    def turn(self, tokens: Sequence[int]) -> tuple[str, bool]:
        return " ".join(map(str, tokens)), False


def scripted(script: Callable[[list[Any]], list[Any]]) -> tuple[VllmEngine, ScriptedLlm]:
    engine, llm = VllmEngine.__new__(VllmEngine), ScriptedLlm(script)
    engine._llm = llm  # type: ignore[assignment]
    engine.own_sampler = False
    engine.text_rules = Words()  # type: ignore[assignment]
    engine.watchdog = Watchdog(0)
    engine.queue = RequestQueue(engine._llm, engine.watchdog, EngineConfig(max_sequences=8, max_model_len=64))
    engine.queue._in_flight, engine.queue._burst, engine.queue._patience = IN_FLIGHT, 1, 40
    return engine, llm


def right(requests: Sequence[Request]) -> list[Completion]:
    answers = [token_ids(request.prompt_ids, request.member) for request in requests]
    return [
        Completion(text=f"{tokens[0]} {tokens[1]}", token_ids=tokens, truncated=False, prompt_tokens=2)
        for tokens in answers
    ]


def reordered(outputs: list[Any]) -> list[Any]:
    return outputs[::-1]


def one_at_a_time_last_first(outputs: list[Any]) -> list[Any]:
    return outputs[-1:]


@pytest.mark.parametrize(("burst", "waited"), [(1, [5] * 8 + [4, 3, 2, 1]), (3, [5, 4, 3, 5, 4, 3, 5, 4, 3, 3, 2, 1])])
def test_a_burst_waits_until_there_is_room_for_it(burst: int, waited: list[int]) -> None:
    """Twelve requests, of which one is answered at each step; no more than five at once."""
    engine, llm = scripted(one_at_a_time_last_first)
    llm.forgets, engine.queue._burst = False, burst
    assert engine.generate(REQUESTS, DECODING) == right(REQUESTS)
    assert llm.given == waited


@pytest.mark.parametrize(("eager", "expected"), [(True, (512, 1)), (False, (256, 32))])
def test_bursts_are_for_graphs(monkeypatch: pytest.MonkeyPatch, eager: bool, expected: tuple[int, int]) -> None:
    config = EngineConfig(max_sequences=256, enforce_eager=eager)
    for on_cpu, right_ in ((False, expected), (True, (512, 1))):
        monkeypatch.setattr(requests_module, "serves_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        assert requests_module._admission(config) == right_


def repeated(outputs: list[Any]) -> list[Any]:
    """Each one again, with another text."""
    return [each for right in outputs for each in (right, output(right.request_id, (0, 0)))]


def foreign(outputs: list[Any]) -> list[Any]:
    """Among them those of an earlier call and of nobody, before and after."""
    others = [output(name, (0, 0)) for name in ("-1", "none", "0-0", "1000")]
    return [*others, *outputs, *others]


def unfinished_first(outputs: list[Any]) -> list[Any]:
    return [output(right.request_id, (0,), finished=False, reason=None) for right in outputs] + outputs


def all_at_once(outputs: list[Any]) -> list[Any]:
    return unfinished_first(foreign(repeated(reordered(outputs))))


@pytest.mark.parametrize(
    "script",
    [reordered, one_at_a_time_last_first, repeated, foreign, unfinished_first, all_at_once],
    ids=lambda script: script.__name__,
)
def test_every_request_gets_its_own_output(script: Callable[[list[Any]], list[Any]]) -> None:
    engine, llm = scripted(script)
    llm.forgets = script is not one_at_a_time_last_first
    assert len({completion.token_ids for completion in right(REQUESTS)}) == len(REQUESTS)
    for requests in (REQUESTS, REQUESTS[::-1]):  # a second call, too, takes nothing of the first
        assert engine.generate(requests, DECODING) == right(requests)
        arrived = list(engine.stream(requests, DECODING))
        assert sorted(i for i, _ in arrived) == list(range(len(requests)))
        assert [completion for _, completion in sorted(arrived, key=lambda each: each[0])] == right(requests)
    assert llm.most_waiting == IN_FLIGHT
    assert llm.aborted == []


def test_outputs_of_an_earlier_call_that_was_given_up_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, llm = scripted(lambda outputs: outputs[:1])
    llm.forgets = False
    arriving = engine.stream(REQUESTS, DECODING)
    next(arriving)
    arriving.close()
    left = list(llm.aborted)
    assert left
    engine_outputs = [output(request_id, (0, 0)) for request_id in left]
    llm.script = lambda outputs: engine_outputs + outputs
    assert engine.generate(REQUESTS, DECODING) == right(REQUESTS)


@pytest.mark.parametrize(("tokens", "truncated"), [((7, 8, 9), True), ((7, 8), False)])
def test_without_a_finish_reason_the_length_tells(tokens: tuple[int, ...], truncated: bool) -> None:
    engine, _ = scripted(lambda outputs: [output(each.request_id, tokens, reason=None) for each in outputs])
    (completion,) = engine.generate(REQUESTS[:1], DECODING)
    assert (completion.token_ids, completion.truncated) == (tokens, truncated)


@pytest.mark.parametrize(("reason", "truncated"), [("length", True), ("stop", False)])
def test_a_finish_reason_goes_before_the_length(reason: str, truncated: bool) -> None:
    engine, _ = scripted(lambda outputs: [output(each.request_id, (7, 8, 9), reason=reason) for each in outputs])
    assert [completion.truncated for completion in engine.generate(REQUESTS[:2], DECODING)] == [truncated] * 2


def test_an_empty_completion_stays_at_its_place() -> None:
    wanted = right(REQUESTS)
    empty = Completion(text="", token_ids=(), truncated=False, prompt_tokens=2)

    def script(outputs: list[Any]) -> list[Any]:
        for each in outputs:
            if each.outputs[0].token_ids == list(wanted[4].token_ids):
                each.outputs[0].token_ids = []
        return outputs[::-1]

    engine, _ = scripted(script)
    assert engine.generate(REQUESTS, DECODING) == [*wanted[:4], empty, *wanted[5:]]


@pytest.mark.parametrize("forgets", [True, False])
def test_an_output_that_never_comes_is_an_error_and_not_another_ones(forgets: bool) -> None:
    """Whether vLLM takes the request for finished, or for ever for one that is being answered."""
    lost = right(REQUESTS)[7]

    def script(outputs: list[Any]) -> list[Any]:
        return [each for each in outputs if each.outputs[0].token_ids != list(lost.token_ids)]

    engine, llm = scripted(script)
    llm.forgets = forgets
    with pytest.raises(EngineError, match="left 1 of 12 requests unanswered"):
        engine.generate(REQUESTS, DECODING)
    assert llm.aborted == []


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_given_up_is_none(reason: str) -> None:
    engine, _ = scripted(lambda outputs: [output(each.request_id, (1,), reason=reason) for each in outputs])
    with pytest.raises(EngineError, match=rf"gave up a request after 1 tokens \({reason}\)"):
        engine.generate(REQUESTS, DECODING)


def test_what_vllm_raises_is_told_in_one_line() -> None:
    failure = RuntimeError("CUDA error:\n  illegal \x1b[2J address")

    def script(outputs: list[Any]) -> list[Any]:
        raise failure

    engine, llm = scripted(script)
    with pytest.raises(EngineError) as info:
        engine.generate(REQUESTS, DECODING)
    message = str(info.value)
    assert message.startswith("the inference engine failed in sampling: RuntimeError: CUDA error: illegal ")
    assert r"illegal \x1b[2J address (test_scripted.py:" in message
    assert message.endswith(f"Check the installation with: {command('doctor')}")
    assert message.isprintable()
    assert info.value.__cause__ is failure
    assert llm.aborted == []  # it is not asked for anything more


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_when_memory_is_short_the_settings_are_named(error: Exception) -> None:
    def script(outputs: list[Any]) -> list[Any]:
        raise error

    with pytest.raises(EngineError, match=r"If memory ran out, lower engine\.max_sequences, engine\.slots or engine\."):
        scripted(script)[0].generate(REQUESTS, DECODING)


def test_an_interruption_is_not_a_failure() -> None:
    def script(outputs: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    engine, llm = scripted(script)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUESTS, DECODING)
    assert len(llm.aborted) == len(REQUESTS)
    assert not engine.watchdog.watching


def test_calls_of_vllm_are_watched_and_nothing_else() -> None:
    def script(outputs: list[Any]) -> list[Any]:
        assert engine.watchdog.watching
        return outputs

    engine, _ = scripted(script)
    for _ in engine.stream(REQUESTS, DECODING):
        assert not engine.watchdog.watching  # a grader may take its time
    assert not engine.watchdog.watching


@pytest.mark.parametrize("method", ["begin", "update", "checksum"])
def test_other_calls_are_watched_and_fail_in_the_same_way(method: str) -> None:
    engine, llm = scripted(lambda outputs: outputs)
    raised: list[Exception] = [ValueError("no"), NonFiniteUpdate("not finite"), ModelError("another shape")]

    def call(name: str, args: tuple[Any, ...]) -> Any:
        assert (name, args[0]) == ("es_call", method)
        assert engine.watchdog.watching
        raise raised[0]

    llm.collective_rpc = call  # type: ignore[attr-defined]
    calls: dict[str, Callable[[], Any]] = {
        "begin": lambda: engine.begin(SimpleNamespace(seed=0, step=1, sigma=0.1), 4),  # type: ignore[arg-type]
        "update": lambda: engine.update(None),  # type: ignore[arg-type]
        "checksum": engine.checksum,
    }
    with pytest.raises(EngineError, match=f"failed in {method}: ValueError: no"):
        calls[method]()
    for kind in (NonFiniteUpdate, ModelError):  # not failures of the engine
        raised.pop(0)
        with pytest.raises(kind):
            calls[method]()
    assert not engine.watchdog.watching


def test_closing_a_broken_engine_hides_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, llm = scripted(lambda outputs: outputs)

    def shutdown() -> None:
        raise RuntimeError("gone")

    llm.engine_core = SimpleNamespace(shutdown=shutdown)  # type: ignore[attr-defined]
    engine._threads_before, threads = 7, list[int]()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    engine.close()
    assert threads == [7]  # vLLM sets one beside a GPU
    assert "failed in shutting down: RuntimeError: gone" in caplog.text


def test_threads_can_be_set_again_after_vllm_was_started(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker makes `torch.set_num_threads` do nothing, and a second engine had the threads of the first."""
    before = torch.set_num_threads

    def start(args: object) -> None:
        torch.set_num_threads = lambda count: None
        raise RuntimeError("no start")

    monkeypatch.setattr("eggroll_llm.engine.vllm.engine.LLMEngine.from_engine_args", start)
    with pytest.raises(EngineError):
        VllmEngine(tiny_model("llama"), EngineConfig(dtype="float32", slots=1, max_sequences=8, max_model_len=64))
    assert torch.set_num_threads is before
