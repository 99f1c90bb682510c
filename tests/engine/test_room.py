"""How many engines a cluster has room for: an engine is on one machine."""

import importlib.util
from typing import Any

import pytest

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.errors import ConfigError

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs the extra ray", allow_module_level=True)

from eggroll_llm.engine import replicas


@pytest.mark.parametrize(
    ("what", "machines", "settings", "engines", "threads"),
    [
        ("GPU", [3, 3], {"replicas": 0, "tensor_parallel": 2}, 2, 0),
        ("GPU", [8, 8], {"replicas": 16}, 16, 0),
        ("GPU", [1, 1], {"replicas": 0, "tensor_parallel": 2}, None, 0),
        ("GPU", [1, 1], {"replicas": 1, "tensor_parallel": 2}, None, 0),
        ("CPU", [8], {"replicas": 3}, 3, 2),
        ("CPU", [3, 3], {"replicas": 3}, 3, 1),  # of two cores each, the third had none
        ("CPU", [2], {"replicas": 3}, None, 1),
    ],
)
def test_an_engine_has_its_gpus_or_cores_on_one_machine(
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    machines: list[int],
    settings: dict[str, Any],
    engines: int | None,
    threads: int,
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 64, what: float(size)}} for size in machines]
    gone = {"Alive": False, "Resources": {what: 99.0}}
    monkeypatch.setattr(replicas.ray, "nodes", lambda: [*nodes, gone])
    monkeypatch.setattr(replicas.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(replicas, "serves_on_cpu", lambda: what == "CPU")
    config = EngineConfig(**settings)
    if engines is None:
        with pytest.raises(ConfigError, match="lower it, or join machines"):
            replicas.Cluster(config)
        return
    cluster = replicas.Cluster(config)
    assert (cluster.engines, cluster.cpus_each) == (engines, threads)


@pytest.mark.parametrize(
    ("engines", "free", "avoided", "given_up", "more"),
    [
        (2, 2, [], {}, 0),  # one GPU on each machine, and an engine needs two
        (1, 4, [], {}, 1),
        (1, 1, [], {}, 0),  # others use them
        (1, 4, [], {"a": 1}, 0),  # its GPU is broken
        (1, 4, [], {"gone": 1}, 1),
        (1, 4, ["a"], {}, 0),
        (0, 6, ["a"], {"b": 1}, 0),
    ],
)
def test_engines_are_added_where_one_machine_has_room(
    monkeypatch: pytest.MonkeyPatch, engines: int, free: int, avoided: list[str], given_up: dict[str, int], more: int
) -> None:
    nodes = [{"Alive": name != "gone", "NodeID": name, "Resources": {"GPU": 3.0}} for name in ("a", "b", "gone")]
    monkeypatch.setattr(replicas.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(replicas.ray, "available_resources", lambda: {"GPU": float(free)})
    monkeypatch.setattr(replicas.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(replicas, "serves_on_cpu", lambda: False)
    cluster = replicas.Cluster(EngineConfig(replicas=0, tensor_parallel=2))
    assert cluster.spare(engines, avoided, given_up) == more
