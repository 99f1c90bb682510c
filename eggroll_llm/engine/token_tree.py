"""Completions that are scored together, packed so that every common prefix is computed once.

Sequences are sorted, so that the longest prefix that one shares with any before it is the one that it shares with its
predecessor, and only the rest of it is new:

    sequences   7 1 2 3      tree   7 1 2 3 | 4 | 5 6
                7 1 4        depth  0 1 2 3   2   1 2
                7 5 6        paths  0 1 2 3 / 0 1 4 / 0 5 6

A token sees the tokens on its path, which are before it in the tree. Attention over the tree is computed in blocks of
queries, each with the keys that any of them may see and a mask (tree attention; Miao et al., arXiv 2305.09781).

Shapes: J completion, T token of the tree, N scored token, Q query of a block, U key of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from eggroll_llm.engine.interface import Scored

BLOCK = 256
"""Queries per block: many short completions share a matrix product, and long ones waste little on what is masked."""


@dataclass(frozen=True, eq=False)
class Block:
    """Queries of attention, and what they see."""

    start: int
    """First token of the tree that asks."""
    stop: int
    """The one after the last."""
    keys_U: Tensor
    """Tokens of the tree that are seen by any of them, ascending, int64."""
    distance_QU: Tensor
    """How many positions a key is before the query, int32; negative where it is not on its path."""

    def mask(self, window: int | None) -> Tensor:
        """Return what is seen, boolean [Q, U], by a layer that looks at `window` positions, its own included."""
        seen_QU = self.distance_QU >= 0
        return seen_QU if window is None else seen_QU & (self.distance_QU < window)


class TokenTree:
    """The tokens that a forward pass has to see to score completions, and where the answers are read off."""

    def __init__(self, completions: Sequence[Scored]) -> None:
        """Pack completions."""
        # The last token of a completion is predicted and predicts nothing.
        inputs = [np.array((*prompt, *completion[:-1]), np.int64) for prompt, completion in completions]
        order = sorted(range(len(completions)), key=lambda j: completions[j][0] + completions[j][1][:-1])
        path_of: dict[int, np.ndarray] = {}
        new: list[np.ndarray] = []
        depths: list[np.ndarray] = []
        before, path, size = np.empty(0, np.int64), np.empty(0, np.int64), 0
        self._starts: list[tuple[int, np.ndarray]] = []  # first new token of a path, in the order of the tree
        for j in order:
            shared = _common_prefix(before, inputs[j])
            rest = inputs[j][shared:]
            path = np.concatenate((path[:shared], np.arange(size, size + len(rest))))
            if len(rest):
                self._starts.append((size, path))
                new.append(rest)
                depths.append(np.arange(shared, len(inputs[j])))
            path_of[j], before, size = path, inputs[j], size + len(rest)
        self.token_T = torch.from_numpy(np.concatenate(new))
        self.depth_T = torch.from_numpy(np.concatenate(depths))
        """Position of each token in its sequence."""
        rows = [path_of[j][len(prompt) - 1 :] for j, (prompt, _) in enumerate(completions)]
        self.row_N = torch.from_numpy(np.concatenate(rows))
        """The token of the tree that predicts each token of the completions, which are in the order given."""
        self.target_N = torch.tensor([token for _, completion in completions for token in completion])

    def __len__(self) -> int:
        return len(self.token_T)

    @cached_property
    def blocks(self) -> list[Block]:
        """Return all queries in blocks."""
        return [self._block(start, min(start + BLOCK, len(self))) for start in range(0, len(self), BLOCK)]

    def _block(self, start: int, stop: int) -> Block:
        ends = [first for first, _ in self._starts[1:]] + [len(self)]
        parts = [
            (max(first, start), min(end, stop), path)
            for (first, path), end in zip(self._starts, ends, strict=True)
            if first < stop and end > start
        ]
        keys = np.unique(np.concatenate([path[path < stop] for _, _, path in parts]))
        depths = self.depth_T.numpy()
        distance_QU = np.full((stop - start, len(keys)), -1, np.int32)
        for first, end, path in parts:
            seen = path[path < end]
            apart = depths[first:end, None] - np.arange(len(seen))
            distance_QU[first - start : end - start, np.searchsorted(keys, seen)] = np.maximum(apart, -1)
        return Block(start, stop, torch.from_numpy(keys), torch.from_numpy(distance_QU))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def trees_of(completions: Sequence[Scored], tokens: int) -> Iterator[tuple[range, TokenTree]]:
    """Yield consecutive completions as trees of at most so many tokens, by their positions in `completions`.

    Raises ValueError for a completion that is longer with its prompt.
    """
    start = 0
    while start < len(completions):
        stop, tree = start + 1, TokenTree(completions[start : start + 1])
        if len(tree) > tokens:
            raise ValueError(f"a completion of {len(tree)} tokens with its prompt: at most {tokens} can be scored")
        # Sequences only share tokens, so a tree never has more than they have together: double while it fits.
        step = len(completions) - start - 1
        while step:
            larger = TokenTree(completions[start : stop + step])
            if len(larger) <= tokens:
                stop, tree = stop + step, larger
                step = min(step, len(completions) - stop)
            else:
                step //= 2
        yield range(start, stop), tree
        start = stop
