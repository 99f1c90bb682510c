"""The packed tree of completions, against attention over each sequence alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eggroll_llm.engine import token_tree
from eggroll_llm.engine.token_tree import TokenTree, trees_of

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)  # few tokens: much is shared
COMPLETIONS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8)


def paths(tree: TokenTree, window: int | None = None) -> list[list[int]]:
    """What each token of the tree sees, as the blocks say it."""
    seen = []
    for block in tree.blocks:
        mask_QU = block.mask(window)
        seen += [block.keys_U[row].tolist() for row in mask_QU]
    return seen


@given(completions=COMPLETIONS, block=st.integers(1, 7), window=st.sampled_from([None, 1, 3]))
def test_every_token_sees_its_own_sequence_and_nothing_else(completions, block, window) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_tree, "BLOCK", block)
        tree = TokenTree(completions)
        seen = paths(tree, window)
    tokens, n = tree.token_T.tolist(), 0
    for prompt, completion in completions:
        for t, target in enumerate(completion):
            row, sequence = int(tree.row_N[n]), prompt + completion[:t]
            assert [tokens[i] for i in seen[row]] == list(sequence if window is None else sequence[-window:])
            assert int(tree.depth_T[row]) == len(sequence) - 1
            assert int(tree.target_N[n]) == target
            n += 1
    assert n == len(tree.row_N)


@given(completions=COMPLETIONS)
def test_a_common_prefix_is_there_once(completions) -> None:
    sequences = [prompt + completion[:-1] for prompt, completion in completions]
    prefixes = {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}
    assert len(TokenTree(completions)) == len(prefixes)


@given(completions=COMPLETIONS, tokens=st.integers(17, 40))
def test_trees_are_within_the_bound_and_hold_all(completions, tokens) -> None:
    trees = list(trees_of(completions, tokens))
    assert [j for some, _ in trees for j in some] == list(range(len(completions)))
    for some, tree in trees:
        assert len(tree) <= tokens
        assert torch.equal(tree.target_N, TokenTree(completions[some.start : some.stop]).target_N)


def test_a_completion_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="a completion of 4 tokens with its prompt: at most 3"):
        list(trees_of([((1,), (2,)), ((1, 2), (3, 4, 5))], 3))
