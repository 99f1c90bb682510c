"""How much of a change of weights an adapter keeps, in figures and in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from eggroll_llm.models.targets import TARGET_MODULES

WARN_BELOW = 0.9
"""Share of the change; an adapter that keeps less comes with a warning."""
SHARES = (0.5, 0.9)
"""For which it is said what rank would keep them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A weight, and what its two factors leave of its change."""

    name: str
    change: float
    """Frobenius norm of D."""
    lost: float
    """Frobenius norm of D - B A."""

    @property
    def module(self) -> str:
        """Name of the layer within its block, such as q_proj."""
        return self.name.split(".")[-2]

    @property
    def error(self) -> float:
        """Relative Frobenius error; 0 where nothing changed."""
        return self.lost / self.change if self.change else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """How much of the change of a model an adapter keeps; shares are of its squared Frobenius norm."""

    rank: int
    layers: tuple[Layer, ...]
    left_out: Mapping[str, float]
    """Norm of the change of weights that changed and cannot be in an adapter, by name."""
    needed: Mapping[float, int]
    """Rank that would keep a share; empty where a layer is so large that it was not computed."""

    @property
    def error(self) -> float:
        """Relative Frobenius error of the whole model."""
        lost = math.hypot(*(layer.lost for layer in self.layers), *self.left_out.values())
        return lost / math.hypot(*(layer.change for layer in self.layers), *self.left_out.values())

    @property
    def share(self) -> float:
        """Share of the change that the adapter keeps."""
        return 1 - self.error**2

    @property
    def share_left_out(self) -> float:
        """Share of the change that is in weights which cannot be in an adapter."""
        left_out = math.hypot(*self.left_out.values())
        return left_out**2 / math.hypot(*(layer.change for layer in self.layers), left_out) ** 2

    def lines(self) -> list[str]:
        """Return the figures as sentences."""
        changed = [layer for layer in self.layers if layer.change]
        by_module = sorted(changed, key=lambda layer: TARGET_MODULES.index(layer.module))
        errors = {name: [one.error for one in group] for name, group in groupby(by_module, lambda one: one.module)}
        lines = [
            f"kept: {self.share:.1%} of the change of weights (its squared Frobenius norm), relative error "
            f"{self.error:.3f}",
            "relative error of a layer: "
            + ", ".join(f"{name} {min(found):.3f} to {max(found):.3f}" for name, found in errors.items()),
        ]
        if self.left_out:
            names = list(self.left_out)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(
                f"not in the adapter, which can only change linear layers of blocks: {', '.join(names[:3])}{more}, "
                f"{self.share_left_out:.1%} of the change"
            )
        return [*lines, *([f"warning: {self.warning}"] if self.warning else [])]

    @property
    def warning(self) -> str:
        """What to know of an adapter that keeps too little; empty where it keeps enough."""
        if self.share >= WARN_BELOW:
            return ""
        needed = " and ".join(f"{share:.0%} of it needs rank {rank}" for share, rank in self.needed.items())
        return (
            f"rank {self.rank} keeps {self.share:.1%} of the change{f'; {needed}' if needed else ''}. A change that "
            "was not trained as an adapter, such as that of evolution strategies, is nearly of full rank: evaluate the "
            "adapter before you use it, or take the full model"
        )
