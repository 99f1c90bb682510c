"""Graders: a completion goes in, a `Score` comes out.

The text is untrusted. A grader is total (no text raises, whatever it holds), evaluates nothing but its own
small grammar, and takes time linear in the length of the text. Standard library only, so that any training
stack can use it.
"""

from rewards import choice, countdown, exact, gsm8k, trl
from rewards.score import Score

__all__ = ["Score", "choice", "countdown", "exact", "gsm8k", "trl"]
