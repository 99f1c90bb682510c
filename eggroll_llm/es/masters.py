"""Float32 master weights: the optimizer adds a step's estimate to them, and the engine serves their rounding.

Added to bf16 weights, most of an update of the published size is lost to rounding, so nothing is ever added to the
served weights. How and where masters are kept between updates is a matter of `storage`.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from eggroll_llm.bounds import check_bounds
from eggroll_llm.es.estimate import (
    PAIR_CHUNK,
    FactorSource,
    Fold,
    UpdateSpec,
    as_matrix,
    check_finite,
    fold_with_torch,
    product_weights,
    weighted_products,
)
from eggroll_llm.es.noise import check_parameter_ids, served_factors_of, shape_of
from eggroll_llm.es.optimizer import STATE_KEYS, take_step
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.es.storage import HostMemory, SplitMasters, Storage, WholeMasters, in_buffer
from eggroll_llm.es.weight_change import UpdateReport, row_stride, update_report, weights_rms


class Served(Protocol):
    """Takes the weights as they are served, in the order of the masters."""

    def room(self, name: str) -> Tensor:
        """Return where the weight of this name is to be written, contiguous, of its shape and the served dtype."""
        ...

    def written(self, name: str) -> None:
        """Take note that it is there."""
        ...


SERVED_DTYPES = (torch.bfloat16, torch.float32)


class MasterWeights:
    """Float32 masters of the perturbed weights and their optimizer; the served weights are their rounding."""

    @torch.inference_mode(False)
    def __init__(
        self,
        weights: Mapping[str, Tensor],
        settings: EsSettings,
        served_dtype: torch.dtype,
        fold: Fold = fold_with_torch,
        *,
        device: torch.device | None = None,
        offload: bool = False,
    ) -> None:
        """Start from the weights [out features, in features], or vectors, by name; updates are computed on `device`.

        That is the weights' own by default. They are copied, but split masters take over weights that are there: they
        are what is served, and change in place. With `offload` masters and optimizer state are in the host's memory;
        the bits are the same.

        Raises ValueError when a setting is out of bounds, when there are no weights, when one is not a finite
        matrix or vector, when two names share a noise id, when `served_dtype` is neither bfloat16 nor float32 (float16
        could overflow where its master does not), and when masters to be split are not served in bfloat16.
        """
        check_bounds(settings)
        if settings.optimizer not in STATE_KEYS:
            raise ValueError(f"optimizer = {settings.optimizer!r}: must be one of {', '.join(STATE_KEYS)}")
        if served_dtype not in SERVED_DTYPES:
            raise ValueError(f"served dtype = {served_dtype}: must be torch.bfloat16 or torch.float32")
        if not weights:
            raise ValueError("no weights to train")
        check_parameter_ids(weights)
        for name, weight in weights.items():
            if weight.ndim not in (1, 2) or not bool(weight.isfinite().all()):
                raise ValueError(f"weight {name!r} of shape {tuple(weight.shape)}: must be a finite matrix or vector")
        self.served_dtype = served_dtype
        self.settings = settings
        self._fold = fold
        self._shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._device = device or next(iter(weights.values())).device
        self._host = HostMemory(pinned=self._device.type != "cpu") if offload else None
        self._storage: Storage
        if settings.masters == "split":
            if {served_dtype, *(weight.dtype for weight in weights.values())} != {torch.bfloat16}:
                raise ValueError('masters = "split": must be of weights that are loaded and served in bfloat16')
            self._storage = SplitMasters(weights, self._device, self._host)
        else:
            self._storage = WholeMasters(weights, self._device, served_dtype, self._host)
        self._moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(
        self, spec: UpdateSpec, factors_of: FactorSource = served_factors_of, served: Served | None = None
    ) -> UpdateReport:
        """Add one update to the masters; only one gradient is alive at a time.

        `factors_of` may supply factors that are still at hand from sampling; their bits are the same. `served` is
        given each weight as soon as it is final. When all coefficients are zero nothing changes, the optimizer's
        state included. Raises NonFiniteUpdate, before anything was touched, when the result might not be finite.
        """
        check_finite(spec)
        every = row_stride(shape[0] for shape in self._shapes.values())
        before = self._storage.rows(every)
        if not spec.coefficient_K.any():
            return UpdateReport(rms=0.0, weights_rms=weights_rms(before), changed=0.0, finite=True)
        plain = self.settings.optimizer == "sgd"
        # Plain SGD needs no gradient: W + learning_rate * G is summed in place. The others take the gradient of a loss,
        # -G. One buffer serves all: fresh memory for each would cost more in page faults than the products themselves.
        shapes = [shape_of(name, shape) for name, shape in self._shapes.items()]
        largest = max(map(math.prod, self._shapes.values()))
        copies = self._host is not None or not self._storage.rounds_to_even
        work = torch.empty(largest if copies else 0, device=self._device)
        gradients = torch.empty(0 if plain else largest, device=self._device)
        weight_K = product_weights(spec, spec.learning_rate if plain else -1.0)
        products_of = weighted_products(
            shapes, spec.noise, weight_K, self.served_dtype, PAIR_CHUNK, self._device, factors_of
        )
        for name, products in products_of:
            master = self._storage.take(name, work)
            room = served.room(name) if served and self._storage.rounds_to_even else None
            if plain:
                self._fold(as_matrix(master), products, None if room is None else as_matrix(room))
            else:
                gradient = in_buffer(gradients, master).zero_()
                self._fold(as_matrix(gradient), products, None)
                self._step(name, master, gradient, spec.learning_rate)
                if room is not None:
                    room.copy_(master)
            self._storage.put(name, master)
            if served and room is None:
                self._hand_over(name, served)
            elif served:
                served.written(name)
        return update_report(before, self._storage.rows(every), self.served_dtype)

    def _step(self, name: str, master: Tensor, gradient: Tensor, learning_rate: float) -> None:
        state = self._moments[name]
        if self._host is not None:
            state = {key: value.to(_device_of(key, self._device), copy=True) for key, value in state.items()}
        self._keep(name, take_step(self.settings, master, gradient, state, learning_rate))

    def _keep(self, name: str, state: dict[str, Tensor]) -> None:
        """Keep the optimizer's state of a weight."""
        if self._host is None:
            self._moments[name] = state
            return
        kept = self._moments[name]
        for key, value in state.items():
            if key not in kept:
                kept[key] = self._host.empty_like(value)
            kept[key].copy_(value)

    def served(self, name: str) -> Tensor:
        """Return a weight as the engine serves it. It may be the master itself: leave it alone."""
        return self._storage.served(name)

    @torch.no_grad()
    def serve(self, served: Served) -> None:
        """Hand over all weights as the engine serves them."""
        for name in self._shapes:
            self._hand_over(name, served)

    def _hand_over(self, name: str, served: Served) -> None:
        room, weight = served.room(name), self._storage.served(name)
        if room.data_ptr() != weight.data_ptr():  # a split master may live where it is served
            room.copy_(weight)
        served.written(name)

    def state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return masters and optimizer state, or those of some names, as "master/<name>" and "optimizer/<name>/<key>".

        What is kept is not copied; masters that are split are put together in the host's memory.
        """
        names = self._shapes if names is None else names
        state = {f"master/{name}": self._storage.whole(name) for name in names}
        for name in names:
            for key in STATE_KEYS[self.settings.optimizer]:
                if (value := self._moments[name].get(key)) is not None:
                    state[f"optimizer/{name}/{key}"] = value
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore exactly what `state` returned. Raises ValueError, before any change, if it does not fit."""
        expected: dict[str, tuple[int, ...]] = {f"master/{name}": shape for name, shape in self._shapes.items()}
        if any(key.startswith("optimizer/") for key in state):
            for name, shape in self._shapes.items():
                for key in STATE_KEYS[self.settings.optimizer]:
                    expected[f"optimizer/{name}/{key}"] = shape if key != "step" else ()
        for key in sorted(expected.keys() ^ state.keys()):
            raise ValueError(f"training state: {key!r} is {'missing' if key in expected else 'not expected'}")
        for key, wanted in expected.items():
            if tuple(state[key].shape) != wanted or state[key].dtype != torch.float32:
                found = f"{state[key].dtype} {tuple(state[key].shape)}"
                raise ValueError(f"training state: {key!r} is {found}, expected {torch.float32} {wanted}")
        for name in self._shapes:
            self._storage.put(name, state[f"master/{name}"].to(self._device, copy=True))
            keys = [key for key in STATE_KEYS[self.settings.optimizer] if f"optimizer/{name}/{key}" in state]
            self._moments[name] = self._moments[name] if keys else {}
            values = {key: state[f"optimizer/{name}/{key}"].detach() for key in keys}
            self._keep(name, {k: value.to(_device_of(k, self._device), copy=True) for k, value in values.items()})

    def checksum(self) -> str:
        """Return the checksum of the weights as the engine serves them."""
        return checksum_of((name, self.served(name)) for name in sorted(self._shapes))


def checksum_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits that identify the bits of weights in order of names: a BLAKE2b."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _device_of(key: str, device: torch.device) -> torch.device:
    """Return where an optimizer wants a tensor of its state: Adam counts its steps on the CPU."""
    return torch.device("cpu") if key == "step" else device
