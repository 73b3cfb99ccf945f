"""What this machine can compute on, for people. Both roles; nothing private."""

from __future__ import annotations

import torch


def describe() -> str | None:
    """The GPUs that torch sees, with their memory; None: none."""
    if not torch.cuda.is_available():
        return None
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{one.name} ({one.total_memory / 2**30:.0f} GB)" for one in found)
