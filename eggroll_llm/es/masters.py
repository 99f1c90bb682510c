"""Float32 master weights: the optimizer adds a step's estimate to them, and the engine serves their rounding.

Added to bf16 weights, most of an update of the published size is lost to rounding, so nothing is ever added to the
served weights.
"""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from eggroll_llm.bounds import check_bounds
from eggroll_llm.es.estimate import (
    PAIR_CHUNK,
    FactorSource,
    Fold,
    UpdateSpec,
    check_finite,
    fold_with_torch,
    product_weights,
    weighted_products,
)
from eggroll_llm.es.noise import check_parameter_ids, served_factors_of
from eggroll_llm.es.optimizer import STATE_KEYS, build_optimizer
from eggroll_llm.es.settings import EsSettings
from eggroll_llm.es.weight_change import UpdateReport, sampled_rows, update_report, weights_rms


class Served(Protocol):
    """Takes the weights as they are served, in the order of the masters."""

    def room(self, name: str) -> Tensor:
        """Return where the weight of this name is to be written, [O, I] of the served dtype."""
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
    ) -> None:
        """Copy the weights [out features, in features] by Hugging Face name, on their device.

        Raises ValueError when a setting is out of bounds, when there are no weights, when one is not a finite
        matrix, when two names share a noise id, and when `served_dtype` is neither bfloat16 nor float32 (float16
        could overflow where its master does not).
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
            if weight.ndim != 2 or not bool(weight.isfinite().all()):
                raise ValueError(f"weight {name!r} of shape {tuple(weight.shape)}: must be a finite matrix")
        self.served_dtype = served_dtype
        self.settings = settings
        self._fold = fold
        self._masters = {n: w.detach().to(torch.float32, copy=True).contiguous() for n, w in weights.items()}
        trained = {} if settings.optimizer == "sgd" else self._masters
        self._optimizers = {name: build_optimizer(settings, master) for name, master in trained.items()}

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
        before = sampled_rows(self._masters.values())
        if not spec.coefficient_K.any():
            return UpdateReport(rms=0.0, weights_rms=weights_rms(before), changed=0.0, finite=True)
        plain = not self._optimizers
        # Plain SGD needs no gradient: W + learning_rate * G is summed in place. The others take the gradient of a loss,
        # -G. One buffer serves all: fresh memory for each would cost more in page faults than the products themselves.
        shapes = [(name, *master.shape) for name, master in self._masters.items()]
        weight_K = product_weights(spec, spec.learning_rate if plain else -1.0)
        memory = before[0].new_empty(0 if plain else max(master.numel() for master in self._masters.values()))
        device = memory.device
        products_of = weighted_products(shapes, spec.noise, weight_K, self.served_dtype, PAIR_CHUNK, device, factors_of)
        for name, products in products_of:
            master = self._masters[name]
            if plain:
                self._fold(master, products, served.room(name) if served else None)
            else:
                master.grad = memory[: master.numel()].view_as(master).zero_()
                self._fold(master.grad, products, None)
                optimizer = self._optimizers[name]
                optimizer.param_groups[0]["lr"] = spec.learning_rate
                optimizer.step()
                master.grad = None
                if served:
                    served.room(name).copy_(master)
            if served:
                served.written(name)
        return update_report(before, sampled_rows(self._masters.values()), self.served_dtype)

    def served(self, name: str) -> Tensor:
        """Return a weight as the engine serves it. In float32 it is the master itself: leave it alone."""
        return self._masters[name].to(self.served_dtype)

    @torch.no_grad()
    def serve(self, served: Served) -> None:
        """Hand over all weights as the engine serves them."""
        for name, master in self._masters.items():
            served.room(name).copy_(master)
            served.written(name)

    def state(self) -> dict[str, Tensor]:
        """Return masters and optimizer state, not copied, as "master/<name>" and "optimizer/<name>/<key>"."""
        state = {f"master/{name}": master for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for key in STATE_KEYS[self.settings.optimizer]:
                value = self._optimizers[name].state[master].get(key)
                if value is not None:
                    state[f"optimizer/{name}/{key}"] = value
        return state

    @torch.inference_mode(False)
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore exactly what `state` returned. Raises ValueError, before any change, if it does not fit."""
        expected = {f"master/{name}": master for name, master in self._masters.items()}
        if any(key.startswith("optimizer/") for key in state):
            for name, master in self._masters.items():
                for key in STATE_KEYS[self.settings.optimizer]:
                    # Adam counts its steps in a float32 scalar, which stays on the CPU.
                    expected[f"optimizer/{name}/{key}"] = master if key != "step" else torch.zeros(())
        for key in sorted(expected.keys() ^ state.keys()):
            raise ValueError(f"training state: {key!r} is {'missing' if key in expected else 'not expected'}")
        for key, like in expected.items():
            if state[key].shape != like.shape or state[key].dtype != like.dtype:
                found = f"{state[key].dtype} {tuple(state[key].shape)}"
                wanted = f"{like.dtype} {tuple(like.shape)}"
                raise ValueError(f"training state: {key!r} is {found}, expected {wanted}")
        for name, master in self._masters.items():
            master.copy_(state[f"master/{name}"])
            if name not in self._optimizers:
                continue
            keys = [key for key in STATE_KEYS[self.settings.optimizer] if f"optimizer/{name}/{key}" in state]
            values = {key: state[f"optimizer/{name}/{key}"].detach() for key in keys}
            self._optimizers[name].state[master] = {
                key: value.to(device="cpu" if key == "step" else master.device, copy=True)
                for key, value in values.items()
            }

    def checksum(self) -> str:
        """Return 16 hexadecimal digits that identify the served bits: a BLAKE2b in order of names."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self._masters):
            served = self.served(name)
            digest.update(f"{name} {served.dtype} {tuple(served.shape)}\n".encode())
            digest.update(served.cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()
