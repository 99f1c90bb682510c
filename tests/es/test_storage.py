"""However masters are kept, they are the same float32 numbers; what is served is their rounding."""

import itertools

import pytest
import torch
from torch import Tensor

from eggroll_llm.es import storage
from eggroll_llm.es.estimate import UpdateSpec
from eggroll_llm.es.masters import MasterWeights
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.es.storage import HostMemory, join, split

SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (24, 40), "b.weight": (40, 24), "c.weight": (7, 5), "c.bias": (7,)}
KINDS = [(kind, offload) for kind in ("float32", "split") for offload in (False, True)]


def spec(step: int) -> UpdateSpec:
    fitness = torch.randn(16, generator=torch.Generator().manual_seed(step))
    return UpdateSpec(
        step=step,
        noise_step=step,
        seed=3,
        rank=2,
        sigma=0.01,
        learning_rate=1e-4,
        fitness_M=tuple(fitness.tolist()),
    )


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (0.05 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in SHAPES.items()}


def masters(kind: str, offload: bool, optimizer: str = "sgd") -> MasterWeights:
    settings = EsSettings(optimizer=optimizer, masters=kind)  # type: ignore[arg-type]
    return MasterWeights(weights(), settings, torch.bfloat16, offload=offload)


class Rooms:
    """Takes what is served, into memory of its own or where a split master is anyway."""

    def __init__(self, rooms: dict[str, Tensor]) -> None:
        self.rooms, self.names = rooms, list[str]()

    def room(self, name: str) -> Tensor:
        return self.rooms[name]

    def written(self, name: str) -> None:
        self.names.append(name)


def test_halves_hold_every_bit_and_the_upper_one_is_rounded_to_nearest() -> None:
    """All lower halves of some upper ones: zeros, the smallest, ordinary and large numbers, of both signs."""
    upper = torch.tensor([0x0000, 0x0001, 0x3D4C, 0x3F7F, 0x3F80, 0x7F00], dtype=torch.int32)
    bits = (torch.cat((upper, upper - 0x8000)) << 16)[:, None] | torch.arange(1 << 16, dtype=torch.int32)
    master = bits.view(torch.float32)
    high, low = torch.empty(bits.shape, dtype=torch.bfloat16), torch.empty(bits.shape, dtype=torch.int16)
    split(master.clone(), high, low)
    assert torch.equal(join(high, low).view(torch.int32), bits)
    up = ((bits >> 16) + 1).to(torch.int16).view(torch.bfloat16).double()
    down = (bits >> 16).to(torch.int16).view(torch.bfloat16).double()
    exact = master.double()
    assert torch.equal(high.double(), torch.where((up - exact).abs() <= (exact - down).abs(), up, down))
    # torch rounds a half to even: one lower half in 2^16, in half of the cases.
    other = high != master.bfloat16()
    assert int(other.sum()) == int((upper % 2 == 0).sum()) * 2
    assert bool((bits[other] & 0xFFFF == 0x8000).all())


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(("kind", "offload"), KINDS[1:])
def test_masters_have_the_same_bits_however_they_are_kept(kind: str, offload: bool, optimizer: str) -> None:
    usual, other = masters("float32", False, optimizer), masters(kind, offload, optimizer)
    rooms = Rooms(weights())
    for step in range(1, 5):
        usual.apply(spec(step))
        other.apply(spec(step), served=rooms)
        if step == 2:  # a checkpoint of one is a checkpoint of the other
            saved = {key: value.clone() for key, value in other.state().items()}
            other = masters(kind, offload, optimizer)
            other.load_state(saved)
            other.load_state(saved)
    right, found = usual.state(), other.state()
    assert list(right) == list(found)
    assert all(torch.equal(right[key], value) for key, value in found.items())
    assert rooms.names == [*SHAPES] * 4
    again = Rooms(weights())
    other.serve(again)
    for name in SHAPES:
        assert torch.equal(rooms.rooms[name], other.served(name))
        assert torch.equal(again.rooms[name], other.served(name))
        assert int((other.served(name) != usual.served(name)).sum()) <= (1 if kind == "split" else 0)
        assert not torch.equal(other.served(name), weights()[name])
    assert (other.checksum() == usual.checksum()) or kind == "split"


@pytest.mark.parametrize("offload", [False, True])
def test_a_split_master_lives_where_it_is_served(offload: bool) -> None:
    """As in vLLM on CUDA, where the served weight is a row range of a fused layer's: nothing is copied."""
    given, elsewhere = weights(), masters("split", offload)
    fused = torch.cat([given["a.weight"], given["a.weight"]])
    given["a.weight"] = fused[24:]
    ours = MasterWeights(given, EsSettings(masters="split"), torch.bfloat16, offload=offload)
    for step in (1, 2):
        ours.apply(spec(step), served=Rooms(given))
        elsewhere.apply(spec(step))
    for name in SHAPES:
        assert ours.served(name).data_ptr() == given[name].data_ptr()
        assert torch.equal(given[name], elsewhere.served(name))
    assert torch.equal(fused[:24], weights()["a.weight"])


def test_offloaded_masters_share_chunks_and_overlap_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 1 << 10)
    memory = HostMemory(pinned=False)
    sizes = [100, 3, 180, 17, 300, 64, 5]  # 300 float32 are more than a chunk
    tensors = [memory.empty_like(torch.empty(size)) for size in sizes]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    assert [tensor.shape[0] for tensor in tensors] == sizes
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    chunks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sorted(chunks.values()) == [1 << 10, 1 << 10, 1 << 11]


def test_split_masters_are_of_bfloat16_only() -> None:
    settings = EsSettings(masters="split")
    for given, served in ((torch.zeros(2, 2), torch.bfloat16), (torch.zeros(2, 2).bfloat16(), torch.float32)):
        with pytest.raises(ValueError, match='"split": must be of weights that are loaded and served in bfloat16'):
            MasterWeights({"a.weight": given}, settings, served)
