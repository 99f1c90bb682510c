"""What an engine is: requests in, completions out, with a population inside. Imports no vLLM."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from eggroll_llm.engine.watchdog import Watchdog

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eggroll_llm.es.estimate import UpdateSpec
    from eggroll_llm.es.noise import NoiseSpec
    from eggroll_llm.es.weight_change import UpdateReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How completions are drawn."""

    max_tokens: int
    """Length limit in tokens; a completion that reaches it is truncated."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus of the distribution that is sampled from."""
    top_k: int = 0
    """Most probable tokens that are sampled from; 0 is all."""
    min_p: float = 0.0
    """Least probability of a token that is sampled, relative to the most probable one's."""
    repetition_penalty: float = 1.0
    """What positive logits of tokens in prompt and completion are divided by, and negative ones multiplied by."""
    thinking_token_budget: int = 0
    """Tokens in thoughts after which the tag that closes one is forced; 0 is no limit."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text ends before the first."""
    special_tokens: bool = False
    """Special tokens are part of the text, and stop strings match them; the end-of-text token is not."""
    ignore_eos: bool = False
    """Go on after the end-of-text token, for measurements."""
    logprobs: bool = False
    """Also return the log-probability of each generated token, in the distribution that it was drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion that is wanted."""

    prompt_ids: tuple[int, ...]
    """The prompt in tokens."""
    member: int | None = None
    """Which member answers; None is the base model."""
    seed: int | None = None
    """Sampling seed, unused when decoding is greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What a member answered."""

    text: str
    """Text up to a stop string, or to the end of the turn, without special tokens."""
    token_ids: tuple[int, ...]
    """Generated tokens, the one that ended it included."""
    truncated: bool
    """The length limit cut the text off."""
    prompt_tokens: int
    """Length of the prompt."""
    thought_open: bool = False
    """Whether the prompt ended in a thought that the text continues."""
    logprobs: tuple[float, ...] = ()
    """Log-probabilities of the generated tokens under temperature and nucleus, if requested; NaN where unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateTimes:
    """Report of an update, and the seconds of its parts."""

    report: "UpdateReport"
    update: float
    """Estimate, optimizer and rounding."""
    serve: float
    """Packing the served weights, and forgetting the prefix cache."""


Scored = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and a completion of it, in tokens, neither of them empty."""
Stream = Generator[tuple[int, Completion], None, None]
Progress = Callable[[int, int], None]
"""Called with the number of finished and of all completions."""


class Sampler(Protocol):
    """Answers requests with the weights that it serves."""

    dtype: "torch.dtype"
    """Number format of the served weights."""
    watchdog: Watchdog
    """Ends the process when a call hangs."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """Return the completion of each request, in their order. Raises EngineError when one is missing."""
        ...

    def stream(self, requests: Sequence[Request], decoding: Decoding) -> Stream:
        """Yield (position of the request, completion) as they finish. Closing it early leaves the engine usable."""
        ...

    def close(self) -> None:
        """Free what the engine holds. Raises nothing."""
        ...


class Engine(Sampler, Protocol):
    """A sampler that serves every member of a population beside the base model, and updates the base model."""

    def begin(self, noise: "NoiseSpec", population: int, *, antithetic: bool = True) -> float:
        """Make members 0 ... population - 1 of a step available; return the seconds that their noise took."""
        ...

    def score(self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0) -> "Tensor":
        """Return the log-probabilities [members, tokens] that members give to the tokens of all completions, in order.

        They are those of a softmax of logits / temperature, float32 on the CPU. A member of None is the base model.
        """
        ...

    def update(self, spec: "UpdateSpec") -> UpdateTimes:
        """Fold a step's fitness into the weights and serve them. Raises NonFiniteUpdate with nothing changed."""
        ...

    def replay(self, specs: Sequence["UpdateSpec"]) -> None:
        """Apply recorded updates without sampling."""
        ...

    def checksum(self) -> str:
        """Return 16 hexadecimal digits that identify the bits of the served weights."""
        ...

    def state(self) -> Mapping[str, "Tensor"]:
        """Return float32 masters and optimizer state, on the CPU."""
        ...

    def load_state(self, state: Mapping[str, "Tensor"]) -> None:
        """Restore what `state` returned, exactly."""
        ...

    def export(self, directory: Path) -> None:
        """Write the served model as a Hugging Face directory."""
        ...

    def load_weights(self, weights: Mapping[str, "Tensor"]) -> None:
        """Serve the weights of a trainer with gradients: all of the checkpoint's tensors, by name."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what a step's row of metrics says of the engines, counted since the last call; {} for just one."""
        ...


class SteppedEngine(Engine, Protocol):
    """An engine that computes one step per call, so that it takes new requests while others are being answered."""

    def scoring(
        self, completions: Sequence[Scored], members: Sequence[int | None], temperature: float = 1.0
    ) -> Generator[None, None, "Tensor"]:
        """Score, yielding after each pass, none of which takes much longer than a step; return what `score` does."""
        ...

    def submit(self, requests: Mapping[int, Request], decoding: Decoding) -> None:
        """Take requests, by keys that are not in use; `poll` answers them."""
        ...

    def poll(self) -> list[tuple[int, Completion]]:
        """Compute one step; return (key, completion) of what it finished. Raises EngineError."""
        ...

    def abort(self) -> None:
        """Forget whatever was submitted and is not answered."""
        ...
