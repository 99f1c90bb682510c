"""Draw docs/figures/*.svg: `python scripts/figures.py`. Standard library only.

`overview.svg` shows the numbers of docs/figures/measured.json, each of which names its source; `step.svg` is a diagram.
Every figure adapts to a light and a dark display by itself.
"""

import json
import statistics
from pathlib import Path
from xml.sax.saxutils import escape

FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# Okabe and Ito 2008, "Color Universal Design"; in the dark the brighter of similar hues.
STYLE = """
svg { background: #ffffff }
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px } .small { font-size: 11.5px; fill: #59636e } .strong { font-weight: 600 }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 11.5px; fill: #59636e }
.end { text-anchor: end } .middle { text-anchor: middle }
.ours, .ES { fill: #0072b2 } .GRPO { fill: #d55e00 } .other, .base { fill: #afb8c1 }
.inside { fill: #ffffff }
.grid { stroke: #d1d9e0 } .line { stroke: #59636e; fill: none } .dash { stroke: #59636e; stroke-dasharray: 4 3 }
.seed { fill: none; stroke: #24292f; stroke-width: 1.2 }
.box { fill: #f6f8fa; stroke: #59636e } .noise { fill: #ddf4ff; stroke: #0072b2 }
.disk { fill: #fff1e5; stroke: #d55e00 }
.arrow { fill: #59636e }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117 } text { fill: #e6edf3 } .small, .code { fill: #9198a1 }
  .ours, .ES { fill: #56b4e9 } .GRPO { fill: #e69f00 } .other, .base { fill: #59636e }
  .inside { fill: #0d1117 } .grid { stroke: #3d444d } .line, .dash { stroke: #9198a1 } .seed { stroke: #e6edf3 }
  .box { fill: #151b23; stroke: #9198a1 } .noise { fill: #0c2d48; stroke: #56b4e9 }
  .disk { fill: #3a2410; stroke: #e69f00 }
  .arrow { fill: #9198a1 }
}
"""


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Return words at a point, the baseline's start unless the style says otherwise."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str, radius: float = 0) -> str:
    """Return a rectangle by its upper left corner."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" class="{style}"/>'


def line(x1: float, y1: float, x2: float, y2: float, style: str, arrow: bool = False) -> str:
    """Return a straight line, with a head at its end if it is an arrow."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="{style}"{head}/>'


def document(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole SVG file; sizes are in pixels."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" class="arrow"/></marker></defs>'
    )
    body = "\n".join([head, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def overview(measured: dict) -> str:
    """Return the figure of the README: throughput and accuracy."""
    return document(
        960,
        318,
        "Left: throughput of a population next to plain vLLM, on CPU and GPU. Right: accuracy of ES and GRPO",
        [*speed(measured["speed"], x=16, width=500), *accuracy(measured["accuracy"], x=548, width=396)],
    )


def speed(groups: dict, x: float, width: float) -> list[str]:
    """Return bars: throughput as a fraction of plain vLLM's."""
    label, top, bar = 222, 44, 17
    left, scale = x + label, width - label - 36
    parts = [text(x, 22, "Sampling throughput, plain vLLM = 1", "title")]
    y: float = top
    for name, group in groups.items():
        parts.append(text(x, y + 12, name, "strong"))
        y += 22
        tall = 25 * len(group["rows"]) - 8
        parts += [line(left, y - 4, left, y + tall + 4, "line")]
        parts += [line(left + scale, y - 4, left + scale, y + tall + 4, "dash")]
        for row, value, style in group["rows"]:
            inside = value > 0.8
            at = left + value * scale + (-6 if inside else 6)
            parts += [
                text(left - 8, y + 13, row, "end"),
                rectangle(left, y, value * scale, bar, style, 2),
                text(
                    at,
                    y + 13,
                    f"{value:.2f}",
                    ("end inside " if inside else "") + ("strong" if style == "ours" else ""),
                ),
            ]
            y += 25
        y += 16
    parts.append(text(left + scale, y + 1, "plain vLLM, compiled", "small middle"))
    return parts


def accuracy(groups: dict, x: float, width: float) -> list[str]:
    """Return columns: base model, and the mean of three seeds of each method, with the seeds as circles."""
    top, height, most = 60, 190, 80.0
    left, bottom = x + 30, top + height
    parts = [text(x, 22, "Held-out accuracy in %, three seeds each", "title")]
    for tick in (0, 20, 40, 60, 80):
        y = bottom - tick / most * height
        parts += [line(left, y, x + width, y, "grid"), text(left - 6, y + 4, str(tick), "small end")]
    pitch = (width - 30) / len(groups)
    for index, (name, group) in enumerate(groups.items()):
        start = left + index * pitch + 10
        for column, (label, values) in enumerate([("base", [group["base"]]), *((m, group[m]) for m in ("ES", "GRPO"))]):
            mean, at = statistics.mean(values), start + column * 35
            tall = mean / most * height
            parts.append(rectangle(at, bottom - tall, 30, tall, label, 2))
            if len(values) > 1:
                spread = ((bottom - value / most * height) for value in values)
                parts += [f'<circle cx="{at + 15:.1f}" cy="{y:.1f}" r="3" class="seed"/>' for y in spread]
            parts.append(text(at + 15, bottom + 15, f"{mean:.1f}", "small middle"))
        y = bottom - group["constant"] / most * height
        parts.append(line(start - 5, y, start + 108, y, "dash"))
        what, _, how = name.partition(", ")
        parts += [text(start + 50, bottom + 34, what, "middle"), text(start + 50, bottom + 51, how, "small middle")]
    legend = left - 4
    for label, words, advance in (("base", "base model", 92), ("ES", "ES", 42), ("GRPO", "GRPO", 60)):
        parts += [rectangle(legend, 36, 11, 11, label, 2), text(legend + 16, 46, words, "small")]
        legend += advance
    return [
        *parts,
        line(legend, 42, legend + 20, 42, "dash"),
        text(legend + 26, 46, "best constant answer", "small"),
    ]


def step() -> str:
    """Return one step of training as data: boxes are data or work, the line below a name is the folder it lives in."""
    width, height = 166, 62
    columns = [16 + index * (width + 24.5) for index in range(5)]
    above, below, middle = 40, 246, 143

    def box(column: float, y: float, name: str, detail: str, folder: str, style: str = "box") -> list[str]:
        at = column + width / 2
        return [
            rectangle(column, y, width, height, style, 6),
            text(at, y + 20, name, "middle strong"),
            text(at, y + 36, detail, "middle small"),
            text(at, y + 53, folder, "middle code"),
        ]

    across = [columns[index] + width for index in range(5)]
    centre = [column + width / 2 for column in columns]
    parts = [
        *box(columns[0], above, "problems", "new ones in each step", "tasks/"),
        *box(columns[1], above, "requests", "members × problems", "engine/"),
        *box(columns[2], above, "one mixed batch", "a member per adapter slot", "engine/vllm/"),
        *box(columns[3], above, "completions", "graded, or score 0", "tasks/, rewards/"),
        *box(columns[4], above, "rewards_MP", "member × problem", "training/"),
        *box(columns[4], below, "fitness_M", "one number per member", "es/"),
        *box(columns[3], below, "journal line", "synced to disk first", "records/", "disk"),
        *box(columns[2], below, "update", "float32 master weights", "es/, kernels/"),
        *box(columns[1], below, "served weights", "rounded, rewritten in place", "engine/vllm/"),
        *box(columns[2], middle, "noise A, B", "f(seed, step, pair, weight)", "es/, kernels/", "noise"),
    ]
    row, back = above + height / 2, below + height / 2
    parts += [line(across[index] + 2, row, columns[index + 1] - 3, row, "line", True) for index in range(4)]
    parts += [line(columns[index] - 2, back, across[index - 1] + 3, back, "line", True) for index in (4, 3, 2)]
    parts.append(line(centre[4], above + height + 2, centre[4], below - 3, "line", True))
    parts.append(line(centre[2], middle - 2, centre[2], above + height + 3, "line", True))
    parts.append(line(centre[2], middle + height + 2, centre[2], below - 3, "line", True))
    corner = f"M{centre[1]:.1f} {below - 2:.1f}V{middle + 12:.1f}L{columns[2] + 12:.1f} {above + height + 3:.1f}"
    parts.append(f'<path d="{corner}" class="line" marker-end="url(#head)"/>')
    parts += [
        text(columns[0], 22, "One step", "title"),
        text(centre[4] - 8, (above + height + below) / 2 + 4, "centred, scaled", "small end"),
        text(columns[3], below + height + 22, "Replay: base model + journal → the weights of any step,", "small"),
        text(columns[3], below + height + 38, "without sampling", "small"),
        text(
            columns[0],
            below + height + 22,
            "Noise is regenerated where it is needed and never stored or sent.",
            "small",
        ),
    ]
    return document(960, 356, "One step of training, from problems to updated weights", parts)


if __name__ == "__main__":
    numbers = json.loads((FIGURES / "measured.json").read_text(encoding="utf-8"))
    (FIGURES / "overview.svg").write_text(overview(numbers), encoding="utf-8")
    (FIGURES / "step.svg").write_text(step(), encoding="utf-8")
