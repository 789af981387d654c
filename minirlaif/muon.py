"""Muon: momentum, made orthogonal before it is applied (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

The update of a matrix W is lr · √max(1, rows/columns) · U Vᵀ, where U S Vᵀ is the singular value decomposition of the
momentum: all directions are learned at one speed, the rare ones too, which AdamW leaves behind. That is what a small GPT
needs to learn to judge (the README has the comparison). For the matrices inside the blocks only; embeddings, biases and norms
stay with AdamW. The projections to queries, keys and values are one matrix here and are treated as one.
"""

import torch


def orthogonalise(g: torch.Tensor, dtype=torch.float32, steps: int = 5) -> torch.Tensor:
    """About U Vᵀ of g (..., rows, columns), in `dtype`.

    Newton-Schulz: x ← a x + b (x xᵀ) x + c (x xᵀ)² x changes the singular values alone, by products alone. Five times, and one
    that was more than a hundredth of the norm ends between about 0.7 and 1.2, which is as good as 1 here; smaller ones lag.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al.: the steepest rise from 0 that still ends near 1
    x = g.to(dtype)
    if g.shape[-2] > g.shape[-1]:  # x xᵀ is the smaller one for a wide x
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the Frobenius norm is at least the largest singular value
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.mT if g.shape[-2] > g.shape[-1] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """For 2-D weights. dtype: that of the products in `orthogonalise`."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}  # matrices of one shape go through the products together
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                # Nesterov's look ahead: the momentum as the next step would see it
                ahead = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                lr = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(params, orthogonalise(ahead, self.dtype), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=lr)
