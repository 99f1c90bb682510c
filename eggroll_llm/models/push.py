"""Puts a trained model on the Hugging Face hub: what would be uploaded, and the upload as a single commit.

    model files, README.md                                     of final/, a checkpoint, or any Hugging Face directory
    eggroll/config.toml, journal.jsonl, perhaps report.html    of a run; `eggroll-llm replay` takes that folder

Only files of known names are uploaded. The journal is cut after the step of the weights, so that a replay of what was
pushed gives what was pushed. `plan_push` uses no network. No message contains the token.
"""

import fnmatch
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eggroll_llm.errors import UserError
from eggroll_llm.models.adapter.peft_format import CONFIG, is_adapter
from eggroll_llm.models.files import weight_files
from eggroll_llm.records.journal import read_journal
from eggroll_llm.records.run_dir import RunDir
from eggroll_llm.records.weights import PROVENANCE, named_run, weights_at
from eggroll_llm.system.terminal import inert

_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
    # By name: a credentials.json or token.json must not match.
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json", "chat_template.json"),
    *(PROVENANCE, CONFIG),
)
# An assignment in TOML whose value, or an item of it, is a path from the root or from someone's home; not "/+-*".
_LOCAL_PATH = re.compile(r"""^\s*[^\s=#][^=]*=\s.*"(?:/[\w.]|~|file:|[A-Za-z]:(?:/|\\\\))""")
# One of a non-empty text whose name, or the key of an inline table, sounds like something secret.
_SECRET = re.compile(r"""([\w.-]*(?:token|key|secret|password)[\w.-]*)["']?\s*=\s*\[?\s*("[^"]|'[^'])""", re.IGNORECASE)
_NO_TOKEN = "no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token with write access"


class PushError(UserError):
    """The model cannot be pushed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushFile:
    """A file to upload."""

    path: str
    """Its path in the repository."""
    source: Path
    """Where it lies."""
    size: int
    """How many of its bytes are uploaded, from the start: all, but of a journal those up to the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushPlan:
    """What a push would do."""

    repo_id: str
    """Repository on the hub: OWNER/NAME."""
    private: bool
    """Whether only its owner may see it."""
    revision: str | None
    """Branch; None is main."""
    directory: Path
    """The model's directory."""
    step: int | None
    """Step of the weights; None for a directory that is not a run."""
    files: tuple[PushFile, ...]
    """What is uploaded, by path."""
    left_out: tuple[str, ...]
    """Names in the model's directory that are not uploaded."""
    warnings: tuple[str, ...]
    """What to think about first."""
    secrets: tuple[str, ...]
    """Names in the files that sound like those of secrets; what they hold would be published."""
    token_found: bool
    """Whether there is a token to log in with."""

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def lines(self) -> list[str]:
        """Return the plan as text to print."""
        lines = [
            f"repository: {self.repo_id} ({'private' if self.private else 'public'}), branch {self.revision or 'main'}",
            f"model: {self.directory}" + ("" if self.step is None else f", step {self.step}"),
            *(f"{file.size:>15,}  {file.path}" for file in self.files),
            f"{self.total:>15,}  bytes in {len(self.files)} files",
            *([f"left out: {', '.join(self.left_out)}"] if self.left_out else []),
            f"token: {'found' if self.token_found else _NO_TOKEN}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return [inert(line, 10_000) for line in lines]


def plan_push(
    source: Path | str, repo_id: str, *, at: str = "final", private: bool = False, revision: str | None = None
) -> PushPlan:
    """Return what pushing a run or a Hugging Face directory would upload; nothing is sent or changed.

    Args:
        source: run directory, also as "RUN@STEP", or directory of a model or an adapter.
        repo_id: repository on the hub: OWNER/NAME.
        at: of a run, which weights, see `weights_at`.
        private: whether a new repository is private; an existing one must be already.
        revision: branch, created when it is not there; None is main.

    Raises:
        UserError: nothing that can be pushed, or not a repository id.
    """
    _check_repo_id(repo_id)
    run, at = named_run(str(source), at) or (None, at)
    if run is None and at != "final":
        raise PushError(f"--at {at}: {source} is not a run directory. Leave --at out, or name a run directory.")
    directory, step = weights_at(run, at) if run else (Path(source), None)
    notes = []
    files, left_out = _model_files(directory)
    if run is not None and step is not None:
        # Only ES has its updates in the journal.
        ends = read_journal(run.journal).line_ends if run.has_updates_in_journal() else None
        files += _run_files(run, step, ends)
        last = len(ends) - 1 if ends is not None else run.last_logged_step() or 0
        if directory == run.final and step < last:
            notes.append(
                f"{directory}: is of step {step}, and the run went on after it, to step {last}. Step {step} "
                "is what is pushed; resume the run to its end, or use --at STEP, for a later one"
            )
    if not any(file.path == "README.md" for file in files):
        notes.append(f"{directory}: has no README.md, so the repository will have no model card")
    warnings, secrets = _private_settings(files)
    return PushPlan(
        repo_id=repo_id,
        private=private,
        revision=revision,
        directory=directory,
        step=step,
        files=tuple(sorted(files, key=lambda file: file.path)),
        left_out=tuple(left_out),
        warnings=(*notes, *warnings),
        secrets=tuple(secrets),
        token_found=_token_found(),
    )


def push(plan: PushPlan) -> str:
    """Create the repository if need be and upload all files in one commit; the address of the result.

    Raises:
        PushError: refused or not reached; no file was published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    try:
        token = get_token()
        if not token:
            raise PushError(f"{plan.repo_id}: {_NO_TOKEN}")
        api = HfApi(token=token)
        # None, not False: an organisation whose repositories are private by default keeps its default.
        repo = api.create_repo(plan.repo_id, private=plan.private or None, exist_ok=True)
        if plan.private and not api.model_info(repo.repo_id).private:
            raise PushError(
                f"{plan.repo_id}: exists already and is public, so --private cannot keep the files private. Make it "
                "private in its settings on the hub, name another repository, or leave --private out."
            )
        if plan.revision:
            api.create_branch(repo.repo_id, branch=plan.revision, exist_ok=True)
        api.create_commit(
            repo.repo_id,
            [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=_content(file)) for file in plan.files],
            commit_message="Upload model" if plan.step is None else f"Upload model, step {plan.step}",
            revision=plan.revision,
        )
    except UserError:
        raise
    except Exception as error:
        # Not `from error`: what the HTTP libraries say may quote the header with the token.
        raise PushError(inert(f"{plan.repo_id}: {_explain(error, plan)}", 2000)) from None
    return inert(f"{repo}/tree/{plan.revision}" if plan.revision else str(repo), 2000)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise PushError(
            f"repository {repo_id!r}: not a name on the hub. Write OWNER/NAME with letters, digits, single -, _ and "
            "single dots, at most 96 each."
        ) from None
    if "/" not in repo_id:
        raise PushError(
            f"repository {repo_id!r}: has no owner. Write OWNER/{repo_id}, with your name or your organisation's."
        )


def _model_files(directory: Path) -> tuple[list[PushFile], list[str]]:
    """Return the files of a model to upload, and the names of what else lies there."""
    if not (directory / "config.json").is_file() and not is_adapter(directory):
        raise PushError(f"{directory}: has no config.json. Name a run, or the directory of a Hugging Face model.")
    weight_files(directory)  # all there, or it says which is not
    files, left_out = [], []
    for entry in sorted(directory.iterdir()):
        if _is_model_file(entry.name) and not entry.is_dir():
            files.append(_push_file(entry.name, entry, directory))
        else:
            left_out.append(entry.name)
    return files, left_out


def _is_model_file(name: str) -> bool:
    return not name.startswith(".") and any(fnmatch.fnmatchcase(name, pattern) for pattern in _MODEL_FILES)


def _run_files(run: RunDir, step: int, line_ends: Sequence[int] | None) -> list[PushFile]:
    """Return what of a run is uploaded: enough for `replay`, where there is one, and the report."""
    if line_ends is not None and step >= len(line_ends):
        raise PushError(f"{run.journal}: ends before step {step}. Restore it, or push the model's directory by itself.")
    files = [_push_file("eggroll/config.toml", run.config, run.path)]
    if line_ends is not None:
        files.append(_push_file("eggroll/journal.jsonl", run.journal, run.path, line_ends[step]))
    report = run.path / "report.html"
    return [*files, _push_file("eggroll/report.html", report, run.path)] if report.is_file() else files


def _push_file(path: str, source: Path, root: Path, size: int | None = None) -> PushFile:
    if not source.is_file() or not source.resolve().is_relative_to(root.resolve()):
        raise PushError(
            f"{source}: not a file in {root}; links that lead out of it are not followed. Put a copy of the file there."
        )
    return PushFile(path=path, source=source, size=source.stat().st_size if size is None else size)


def _content(file: PushFile) -> Path | bytes:
    # The files of a run are small, and may grow while they are uploaded.
    return file.source.read_bytes()[: file.size] if file.path.startswith("eggroll/") else file.source


def _private_settings(files: Sequence[PushFile]) -> tuple[list[str], list[str]]:
    """Return a warning for each setting that looks secret or is a path of this machine, and the names of the former."""
    where: dict[str, list[str]] = {}
    secrets: list[str] = []
    for file in files:
        if file.path in ("README.md", CONFIG, "eggroll/config.toml", "eggroll/report.html"):
            text, folder = file.source.read_text(encoding="utf-8", errors="replace"), str(file.source.resolve().parent)
            if file.path.endswith(".html"):
                text = html.unescape(re.sub("<[^>]*>", "", text))
            for line in text.splitlines():
                if secret := _SECRET.search(line):  # its value is not repeated
                    secrets.append(secret[1])
                    where.setdefault(f"{secret[1]} looks like the name of a secret", []).append(file.path)
                elif _LOCAL_PATH.match(line.replace('": ', '" = ', 1) if file.path == CONFIG else line):
                    where.setdefault(f"{line.strip()} is a path of this machine", []).append(file.path)
                elif folder in line:
                    where.setdefault(f"{folder} is a path of this machine", []).append(file.path)
    warnings = [
        f"{' and '.join(dict.fromkeys(names))}: {what}, readable by all who can see the repository: use --private, or "
        "push a copy of the run without it"
        for what, names in where.items()
    ]
    return warnings, list(dict.fromkeys(secrets))


def _token_found() -> bool:
    """Return whether `get_token` would find one; it is not asked, as it renews some tokens over the network."""
    from huggingface_hub import constants

    if any(os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")):
        return True
    try:
        return bool(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return False


def _explain(error: Exception, plan: PushPlan) -> str:
    """Return one line: what went wrong and what to do. Only texts of which we know that they do not hold the token."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of one of the uploads that run side by side
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "").split())
        remedies = {
            401: "the hub does not accept the token. Run `hf auth login`, or set HF_TOKEN to a valid token",
            403: "the token may not write there. Use a token with write access, and an OWNER that is you or an "
            "organisation of yours",
            404: "not found, or hidden from this token. Check OWNER/NAME, and what the token may see",
        }
        remedy = remedies.get(status, "the hub refuses. Correct what it names, or push again later")
        return f"{remedy} (status {status}{f': {said}' if said else ''})."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read ({error.strerror}). Push again when nothing writes there."
    if isinstance(error, ValueError) and "README.md" in str(error):
        said = " ".join(str(error).split()).rstrip(".")
        return f"{said}. Correct the lines at the top of {plan.directory / 'README.md'}."
    return f"{constants.ENDPOINT} is not reached, or its client failed ({type(error).__name__}). Check the network."
