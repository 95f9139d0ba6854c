"""From the CPU's memory to a device's."""

from __future__ import annotations

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU's on the device, without waiting until it is there.

    A plain copy to a GPU waits until all is done that the GPU was told before.  From pinned memory
    it need not; torch keeps that for as long as it is read.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
