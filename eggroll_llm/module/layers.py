"""Which parameters of a torch module are trained, and which modules cannot be.

Every parameter that wants a gradient is trained, and all of them must belong to layers whose members' forward passes
are known (`members.FORWARD`): a parameter that is perturbed in silence nowhere would only be moved by noise.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from eggroll_llm.errors import ModelError
from eggroll_llm.es.masters import SERVED_DTYPES
from eggroll_llm.module.members import FORWARD, Layer

_REMEDY = (
    f"Build the module of {', '.join(f'nn.{kind.__name__}' for kind in FORWARD)}, or freeze what need not be trained "
    "with requires_grad_(False)"
)


def find_layers(module: nn.Module) -> list[Layer]:
    """Return the layers with trained parameters, in the module's order.

    Raises ModelError when there are none, when a trained parameter is of another kind of layer or shared, when they
    differ in format or device or are neither float32 nor bfloat16, and when a layer lets one row change another.
    """
    layers = []
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise ModelError(
                f"layer {name!r} is {type(layer).__name__}: its statistics of a batch would mix the members. Use "
                "nn.LayerNorm"
            )
        # Of exactly this type, and its own: what a subclass computes is not known.
        computed = type(layer) in FORWARD and "forward" not in vars(layer)
        own = {
            attribute: f"{name}.{attribute}" if name else attribute
            for attribute, parameter in layer.named_parameters(recurse=False)
            if computed and parameter.requires_grad and attribute in ("weight", "bias")
        }
        if isinstance(layer, nn.Embedding) and own and (layer.max_norm is not None or layer.padding_idx is not None):
            raise ModelError(
                f"layer {name!r} has max_norm or padding_idx: its forward pass would change weights, or its training "
                "the padding. Build it without"
            )
        if own:
            layers.append(Layer(name=name, module=layer, trained=own))
    _check_parameters(module, {name for layer in layers for name in layer.trained.values()})
    return layers


def _check_parameters(module: nn.Module, known: set[str]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise ModelError(f"{type(module).__name__} has no parameters to perturb: all are frozen, or there are none")
    names_at = defaultdict(list)
    for name, parameter in parameters.items():
        if not isinstance(parameter, UninitializedParameter):
            names_at[parameter.data_ptr()].append(name)
    for names in names_at.values():
        if len(names) > 1 and trained.keys() & names:
            raise ModelError(
                f"parameters {' and '.join(map(repr, names))} are one and the same: members' noise is by name. Give "
                "each its own, or freeze them with requires_grad_(False)"
            )
    if unknown := [name for name in trained if name not in known]:
        raise ModelError(f"parameter {unknown[0]!r} is of a kind of layer that members cannot compute. {_REMEDY}")
    first_name, first = next(iter(trained.items()))
    if first.dtype not in SERVED_DTYPES:
        raise ModelError(f"parameter {first_name!r} is {first.dtype}: convert the module with .float() or .bfloat16()")
    for name, parameter in trained.items():
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            raise ModelError(
                f"parameter {name!r} is {parameter.dtype} on {parameter.device}, but {first_name!r} {first.dtype} on "
                f"{first.device}: convert the module to one format and move it to one device"
            )


def rest_of(module: nn.Module, trained: Collection[str]) -> list[str]:
    """Return what identifies the bits of frozen parameters and buffers: a hash, or nothing where there are none."""
    digest, names = hashlib.sha256(), []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in trained and not isinstance(tensor, UninitializedBuffer | UninitializedParameter):
            names.append(name)
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return [digest.hexdigest()[:16]] if names else []


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether both hold the same tensors by name, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def version_of(tensor: Tensor) -> int:
    """Return a number that changes with every write to a tensor; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


class Buffers:
    """The buffers of a module, and whether a forward pass has changed them."""

    def __init__(self, module: nn.Module) -> None:
        """Remember what they hold."""
        self._module, self._before = module, self._now(module)

    @staticmethod
    def _now(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
        return {name: (buffer, version_of(buffer)) for name, buffer in module.named_buffers()}

    def check(self) -> None:
        """Raise ModelError when one has changed."""
        now = self._now(self._module)
        for name in sorted(now.keys() | self._before.keys()):
            (buffer, version), (before, version_before) = (found.get(name, (None, 0)) for found in (now, self._before))
            if buffer is not before or version != version_before:
                raise ModelError(
                    f"buffer {name!r} changed while members computed: they would influence each other, and no journal "
                    "could restore it. Keep such state outside of the module"
                )
