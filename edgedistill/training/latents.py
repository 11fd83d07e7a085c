"""A matrix as the blocks of its file, with what each of their numbers would be if it needed not be one that the file can hold.

What is trained are a *place* of every weight, a real number in units of the grid (3.2 is between the levels of the codes 3 and
4), and a factor of every float16 that scales and offsets are multiples of. Forward, the weight is what the file would say: the
place rounded to a code, the base rounded to float16, and ggml's own arithmetic. Backward, both roundings pass the gradient on as
if they were not there (straight-through, Bengio et al. 2013, arXiv:1308.3432; the scales' as in LSQ, arXiv:1902.08153), but for
places that have left the range of the codes, which nothing draws further out. The small whole numbers of the groups of k-quants
stay as they are.

Places are in grid units so that one learning rate fits all types and matrices: Adam moves each by as much a step.
"""

from __future__ import annotations

import numpy as np
import torch

from edgedistill.formats.gguf.blocks import BlockFormat

MARGIN = 0.49
"""How far from its code, in grid units, a weight's place may be at the start: within it, the codes are those of the file."""


class Latents:
    """The numbers of one matrix [R, C] that are not trained, and the way from those that are to its weights and back.

    ``blocks`` are uint8 [R, C / size, bytes]; on ``device`` all but the blocks.
    """

    def __init__(self, blocks: np.ndarray, form: BlockFormat, device: torch.device | str = "cpu") -> None:
        self.form, self.device = form, device
        self.shape = blocks.shape[0], blocks.shape[1] * form.size
        self.codes = torch.from_numpy(form.codes(blocks).reshape(self.shape)).to(device)
        self.bases = torch.from_numpy(form.bases(blocks)).to(device)  # [R, blocks, halves]
        # float16 holds whole numbers to 2,048, and the groups' are below 128.
        self.multiples = torch.from_numpy(form.multiples(blocks)).half().to(device)  # [R, blocks, halves, groups]
        levels = form.levels
        self.levels = torch.from_numpy(levels.copy()).to(device)
        self.even = bool((np.diff(levels) == 1).all())
        self.slopes = torch.from_numpy(np.gradient(levels).astype(np.float32)).to(device)

    def start(self, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places [R, C] and the factors [R, blocks, halves], float32, that the file's own weights are made of.

        With ``weights`` [R, C], those before rounding, a place is where its weight lies, as near as ``MARGIN`` of its code: what
        was nearly rounded the other way turns first.
        """
        places, factors = self.codes.float(), torch.ones_like(self.bases)
        if weights is None:
            return places, factors
        scale, offset = self._scales(self.halves(factors))
        grouped = weights.to(self.device, torch.float32).view(*scale.shape, self.form.group)
        if offset is not None:
            grouped = grouped - offset[..., None]
        at = (grouped / torch.where(scale == 0, 1.0, scale)[..., None]).view(self.shape)
        at = at - self.levels[0] if self.even else self._between(at)
        return places + (at - places).clamp_(-MARGIN, MARGIN).nan_to_num_(0.0), factors

    def rounded(self, places: torch.Tensor) -> torch.Tensor:
        """Return the codes, uint8 [R, C], that places are rounded to."""
        return places.round().clamp_(self.form.lowest, len(self.levels) - 1).to(torch.uint8)

    def halves(self, factors: torch.Tensor) -> torch.Tensor:
        """Return the bases that factors make, float16 [R, blocks, halves]."""
        return (self.bases * factors).half()

    def weights(self, places: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
        """Return the weights, float32 [R, C], as the packed file has them. ``bases`` are float16 [R, blocks, halves]."""
        scale, offset = self._scales(bases)
        out = self._levels(places).view(*scale.shape, self.form.group)
        out *= scale[..., None]
        if offset is not None:
            out += offset[..., None]
        return out.view(self.shape)

    def gradients(
        self, gradient: torch.Tensor, places: torch.Tensor, factors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of places and factors, float32, of that of the weights [R, C]."""
        scale, _ = self._scales(self.halves(factors))
        grouped = gradient.float().view(*scale.shape, self.form.group)
        levels = self._levels(places).view(grouped.shape)
        sums = [(grouped * levels).sum(-1)]  # of scales, then of offsets: [R, blocks, groups]
        if self.multiples.shape[2] > 1:
            sums.append(grouped.sum(-1))
        of_factors = torch.stack(
            [(one * self.multiples[:, :, index]).sum(-1) for index, one in enumerate(sums)], dim=-1
        ).mul_(self.bases)
        of_places = torch.mul(grouped, scale[..., None], out=levels).view(self.shape)
        if not self.even:
            of_places *= self.slopes[self.rounded(places).int()]
        # Descent moves a place against its gradient.
        low, high = self.form.lowest - 0.5, len(self.levels) - 0.5
        of_places.masked_fill_(((places >= high) & (of_places < 0)) | ((places <= low) & (of_places > 0)), 0.0)
        return of_places, of_factors

    def _scales(self, bases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scale and offset of every group, float32 [R, blocks, groups]; None where the type has no offsets."""
        both = bases.float()[..., None] * self.multiples.float()
        return both[:, :, 0], both[:, :, 1] if both.shape[2] > 1 else None

    def _levels(self, places: torch.Tensor) -> torch.Tensor:
        """Return the levels of the codes that places are rounded to, float32 [R, C], a new tensor."""
        if self.even:
            return places.round().clamp_(self.form.lowest, len(self.levels) - 1).add_(self.levels[0])
        return self.levels[self.rounded(places).int()]

    def _between(self, values: torch.Tensor) -> torch.Tensor:
        """Return where values lie between the levels, in codes: halfway between two levels is halfway between their codes."""
        upper = torch.searchsorted(self.levels, values.contiguous()).clamp_(1, len(self.levels) - 1)
        below, above = self.levels[upper - 1], self.levels[upper]
        return (upper - 1) + (values - below) / (above - below)
