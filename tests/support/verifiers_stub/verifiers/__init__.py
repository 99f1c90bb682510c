"""A stand-in for the package verifiers: what task "verifiers" uses of it, of environments of one turn."""

import abc
import asyncio
import copy
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from verifiers.types import Message, Response


def load_environment(name: str, **args: Any) -> Any:
    return importlib.import_module(name.rpartition("/")[2].replace("-", "_")).load_environment(**args)


class Client(abc.ABC):
    @abc.abstractmethod
    async def get_native_response(self, prompt: Any, model: str) -> Any: ...

    @property
    def client(self) -> Any:
        return self._client  # type: ignore[attr-defined]


class Parser:
    def __init__(self, extract_fn: Any = lambda text: text) -> None:
        self.extract_fn = extract_fn

    def parse_answer(self, completion: Any) -> Any:
        last = completion[-1]
        return self.extract_fn(last["content"] if isinstance(last, Mapping) else last.content)


class Rubric:
    def __init__(self, funcs: Any = (), weights: Any = None, parser: Any = None) -> None:
        self.funcs, self.weights = list(funcs), weights or [1.0] * len(funcs)
        self.parser = parser or Parser()
        self.class_objects: dict[str, Any] = {"parser": self.parser}

    @property
    def has_group_rewards(self) -> bool:
        return any("completions" in inspect.signature(function).parameters for function in self.funcs)

    async def score_rollout(self, state: dict[str, Any]) -> None:
        given = {**state["input"], **self.class_objects, "state": state, "completion": state["completion"]}
        metrics = {}
        for function in self.funcs:
            parameters = inspect.signature(function).parameters
            everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            try:
                value = function(**{k: v for k, v in given.items() if everything or k in parameters})
                metrics[function.__name__] = float(await value if inspect.isawaitable(value) else value)
            except Exception:  # as the package does, which also logs it
                metrics[function.__name__] = 0.0
        state["reward"] = sum(w * v for w, v in zip(self.weights, metrics.values(), strict=True))
        state["metrics"] = metrics | {"num_turns": 1.0}


class JudgeRubric(Rubric):
    def __init__(self) -> None:
        super().__init__()
        self.class_objects["judge"] = print


class RubricGroup(Rubric):
    def __init__(self, rubrics: Any) -> None:
        super().__init__()
        self.rubrics = rubrics


class Environment:
    def __init__(
        self, dataset: Any = None, eval_dataset: Any = None, system_prompt: str = "", few_shot: Any = (), **kwargs: Any
    ) -> None:
        self._data = [dataset, eval_dataset]
        self._before = ([{"role": "system", "content": system_prompt}] if system_prompt else []) + list(few_shot)
        self.rubric = kwargs.pop("rubric", Rubric())
        self.parser, self.tool_defs = kwargs.pop("parser", Parser()), kwargs.pop("tool_defs", None)
        self.max_turns = kwargs.pop("max_turns", -1)

    def build_dataset(self) -> Any:
        return self._built(self._data[0])

    def build_eval_dataset(self) -> Any:
        return self._built(self._data[1])

    def _built(self, rows: Any) -> Any:
        def prompt(row: Any) -> Any:
            return (
                {"prompt": [*self._before, {"role": "user", "content": row["question"]}]} if "question" in row else {}
            )

        return rows and [{"example_id": i, **row, **prompt(row)} for i, row in enumerate(rows)]

    async def setup_state(self, state: dict[str, Any]) -> None: ...

    async def run_rollout(self, input: Any, client: Client, model: str, sampling_args: Any) -> dict[str, Any]:
        assert isinstance(client, Client)
        state = {"input": copy.deepcopy(input), "client": client, "error": None}
        await self.setup_state(state)
        given = state["input"]["prompt"]
        given = [{"role": "text", "content": given}] if isinstance(given, str) else given
        for _ in range(2 if self.max_turns == -1 else 1):
            prompt = [Message(**message) for message in given]
            response: Response = await client.get_response(  # type: ignore[attr-defined]
                prompt=prompt, model=model, sampling_args=sampling_args, tools=None, state=state
            )
        await asyncio.sleep(0)
        state |= {"completion": [response.message], "is_truncated": response.message.is_truncated}
        await self.rubric.score_rollout(state)
        return {key: state[key] for key in ("reward", "metrics", "error")}


class SingleTurnEnv(Environment):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_turns=1, **kwargs)


class EnvGroup(Environment):
    def __init__(self, envs: Any) -> None:
        super().__init__(dataset=envs[0]._data[0])
        self.envs = envs
