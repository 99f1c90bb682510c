"""The compiled library: built once, and every way of not getting one ends in torch operations that give the same."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parts import assert_parts_are_rows
from torch import Tensor

from eggroll_llm.es import noise
from eggroll_llm.es.noise import NoiseSpec
from eggroll_llm.kernels import build, member_term
from eggroll_llm.kernels import noise as rows
from eggroll_llm.system.hardware import cxx_compiler

SHAPES = [("a.weight", 37, 101), ("b.weight", 37, 101), ("c.weight", 64, 128), ("c.bias", 37, 0)]


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path))
    build.library.cache_clear()
    member_term.implementation.cache_clear()
    yield tmp_path
    build.library.cache_clear()
    member_term.implementation.cache_clear()


def assert_equal_factors(found: dict[str, tuple[Tensor, Tensor]], expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, (A_KOR, B_KIR) in expected.items():
        assert torch.equal(found[name][0], A_KOR)
        assert torch.equal(found[name][1], B_KIR)


def compiler(directory: Path, script: str) -> str:
    path = directory / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(cxx_compiler() is None, reason="needs a C++ compiler")
def test_it_is_compiled_once_and_leaves_nothing_else(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    path = build.build()
    before = path.stat()
    assert build.build() == path
    assert path.stat() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no g++"),
        ("echo 'x.cpp:1: fatal error: no such header' >&2; exit 1", "no such header"),
        ("exit 3", "status 3"),
    ],
)
def test_a_compiler_that_fails_is_one_line_and_the_fallback(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++" if script is None else compiler(empty_cache, script))
    with pytest.raises(build.BuildError, match=reason) as raised:
        build.build()
    assert "\n" not in str(raised.value)
    assert build.library() is None
    assert member_term.implementation() is member_term.add_term_torch
    spec, pairs_K = NoiseSpec(seed=1, step=2, rank=2, sigma=0.1), torch.tensor([3, 0])
    layout = rows.RowLayout(tuple(SHAPES), 2)
    expected = noise.served_factors_of(spec, pairs_K, SHAPES, torch.float32, "cpu")
    assert_equal_factors(layout.factors(rows.served_rows(spec, pairs_K, layout, torch.float32)), expected)
    assert_equal_factors(rows.served_factors_of(spec, pairs_K, SHAPES, torch.float32, "cpu"), expected)


def test_a_compiler_that_writes_rubbish_is_the_fallback(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(empty_cache, 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'))
    assert build.library() is None


@pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seed", "step"), [(0, 7), (2**63 + 12345, 1), (2**64 - 1, 2**32 - 1)])
def test_noise_has_the_bits_of_its_definition(rank: int, dtype: torch.dtype, seed: int, step: int) -> None:
    library = build.library()
    assert library is not None
    spec, pairs_K = NoiseSpec(seed=seed, step=step, rank=rank, sigma=0.0123), torch.tensor([0, 5, 2**32 - 1, 17])
    layout = rows.RowLayout(tuple(SHAPES), rank)
    found_KV = torch.empty(len(pairs_K), layout.width, dtype=dtype)
    rows.fill_native(library, found_KV, spec, pairs_K, layout)
    assert_equal_factors(layout.factors(found_KV), noise.served_factors_of(spec, pairs_K, SHAPES, dtype, "cpu"))


@pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("rank", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (8, torch.bfloat16)])
def test_parts_have_the_rows_of_the_whole(rank: int, dtype: torch.dtype) -> None:
    assert_parts_are_rows(rows.served_factors_of, rank, dtype, (137, 101))


@pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")
def test_a_million_values_of_noise_have_the_bits_of_their_definition() -> None:
    """Rare words (the ends of the logarithm's pieces, the largest radius) come up."""
    library = build.library()
    assert library is not None
    spec, pairs_K, shapes = NoiseSpec(seed=11, step=1, rank=4, sigma=1.0), torch.arange(64), [("w", 2048, 2048)]
    layout = rows.RowLayout(tuple(shapes), 4)
    found_KV = torch.empty(len(pairs_K), layout.width)
    rows.fill_native(library, found_KV, spec, pairs_K, layout)
    assert_equal_factors(layout.factors(found_KV), noise.served_factors_of(spec, pairs_K, shapes, torch.float32, "cpu"))
