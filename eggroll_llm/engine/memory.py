"""How much memory an ES run takes, and where, from the shapes of its model alone. Nothing is started.

    GPU     vLLM's share: served weights, masters, slots, activations, and what is left of it for the key-value cache;
            beside it optimizer state and the buffers of an update, which come after vLLM has measured what is left
    host    checkpoints while they are written, and what is offloaded; on a CPU everything

With engine.tensor_parallel a GPU's is that of each device of an engine, and a host's that of all of them.

Activations are an estimate: the widest layer at the most tokens of a batch, and the logits of all sequences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.es.noise import KEPT_BYTES, Shape
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.models.architectures import head_size
from eggroll_llm.models.targets import is_trained

SIZE = {"bfloat16": 2, "float32": 4}
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
"""Float32 numbers that an optimizer keeps of each weight."""


LOGITS_AT_ONCE = 2**25
"""Values of logits that are held at once where members score completions."""

Place = Literal["share", "beside", "host"]
"""vLLM's share of the GPU, the rest of it, or the host. On a CPU all are the host's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What takes memory."""

    name: str
    size: int
    """Bytes."""
    place: Place


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that its memory depends on."""

    trained: Sequence[Shape]
    weights: int
    """All of them, embeddings and norms too."""
    vocabulary: int
    hidden: int
    intermediate: int
    blocks: int
    """Decoder blocks."""
    cached: int
    """Values in the key-value cache of a token."""
    heads: int = 1
    """Attention heads with keys and values of their own."""

    @classmethod
    def of(
        cls, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], layers: Sequence[int] = ()
    ) -> "ModelShape":
        """Return the shape of a model with this config.json and tensors of these shapes; `layers`: `es.layers`."""

        def number(key: str, default: int = 0) -> int:
            value = config.get(key)
            return value if type(value) is int else default

        heads = number("num_key_value_heads", number("num_attention_heads"))
        blocks = number("num_hidden_layers")
        return cls(
            trained=[(name, *shape) for name, shape in tensors.items() if is_trained(name, layers) and len(shape) == 2],
            weights=sum(map(math.prod, tensors.values())),
            vocabulary=number("vocab_size"),
            hidden=number("hidden_size"),
            intermediate=number("intermediate_size"),
            blocks=blocks,
            cached=2 * blocks * heads * head_size(config),
            heads=heads,
        )

    def on_each(self, ranks: int) -> "ModelShape":
        """Return what each of the devices of an engine has: columns of o and down, rows of all else."""

        def part(name: str, out: int, inside: int) -> Shape:
            layer = name.split(".")[-2]
            if layer in ("o_proj", "down_proj"):
                return name, out, inside // ranks
            return name, out // (self._heads_cut(ranks) if layer in ("k_proj", "v_proj") else ranks), inside

        here = replace(self, trained=[part(*shape) for shape in self.trained])
        return replace(
            here,
            weights=here.linear + (self.weights - self.linear) // ranks,
            intermediate=self.intermediate // ranks,
            cached=self.cached // self._heads_cut(ranks),
        )

    def _heads_cut(self, ranks: int) -> int:
        """Return among how many the heads of k and v are shared; the others have copies."""
        return max(1, min(ranks, self.heads))

    @property
    def linear(self) -> int:
        """Return the weights that are trained."""
        return sum(out * inside for _, out, inside in self.trained)


def es_parts(model: ModelShape, es: EsSettings, engine: EngineConfig, *, on_cpu: bool) -> list[Part]:
    """Return what a run takes, settings settled; on a GPU without the key-value cache, which takes the rest."""
    size, whole, ranks = SIZE[engine.dtype], model, engine.tensor_parallel
    model = whole.on_each(ranks)
    split, offloaded = es.masters == "split", engine.offload_masters and not on_cpu
    member = member_bytes(model.trained, es.rank, size)
    quantised = engine.quantization == "fp8"
    # Packed for its matrix product, a CPU's copy of the head is one more.
    served = size * (model.weights + (model.vocabulary * model.hidden // ranks if on_cpu else 0))
    if quantised:  # a byte each and a float32 scale a row
        served += (1 - size) * model.linear + 4 * sum(out for _, out, _ in model.trained)
    # Split masters are in what is served, but for what is packed or quantised.
    halves = 2 + (size if on_cpu or quantised else 0)
    parts = [
        Part(name=f"served weights ({'fp8' if quantised else engine.dtype})", size=served, place="share"),
        Part(name="slots", size=engine.slots * member, place="share"),
        Part(name="activations (estimate)", size=activation_bytes(model, engine, on_cpu=on_cpu), place="share"),
        Part(
            name="logits of what is scored",  # as computed, in float32, and once more for their logsumexp
            size=(size + 8) * LOGITS_AT_ONCE if es.fitness_from == "probabilities" else 0,
            place="beside",
        ),
        Part(
            name="masters (split)" if split else "masters (float32)",
            size=(halves if split else 4) * model.linear,
            place="host" if offloaded else "share",
        ),
        Part(
            name="optimizer",
            size=4 * MOMENTS[es.optimizer] * model.linear,
            place="host" if offloaded else "beside",
        ),
        Part(name="noise of a step", size=kept_bytes(member, es.directions) if on_cpu else 0, place="host"),
        Part(name="an update", size=update_bytes(model, es, engine, on_cpu=on_cpu), place="beside"),
    ]
    if ranks > 1:
        parts = [replace(part, size=part.size * (ranks if on_cpu or part.place == "host" else 1)) for part in parts]
    parts.append(Part(name="a checkpoint", size=checkpoint_bytes(whole, es, engine, on_cpu=on_cpu), place="host"))
    return [part for part in parts if part.size]


def batch_tokens(max_model_len: int, *, on_cpu: bool) -> int:
    """Return how many tokens a forward pass has at most."""
    return max(4096 if on_cpu else 8192, max_model_len)


def activation_bytes(model: ModelShape, engine: EngineConfig, *, on_cpu: bool) -> int:
    """Return an estimate of what a forward pass and the sampling after it hold at once."""
    tokens = batch_tokens(engine.max_model_len, on_cpu=on_cpu)
    layer = 3 * model.intermediate + 4 * model.hidden  # gate and up, their product, what goes in and out
    return SIZE[engine.dtype] * tokens * layer + 2 * 4 * engine.max_sequences * model.vocabulary


def update_bytes(model: ModelShape, es: EsSettings, engine: EngineConfig, *, on_cpu: bool) -> int:
    """Return the buffers of an update, which takes the weights one by one, for the largest."""
    largest = max(out * inside for _, out, inside in model.trained)
    copies = (engine.offload_masters and not on_cpu) or es.masters == "split"
    columns = 4 * es.directions * es.rank * max(out + inside for _, out, inside in model.trained)
    packed = 2 * largest * SIZE[engine.dtype] if on_cpu else 0  # gate and up are packed as one
    return 4 * largest * (copies + (es.optimizer != "sgd")) + columns + packed


def checkpoint_bytes(model: ModelShape, es: EsSettings, engine: EngineConfig, *, on_cpu: bool) -> int:
    """Return what writing a checkpoint takes besides what is in the host's memory anyway."""
    here = engine.tensor_parallel == 1  # else masters are in parts, in other processes
    in_host = here and (on_cpu or engine.offload_masters)
    masters = 4 if es.masters == "split" or not in_host else 0
    moments = 0 if in_host else 4 * MOMENTS[es.optimizer]
    served = 0 if here and on_cpu and (es.masters == "split" or engine.dtype == "float32") else SIZE[engine.dtype]
    return (masters + moments + served) * model.linear


def member_bytes(shapes: Sequence[Shape], rank: int, size: int) -> int:
    """Return the memory of one member's factors, rank * (in + out) values of `size` bytes per weight."""
    return size * rank * sum(out + inside for _, out, inside in shapes)


def kept_bytes(member: int, directions: int) -> int:
    """Return the memory of a step's noise beside the slots: nothing where it is too much and is made again instead."""
    return directions * member if directions * member <= KEPT_BYTES else 0
