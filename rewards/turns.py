"""Which part of a completion answers the prompt: the text outside thoughts, up to the next turn.

    <think>9 * 2</think>                a thought; nothing in it is an answer
    <|channel|>analysis<|message|>      begins one too, up to the channel "final"
    <|im_end|>   </s>   [INST]          special tokens that end a turn or begin one
    Human:   Question 2   user          the same in words, where a line begins or a sentence ends

A thought that the prompt has opened, as chat templates of reasoning models do, counts as if the completion began with
its tag. Everything before a closing tag without an opening one is thought too.
"""

import re
from collections import deque
from itertools import islice

THOUGHT = re.compile(
    r"(?i)<(/?)(?:seed:)?(?:think(?:ing)?|thought)>|\[(/?)think\]|\u25c1(/?)think\u25b7"
    r"|<\|(?:start\|>assistant<\|)?channel\|>(?:analysis|commentary|(?P<final>final))\b[^\n]{0,80}?<\|message\|>"
)
"""Tags that begin or end a thought."""
_BAR = "[|\uff5c]"
TURN_END = re.compile(
    rf"</s>|<eos>|<end_of_turn>|<{_BAR}(?:return|im_end|eot_id|eom_id|eot|end|end_of_turn|end_of_text|endoftext"
    rf"|end[\u2581_]of[\u2581_]sentence|END_OF_TURN_TOKEN){_BAR}>"
)
"""Special tokens that end the model's turn."""
TURN_START = re.compile(
    rf"<s>|<bos>|<start_of_turn>|\[/?INST\]|<<SYS>>|<(?i:user|human|assistant|system|question|problem)>|<{_BAR}(?i:start|im_start|start_header_id|start_of_role|begin_of_text"
    rf"|begin[\u2581_]of[\u2581_]sentence|user|assistant|system|human|START_OF_TURN_TOKEN){_BAR}>"
)
"""Special tokens that start a turn."""

MAX_CUES = 128
"""Places looked at of each cue, from the first; more are an attack on the clock."""
MAX_TURNS = 16
"""Next turns that are reported, from the first."""

_TOKEN = re.compile(f"{TURN_END.pattern}|{TURN_START.pattern}")
_ROLES = (
    *("Human", "User", "Assistant", "System", "HUMAN", "USER", "ASSISTANT", "SYSTEM"),
    *("human", "user", "assistant", "system", "model", "Student", "Teacher", "Tutor", "Bot", "AI", "Customer"),
)
_TOPICS = (
    *("Question", "Problem", "Exercise", "Instruction", "Example", "QUESTION", "PROBLEM", "EXERCISE"),
    *("question", "problem", "exercise", "Q", "Task", "Prompt", "Input", "Query", "Puzzle", "Challenge"),
    *("example", "Scenario", "scenario", "Problem statement", "Problem Statement", "Follow-up"),
    *("Another one", "another one"),
)
# What may stand in front of the cue, from the beginning of its line or the end of a sentence or answer.
_BEFORE = re.compile(
    r"(?P<line>\A|\n)?(?(line)|[0-9.!?)}\]$*`>%])[ \t]*+(?P<heading>(?:\#{1,6}|\*\*|\[|[>=_~-]++)?+)[ \t>*#]*+"
    r"(?(line)|(?![a-z]))"
    r"(?i:(?:now|here|let)[^\n]{0,24}\s)?"
    r"(?P<another>(?i:(?:the\s)?(?:next|another|one\smore|a?\s?new|follow[ -]?up|similar|second|third|last|final"
    r"|practice|bonus|word|story|math|sample|related|additional|extra)\s){0,2})\Z"
)
_ANSWER_END = re.compile(r"[0-9.!?)}\]$*>%]")
_REACH = 60
_NUMBER = (
    r"[ \t]?(?:(?i:no\.?|number)[ \t])?#?\(?"
    r"(?P<number>[0-9]{1,4}|(?i:one|two|three|four|five|six|seven|eight|nine|ten)\b)?\)?"
)
_COLON = re.compile(rf"{_NUMBER}[ \t*_]{{0,4}}(?:[:\uff1a\]]|\.(?!\w))")
_SPOKEN = re.compile(rf"{_NUMBER}[ \t*_]{{0,4}}[:\uff1a>\]]")
_ALONE = re.compile(
    rf"{_NUMBER}[ \t*_:#>\]]{{0,6}}(?:\([^()\n]{{0,40}}\)[ \t*_:]{{0,4}})?(?=\r?\n|\Z|{TURN_END.pattern})"
)
_LISTED = re.compile(r"[ \t]?#?[0-9]{1,4}(?:\)|[ \t]{1,2}[-\u2013\u2014])[ \t]")


def visible(text: str, *, thought_open: bool = False) -> str:
    """Return the text outside thoughts, each piece on lines of its own; a thought that is never closed hides the rest.

    `thought_open` says that the prompt ended in a thought.
    """
    if not thought_open and not THOUGHT.search(text):
        return text
    pieces: list[str] = []
    start, hidden = 0, thought_open
    for tag in THOUGHT.finditer(text):
        closes = any(tag.groups())
        if not hidden and closes and not tag["final"]:  # the prompt has opened it
            pieces.clear()
        elif not hidden:
            pieces.append(text[start : tag.start()])
        start, hidden = (tag.end(), False) if closes else (start, True)
    closed = [f"{piece}\n" for piece in pieces if piece]
    return "".join([*closed, "" if hidden else text[start:]])


def closes_thought(text: str) -> bool:
    """Return whether a thought ends in the text."""
    return any(any(tag.groups()) for tag in THOUGHT.finditer(text))


def ends_in_thought(prompt: str) -> bool:
    """Return whether a prompt, chat template applied, ends inside a thought that the completion continues.

    The tag must stand where a line or a turn begins: one in the middle of a sentence is only mentioned.
    """
    last = last_match(THOUGHT, prompt)
    if last is None or any(last.groups()):
        return False
    before = prompt[max(0, last.start() - _REACH) : last.start()].rstrip(" \t")
    return (not before or before[-1] in "\n:>]") and not next_turns(prompt[last.end() :])


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last match of a pattern in a text."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def next_turns(text: str, start: int = 0, end: int | None = None) -> list[int]:
    """Return where the text may go on to a next turn from `start` to `end`, in order: the first `MAX_TURNS` places."""
    end = len(text) if end is None else end
    found = {token.start() for token in islice(_TOKEN.finditer(text, start, end), MAX_TURNS)}
    # Finding a literal is many times faster than searching for a pattern.
    for cue in (*_ROLES, *_TOPICS):
        position = text.find(cue, start, end)
        for _ in range(MAX_CUES):
            if position < 0:
                break
            if _is_turn(text, position, cue):
                found.add(position)
            position = text.find(cue, position + 1, end)
    return sorted(found)[:MAX_TURNS]


def _is_turn(text: str, position: int, cue: str) -> bool:
    """Return whether a turn begins with the cue that stands there."""
    after, role = position + len(cue), cue in _ROLES
    if cue == "Question" and text.startswith((":", "\uff1a"), after):
        return True
    alone = _ALONE.match(text, after)
    said = _SPOKEN.match(text, after) if role else _COLON.match(text, after) or _LISTED.match(text, after)
    if not alone and not said:
        return False
    before = _BEFORE.search(text, max(0, position - _REACH), position)
    if role:
        line = before is not None and before["line"] is not None
        return bool((said and before) or (alone and (line or _ANSWER_END.match(text, position - 1))))
    plain = cue in ("Question", "Problem", "Problem statement", "Problem Statement")
    return before is not None and bool(
        said or plain or (alone and alone["number"]) or before["heading"] or before["another"]
    )
