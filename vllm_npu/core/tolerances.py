"""Largest difference between two correct results."""

import torch

# Relative to the largest element, for sums that are rounded twice in this dtype.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
