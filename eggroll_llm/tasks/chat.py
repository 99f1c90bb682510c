"""The settings of [chat]: a system prompt, a chat template and its arguments; refused where they do nothing.

And thoughts, which the templates of reasoning models open.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from eggroll_llm.config.schema import ChatConfig
from eggroll_llm.errors import ConfigError, ModelError
from eggroll_llm.tasks.prompts import Prompt, Prompter
from rewards.turns import THOUGHT

# Tags that transformers adds to Jinja.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def is_chat(prompts: Sequence[Prompt]) -> bool:
    """Return whether the chat template is applied to any of the prompts."""
    return any(not isinstance(prompt, str) for prompt in prompts)


def check_chat(
    prompter: Prompter, prompts: Iterable[Prompt], remedy: str = "let the task return chat messages"
) -> None:
    """Raise UserError when settings of [chat] change nothing; `remedy` is one for prompts that are plain text."""
    chat = prompter.chat
    if chat == ChatConfig():
        return
    messages = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if messages is None:
        key = next(f"chat.{name}" for name in ("system", "template_file", "template_args") if getattr(chat, name))
        raise ConfigError(
            f"{key} is set, but the prompts are plain text, to which no chat template is applied: remove it, or "
            f"{remedy}"
        )
    text = prompter.render(messages)
    free, likely = _arguments(prompter.chat_template, chat.template_args)
    if unknown := [name for name in chat.template_args if name not in free]:
        nearest = difflib.get_close_matches(unknown[0], likely, n=1)
        hint = f"Did you mean {nearest[0]}?" if nearest else f"It has: {', '.join(sorted(likely)) or 'none'}."
        raise ConfigError(
            f"chat.template_args.{unknown[0]}: the chat template of {prompter.template_place} has no such argument. "
            f"{hint}"
        )
    # The text itself may be there although nothing changes: as the template's own default.
    if chat.system and chat.system.strip() not in text and text == prompter.apply_template(messages):
        raise ModelError(
            f"{prompter.template_place}: the chat template ignores the system prompt: remove chat.system, or put it "
            "into the task's prompt"
        )


def thought_tags(tokenizer: Any) -> dict[int, int]:
    """Return the tokens that open a thought, each with the one that closes it; {} for a tokenizer without them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})  # mistral-common's has none
    ids = {token.content: token_id for token_id, token in added.items() if THOUGHT.fullmatch(token.content)}
    closing = {text: f"{text[0]}/{text[1:]}" for text in ids}
    return {token_id: ids[closing[text]] for text, token_id in ids.items() if closing[text] in ids}


def check_thoughts(prompter: Prompter, budget: int, key: str = "sampling.thinking_token_budget") -> None:
    """Raise ConfigError where thoughts have a budget, set by `key`, and the model has no tokens that mark them."""
    if budget and not thought_tags(prompter.tokenizer):
        raise ConfigError(
            f"{key} = {budget}: the tokenizer of {prompter.model_dir} has no pair of tokens such as <think> and "
            "</think>: leave it out, or use a reasoning model"
        )


def _arguments(template: str, unknown: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the names that a chat template may take from its caller, and those that are most likely meant for it.

    Where the template cannot be parsed, both are those that are `unknown`.
    """
    import jinja2.ext
    import jinja2.meta
    from jinja2 import nodes

    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols], autoescape=True)  # nothing is rendered
    try:
        tree = environment.parse(_GENERATION.sub("", template))
        free = jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateError:
        return set(unknown), set(unknown)
    free -= {"messages", "add_generation_prompt", "raise_exception", "strftime_now", *environment.globals}
    # A name that is set in one branch is free in another: of those, arguments are the ones with a default.
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    defaults = [
        each
        for kind, names in ((nodes.Test, ("defined", "undefined")), (nodes.Filter, ("default", "d")))
        for each in tree.find_all(kind)
        if each.name in names
    ]
    own -= {each.node.name for each in defaults if isinstance(each.node, nodes.Name)}
    return free, {name for name in free - own if not name.endswith("_token")}
