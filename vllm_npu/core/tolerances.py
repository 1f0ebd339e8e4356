"""How far two right results may differ."""

import torch

# Largest difference relative to the largest element, for sums that are rounded twice in this dtype.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}
