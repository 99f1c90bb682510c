"""An environment of the package verifiers, in the process that scores: its rows, and its rubric.

    await env.run_rollout(row, client, model, sampling_args)
        -> {"reward": 1.2, "metrics": {"right": 1.0, "brief": 0.4}, ...}

The package runs the rollout as always, with its state, its rubric and its clean-up; the client that it asks gives the
answer that a member of the population has written. What one written answer cannot satisfy is refused: several turns,
tools, judges, and rewards that compare answers. Nothing else here imports the package, which installs signal handlers
and exit hooks.
"""

import asyncio
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll_llm.errors import TaskError
from eggroll_llm.tasks.modules import unpacked
from eggroll_llm.tasks.order import split_off
from eggroll_llm.tasks.task import Answer, Message, Problem, Split, problem_text
from eggroll_llm.tasks.user import import_file, named
from rewards import Score

_QUIET = {"VF_LOG_LEVEL": "WARNING", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
_REPLY = 1 << 18  # characters of problems in a reply
_TURNS = "num_turns"  # a metric that the package adds to every environment; always 1 here


class Environment:
    """An environment, loaded."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Load what `load.describe` has described. Raises TaskError for what cannot be trained on or graded here."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        self._env = _loaded(spec)
        for env in _members(self._env):
            _check(env)
        splits = _splits(self._env, spec["test_share"], spec["seed"])
        self._rows: dict[str, Any] = {}
        self._problems: dict[str, list[Problem]] = {}
        for split, rows in splits.items():
            numbered = {f"{split}-{number}": row for number, row in enumerate(rows, start=1)}
            self._rows |= numbered
            self._problems[split] = [_problem(name, row) for name, row in numbered.items()]
        self._runner: asyncio.Runner | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the rows of each split."""
        return {
            split: hashlib.sha256("\n".join(problem["sha256"] for problem in problems).encode()).hexdigest()
            for split, problems in self._problems.items()
        }

    def problems(self, split: Split, start: int) -> dict[str, Any]:
        """Return as many problems from `start` on as fit a reply, and how many are left after them."""
        given: list[Problem] = []
        size = 0
        for problem in self._problems[split][start:]:
            size += len(json.dumps(problem))
            if given and size > _REPLY:
                break
            given.append(problem)
        return {"problems": given, "left": len(self._problems[split]) - start - len(given)}

    def score_batch(self, answers: Sequence[Answer]) -> list[Score]:
        """Return the rubric's score of each answer; what waits in it waits side by side. Raises TaskError."""
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(self._together(answers))

    def score(self, answer: Answer) -> Score:
        """Return the rubric's score of one answer. Raises TaskError."""
        return self.score_batch([answer])[0]

    def answer(self, answer: Answer) -> str | None:
        """Return what the environment's parser reads; None where that is nothing, or the completion as it is."""
        read = self._env.parser.parse_answer([{"role": "assistant", "content": answer.text}])
        return None if read is None or read == answer.text else str(read)

    async def _together(self, answers: Sequence[Answer]) -> list[Score]:
        return list(await asyncio.gather(*map(self._score, answers)))

    async def _score(self, answer: Answer) -> Score:
        row = self._rows[answer.problem["id"]]
        client = _client(answer)
        output = await self._env.run_rollout(row, client, model="member", sampling_args={})
        if client.refused:
            raise TaskError(client.refused)
        if output.get("error"):
            raise TaskError(f"the rollout failed: {output['error']!s:.500}")
        values = {name: float(value) for name, value in output["metrics"].items() if name != _TURNS}
        reward = float(output["reward"])
        passed = reward >= getattr(self._env, "pass_threshold", 0.5)
        return Score(reward, passed, "reward", values if len(values) > 1 else {})


class _Written:
    """The client of a rollout: one answer, and no model."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._asked = answer, False
        self.refused = ""

    async def get_response(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the answer, once."""
        if self._asked:
            raise self._refusal("it asks the model again, for another turn or as a judge")
        if _messages(prompt) != self._answer.problem["prompt"]:
            raise self._refusal("it sends another prompt than its data set has")
        self._asked = True
        return _response(self._answer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal(f"it uses {name} of the client, as judges do")

    def _refusal(self, why: str) -> AttributeError:
        self.refused = f"{why}. Only environments of one turn that grade by themselves work here."
        return AttributeError(self.refused)


def _client(answer: Answer) -> Any:
    """Return a client that is one of the package's, without any of its methods."""
    import verifiers as vf

    async def absent(self: _Written, *args: Any, **kwargs: Any) -> Any:
        raise self._refusal("it talks to the client, as judges do")

    methods = dict.fromkeys(getattr(vf.Client, "__abstractmethods__", ()), absent)
    return type("WrittenClient", (_Written, vf.Client), methods)(answer)


def _response(answer: Answer) -> Any:
    from verifiers.types import Response, ResponseMessage

    message = ResponseMessage(
        content=answer.text,
        finish_reason="length" if answer.truncated else "stop",
        is_truncated=answer.truncated,
    )
    return Response(id="member", created=0, model="member", message=message)


def _loaded(spec: Mapping[str, Any]) -> Any:
    """Return what load_environment returns. Raises TaskError when that is no environment."""
    import verifiers as vf

    name, args = spec["environment"], tomllib.loads(spec["args"])
    if "source" in spec:
        module = import_file(Path(name), *unpacked(spec))
        env = named(module, "load_environment", Path(name))(**args)
    else:
        env = vf.load_environment(name, **args)
    if not isinstance(env, vf.Environment):
        raise TaskError(f"load_environment() returned {env!r:.80}, not an environment of the package verifiers.")
    return env


def _members(env: Any) -> Iterator[Any]:
    """Yield the environments of a group, else the one."""
    if not (inner := getattr(env, "envs", None)):
        yield env
    for each in inner or ():
        yield from _members(each)


def _check(env: Any) -> None:
    """Raise TaskError for what one written answer cannot satisfy."""
    name, only = type(env).__name__, "Only environments of one turn that grade by themselves work here."
    if getattr(env, "tool_defs", None):
        raise TaskError(f"{name} offers tools, which are never called. {only}")
    if getattr(env, "max_turns", None) != 1:
        raise TaskError(f"{name} has several turns (max_turns = {getattr(env, 'max_turns', None)}). {only}")
    rubrics = [env.rubric]
    for rubric in rubrics:
        rubrics += getattr(rubric, "rubrics", ())
        if "judge" in getattr(rubric, "class_objects", ()):
            raise TaskError(f"the rubric of {name} asks a judge model ({type(rubric).__name__}). {only}")
    if env.rubric.has_group_rewards:
        raise TaskError(f"the rubric of {name} has rewards that compare the answers to a problem. {only}")


def _splits(env: Any, share: float, seed: int) -> dict[str, list[Any]]:
    """Return the rows of train and test. Raises TaskError."""
    data = env.build_dataset()
    train = [] if data is None else list(data)
    if not train:
        raise TaskError("the environment has no training data set. Give load_environment one.")
    if (tested := env.build_eval_dataset()) is not None:
        return {"train": train, "test": list(tested)}
    rest, held = split_off(train, share, seed=seed)
    if not held:
        raise TaskError(f"the environment has {len(train)} rows, too few to hold any out.")
    return {"train": rest, "test": held}


def _problem(name: str, row: Mapping[str, Any]) -> Problem:
    """Return of a row what is needed outside of this process. Raises TaskError."""
    answer = row.get("answer")
    return {
        "id": name,
        "prompt": _messages(row["prompt"], name),
        **({"answer": answer} if isinstance(answer, str | int | float) else {}),
        "sha256": hashlib.sha256(problem_text(row).encode()).hexdigest(),
    }


def _messages(prompt: Any, name: str = "") -> str | list[Message]:
    """Return a prompt with nothing but roles and texts. Raises TaskError when there is more to it."""
    if isinstance(prompt, str):
        return prompt
    messages = []
    for given in prompt:
        message = given if isinstance(given, Mapping) else given.model_dump()
        content = message.get("content")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise TaskError(f"the prompt of row {name} holds {content!r:.80}, which is not text.")
        messages.append({"role": str(message["role"]), "content": content})
    if len(messages) == 1 and messages[0]["role"] == "text":  # what the package makes of a text
        return messages[0]["content"]
    return messages
