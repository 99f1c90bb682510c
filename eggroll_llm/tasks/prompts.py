"""Prompts as tokens. Loads the tokenizer but not the model, so lengths are known before the engine starts."""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.config.schema import ChatConfig
from eggroll_llm.config.toml import is_unicode
from eggroll_llm.errors import ConfigError, ModelError, TaskError
from eggroll_llm.tasks.task import Problem, problem_text
from rewards.turns import ends_in_thought

Prompt = str | Sequence[Mapping[str, str]]
"""Plain text to be continued, or chat messages with "role" and "content"."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Problems with their prompts."""

    problems: Sequence[Problem]
    prompts: Sequence[tuple[int, ...]]
    """In tokens."""
    hashes: Sequence[str]
    """SHA-256 of the prompts' texts."""
    in_thought: Set[int] = frozenset()
    """Indices of the prompts that end in a thought, as the chat templates of reasoning models do."""
    questions: Sequence[str] = ()
    """The part of each prompt that is shown to readers; see `questions_of`."""
    example: str = ""
    """Text of the first prompt, chat template applied, to be shown."""
    kinds: Sequence[str] = ()
    """Kind of each problem, as its task tells them apart; empty where they were not asked for."""


_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model")
"""A tokenizer has at least one of these files; without any, transformers would create an empty tokenizer."""


class Prompter:
    """Turns prompts into tokens with a model's tokenizer and chat template."""

    def __init__(self, model_dir: Path, chat: ChatConfig | None = None) -> None:
        """Load the tokenizer, and the chat template if one is named.

        Raises ModelError when the tokenizer is missing or damaged, or would run its own code, and ConfigError when the
        template cannot be read.
        """
        from transformers import AutoTokenizer

        self.model_dir, self.chat = model_dir, chat or ChatConfig()
        self._template = _read_template(self.chat.template_file)
        if not any(found for pattern in _VOCABULARIES for found in model_dir.glob(pattern)):
            raise ModelError(
                f"{model_dir} has no tokenizer (none of {', '.join(_VOCABULARIES)}): copy it from the original model"
            )
        try:
            if "auto_map" in _read_object(model_dir / "tokenizer_config.json"):
                # Not left to transformers, which takes another tokenizer in its place for some models.
                raise ModelError(
                    f"{model_dir / 'tokenizer_config.json'}: 'auto_map' asks to run Python code shipped with the model"
                    ", which is never allowed: use a model whose tokenizer transformers implements"
                )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        except ModelError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever the file makes them stumble over
            raise ModelError(
                f"{model_dir}: the tokenizer cannot be loaded ({type(error).__name__}: {_shown(error, 200)}): restore "
                "it from the original model"
            ) from error

    @property
    def has_chat_template(self) -> bool:
        """Return whether chat messages can be rendered."""
        return bool(self._template) or self.tokenizer.chat_template is not None

    @property
    def chat_template(self) -> str:
        """Return the template of chat messages: that of `chat.template_file`, else the model's."""
        return self._template or str(self.tokenizer.get_chat_template())

    @property
    def template_place(self) -> Path | str:
        """Return where it comes from."""
        return self.chat.template_file or self.model_dir

    def render(self, prompt: Prompt) -> str:
        """Return the prompt's text, chat template applied.

        Raises ModelError when it needs a template and there is none, or the template fails.
        """
        if isinstance(prompt, str):
            return prompt
        if not self.has_chat_template:
            raise ModelError(
                f"{self.model_dir}: the tokenizer has no chat template, which the task's chat messages need: "
                'use prompt_style = "few_shot" in [task_options], an instruct model, or chat.template_file'
            )
        return self.apply_template(with_system(self.chat, prompt))

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of messages, no system prompt added. Raises ModelError when the template does.

        transformers runs templates in Jinja's sandbox, from which they reach no files and no code.
        """
        own = {"chat_template": self._template} if self._template else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [*messages], add_generation_prompt=True, tokenize=False, **self.chat.template_args, **own
                )
            )
        except Exception as error:
            remedy = "remove chat.system, or change" if self.chat.system else "change"
            raise ModelError(
                f"{self.template_place}: the chat template does not take the task's messages ({type(error).__name__}: "
                f"{_shown(error, 200)}): {remedy} the task's prompt, or use another model"
            ) from error

    def encode(self, prompt: Prompt, *, bos_by_text: bool = False) -> tuple[int, ...]:
        """Return the prompt's tokens. Raises ModelError like `render`.

        The tokenizer adds its special tokens to plain text, and not to messages, as a chat template writes them itself.
        With `bos_by_text` it adds them to any text that does not start with one, which is lm-eval's rule.
        """
        return self._tokens(self.render(prompt), plain=isinstance(prompt, str), bos_by_text=bos_by_text)

    def encode_all(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Prompt],
        *,
        kinds: Sequence[str] = (),
        bos_by_text: bool = False,
    ) -> ProblemSet:
        """Return the problems with their prompts, in tokens, and their kinds; all are given in the same order."""
        texts = [self.render(prompt) for prompt in prompts]
        for problem, text in zip(problems, texts, strict=True):
            if not is_unicode(text):
                raise TaskError(
                    f"the prompt of problem {problem.get('id')!a:.60} is not valid Unicode: it holds half of a "
                    "surrogate pair; write the whole character, or remove the problem"
                )
        tokens = [
            self._tokens(text, plain=isinstance(prompt, str), bos_by_text=bos_by_text)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        if () in tokens:
            raise TaskError(f"the prompt of problem {problems[tokens.index(())].get('id')!a:.60} is empty: write one")
        return ProblemSet(
            problems=problems,
            prompts=tokens,
            hashes=[text_hash(text) for text in texts],
            in_thought={index for index, text in enumerate(texts) if ends_in_thought(text)},
            questions=questions_of(prompts),
            example=texts[0] if texts else "",
            kinds=kinds,
        )

    def _tokens(self, text: str, *, plain: bool, bos_by_text: bool) -> tuple[int, ...]:
        special = plain
        if bos_by_text:
            bos = self.tokenizer.bos_token or self.tokenizer.eos_token
            special = bos is None or not text.startswith(bos)
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def questions_of(prompts: Sequence[Prompt]) -> list[str]:
    """Return the last line of each prompt that is not in all of them, cut to 200 characters.

    That is the question, without examples, instructions and the start of the answer.
    """
    texts = [p if isinstance(p, str) else "\n".join(str(message.get("content")) for message in p) for p in prompts]
    lines_P = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    common = set.intersection(*map(set, lines_P)) if len(lines_P) > 1 else set()
    own_P = [next((line for line in reversed(lines) if line not in common), "".join(lines[-1:])) for lines in lines_P]
    return [line[:200] for line in own_P]


def set_hash(hashes: Sequence[str]) -> str:
    """Return one hash of the hashes of many prompts, in their order."""
    return text_hash("\n".join(hashes))


def problems_hash(problems: ProblemSet) -> str:
    """Return one hash of the problems and their prompts, in order; what JSON cannot say counts by its type."""
    rows = zip(problems.hashes, problems.problems, strict=True)
    return set_hash([f"[{json.dumps(prompt)}, {problem_text(problem)}]" for prompt, problem in rows])


def text_hash(text: str) -> str:
    """Return SHA-256 of a text as hex digits, lm-evaluation-harness's `prompt_hash`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def needed_context(
    problem_sets: Sequence[ProblemSet],
    max_tokens: int,
    limit: int,
    model_limit: int,
    *,
    length_key: str = "sampling.max_tokens",
    context_key: str = "engine.max_model_len",
    shorten: str = "shorten the prompts",
) -> int:
    """Return the context length to serve: `limit` when set, else just what is needed, in whole blocks of 32 tokens.

    Raises ConfigError with their number when prompts with completions do not fit; nothing is truncated. `length_key`
    and `context_key` name the settings of `max_tokens` and `limit`; only remedies that would help are proposed.
    """
    if limit > model_limit:
        raise ConfigError(
            f"{context_key} = {limit}: the model takes {model_limit} tokens: set it to that or less, or to 0"
        )
    lengths = [
        (len(prompt), problem.get("id", number))
        for problems in problem_sets
        for number, (prompt, problem) in enumerate(zip(problems.prompts, problems.problems, strict=True))
    ]
    longest = max(tokens for tokens, _ in lengths)
    allowed, needed = limit or model_limit, longest + max_tokens
    if too_long := [each for each in lengths if each[0] + max_tokens > allowed]:
        key = f"{context_key} = {limit}" if limit else f"the model's context of {model_limit} tokens"
        (tokens, name), are = too_long[0], "is" if len(too_long) == 1 else "are"
        remedies = [f"raise {context_key} to {needed}"] if needed <= model_limit else []
        remedies += [f"lower {length_key} to {allowed - longest}"] if longest < allowed else []
        remedies += [shorten] + (["use a model with a longer context"] if needed > model_limit else [])
        remedy = " or ".join([*([", ".join(remedies[:-1])] if remedies[1:] else []), remedies[-1]])
        raise ConfigError(
            f"{len(too_long):,} of {len(lengths):,} prompts {are} too long, first {_shown(name, 60)} with {tokens} "
            f"tokens; the longest prompt has {longest} tokens and completions up to {max_tokens}, together "
            f"{needed}, but {key} allows {allowed}: {remedy}"
        )
    return limit or min(model_limit, -(-needed // 32) * 32)


def _shown(value: object, limit: int) -> str:
    """Return the text of something from a file, on one line, cut, and without anything that acts on a terminal."""
    return repr(" ".join(str(value).split())[:limit])[1:-1]


def _read_template(file: str) -> str:
    if not file:
        return ""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat.template_file = {file!r}: cannot be read ({_shown(error, 200)}): name a text file in UTF-8"
        ) from error
    if not text.strip():
        raise ConfigError(f"chat.template_file = {file!r}: is empty: write a chat template into it, or leave it out")
    return text


def _read_object(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; empty without the file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    return content


def with_system(chat: ChatConfig, prompt: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the messages with the system prompt, if any, before them. Raises ConfigError when they have one."""
    messages = [dict(message) for message in prompt]
    if not chat.system:
        return messages
    if any(message["role"] in ("system", "developer") for message in messages):
        raise ConfigError(
            f"chat.system = {chat.system!a:.60}: the task's messages have a system prompt already: remove it there, or "
            'set chat.system = ""'
        )
    return [{"role": "system", "content": chat.system}, *messages]
