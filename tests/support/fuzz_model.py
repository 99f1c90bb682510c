"""What holds of a model's directory whatever its texts say. A check takes bytes and a folder of its own."""

import hashlib
import json
from pathlib import Path

from fuzz_common import HARD_JSON, SECONDS, refused
from fuzz_graders import in_time

from eggroll_llm.errors import CheckpointError, ModelError
from eggroll_llm.models.files import architecture_of, check_model, model_identity, tensor_shapes
from eggroll_llm.records.checkpoint import MANIFEST, verify_checkpoint

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


def check_manifest(data: bytes, folder: Path) -> None:
    """The manifest of a checkpoint as it stands and, where it is JSON, with the right hash."""
    (folder / "state").write_bytes(_WEIGHTS)
    contents = [data]
    try:
        content = json.loads(data)
        text = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
        contents.append(json.dumps(json.loads(text) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode())
    except (ValueError, AttributeError, RecursionError):
        pass
    for content in contents:
        (folder / MANIFEST).write_bytes(content)
        found = refused(lambda: in_time(lambda: verify_checkpoint(folder), SECONDS), CheckpointError)
        if found is not None:
            written = json.loads(content)
            assert (found.step, found.metadata) == (written["step"], written["metadata"])
            sums = {name: entry["sha256"] for name, entry in written["files"].items()}
            assert all(
                hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in sums.items()
            )


def manifest_seeds() -> list[bytes]:
    """A manifest, and hard values in each of its places."""
    files = {"state": {"size": len(_WEIGHTS), "sha256": hashlib.sha256(_WEIGHTS).hexdigest()}}
    good = json.dumps({"format": 1, "step": 7, "metadata": {"a": [1]}, "files": files}).encode()
    places = [b'"state"', b"7", b"[1]", b'{"a": [1]}', b": 8", b'"format": 1', json.dumps(files).encode()]
    values = [*HARD_JSON, b'"' + b"x" * 300 + b'"', b'"../other"', b'"format": 2', b": 9"]
    return [good, *(good.replace(place, value) for place in places for value in values)]


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
