"""What ES takes of a GPU, for the shapes of Qwen2.5: `python scripts/memory_table.py` prints a table of docs/models.md.

By `eggroll_llm.engine.memory`, as `train --dry-run` has it: 64 members of rank 1 in 64 slots, 512 sequences, plain SGD.
"""

from collections import Counter
from dataclasses import replace

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.memory import ModelShape, es_parts
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.system.hardware import GIB

SHAPES = {  # hidden, intermediate, layers, values of keys a token, vocabulary, embeddings that are stored
    "0.5B": (896, 4864, 24, 128, 151_936, 1),
    "1.5B": (1536, 8960, 28, 256, 151_936, 1),
    "7B": (3584, 18_944, 28, 512, 152_064, 2),
}
ENGINE = EngineConfig(dtype="bfloat16", slots=64, max_sequences=512)
SPLIT, FLOAT32 = EsSettings(population=64, masters="split"), EsSettings(population=64)
WAYS = {
    "float32, the default": (FLOAT32, ENGINE),
    '`es.masters = "split"`': (SPLIT, ENGINE),
    "`engine.offload_masters = true`": (FLOAT32, replace(ENGINE, offload_masters=True)),
    'offloaded, `engine.quantization = "fp8"`': (FLOAT32, replace(ENGINE, offload_masters=True, quantization="fp8")),
}


def shape_of(name: str) -> ModelShape:
    """Return the shape of a model of the Qwen2.5 family."""
    hidden, wide, layers, keys, vocabulary, embeddings = SHAPES[name]
    sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (wide, hidden), (wide, hidden)]
    trained = [(f"{layer}.{i}", *size) for layer in range(layers) for i, size in enumerate([*sizes, (hidden, wide)])]
    weights = sum(out * inside for _, out, inside in trained) + embeddings * vocabulary * hidden
    return ModelShape(
        trained=trained,
        weights=weights + layers * (4 * hidden + 2 * keys) + hidden,  # norms, and biases of queries, keys and values
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=wide,
        blocks=layers,
        cached=2 * layers * keys,
    )


def table() -> str:
    """Return the table."""
    lines = [
        "| model | masters | weights, masters and slots in vLLM's share | beside it | the GPU in all "
        "| times its weights | host |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        model = shape_of(name)
        for way, (es, engine) in WAYS.items():
            size: Counter[str] = Counter()
            for part in es_parts(model, es, engine, on_cpu=False):
                size[part.place] += part.size
            gpu = size["share"] + size["beside"]
            cells = " | ".join(f"{bytes_ / GIB:.1f}" for bytes_ in (size["share"], size["beside"], gpu))
            lines.append(f"| {name} | {way} | {cells} | {gpu / (2 * model.weights):.1f} | {size['host'] / GIB:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
