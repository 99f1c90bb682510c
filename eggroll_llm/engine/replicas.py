"""Engines as Ray actors, on this machine or on a cluster. The only module that imports Ray.

Ray places the processes, starts and kills them, notices their death and carries bytes; what is done with them is the
pool's. An actor has two threads: `run` is the engine's loop, a generator whose items Ray streams to the driver, and
`post` fills its inbox meanwhile. No actor is detached: all end with the driver, whatever ends it.
"""

import contextlib
import dataclasses
import os
import platform
import queue
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eggroll_llm.config.schema import EngineConfig
from eggroll_llm.engine.blueprint import Blueprint
from eggroll_llm.engine.host import serve
from eggroll_llm.engine.interface import SteppedEngine
from eggroll_llm.engine.links import Link, Lost, Rules
from eggroll_llm.engine.messages import Message, Started, decode, encode
from eggroll_llm.engine.pool import EnginePool
from eggroll_llm.engine.watchdog import LOOKS
from eggroll_llm.errors import ConfigError, EngineError
from eggroll_llm.models.files import model_identity
from eggroll_llm.system import signals
from eggroll_llm.system.hardware import cores, resolve_dtype, serves_on_cpu
from eggroll_llm.system.terminal import inert
from eggroll_llm.system.versions import BITS_DEPEND_ON, package_versions

for _name, _value in {
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it would abort the driver soon after SIGTERM
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the driver may look at the GPUs although it has asked for none
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402 - it reads them

Build = Callable[[], SteppedEngine]
LARGE = 1 << 20
"""Bytes from which on a frame is put into Ray's object store, once for all engines."""


def start_pool(blueprint: Blueprint, logs: Path | None, say: Callable[[str], None]) -> EnginePool:
    """Connect to Ray and start the engines. Raises ConfigError when there is no room for them, else UserError."""
    config = blueprint.engine
    identity = model_identity(blueprint.model_dir)
    if logs is not None:
        logs.mkdir(exist_ok=True)
    cluster = Cluster(config)
    engine = dataclasses.replace(config, threads=config.threads or cluster.cpus_each)
    build = dataclasses.replace(blueprint, engine=engine, identity=identity).build
    rules = Rules(
        engines=cluster.engines,
        least=config.min_replicas,
        restarts=config.restart,
        timeout=config.timeout_seconds,
        trainable=blueprint.es is not None,
    )
    dtype: torch.dtype = getattr(torch, resolve_dtype(config.dtype))
    launcher = RayLauncher(cluster, build, logs, beat=config.timeout_seconds / LOOKS or 60.0)
    return EnginePool(launcher, rules, dtype=dtype, max_sequences=config.max_sequences, say=say)


class Cluster:
    """The connection to Ray, and how many engines there is room for. An engine has one or more GPUs, or some cores."""

    def __init__(self, config: EngineConfig) -> None:
        """Connect, or start a cluster on this machine. Raises ConfigError when there is no room for the engines."""
        self.on_cpu, self.counted = serves_on_cpu(), config.replicas == 0
        self.gpus_each = config.tensor_parallel
        self._ours = not ray.is_initialized()
        if self._ours:
            address = config.ray_address or os.environ.get("RAY_ADDRESS", "")
            _connect(address, cpus=max(cores(), config.replicas * max(1, config.threads)))
        try:
            self.cpus, self.gpus = self._room("CPU", 1), self._room("GPU", 1)
            self.engines = config.replicas or (1 if self.on_cpu else self._room("GPU", self.gpus_each))
            self.cpus_each = config.threads or (self._largest_share() if self.on_cpu else 0)
            self._check(config)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _room(what: str, each: int) -> int:
        """Return how many engines fit that take `each` of "CPU" or "GPU", all of it from one machine."""
        return sum(int(node["Resources"].get(what, 0)) // each for node in ray.nodes() if node["Alive"])

    def _largest_share(self) -> int:
        """Return the most cores of which every engine can have as many."""
        shares = range(max(1, self.cpus // max(1, self.engines)), 1, -1)
        return next((share for share in shares if self._room("CPU", share) >= self.engines), 1)

    def _check(self, config: EngineConfig) -> None:
        there = self._room("CPU", max(1, self.cpus_each)) if self.on_cpu else self._room("GPU", self.gpus_each)
        if not 0 < self.engines <= there:
            what = f"{self.cpus} cores for engines of {self.cpus_each} threads" if self.on_cpu else f"{self.gpus} GPUs"
            if not self.on_cpu and self.gpus_each > 1:
                what += f" for engines of engine.tensor_parallel = {self.gpus_each}"
            raise ConfigError(
                f"engine.replicas = {config.replicas}: Ray has {what}, enough for {there} engines: lower it, or join "
                "machines to the cluster"
            )

    @property
    def resources(self) -> dict[str, float]:
        """Return what Ray is to set aside for an engine."""
        return {"num_cpus": self.cpus_each} if self.on_cpu else {"num_cpus": 1, "num_gpus": self.gpus_each}

    def spare(self, engines: int, avoided: Collection[str], given_up: Mapping[str, int]) -> int:
        """Return how many engines there is room for besides these, where their number is left to the machines."""
        if not self.counted or self.on_cpu:
            return 0
        alive = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]}
        free = int(ray.available_resources().get("GPU", 0)) - sum(alive.get(node, 0) for node in avoided)
        lost = {node: min(given_up.get(node, 0), gpus // self.gpus_each) for node, gpus in alive.items()}
        room = sum(gpus // self.gpus_each - lost[node] for node, gpus in alive.items() if node not in avoided)
        return max(0, min(free // self.gpus_each - sum(lost.values()), room - engines))

    def close(self) -> None:
        """Leave Ray, which ends the cluster if it was started here."""
        if self._ours:
            with contextlib.suppress(Exception), signals.kept():
                ray.shutdown()


def _connect(address: str, *, cpus: int) -> None:
    """Connect to a cluster, or start one on this machine; keep our handlers of signals, which Ray replaces."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    if not address:
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    else:
        options["address"] = address
    try:
        with signals.kept():
            ray.init(**options)
    except Exception as error:
        where = f"Ray at {address!r}" if address else "Ray"
        raise EngineError(
            f"{where} cannot be reached or started: {inert(' '.join(str(error).split()), 300)}. Check "
            "engine.ray_address and RAY_ADDRESS; `ray status` shows a cluster"
        ) from error


class RayLink:
    """The way to an actor."""

    def __init__(self, actor: Any, put: Callable[[bytes], Any], log: Path | None) -> None:
        self.actor, self.events, self.log, self._put = actor, actor.run.remote(), log, put

    def post(self, frame: bytes) -> None:
        """Send a message. To an actor that is lost it goes nowhere."""
        self.actor.post.remote(frame if len(frame) < LARGE else self._put(frame))

    def kill(self) -> None:
        """End the actor's process."""
        with contextlib.suppress(Exception):  # it has ended
            ray.kill(self.actor)


class RayLauncher:
    """Starts actors, and hears from them."""

    def __init__(self, cluster: Cluster, build: Build, logs: Path | None, *, beat: float) -> None:
        self._cluster, self._build, self._logs, self._beat = cluster, build, logs, beat
        self.node: str = ray.get_runtime_context().get_node_id()
        self._large: tuple[bytes, Any] | None = None
        self._avoided: set[str] = set()

    def start(self, number: int) -> RayLink:
        """Start the actor of an engine."""
        log = self._logs / f"{number:02}.log" if self._logs else None
        environment = {"OMP_NUM_THREADS": str(self._cluster.cpus_each)} if self._cluster.on_cpu else {}
        options = {**self._cluster.resources, "max_restarts": 0, "runtime_env": {"env_vars": environment}}
        if self._avoided:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._avoided))})"}
        return RayLink(EngineActor.options(**options).remote(self._build, log, self._beat), self._put, log)

    def wait(self, links: Sequence[Link], timeout: float) -> list[tuple[Link, bytes | Lost]]:
        """Return what came first, and whatever else is there."""
        self._large = None
        of_events = {link.events: link for link in links if isinstance(link, RayLink)}
        # What is large is fetched meanwhile: of a machine that is cut off, `get` would wait for it without end.
        ready, _ = ray.wait(list(of_events), num_returns=1, timeout=timeout, fetch_local=True)
        return [(of_events[events], _next(events, of_events[events])) for events in ready]

    def spare(self, engines: int, given_up: Mapping[str, int]) -> int:
        """Return how many engines there is room for besides these."""
        return self._cluster.spare(engines, self._avoided, given_up)

    def avoid(self, node: str) -> None:
        """Start no engine on a machine any more."""
        self._avoided.add(node)

    def close(self) -> None:
        """Leave Ray."""
        self._cluster.close()

    def _put(self, frame: bytes) -> Any:
        """Return a reference to a frame, the same one for every engine that it is sent to in a row."""
        if self._large is None or self._large[0] is not frame:
            self._large = frame, ray.put(frame)
        return self._large[1]


def _next(events: Any, link: RayLink) -> bytes | Lost:
    try:
        frame: bytes = ray.get(next(events))
    except StopIteration:
        return Lost("it has ended" + _see(link))
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        return Lost(f"{type(error).__name__}: {inert(first, 200)}{_see(link)}")
    return frame


def _see(link: RayLink) -> str:
    return f"; see {link.log}" if link.log and link.log.exists() else ""


class _Engine:
    """A process with an engine, and an inbox."""

    def __init__(self, build: Build, log: Path | None, beat: float) -> None:
        self._build, self._beat = build, beat
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        if log and log.parent.is_dir():  # it is shared with the driver
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os.close(descriptor)

    @ray.method(concurrency_group="inbox")
    def post(self, frame: bytes) -> None:
        """Take a message."""
        self._inbox.put(frame)

    @ray.method(concurrency_group="engine", num_returns="streaming")
    def run(self) -> Iterator[bytes]:
        """Yield what the engine has to say."""
        for event in serve(self._build, _hello, self._read, self._beat):
            yield encode(event)

    def _read(self, wait: bool) -> Message | None:
        try:
            message: Message = decode(self._inbox.get(block=wait))
        except queue.Empty:
            return None
        return message


EngineActor: Any = ray.remote(concurrency_groups={"engine": 1, "inbox": 1})(_Engine)


def _hello() -> Started:
    cuda = torch.cuda.is_available() and not serves_on_cpu()
    return Started(
        host=platform.node(),
        node=ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        device=torch.cuda.get_device_name() if cuda else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        versions=package_versions(*BITS_DEPEND_ON),
    )
