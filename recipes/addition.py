"""Sums of two-digit numbers, four of ten of which SmolLM2-135M-Instruct solves, and a constant answer one of 60."""

import random
from typing import Any

from rewards import Score

HELD_OUT = 512


class Addition:
    """The task."""

    stop = ("\n",)

    def problems(self, split: str) -> list[dict[str, Any]]:
        pairs = [{"id": f"{a}+{b}", "a": a, "b": b} for a in range(10, 100) for b in range(10, 100)]
        random.Random(0).shuffle(pairs)
        return pairs[:HELD_OUT] if split == "test" else pairs[HELD_OUT:]

    def prompt(self, problem: dict[str, Any]) -> str:
        return f"23 + 45 = 68\n81 + 17 = 98\n{problem['a']} + {problem['b']} ="

    def gold(self, problem: dict[str, Any]) -> str:
        return f" {problem['a'] + problem['b']}"

    def kind(self, problem: dict[str, Any]) -> str:
        return "carry" if problem["a"] % 10 + problem["b"] % 10 > 9 else "no carry"

    def score(self, completion: str, problem: dict[str, Any]) -> Score:
        answer = completion.strip()
        right = answer == str(problem["a"] + problem["b"])
        digits = answer.isascii() and answer.isdigit()  # a number at all is worth a little
        return Score(reward=1.0 if right else 0.1 * digits, correct=right, detail="sum" if digits else "no number")
