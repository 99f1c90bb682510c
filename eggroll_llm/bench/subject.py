"""What is measured: a model and prompts for it, of a recipe, or random ones of a model's shape."""

import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eggroll_llm.bench.plan import Variant
from eggroll_llm.config.schema import EngineConfig, RunConfig
from eggroll_llm.engine.memory import SIZE, ModelShape, kept_bytes, member_bytes
from eggroll_llm.errors import ModelError
from eggroll_llm.models.architectures import check_architecture
from eggroll_llm.models.files import read_config, tensor_shapes
from eggroll_llm.models.targets import trained_parameters
from eggroll_llm.system.hardware import GIB, resolve_dtype, serves_on_cpu
from eggroll_llm.system.jsonl import parse_json
from eggroll_llm.training.prepare import prepare

LARGEST_CPU_BLOCK, LARGEST_GPU_BLOCK = 128, 64  # tokens; vLLM's of a key-value cache, so that any of its sizes fits

_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _qwen(*sizes: int, **others: Any) -> dict[str, Any]:
    return _QWEN | dict(zip(_SIZES, sizes, strict=True)) | others


_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 8192}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": _qwen(576, 1536, 30, 9, 3, vocab_size=49152, rms_norm_eps=1e-5, rope_theta=1e5) | _LLAMA,
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
}
"""What the published config.json of each says of its size."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and prompts."""

    model_dir: Path
    prompts: Sequence[Sequence[int]]
    engine: EngineConfig
    """With its dtype settled."""
    sigma: float
    random_weights: bool = False
    """Whether the directory has names and shapes only."""

    def context(self, output_len: int) -> int:
        """Return the longest prompt and completion, in whole blocks of 32 tokens."""
        return -(-(max(map(len, self.prompts)) + output_len) // 32) * 32


def of_recipe(config: RunConfig, recipe_dir: Path) -> Subject:
    """Return the model and the training prompts of a recipe. Raises UserError."""
    prepared = prepare(config, recipe_dir)
    return Subject(
        model_dir=prepared.model_dir,
        prompts=prepared.train.prompts,
        engine=prepared.config.engine,
        sigma=config.es.sigma,
    )


@contextmanager
def of_shape(shape: str, engine: EngineConfig, sigma: float, num_prompts: int, input_len: int) -> Iterator[Subject]:
    """Yield random prompts for a model of this shape, which vLLM fills with random weights. Raises ModelError.

    The temporary directory has a configuration, the names and shapes of the tensors, and a tokenizer of single bytes:
    prompts are token ids, of any model.
    """
    config = shape_config(shape)
    with TemporaryDirectory(prefix="eggroll-bench-") as folder:
        model_dir = Path(folder)
        (model_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            _write_header(model_dir)
        except Exception as error:  # transformers raises anything
            cause = str(error).partition("\n")[0]
            raise ModelError(f"--random-weights {shape}: transformers makes no model of it ({cause:.300})") from error
        _write_tokenizer(model_dir)
        generator, size = random.Random(0), config["vocab_size"]
        yield Subject(
            model_dir=model_dir,
            prompts=[[generator.randrange(size // 2) for _ in range(input_len)] for _ in range(num_prompts)],
            engine=replace(engine, dtype=resolve_dtype(engine.dtype)),
            sigma=sigma,
            random_weights=True,
        )


def shape_config(shape: str) -> dict[str, Any]:
    """Return the config.json of a shape: one of SHAPES, a model's directory or its config.json. Raises ModelError."""
    if shape.lower() in SHAPES:
        return dict(SHAPES[shape.lower()])
    path = Path(os.path.expanduser(shape))
    path = path / "config.json" if os.path.isdir(path) else path
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--random-weights {shape}: neither one of {', '.join(SHAPES)}, nor a model's directory or config.json "
            f"({error})"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"--random-weights {shape}: {path} does not hold a JSON object")
    check_architecture(config, path)
    if type(config.get("vocab_size")) is not int:
        raise ModelError(f"--random-weights {shape}: {path} has no vocab_size")
    return {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}


def _write_header(model_dir: Path) -> None:
    """Write a safetensors file without its data, of which vLLM reads nothing when it makes weights up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    end, header = 0, {}
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": [*parameter.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (model_dir / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def _write_tokenizer(model_dir: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    vocabulary = {text: i for i, text in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(model_dir)


def kv_cache_bytes(subject: Subject, sequences: int, context: int) -> int:
    """Return the key-value cache in which all sequences fit at their full length."""
    token = ModelShape.of(read_config(subject.model_dir), tensor_shapes(subject.model_dir)).cached
    block = LARGEST_CPU_BLOCK if serves_on_cpu() else LARGEST_GPU_BLOCK
    return (sequences + 1) * math.ceil(context / block) * block * token * SIZE[subject.engine.dtype]


def gpu_bytes(subject: Subject, variant: Variant, sequences: int, context: int) -> int:
    """Return an upper estimate of the memory that a variant takes on a GPU."""
    shapes = tensor_shapes(subject.model_dir)
    weights = 2 * sum(math.prod(shape) for shape in shapes.values())
    vocabulary = max(shape[0] for shape in shapes.values())
    beside = 1.5 * GIB + 4 * 4 * sequences * vocabulary  # context, activations and graphs; logits
    ours = population_bytes(subject, variant) if variant.population and variant.kind != "swap" else 0
    return int(weights + kv_cache_bytes(subject, sequences, context) + beside + ours)


def population_bytes(subject: Subject, variant: Variant) -> int:
    """Return the memory of a population beside plain vLLM: float32 masters, slots and one copy of the noise."""
    shapes = trained_parameters(subject.model_dir)
    masters = 4 * sum(out * inside for _, out, inside in shapes)
    member = member_bytes(shapes, variant.rank, SIZE[subject.engine.dtype])
    kept = kept_bytes(member, variant.population // 2) if serves_on_cpu() else 0
    return masters + variant.slots * member + kept
