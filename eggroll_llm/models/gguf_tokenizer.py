"""The tokenizer of a GGUF file, written as the original's would be.

A GGUF has the vocabulary, the merges and the names of a pre-tokenizer and of a few special tokens, but not the rules
behind these names. `FAMILIES` has them, as they are in the tokenizer.json and generation_config.json of the originals.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll_llm.errors import ModelError
from eggroll_llm.system.terminal import inert

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Types of tokens: matched whole and skipped in text, matched whole, and none that the original has (padding)."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a GGUF's `tokenizer.ggml.pre` stands for."""

    split: str | None
    """Pattern that cuts text before the merges; None for GPT-2's, behind single digits."""
    nfc: bool = False
    """Whether text is normalised (Unicode NFC) first."""
    whole_words: bool = False
    """Whether a piece that is a token is taken as it is, without merges."""
    adds_bos: bool = False
    """Whether text begins with the bos token where the GGUF does not say."""
    has_bos: bool = True
    """Whether the tokenizer has a bos token at all; a GGUF names one always."""
    also_ends: tuple[str, ...] = ()
    """Tokens that end a chat's answer besides the eos token."""


FAMILIES = {
    "smollm": Family(split=None),
    "qwen2": Family(split=rf"{_WORDS}\p{{N}}{_OTHER}", nfc=True, has_bos=False, also_ends=("<|endoftext|>",)),
    "llama-bpe": Family(
        split=rf"{_WORDS}\p{{N}}{{1,3}}{_OTHER}",
        whole_words=True,
        adds_bos=True,
        also_ends=("<|end_of_text|>", "<|eom_id|>"),
    ),
}
"""SmolLM and SmolLM2; Qwen2, 2.5 and 3; Llama 3."""


def family_of(metadata: Mapping[str, Any], path: Path) -> Family:
    """Return the family of a GGUF's tokenizer. Raises ModelError where its rules are not known."""
    kind, name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"{path}: its tokenizer is of type {inert(str(kind))!r} with pre-tokenizer {inert(str(name))!r}; known are "
            f"'gpt2' with {', '.join(map(repr, FAMILIES))}: use the original's directory or hub id"
        )
    return FAMILIES[name]


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of bos, eos, pad and unk as config.json has them: `bos_token_id` and so on, if the GGUF does."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    size = len(metadata["tokenizer.ggml.tokens"])
    return {name: id for name, id in found.items() if isinstance(id, int) and 0 <= id < size}


def ends(metadata: Mapping[str, Any], family: Family) -> int | list[int] | None:
    """Return the ids that end an answer, as generation_config.json has them: one, several, or None."""
    tokens = metadata["tokenizer.ggml.tokens"]
    eos = special_ids(metadata).get("eos_token_id")
    if eos is None or not re.fullmatch(r"<\|(im_end|eot_id)\|>", tokens[eos]):  # a base model's answer is no turn
        return eos
    others = [tokens.index(name) for name in family.also_ends if name in tokens]
    return [eos, *others] if others else eos


def write_tokenizer(metadata: Mapping[str, Any], path: Path, directory: Path, context: int) -> None:
    """Write tokenizer and chat template of the GGUF at `path` into `directory`. Raises ModelError."""
    from transformers import PreTrainedTokenizerFast

    family, tokens = family_of(metadata, path), metadata["tokenizer.ggml.tokens"]
    special = {name.removesuffix("_id"): tokens[id] for name, id in special_ids(metadata).items()}
    if not family.has_bos:
        special.pop("bos_token", None)
    template = metadata.get("tokenizer.chat_template")
    PreTrainedTokenizerFast(
        tokenizer_object=_backend(metadata, path, family),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **special,
        **({"chat_template": template} if isinstance(template, str) else {}),
    ).save_pretrained(directory)


def _backend(metadata: Mapping[str, Any], path: Path, family: Family) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=family.whole_words))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(
            f"{path}: its merges do not fit its tokens ({inert(str(error))}): download it again"
        ) from error
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    first = (
        pre_tokenizers.Split(Regex(family.split), behavior="isolated")
        if family.split
        else pre_tokenizers.Digits(individual_digits=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not family.split)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos = special_ids(metadata).get("bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", family.adds_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    for kind in (_CONTROL, _USER_DEFINED):
        chosen = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        tokenizer.add_special_tokens(chosen) if kind == _CONTROL else tokenizer.add_tokens(chosen)
    return tokenizer
