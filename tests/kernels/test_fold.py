"""The compiled fold and Triton's against torch: the same sums to float32, the same rounding, the same update."""

import pytest
import torch
from threads import threads
from torch import Tensor

from eggroll_llm.es.estimate import UpdateSpec, fold_with_torch
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.kernels import build, fold
from eggroll_llm.kernels.rounding import DEVICE

needs_library = pytest.mark.skipif(build.library() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
FOLDS = [pytest.param(CPU, marks=needs_library, id="compiled"), pytest.param(torch.device("cuda"), id="triton")]
SPEC = UpdateSpec(
    step=1, noise_step=1, seed=3, rank=2, sigma=0.05, learning_rate=0.02, fitness_M=(1.0, -1.0, 0.5, 0.25, -0.75, 0.0)
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 64), (8, 192), (1, 1), (7, 100), (33, 65), (192, 576)])
@pytest.mark.parametrize("terms", [(1,), (16,), (64, 64, 5)])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", FOLDS)
def test_it_adds_the_products_and_writes_the_rounding(
    shape: tuple[int, int], terms: tuple[int, ...], dtype: torch.dtype | None, device: torch.device
) -> None:
    out, inside = shape
    where = CPU if device == CPU else DEVICE
    products = [(random(k, out, seed=i), random(k, inside, seed=i + 9)) for i, k in enumerate(terms)]
    start = random(out + 2, inside, seed=99)
    memory = start.to(where, copy=True)
    served = None if dtype is None else torch.full((out + 2, inside), 7.0, dtype=dtype, device=where)
    columns = [(A.to(where), B.to(where)) for A, B in products]
    fold.fold_for(device)(memory[1:-1], columns, None if served is None else served[1:-1])
    memory, served = memory.cpu(), None if served is None else served.cpu()
    expected = start[1:-1].double() + sum(A.double().T @ B.double() for A, B in products)
    assert (memory[1:-1] - expected).abs().max() < 2e-5 * sum(terms) ** 0.5
    assert torch.equal(memory[[0, -1]], start[[0, -1]])  # nothing beside
    if served is not None:
        assert torch.equal(served[1:-1], memory[1:-1].to(dtype))
        assert (served[[0, -1]] == 7.0).all()


@needs_library
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    products = [(random(40, 67, seed=1), random(40, 129, seed=2))]
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(random(67, 129))
            fold.fold_for(CPU)(results[-1], products, None)
    assert torch.equal(*results)


class Taken:
    """Keeps what it is given to serve."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype, self.device = dtype, device
        self.weights: dict[str, Tensor] = {}
        self.names: list[str] = []

    def room(self, name: str) -> Tensor:
        return self.weights.setdefault(name, torch.empty(48, 80, dtype=self.dtype, device=self.device))

    def written(self, name: str) -> None:
        self.names.append(name)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", FOLDS)
def test_an_update_serves_each_weight_once_and_is_that_of_torch(
    optimizer: str, dtype: torch.dtype, device: torch.device
) -> None:
    where = torch.device(CPU if device == CPU else DEVICE)
    weights = {name: random(48, 80, seed=i) for i, name in enumerate(("b.weight", "a.weight"))}
    settings = EsSettings(optimizer=optimizer)  # type: ignore[arg-type]
    ours = MasterWeights(weights, settings, dtype, fold.fold_for(device), device=where)
    theirs = MasterWeights(weights, settings, dtype, fold_with_torch)
    taken = Taken(dtype, where)
    ours.apply(SPEC, served=taken)
    theirs.apply(SPEC)
    assert taken.names == list(weights)
    for name in weights:
        assert torch.equal(taken.weights[name], ours.served(name))
        found, expected = ours.state()[f"master/{name}"].cpu(), theirs.state()[f"master/{name}"]
        assert (found - expected).abs().max() < 1e-5
        assert (found - weights[name]).abs().max() > 1e-3
    again = Taken(dtype, where)
    ours.serve(again)
    assert all(torch.equal(again.weights[name], ours.served(name)) for name in weights)
