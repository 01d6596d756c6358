"""Augmentation of whole batches, on the device on which they live."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def augmentation(
    *,
    rotate: float = 15.0,
    scale: float = 0.15,
    shear: float = 0.15,
    shift: float = 0.1,
    brightness: float = 0.5,
    contrast: float = 0.3,
    invert: float = 0.0,
    flip: float = 0.0,
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A function that changes each picture of a transformed batch `(n, channels, height, width)` in its own way.

    rotate: degrees to either side; scale, contrast: logarithm of the factor; shear: tangent of the angle; shift: share
    of the side; brightness: in units of the transformed pictures, for each channel; invert, flip (left and right):
    probabilities. The random numbers come from the generator handed in, on the CPU, so that a GPU draws the same.
    """

    def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
        count = len(pictures)

        def uniform(limit: float, channels: int = 1) -> Tensor:
            return (2 * torch.rand(count, channels, generator=generator) - 1) * limit

        angle, sheared = torch.deg2rad(uniform(rotate)), uniform(shear)
        width, height = torch.exp(uniform(scale)), torch.exp(uniform(scale))
        mirror = 1 - 2 * (torch.rand(count, 1, generator=generator) < flip).float()
        across = torch.cat([mirror * angle.cos() * width, (sheared - angle.sin()) * width, uniform(2 * shift)], dim=1)
        down = torch.cat([mirror * angle.sin() * height, (sheared + 1) * angle.cos() * height, uniform(2 * shift)], dim=1)
        matrices = torch.stack([across, down], dim=1).to(pictures.device)
        grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
        moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)

        sign = 1 - 2 * (torch.rand(count, 1, generator=generator) < invert).float()
        gain = (sign * torch.exp(uniform(contrast))).to(pictures.device)
        offset = uniform(brightness, pictures.shape[1]).to(pictures.device)
        return moved * gain[:, :, None, None] + offset[:, :, None, None]

    return augment
