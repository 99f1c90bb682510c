"""What holds of a model's directory whatever its texts say. A check takes bytes and a folder of its own."""

import json
from pathlib import Path

from fuzz_common import HARD_JSON, SECONDS, refused
from fuzz_graders import in_time

from eggroll_llm.errors import ModelError
from eggroll_llm.model_files import architecture_of, check_model, model_identity, tensor_shapes

_WEIGHTS = bytes(8)
"""Two float32."""


def check_model_files(data: bytes, folder: Path) -> None:
    """Split at zero bytes: config.json, header of the weights, and, where it is not empty, their index."""
    config, header, index = [*data.split(b"\0", 2), b"", b""][:3]
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + _WEIGHTS)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if index:
        (folder / "model.safetensors.index.json").write_bytes(index)
    architecture = refused(lambda: in_time(lambda: check_model(folder), SECONDS), ModelError)
    if architecture is not None:
        assert architecture == architecture_of(folder)
        assert architecture.endswith("ForCausalLM")
        shapes = tensor_shapes(folder)
        assert shapes
        assert all(isinstance(size, int) for shape in shapes.values() for size in shape)
        assert len(model_identity(folder)) == 16


def model_seeds() -> list[bytes]:
    """A model with and without an index, and with hard values in each place."""
    config = json.dumps({"architectures": ["LlamaForCausalLM"], "hidden_size": 2}).encode()
    tensors = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    header = json.dumps(tensors).encode()
    index = json.dumps({"weight_map": {"a": "model.safetensors"}}).encode()
    files = [config, header, index]
    whole = b"\0".join(files)
    places = [
        b'["LlamaForCausalLM"]',
        b'"LlamaForCausalLM"',
        b"2",
        b"[2]",
        b"8",
        b'{"format": "pt"}',
        b'"model.safetensors"',
    ]
    values = [*HARD_JSON, b'"' + b"x" * 300 + b'"', b'"../other"', b'"\\u001b[2J ForCausalLM"', b"3", b"[[3]]"]
    hard = [whole.replace(place, value) for place in (*places, index) for value in values]
    return [whole, b"\0".join(files[:2]), *hard]
