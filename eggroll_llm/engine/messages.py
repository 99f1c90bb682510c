"""What a pool and the engines in other processes say to each other, as bytes.

No weights and no noise in a step: work goes out as numbers (request, prompt, member, seed), an update as its fitness,
and completions and reports come back. Weights travel when a run is resumed or saved, and to an engine that is trained
from outside (GRPO).

Frames are pickles. Both ends are processes of one user, started by one driver, and a cluster must not be open to others
(docs/distributed.md). The classes lie outside of `engine.vllm`: reading a reply must not import vLLM into the driver.
"""

import dataclasses
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eggroll_llm import errors
from eggroll_llm.engine.interface import Completion, Decoding, Scored
from eggroll_llm.es.estimate import NonFiniteUpdate
from eggroll_llm.system.files import of_the_system

if TYPE_CHECKING:
    from torch import Tensor

_COMPLETION = tuple(field.name for field in dataclasses.fields(Completion))


@dataclass(frozen=True, slots=True)
class Call:
    """Call a method of the engine; answered by `Reply`."""

    id: int
    method: str
    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a job, sent once to each engine that works on it."""

    job: int
    prompts: tuple[tuple[int, ...], ...]
    decoding: Decoding


@dataclass(frozen=True, slots=True)
class Scoring:
    """The completions of a job that asks for their probabilities, sent once to each engine that works on it."""

    job: int
    completions: tuple[Scored, ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class Work:
    """Requests to answer; `Done` brings the completions, or `Scores` what members make of those of the job."""

    job: int
    items: tuple[tuple[int, int, int | None, int | None], ...]
    """Request, prompt, member and sampling seed of each; of a member that scores, prompt and seed say nothing."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Leave unanswered what is left of the work."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


Message = Call | Prompts | Scoring | Work | Forget | Stop


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception, as one that can be raised elsewhere."""

    kind: str
    text: str
    details: tuple[Any, ...] = ()
    """Of an OSError, such as that a disk is full: what it is made from."""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Return what is to be said of it; what is neither one of our errors nor of files becomes an EngineError."""
        if isinstance(error, errors.UserError | NonFiniteUpdate):
            return cls(type(error).__name__, str(error))
        if cause := of_the_system(error):
            details = (*cause.args[:2], cause.filename) if cause.filename else cause.args
            return cls("OSError", str(cause), details)
        return cls("EngineError", f"the engine failed: {type(error).__name__}: {error}")

    @property
    def of_the_engine(self) -> bool:
        """Return whether another engine may do better."""
        return self.kind == "EngineError"

    def raised(self, where: str = "") -> Exception:
        """Return the exception; `where` names the engine."""
        if self.kind == "OSError":
            return OSError(*self.details)
        kind = NonFiniteUpdate if self.kind == "NonFiniteUpdate" else getattr(errors, self.kind)
        error: Exception = kind(f"{where}: {self.text}" if where else self.text)
        return error


@dataclass(frozen=True, slots=True)
class Started:
    """The engine is there."""

    host: str
    """Name of its machine, for people."""
    node: str
    """What processes that share files with it have in common."""
    pid: int
    device: str
    versions: Mapping[str, str]
    """Of the packages that the bits depend on."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call has come to."""

    id: int
    value: Any
    failure: Failure | None
    peak: int
    """The most memory that the process has had resident, in bytes."""
    seconds: float
    """Spent in the call."""


@dataclass(frozen=True, slots=True)
class Done:
    """Completions of a job, by request, as bare values: sending each as an object takes a third longer."""

    job: int
    values: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, job: int, answers: Iterable[tuple[int, Completion]]) -> "Done":
        """Return the completions (request, completion) as they are sent."""
        return cls(job, tuple((request, *(getattr(c, name) for name in _COMPLETION)) for request, c in answers))

    @property
    def answers(self) -> list[tuple[int, Completion]]:
        """Return (request, completion) of each."""
        return [(i, Completion(**dict(zip(_COMPLETION, values, strict=True)))) for i, *values in self.values]


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of a job's completions, by request, which is a member."""

    job: int
    requests: tuple[int, ...]
    logprobs: bytes
    """Float32, in the order of the tokens, one request after the other."""

    @classmethod
    def of(cls, job: int, requests: Sequence[int], logprobs: "Tensor") -> "Scores":
        """Return rows [requests, tokens] as they are sent."""
        return cls(job, tuple(requests), logprobs.numpy().tobytes())

    @property
    def answers(self) -> list[tuple[int, "Tensor"]]:
        """Return (request, log-probabilities) of each."""
        import torch

        rows = torch.frombuffer(bytearray(self.logprobs), dtype=torch.float32).view(len(self.requests), -1)
        return list(zip(self.requests, rows, strict=True))


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot do a job, nor could another; it goes on."""

    job: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Alive:
    """Work goes on, and nothing is finished yet."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The engine did not start, or failed while it sampled; the process ends."""

    failure: Failure


Event = Started | Reply | Done | Scores | Refused | Alive | Broken


def encode(record: Message | Event) -> bytes:
    """Return a frame."""
    return pickle.dumps(record, protocol=5)


def decode(frame: bytes) -> Any:
    """Return the record of a frame from `encode`."""
    return pickle.loads(frame)
