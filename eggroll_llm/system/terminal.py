"""Text of models, graders and files in a form that does nothing to the terminal that shows it."""

SAMPLE_CHARACTERS = 160


def inert(text: str, limit: int = SAMPLE_CHARACTERS) -> str:
    """Return text in which nothing acts on a terminal: control and direction characters are escaped, the rest cut."""
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def inert_lines(text: str, limit: int) -> str:
    """Return text whose lines are kept and otherwise inert; what is longer than `limit` characters is cut."""
    shown = text[:limit] + ("…" if len(text) > limit else "")
    return "\n".join(inert(line, 10 * limit) for line in shown.split("\n"))
