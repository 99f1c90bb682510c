"""Several engines come to the run of one, byte for byte, whatever becomes of them on the way."""

import dataclasses
import re
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import undocumented
from fake_engine import CONFIG, SHAPES, Bench, FakeEngine, Near, rows, same_run, train_once
from pipe_link import NODE, SLOW, Fault, Plan, pool
from safetensors.torch import load_file
from torch import Tensor

from eggroll_llm.config.schema import CheckpointConfig
from eggroll_llm.engine import parcels
from eggroll_llm.engine.host import serve
from eggroll_llm.engine.interface import Decoding, Request
from eggroll_llm.engine.messages import Alive, Call, Scores, Scoring, Started, Stop, Work, decode, encode
from eggroll_llm.engine.pool import EnginePool
from eggroll_llm.engine.roster import _mismatch
from eggroll_llm.errors import ConfigError, EngineError, ModelError, TrainingError
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.records.journal import read_journal

CHANGES = {
    "steps": 5,
    "es": dataclasses.replace(CONFIG.es, optimizer="adam"),
    "checkpoint": CheckpointConfig(every=2, keep=2),
}


class Benches(Bench):
    """Runs the real session with some engines, in processes of their own."""

    def run(self, name: str, engines: int, faults: dict[int, Fault], on_existing: str = "fail", **options: Any) -> Path:
        changes = CHANGES | options.pop("changes", {}) | {"task": options.pop("task", None)}
        plan = {name: options.pop(name) for name in ("hosts", "seconds", "versions") if name in options}
        self.make_engine = lambda config, journal: pool(
            Plan(config, journal, faults, **plan), engines, say=self.display.message, sequences=4, **options
        )
        self.train(name, on_existing, **changes)
        return self.folder / name


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Benches:
    return Benches(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by one engine in this process."""
    return train_once(tmp_path_factory.mktemp("one"), run=CHANGES) / "run"


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_any_number_of_engines_makes_the_same_run(bench: Benches, one: Path, engines: int) -> None:
    run = bench.run("run", engines, {})
    same_run(one, run)
    assert {(row["engines"], row["time/replay"]) for row in rows(run)[1:]} == {(engines, 0.0)}
    assert "engines" not in rows(one)[1]
    assert undocumented(rows(run)[1]) == set()
    assert not bench.display.messages


LOSSES = {
    "sampling": ("sample", 3),
    "evaluation": ("evaluate", 2),
    "update": ("update", 3),
    "begin": ("begin", 2),
    "checksum": ("checksum", 3),
}


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("phase", LOSSES)
def test_a_killed_engine_changes_nothing(bench: Benches, one: Path, phase: str, engines: int) -> None:
    method, after = LOSSES[phase]
    run = bench.run("run", engines, {engines - 1: Fault(method, after)})
    same_run(one, run)
    assert sum(row["engines/lost"] for row in rows(run)[1:]) == 1
    lost = next(text for text in bench.display.messages if " lost " in text)
    assert lost.startswith(f"engine {engines} on node-{engines} lost (killed by signal 9)")
    assert lost.endswith("a replacement is starting")


PROBABILITIES: dict[str, Any] = {
    "es": dataclasses.replace(CONFIG.es, fitness_from="probabilities"),
    "sampling": dataclasses.replace(CONFIG.sampling, samples_per_prompt=4, temperature=1.0),
}


@pytest.mark.parametrize("faults", [{}, {1: Fault("score", 2)}], ids=["well", "one dies"])
def test_members_that_judge_are_shared_out(bench: Benches, faults: dict[int, Fault]) -> None:
    """Two engines come to the run of one, also when one dies while it scores."""
    run = bench.run("two", 2, faults, changes=PROBABILITIES)
    single = Bench(bench.folder, bench.monkeypatch)
    single.train("one", **CHANGES | PROBABILITIES)
    same_run(bench.folder / "one", run)
    assert sum(row["engines/lost"] for row in rows(run)[1:]) == len(faults)


def test_an_engine_that_scores_for_long_says_that_it_goes_on() -> None:
    class Thorough(FakeEngine):
        def scoring(self, *args: Any, **keywords: Any) -> Generator[None, None, Tensor]:
            yield from (None, None)
            return (yield from super().scoring(*args, **keywords))

    messages = iter([Scoring(1, (((1, 2, 3, 4), (5, 6)),), 1.0), Work(1, ((0, 0, None, None),)), None, Stop()])
    hello = Started("host", "node", 0, "device", {})
    events = list(serve(lambda: Thorough(CONFIG, Path()), lambda: hello, lambda block: next(messages), 0.0))
    assert [type(event) for event in events] == [Started, Alive, Alive, Alive, Scores]


def test_an_engine_that_dies_while_answers_are_scored_is_replaced(bench: Benches, one: Path) -> None:
    class Killing(Near):
        killed = False

        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            if member == 5 and not self.killed:
                self.killed = True
                bench.engine._roster.replicas[0].link.kill()
            return super().reward(member, value, problem)

    run = bench.run("run", 2, {}, task=Killing())
    same_run(one, run)
    assert sum(row["engines/lost"] for row in rows(run)[1:]) == 1


def test_a_replacement_that_dies_while_it_catches_up_is_replaced(bench: Benches, one: Path) -> None:
    run = bench.run("run", 2, {1: Fault("sample", 8), 2: Fault("replay")})
    same_run(one, run)
    assert sum(row["engines/lost"] for row in rows(run)[1:]) == 2


@pytest.mark.parametrize("faults", [{}, {1: Fault("evaluate")}], ids=["well", "one dies"])
def test_a_run_goes_on_with_another_number_of_engines(bench: Benches, one: Path, faults: dict[int, Fault]) -> None:
    """From a checkpoint and the journal, which a replacement gets as well."""
    bench.run("run", 3, {}, changes={"steps": 3})
    run = bench.run("run", 2, faults, "resume")
    assert (run / "journal.jsonl").read_text() == (one / "journal.jsonl").read_text()
    weights = [load_file(path / "final" / "model.safetensors") for path in (one, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in SHAPES)


def test_an_engine_that_hangs_is_ended(bench: Benches, one: Path) -> None:
    run = bench.run("run", 2, {1: Fault("sample", 2, "hang")}, timeout=1.0)
    same_run(one, run)
    lost = r"engine 2 on node-2 lost \(no progress for engine.timeout_seconds = 1 seconds\); \d+ completions"
    assert re.match(lost, bench.display.messages[0])


def test_an_engine_that_fails_is_replaced_once(bench: Benches, one: Path) -> None:
    run = bench.run("run", 2, {1: Fault("sample", 2, "fail")})
    same_run(one, run)
    assert "engine 2 on node-2 lost (out of memory)" in bench.display.messages[0]
    with pytest.raises(TrainingError, match=r"step 1: engine \d on node-\d: out of memory\. The journal is on disk"):
        bench.run("both", 2, {0: Fault("sample", 1, "fail"), 1: Fault("sample", 1, "fail")})


def test_without_a_replacement_the_run_ends_with_the_last_engine(bench: Benches) -> None:
    said = r"step 1: 0 engines are left, engine.min_replicas = 1; the last loss: killed by signal 9\. .*resume with: "
    with pytest.raises(TrainingError, match=said):
        bench.run("run", 1, {0: Fault("sample")}, restarts=0)
    with pytest.raises(TrainingError, match=r"1 engines are left, engine.min_replicas = 2"):
        bench.run("two", 2, {0: Fault("sample")}, restarts=0, least=2)


@pytest.mark.parametrize(
    "fault", [Fault("update", 2, "miscalculate"), Fault("begin", 2, "lie")], ids=["update", "other"]
)
def test_an_engine_with_other_weights_is_found_and_replaced(bench: Benches, one: Path, fault: Fault) -> None:
    """Of three: in the update that goes wrong by what they report of it, else by the next checksum."""
    run = bench.run("run", 3, {2: fault})
    lost = r"engine 3 on node-3 lost \(node-3 \(CPU\) computes other bits than node-[12] \(CPU\): use equal processors"
    assert re.match(lost, bench.display.messages[0])
    if fault.method == "update":  # it answered nothing with the wrong weights
        same_run(one, run)


def lies(after: int) -> Fault:
    return Fault("update", after, "miscalculate")


def test_a_machine_that_computes_other_bits_again_is_left_out(bench: Benches) -> None:
    """Whichever of its engines it is; nor does any other start there afterwards."""
    refused = "engine 1 on bad lost (bad (CPU) computes other bits than "

    class Killing(Near):
        killed = False

        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            if bench.engine._launcher.avoided:
                if not self.killed:
                    bench.engine._launcher.links[0].kill()
                self.killed = True
                if not any(text.startswith(refused) for text in bench.display.messages):
                    time.sleep(0.02)
            return super().reward(member, value, problem)

    hosts = dict.fromkeys(range(2, 6), "bad")
    bench.run("run", 4, {2: lies(2), 3: lies(3)}, hosts=hosts, task=Killing(), changes={"steps": 24})
    lost = [text for text in bench.display.messages if " lost " in text]
    assert [text.split(" lost")[0] for text in lost[:2]] == ["engine 3 on bad", "engine 4 on bad"]
    assert re.search(r"lost \(bad \(CPU\) computes other bits than node-[12] \(CPU\): use equal processors", lost[0])
    assert lost[0].endswith("a replacement is starting")
    assert lost[1].endswith("it is not replaced (the second time on its machine)")
    assert bench.engine._launcher.avoided == [NODE]
    assert any(text.startswith(refused) for text in lost[2:])


def test_the_only_machine_is_not_left_out(bench: Benches) -> None:
    """Nor is the place where an engine deviated twice filled for being free."""

    class Adding(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            bench.engine._launcher.more = 1 if bench.engine._roster.given_up else 0
            return super().reward(member, value, problem)

    bench.run("run", 3, {2: lies(2), 3: lies(1)}, hosts=dict.fromkeys(range(5), "here"), task=Adding(), seconds=0.02)
    assert bench.engine._roster.given_up == {NODE: 1}
    assert bench.engine._launcher.avoided == []
    assert len(bench.engine._launcher.links) == 4
    assert rows(bench.folder / "run")[-1]["engines"] == 2


@pytest.mark.parametrize("here", [True, False], ids=["its machine has others", "alone on its machine"])
def test_an_engine_that_does_not_fit_in_is_tried_once(bench: Benches, here: bool) -> None:
    """Its place is free afterwards, and would be filled again at every step."""

    class Adding(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            bench.engine._launcher.more = 0 if bench.engine._launcher.avoided else 1
            return super().reward(member, value, problem)

    hosts = dict.fromkeys(range(9), "here") if here else {}
    bench.run("run", 2, {}, hosts=hosts, versions=dict.fromkeys(range(2, 9), "3"), task=Adding(), seconds=0.02)
    lost = [text for text in bench.display.messages if " lost " in text]
    assert len(lost) == 1
    assert lost[0].endswith("it is not replaced (its machine is not like the others)")
    assert len(bench.engine._launcher.links) == 3
    assert bench.engine._launcher.avoided == ([] if here else [NODE])


def test_two_engines_with_different_weights_end_the_run(bench: Benches) -> None:
    with pytest.raises(TrainingError, match="step 2: the engines computed different weights, and no majority"):
        bench.run("run", 2, {1: Fault("update", 2, "miscalculate")})
    assert len(read_journal(bench.folder / "run" / "journal.jsonl").entries) == 2


def test_a_newcomer_with_other_weights_does_not_join(bench: Benches, one: Path) -> None:
    faults = {1: Fault("sample", 5), 2: Fault("replay", 1, "lie"), 3: Fault("replay", 1, "slow")}
    run = bench.run("run", 2, faults, seconds=0.05)
    same_run(one, run)
    assert sum(row["time/replay"] for row in rows(run)[1:]) >= SLOW
    assert [text.split(" (")[0] for text in bench.display.messages] == [
        "engine 2 on node-2 lost",
        "engine 2 on node-2 lost",
        "engine 2 on node-2 joins",
    ]


def test_an_engine_may_come_later(bench: Benches, one: Path) -> None:
    """In the middle of any phase of a step: its start takes as long as it takes."""

    class Adding(Near):
        def reward(self, member: int, value: float, problem: Mapping[str, Any]) -> float:
            if member == 2:
                bench.engine._launcher.more = 1
            return super().reward(member, value, problem)

    run = bench.run("run", 1, {}, task=Adding())
    same_run(one, run)
    assert [row["engines"] for row in rows(run)[1:]][-1] > 1


def test_engines_of_other_versions_are_refused(bench: Benches) -> None:
    plan = Plan(CONFIG, bench.folder / "none", versions={1: "3"})
    with pytest.raises(ConfigError, match=r"node-. has torch \S+, node-. has torch \S+: engines compute the same bits"):
        pool(plan, 2)


def test_what_engines_run_on_is_said_of_both() -> None:
    here = Started(host="a", node="1", pid=1, device="A100", versions={"torch": "2", "vllm": "1"})
    there = dataclasses.replace(here, host="b", device="H100")
    assert _mismatch(here, there).startswith("a runs on A100, b runs on H100: engines compute the same bits on equal")
    assert _mismatch(here, dataclasses.replace(here, host="b")) == ""


def test_what_keeps_an_engine_from_starting_is_raised(bench: Benches) -> None:
    config = dataclasses.replace(CONFIG, es=dataclasses.replace(CONFIG.es, optimizer="none"))
    with pytest.raises(EngineError, match="the engine failed: ValueError: optimizer = 'none'"):
        pool(Plan(config, bench.folder / "none"), 2)


def requests(members: int = 32) -> list[Request]:
    return [Request(prompt_ids=(m % 3, p, 3, 5), member=m, seed=2**60 + p) for m in range(members) for p in range(8)]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[EnginePool]:
    engines = pool(Plan(CONFIG, tmp_path / "none", {0: Fault("sample", 1, "slow")}), 2, sequences=26)
    yield engines
    engines.close()


def test_a_slow_engine_gets_less(two: EnginePool) -> None:
    links = two._launcher.links  # type: ignore[attr-defined]
    two.begin(NoiseSpec(seed=0, step=1, rank=1, sigma=0.1), 32)
    two.generate(requests(), Decoding(max_tokens=4))
    got = [sum(len(m.items) for m in map(decode, link.sent) if isinstance(m, Work)) for link in links]
    assert sum(got) == 256
    assert got[0] < got[1] / 2
    assert 0 <= two.metrics()["engines/idle"] < 1


def test_a_step_of_256_completions_is_a_few_kilobytes(two: EnginePool) -> None:
    two.metrics()
    noise = NoiseSpec(seed=0, step=1, rank=1, sigma=0.1)
    two.begin(noise, 32)
    completions = two.generate(requests(), Decoding(max_tokens=4))
    wire = two.metrics()
    assert len(completions) == 256
    assert 5_000 < wire["wire/out"] < 16_000
    assert 5_000 < wire["wire/in"] < 16_000


def test_what_is_closed_early_is_forgotten_and_the_pool_goes_on(two: EnginePool) -> None:
    two.begin(NoiseSpec(seed=0, step=1, rank=1, sigma=0.1), 32)
    whole = two.generate(requests(4), Decoding(max_tokens=4))
    arriving = two.stream(requests(), Decoding(max_tokens=4))
    next(arriving)
    arriving.close()
    assert two.generate(requests(4), Decoding(max_tokens=4)) == whole


def test_what_no_engine_can_score_is_not_the_fault_of_one(tmp_path: Path) -> None:
    faults = {0: Fault("score", kind="refuse"), 1: Fault("score", kind="refuse")}
    engines = pool(Plan(CONFIG, tmp_path / "none", faults), 2, sequences=4)
    engines.begin(NoiseSpec(seed=0, step=1, rank=1, sigma=0.1), 4)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^attention is not known$"):
            engines.score([((1, 2, 3, 4), (5, 6))], [None, None])
    assert len(engines.generate(requests(4), Decoding(max_tokens=4))) == len(requests(4))
    assert (engines.metrics()["engines"], engines.metrics()["engines/lost"]) == (2, 0)
    engines.close()


def test_weights_of_a_trainer_reach_every_engine_and_its_replacement(tmp_path: Path) -> None:
    weights = {name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}
    asked, decoding = [Request(prompt_ids=(p, 1, 2, 3), seed=p) for p in range(16)], Decoding(max_tokens=4)
    alone = FakeEngine(CONFIG, tmp_path / "none")
    before = alone.generate(asked, decoding)
    alone.load_weights(weights)
    plan = Plan(CONFIG, tmp_path / "none", {1: Fault("evaluate", 2)}, seconds=0.05)
    engines = pool(plan, 2, trainable=False, sequences=4)
    engines.load_weights(weights)
    answers = [engines.generate(asked, decoding) for _ in range(4)]
    engines.close()
    assert answers == [alone.generate(asked, decoding)] * 4
    assert answers[0] != before
    assert len(engines._launcher.links) == 3  # type: ignore[attr-defined]


def test_a_disk_that_cannot_be_written_is_not_the_fault_of_an_engine(two: EnginePool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as info:
        two.export(tmp_path / "file" / "model")
    assert info.value.filename == str(tmp_path / "file" / "model")
    two.export(tmp_path / "model")
    assert two.metrics()["engines/lost"] == 0


def test_an_engine_that_shares_no_files_sends_the_model(tmp_path: Path) -> None:
    exported, states = [], []
    for node in (NODE, "far"):
        engines = pool(Plan(CONFIG, tmp_path / "none", node=node), 1)
        engines.export(tmp_path / node)
        states.append({name: tensor.tolist() for name, tensor in engines.state().items()})
        engines.close()
        exported.append({path.name: path.read_bytes() for path in (tmp_path / node).iterdir()})
    assert exported[0] == exported[1] != {}
    assert states[0] == states[1] != {}


def test_no_message_has_more_than_a_parameter_or_a_piece_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine's state and model, each asked for twice; nothing is kept that was sent."""
    monkeypatch.setattr(parcels, "PIECE", 10_000)

    class Large:
        def state(self) -> dict[str, Any]:
            return {f"{i}": torch.full((1000,), float(i)) for i in range(50)}

        def export(self, directory: Path) -> None:
            directory.mkdir()
            (directory / "model").write_bytes(bytes(range(256)) * 100)
            (directory / "empty").touch()

        def close(self) -> None: ...

    inbox: list[Any] = []
    sizes: list[int] = []
    hello = Started(host="", node="", pid=0, device="", versions={})
    events = serve(Large, lambda: hello, lambda wait: inbox.pop() if inbox else None, 60.0)  # type: ignore[arg-type]
    assert next(events) is hello

    def call(method: str, *args: Any) -> Any:
        inbox.append(Call(0, method, args))
        frame = encode(next(events))
        sizes.append(len(frame))
        reply = decode(frame)
        assert reply.failure is None, reply.failure
        return reply.value

    for _ in range(2):
        state = {name: call("take", name) for name in call("pack_state")}
        assert {name: set(tensor.tolist()) for name, tensor in state.items()} == {f"{i}": {i} for i in range(50)}
        files = call("pack_export")
        assert files == {"model": 25_600, "empty": 0}
        assert b"".join(call("read", "model", at) for at in range(0, 25_600, 10_000)) == bytes(range(256)) * 100
    assert max(sizes) < 11_000
    events.close()
