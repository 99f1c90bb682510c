"""What a push would upload, to the byte; and the upload itself, by the real client to a small stand-in for the hub."""

import base64
import hashlib
import html
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from eggroll_llm.cli import push as push_command
from eggroll_llm.cli.main import main
from eggroll_llm.errors import CheckpointError, JournalError, ModelError, UserError
from eggroll_llm.models.push import PushError, PushPlan, plan_push, push
from eggroll_llm.records.checkpoint import save_checkpoint
from eggroll_llm.records.journal import Journal, JournalEntry, JournalHeader, read_journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import write_provenance

# The hub's client uses its HTTP library in an old way when it uploads weights without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

TOKEN = "hf_SecretSecretSecret"
WEIGHTS = b"\x00\x01weights" * 50
README = "---\nlibrary_name: transformers\n---\n\n# Mine\n"
MODEL = {
    "config.json": b"{}\n",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"x",
}
CONFIG = 'model = "smollm2-135m-instruct"\ntask = "countdown"\nsteps = 4\n'


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "home" / "stored_tokens"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail(f"network used: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


def write_model(directory: Path, step: int | None = None) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in (MODEL | {"README.md": README.encode()}).items():
        (directory / name).write_bytes(content)
    if step is not None:
        write_provenance(directory, step=step, base_model="b" * 16)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four updates, evaluated after 0, 2 and 4, best after 2, with a checkpoint of that step."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml").write_text(CONFIG)
    with Journal.open(path / "journal.jsonl", JournalHeader(frozen_hash="a" * 64, base_model="b" * 16)) as journal:
        for step in range(1, 5):
            journal.append(
                JournalEntry(step=step, noise_step=step, fitness=(0.5, -0.5), sigma=0.012, learning_rate=1e-3)
            )
    log(path, {0: 0.35, 1: None, 2: 0.5, 3: None, 4: 0.45})
    save_checkpoint(path / "checkpoints", 2, lambda directory: write_model(directory, 2), {}, {})
    write_model(path / "final", 4)
    (path / "final" / "model.safetensors").write_bytes(b"final weights")
    return path


def log(path: Path, accuracies: dict[int, float | None]) -> None:
    rows = [{"step": step, **({} if a is None else {"eval/accuracy": a})} for step, a in accuracies.items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "eval/acc')


def sizes(plan: PushPlan) -> dict[str, int]:
    return {file.path: file.size for file in plan.files}


def journal_bytes(run: Path, step: int) -> bytes:
    return b"".join((run / "journal.jsonl").read_bytes().splitlines(keepends=True)[: step + 1])


def provenance(step: int) -> bytes:
    return f'{{"step": {step}, "base_model": "{"b" * 16}"}}\n'.encode()


MODEL_SIZES = {name: len(content) for name, content in MODEL.items()} | {"README.md": len(README)}
RUN_SIZES = MODEL_SIZES | {"eggroll.json": len(provenance(0))}


@pytest.mark.usefixtures("no_network")
class TestPlan:
    def test_of_a_model_directory(self, model: Path) -> None:
        for name in (".env", ".lock", "training_state.st", "manifest.json", "optimizer.pt", "notes.txt"):
            (model / name).write_text("secret")
        for name in ("credentials.json", "token.json", "params.json", "trainer_state.json"):
            (model / name).write_text('{"token": "secret"}')
        (model / ".hidden.json").write_text("{}")
        (model / "onnx").mkdir()
        (model / "folder.json").mkdir()
        plan = plan_push(model, "me/mine", private=True)
        assert sizes(plan) == MODEL_SIZES
        assert [file.path for file in plan.files] == sorted(MODEL_SIZES)
        assert plan.total == sum(MODEL_SIZES.values())
        assert set(plan.left_out) == {
            *(".env", ".hidden.json", ".lock", "training_state.st", "manifest.json", "optimizer.pt", "notes.txt"),
            *("onnx", "folder.json", "credentials.json", "token.json", "params.json", "trainer_state.json"),
        }
        assert (plan.repo_id, plan.private, plan.step, plan.warnings) == ("me/mine", True, None, ())

    def test_of_a_run_is_final_with_what_a_replay_needs(self, run: Path) -> None:
        plan = plan_push(run, "me/mine")
        assert (plan.directory, plan.step, plan.private, plan.warnings) == (run / "final", 4, False, ())
        assert sizes(plan) == RUN_SIZES | {
            "model.safetensors": len(b"final weights"),
            "eggroll/config.toml": len(CONFIG),
            "eggroll/journal.jsonl": len(journal_bytes(run, 4)),
        }

    def test_with_a_report(self, run: Path) -> None:
        (run / "report.html").write_text("<html>")
        assert sizes(plan_push(run, "me/mine"))["eggroll/report.html"] == 6

    @pytest.mark.parametrize("at", ["best", "2"])
    def test_of_a_checkpoint_has_the_journal_up_to_it(self, run: Path, at: str) -> None:
        plan = plan_push(run, "me/mine", at=at)
        assert (plan.directory, plan.step) == (run / "checkpoints" / "step-000002", 2)
        assert sizes(plan) == RUN_SIZES | {
            "eggroll/config.toml": len(CONFIG),
            "eggroll/journal.jsonl": len(journal_bytes(run, 2)),
        }
        assert set(plan.left_out) == {"manifest.json", "training_state.st"}

    def test_the_last_step_is_final(self, run: Path) -> None:
        assert plan_push(run, "me/mine", at="4").directory == run / "final"

    def test_of_equal_steps_the_first_is_best(self, run: Path) -> None:
        log(run, {0: 0.1, 2: 0.5, 4: 0.5})
        assert plan_push(run, "me/mine", at="best").step == 2

    def test_a_run_that_went_on_after_its_final_model(self, run: Path) -> None:
        """What is pushed is of one step throughout: weights, journal, and the step that the plan names."""
        write_provenance(run / "final", step=3, base_model="b" * 16)
        plan = plan_push(run, "me/mine")
        assert plan.step == 3
        assert sizes(plan)["eggroll/journal.jsonl"] == len(journal_bytes(run, 3))
        (warning,) = plan.warnings
        assert warning.startswith(f"{run}/final: is of step 3, and the run went on after it, to step 4.")
        assert "--at STEP" in warning

    def test_a_missing_card_is_told(self, model: Path) -> None:
        (model / "README.md").unlink()
        assert plan_push(model, "me/mine").warnings == (
            f"{model}: has no README.md, so the repository will have no model card",
        )

    @pytest.mark.parametrize(
        "line",
        [
            'model = "/home/me/model"',
            'task = "/home/me/sums.py:Sums"',
            '"data dir" = "~/data"',
            'files = ["a", "/b"]',
            'file = "C:\\\\data"',
            'nested = {x = "file:///b"}',
        ],
    )
    def test_paths_of_this_machine_are_told_once(self, run: Path, line: str) -> None:
        (run / "config.toml").write_text(f"{CONFIG}{line}\n")
        (run / "final" / "README.md").write_text(f"{README}```toml\n{CONFIG}{line}\n```\n")
        (warning,) = plan_push(run, "me/mine").warnings
        assert warning.startswith(f"README.md and eggroll/config.toml: {line} is a path of this machine")
        assert "--private" in warning

    @pytest.mark.parametrize(
        "line",
        ['hub = "Jiayi-Pan/Countdown-Tasks-3to4"', 'operators = "+-*/"', 'operators = "/+-*"', "# = '/x'", "a = 1"],
    )
    def test_what_is_no_path_of_this_machine(self, run: Path, line: str) -> None:
        (run / "config.toml").write_text(f"{CONFIG}{line}\n")
        assert plan_push(run, "me/mine").warnings == ()

    @pytest.mark.parametrize(
        "line",
        [
            'api_key = "abc"',
            "Secret_Word = 'abc'",
            'login = {password = "abc"}',
            'tokens = ["abc"]',
            '"my token" = "abc"',
        ],
    )
    def test_what_sounds_secret_is_told_without_its_value(self, run: Path, line: str) -> None:
        (run / "config.toml").write_text(f"{CONFIG}{line}\n")
        (run / "final" / "README.md").write_text(f"{README}```toml\n{CONFIG}{line}\n```\n")
        (warning,) = plan_push(run, "me/mine").warnings
        assert warning.startswith("README.md and eggroll/config.toml: ")
        assert "looks like the name of a secret" in warning
        assert "abc" not in warning

    def test_what_sounds_secret_is_not_published_without_a_word(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (run / "config.toml").write_text(f'{CONFIG}api_key = "abc"\n')
        sent = []
        monkeypatch.setattr(push_command, "push", lambda plan: sent.append(plan) or "sent")
        assert main(["push", str(run), "me/mine"]) == 2
        assert "error: nothing was sent: api_key would be published" in capsys.readouterr().err
        assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
        assert not sent
        for flag in ("--private", "--public"):
            assert main(["push", str(run), "me/mine", flag]) == 0
        assert [plan.private for plan in sent] == [True, False]

    @pytest.mark.parametrize("line", ['api_key = ""', "max_tokens = 64", 'word = "token"'])
    def test_what_does_not_sound_secret(self, run: Path, line: str) -> None:
        (run / "config.toml").write_text(f"{CONFIG}{line}\n")
        assert plan_push(run, "me/mine").warnings == ()

    def test_a_report_is_looked_through_too(self, run: Path) -> None:
        setting = 'task = "/home/me/sums.py:Sums"'
        (run / "config.toml").write_text(f"{CONFIG}{setting}\n")
        page = f"<ul><li>{run}/evaluations: gone</li></ul><pre>{html.escape(setting)}\nsecret = &quot;abc&quot;</pre>"
        (run / "report.html").write_text(page.replace("</ul>", "</ul>\n"))
        found = [warning.partition(", readable")[0] for warning in plan_push(run, "me/mine").warnings]
        assert found == [
            f"eggroll/config.toml and eggroll/report.html: {setting} is a path of this machine",
            f"eggroll/report.html: {run} is a path of this machine",
            "eggroll/report.html: secret looks like the name of a secret",
        ]

    def test_names_do_nothing_to_a_terminal(self, model: Path) -> None:
        (model / "a\x1b[2J").write_text("")
        text = "".join(plan_push(model, "me/mine").lines())
        assert text.isprintable()
        assert r"left out: a\x1b[2J" in text

    def test_is_printed_without_the_token(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        plan = plan_push(run, "me/mine", at="best", private=True, revision="step-2")
        text = "\n".join(plan.lines())
        assert "repository: me/mine (private), branch step-2\n" in text
        assert f"{len(WEIGHTS):>15,}  model.safetensors\n" in text
        assert f"{plan.total:>15,}  bytes in 8 files\n" in text
        assert "left out: manifest.json, training_state.st\n" in text
        assert "token: found" in text
        assert TOKEN not in text + repr(plan)

    def test_says_how_to_get_a_token(self, model: Path) -> None:
        plan = plan_push(model, "me/mine")
        assert not plan.token_found
        assert (
            "token: no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token with write access"
            in plan.lines()
        )

    def test_finds_the_token_of_a_login(self, model: Path) -> None:
        path = Path(constants.HF_TOKEN_PATH)
        path.parent.mkdir()
        path.write_text(" \n")
        assert not plan_push(model, "me/mine").token_found
        path.write_text(TOKEN)
        assert plan_push(model, "me/mine").token_found

    def test_a_token_is_looked_for_without_asking_for_it(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`get_token` may renew it or exchange it for another, over the network."""
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("asked"))
        monkeypatch.setenv("HF_OIDC_RESOURCE", "me/mine")
        assert plan_push(model, "me/mine").token_found

    @pytest.mark.parametrize("repo_id", ["", "a/b/c", "me/-mine", "me/mi ne", "me/a--b", "me/a..b", "me/é", "me/a\nb"])
    def test_refuses_what_is_no_repository_id(self, model: Path, repo_id: str) -> None:
        with pytest.raises(PushError, match=r"not a name on the hub. Write OWNER/NAME") as caught:
            plan_push(model, repo_id)
        assert "\n" not in str(caught.value)

    def test_refuses_a_name_without_its_owner(self, model: Path) -> None:
        """The hub would put it into the account of whoever's token it is."""
        with pytest.raises(PushError, match=r"repository 'mine': has no owner\. Write OWNER/mine"):
            plan_push(model, "mine")

    def test_looks_at_the_repository_id_first(self, tmp_path: Path) -> None:
        with pytest.raises(PushError, match=r"not a name on the hub"):
            plan_push(tmp_path / "nothing", "a/b/c")

    @pytest.mark.parametrize("at", ["3", "first"])
    def test_refuses_weights_that_a_run_does_not_have(self, run: Path, at: str) -> None:
        with pytest.raises(UserError, match=f"step {at} has no checkpoint|--at {at}: write"):
            plan_push(run, "me/mine", at=at)

    def test_takes_the_step_from_the_name_of_the_run(self, run: Path) -> None:
        for at in ("best", "2"):
            assert plan_push(f"{run}@{at}", "me/mine") == plan_push(run, "me/mine", at=at)

    def test_uploads_an_adapter_as_it_is(self, tmp_path: Path) -> None:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{\n  "base_model_name_or_path": "/home/me/base"\n}\n')
        for name in ("README.md", "adapter_model.safetensors", "optimizer.pt"):
            (adapter / name).write_bytes(b"x")
        plan = plan_push(adapter, "me/mine")
        assert [file.path for file in plan.files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert plan.left_out == ("optimizer.pt",)
        (warning,) = plan.warnings
        assert '"base_model_name_or_path": "/home/me/base" is a path' in warning

    def test_refuses_a_step_of_a_plain_model(self, model: Path) -> None:
        with pytest.raises(PushError, match=r"--at best: .*model is not a run directory. Leave --at out"):
            plan_push(model, "me/mine", at="best")

    def test_refuses_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(
            PushError, match=r"has no config.json. Name a run, or the directory of a Hugging Face model"
        ):
            plan_push(tmp_path / "nothing", "me/mine")

    def test_refuses_a_model_without_weights(self, model: Path) -> None:
        (model / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"has no \*.safetensors"):
            plan_push(model, "me/mine")

    def test_refuses_a_damaged_checkpoint(self, run: Path) -> None:
        (run / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x")
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            plan_push(run, "me/mine", at="2")

    def test_refuses_a_damaged_journal(self, run: Path) -> None:
        data = (run / "journal.jsonl").read_bytes()
        (run / "journal.jsonl").write_bytes(data.replace(b'"step":2', b'"step":9'))
        with pytest.raises(JournalError, match=r"journal.jsonl:3: damaged line"):
            plan_push(run, "me/mine")

    def test_refuses_a_journal_that_ends_before_the_checkpoint(self, run: Path) -> None:
        (run / "journal.jsonl").write_bytes(journal_bytes(run, 1))
        with pytest.raises(PushError, match=r"journal.jsonl: ends before step 2. Restore it"):
            plan_push(run, "me/mine", at="2")

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "README.md"])
    def test_refuses_links_that_lead_outside(self, model: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "outside").write_text("secret")
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "outside")
        with pytest.raises(
            PushError, match=rf"{name}: not a file in .*model; links that lead out of it are not followed"
        ):
            plan_push(model, "me/mine")

    def test_refuses_links_of_a_run_that_lead_outside(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "outside").write_text("secret")
        (run / "report.html").symlink_to(tmp_path / "outside")
        with pytest.raises(PushError, match=r"report.html: not a file in .*run"):
            plan_push(run, "me/mine")

    def test_refuses_links_to_nothing(self, model: Path) -> None:
        (model / "vocab.json").symlink_to(model / "missing")
        with pytest.raises(PushError, match=r"vocab.json: not a file in"):
            plan_push(model, "me/mine")

    def test_links_within_the_directory_are_files(self, model: Path) -> None:
        (model / "vocab.json").symlink_to("config.json")
        assert sizes(plan_push(model, "me/mine"))["vocab.json"] == len(MODEL["config.json"])


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs. `answers` replaces replies: (method, path) -> (status, headers, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, str, bytes]] = []
        self.tokens: set[str | None] = set()
        self.answers: dict[tuple[str, str], tuple[int, dict[str, str], Any]] = {}
        self.private = False

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if answer := self.answers.get((method, path)):
            return answer
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.private = wanted.get("visibility") == "private"
            return 200, {}, {"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"}
        if path == "/api/validate-yaml" or "/branch/" in path:
            return 200, {}, {}
        if path == "/api/models/me/mine":
            return 200, {}, {"id": "me/mine", "private": self.private}
        if "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return 200, {}, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {}, {"transfer": "basic", "objects": objects}
        if path.startswith("/store/"):
            return 200, {}, {}
        if "/commit/" in path:
            return 200, {}, {"commitUrl": f"{self.url}/me/mine/commit/{'a' * 40}", "commitOid": "a" * 40}
        return 404, {}, {}

    def paths(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.requests]

    def bodies(self, start: str) -> list[bytes]:
        return [body for _, path, body in self.requests if path.startswith(start)]

    def committed(self, branch: str = "main") -> dict[str, bytes]:
        """Content by path of the one commit; of an LFS file what was stored under its hash."""
        (body,) = self.bodies(f"/api/models/me/mine/commit/{branch}")
        files = {}
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                (files[value["path"]],) = self.bodies(f"/store/{value['oid']}")
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
        return files


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = b"".join(self.chunks()) if self.headers.get("Transfer-Encoding") == "chunked" else self.body()
        path = self.path.partition("?")[0]
        if path != "/api/agent-harnesses":
            self.server.requests.append((self.command, path, body))
        if path.startswith("/api/models"):
            self.server.tokens.add(self.headers.get("Authorization"))
        status, headers, reply = self.server.reply(self.command, path, body)
        data = json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST  # the names that http.server looks for

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "AGENT_HARNESSES_PATH": str(tmp_path / "home" / "harnesses.json"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        huggingface_hub.close_session()


def test_a_run_is_pushed_in_one_commit(hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert push(plan_push(run, "me/mine", at="best", private=True)) == f"{hub.url}/me/mine"
    assert hub.committed() == MODEL | {
        "README.md": README.encode(),
        "eggroll.json": provenance(2),
        "eggroll/config.toml": CONFIG.encode(),
        "eggroll/journal.jsonl": journal_bytes(run, 2),
    }
    (created,) = hub.bodies("/api/repos/create")
    assert json.loads(created) == {"name": "mine", "organization": "me", "visibility": "private"}
    (commit,) = hub.bodies("/api/models/me/mine/commit/main")
    assert json.loads(commit.splitlines()[0])["value"]["summary"] == "Upload model, step 2"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr())


def test_what_was_pushed_of_a_run_is_a_run(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(plan_push(run, "me/mine", at="best"))
    (tmp_path / "eggroll").mkdir()
    for path, content in hub.committed().items():
        if path.startswith("eggroll/"):
            (tmp_path / path).write_bytes(content)
    fetched = RunDir.open(tmp_path / "eggroll")
    assert fetched.config.read_text() == CONFIG
    assert list(read_journal(fetched.journal).entries) == list(read_journal(run / "journal.jsonl").entries[:2])


def test_a_plain_model(hub: Hub, model: Path) -> None:
    assert push(plan_push(model, "me/mine")) == f"{hub.url}/me/mine"
    assert hub.committed() == MODEL | {"README.md": README.encode()}
    (created,) = hub.bodies("/api/repos/create")
    assert json.loads(created) == {"name": "mine", "organization": "me"}  # the account's own default of visibility


def test_a_branch_is_created(hub: Hub, model: Path) -> None:
    assert push(plan_push(model, "me/mine", revision="v2")) == f"{hub.url}/me/mine/tree/v2"
    assert hub.committed("v2").keys() == MODEL.keys() | {"README.md"}
    assert "POST /api/models/me/mine/branch/v2" in hub.paths()


def test_an_existing_repository_and_branch_are_used(hub: Hub, model: Path) -> None:
    hub.answers["POST", "/api/repos/create"] = (409, {}, {"url": f"{hub.url}/me/mine"})
    hub.answers["POST", "/api/models/me/mine/branch/v2"] = (409, {}, {})
    push(plan_push(model, "me/mine", revision="v2"))
    assert len(hub.committed("v2")) == len(MODEL) + 1


def test_private_is_not_pushed_to_a_public_repository(hub: Hub, model: Path) -> None:
    hub.answers["POST", "/api/repos/create"] = (409, {}, {"url": f"{hub.url}/me/mine"})
    with pytest.raises(PushError, match="me/mine: exists already and is public, so --private cannot keep"):
        push(plan_push(model, "me/mine", private=True))
    assert hub.paths() == ["POST /api/repos/create", "GET /api/models/me/mine"]


def test_a_journal_that_grows_is_pushed_as_planned(hub: Hub, run: Path) -> None:
    plan = plan_push(run, "me/mine")
    with (run / "journal.jsonl").open("ab") as file:
        file.write(b"more")
    push(plan)
    assert hub.committed()["eggroll/journal.jsonl"] == journal_bytes(run, 4)


def test_planning_sends_nothing(hub: Hub, run: Path) -> None:
    plan_push(run, "me/mine")
    assert hub.requests == []


COMMIT = ("POST", "/api/models/me/mine/commit/main")
CREATE = ("POST", "/api/repos/create")
INFO = ("GET", "/api/models/me/mine")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {
                CREATE: (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, {}),
                INFO: (401, {}, {}),
            },
            "me/mine: the hub does not accept the token. Run `hf auth login`, or set HF_TOKEN to a valid token "
            "(status 401: Invalid credentials in Authorization header).",
        ),
        (
            {CREATE: (403, {}, {"error": "You don't have the rights"}), INFO: (404, {}, {})},
            "me/mine: the token may not write there. Use a token with write access, and an OWNER that is you or an "
            "organisation of yours (status 403: You don't have the rights).",
        ),
        (
            {COMMIT: (404, {"X-Error-Code": "RepoNotFound"}, {})},
            "me/mine: not found, or hidden from this token. Check OWNER/NAME, and what the token may see (status 404).",
        ),
        (
            {COMMIT: (400, {}, {"error": "Files too large"})},
            "me/mine: the hub refuses. Correct what it names, or push again later (status 400: Files too large).",
        ),
        (
            {COMMIT: (500, {}, {"error": "two\nlines \x1b[2J\u202e"})},
            "me/mine: the hub refuses. Correct what it names, or push again later (status 500: two lines "
            r"\x1b[2J\u202e).",
        ),
    ],
    ids=["401", "403", "404", "400", "500"],
)
def test_a_refusal_is_one_line_with_a_remedy(hub: Hub, model: Path, answers: dict[Any, Any], message: str) -> None:
    hub.answers.update(answers)
    with pytest.raises(PushError) as caught:
        push(plan_push(model, "me/mine"))
    assert str(caught.value) == message


def test_a_refusal_of_the_weights_is_told_as_such(hub: Hub, model: Path) -> None:
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    hub.answers["PUT", f"/store/{oid}"] = (403, {}, {"error": "storage is full"})
    with pytest.raises(PushError, match=r"may not write there\. .* \(status 403: storage is full\)"):
        push(plan_push(model, "me/mine"))
    assert not hub.bodies("/api/models/me/mine/commit")


def test_metadata_that_the_hub_refuses_is_named(hub: Hub, model: Path) -> None:
    hub.answers["POST", "/api/validate-yaml"] = (400, {}, {"errors": [{"message": '"license" must be one of these'}]})
    with pytest.raises(PushError) as caught:
        push(plan_push(model, "me/mine"))
    assert str(caught.value) == (
        'me/mine: Invalid metadata in README.md. - "license" must be one of these. Correct the lines at the top of '
        f"{model}/README.md."
    )


def fails_with(expected: str, plan: PushPlan) -> None:
    with pytest.raises(UserError) as caught:
        push(plan)
    assert str(caught.value) == expected


def test_without_a_token_nothing_is_sent(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    expected = "me/mine: no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token with write access"
    fails_with(expected, plan_push(model, "me/mine"))
    assert hub.requests == []


def test_offline_mode(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails_with("me/mine: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it.", plan_push(model, "me/mine"))
    assert hub.requests == []


def test_a_hub_that_is_not_there(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        nobody = f"http://127.0.0.1:{other.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    expected = f"me/mine: {nobody} is not reached, or its client failed (ConnectError). Check the network."
    fails_with(expected, plan_push(model, "me/mine"))


def test_a_file_that_vanishes(hub: Hub, run: Path) -> None:
    plan = plan_push(run, "me/mine")
    (run / "config.toml").unlink()
    expected = (
        f"me/mine: {run}/config.toml cannot be read (No such file or directory). Push again when nothing writes there."
    )
    fails_with(expected, plan)
    assert not hub.bodies("/api/models/me/mine/commit")


@pytest.mark.parametrize("token", ["hf_Sécret", "hf_Secret\x01", "hf_Secret Secret"])
def test_a_token_that_is_no_header_is_not_repeated(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.answers[CREATE] = hub.answers[INFO] = (401, {}, {})
    with pytest.raises(PushError) as caught:
        push(plan_push(model, "me/mine"))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "cret" not in str(caught.value) + "".join(capfd.readouterr())
