"""What is trained: float32 masters outside the model, whose own weights are copies of them in the type that it computes in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from edgedistill.training.settings import TrainSettings

if TYPE_CHECKING:
    from edgedistill.training.quantized import QuantizedWeights


class Weights:
    """The weights of a model in training, by name. ``masters`` are what the optimiser changes; ``beside`` are matrices of a guide,
    trained and not shipped. The model's parameters have ``dtype`` from now on.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        *,
        full: bool,
        blocks: QuantizedWeights | None,
        beside: dict[str, torch.nn.Parameter],
    ) -> None:
        self.model, self.blocks, self.beside = model, blocks, beside
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.masters: dict[str, torch.Tensor] = {}
        self._frozen: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            exact = parameter.detach()
            parameter.data = exact.to(dtype)
            if name in self._trained and blocks is not None and name in blocks:
                self.masters |= blocks.masters(name)
            elif name in self._trained:
                self.masters[name] = exact.float().clone()
            elif full:
                # Saved as it came: a pass through bf16 would change weights that were never trained.
                self._frozen[name] = exact
        for name, parameter in beside.items():
            self._trained[name], self.masters[name] = parameter, parameter.detach().clone()

    def groups(self, settings: TrainSettings) -> list[dict[str, Any]]:
        """Return the optimiser's groups of parameters: vectors (norms, biases) do not decay."""
        if self.blocks is not None:
            return self.blocks.groups(self.masters, settings)
        decay = [master for master in self.masters.values() if master.ndim > 1]
        rest = [master for master in self.masters.values() if master.ndim <= 1]
        groups: list[dict[str, Any]] = []
        if decay:
            groups.append({"params": decay, "weight_decay": settings.weight_decay})
        if rest:
            groups.append({"params": rest, "weight_decay": 0.0})
        return groups

    def publish(self) -> None:
        """Copy the masters into the model's weights."""
        plain = dict(self._trained)
        with torch.no_grad():
            if self.blocks is not None:
                for name in [name for name in plain if name in self.blocks]:
                    plain.pop(name).copy_(self.blocks.weights(name, self.masters))
            _copy_all((parameter, self.masters[name]) for name, parameter in plain.items())

    def collect(self) -> None:
        """Add the model's gradients to those of the masters, in float32."""
        fresh: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            found = {name: parameter.grad}
            of_blocks = self.blocks is not None and name in self.blocks
            if self.blocks is not None and of_blocks:
                found = self.blocks.gradients(name, parameter.grad, self.masters)
            for key, gradient in found.items():
                master = self.masters[key]
                if master.grad is None:
                    # The buffer of the last step: fresh pages for every gradient would be zeroed and mapped again.
                    buffer = self._gradients.get(key)
                    if buffer is None:
                        buffer = self._gradients[key] = torch.empty_like(master)
                    master.grad = buffer
                    if of_blocks:  # made here, and as large as the weights: not kept until all are there
                        buffer.copy_(gradient)
                    else:
                        fresh.append((buffer, gradient))
                else:
                    master.grad += gradient
            parameter.grad = None
        _copy_all(fresh)

    def norm(self) -> torch.Tensor:
        """Return the norm of all gradients that were collected."""
        return torch.nn.utils.get_total_norm(
            [master.grad for master in self.masters.values() if master.grad is not None]
        )

    def hand_back(self) -> None:
        """Give the model its weights in full precision: the masters, and what was never trained as it came."""
        for name, parameter in self.model.named_parameters():
            if name in self.masters:
                parameter.data = self.masters[name]
            elif name in self._frozen:
                parameter.data = self._frozen[name]


def _copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy every second tensor into the first, by one call for all: on a GPU hundreds of launches fewer a step."""
    targets, sources = [], []
    for target, source in pairs:
        targets.append(target)
        sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
