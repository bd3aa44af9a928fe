"""GPTQ (Frantar et al. 2022): rounding column by column, where later columns compensate for the error of each.

Knows one weight matrix and the grid that it must end on; nothing of models or storage.

References: Frantar, Ashkboos, Hoefler, Alistarh 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, https://arxiv.org/abs/2210.17323
"""

import torch

from hpc_compress.calibration import damped_inverse

BLOCK = 128  # columns after which the rest is brought up to date at once (section 3.3, step 2)


def round_weights(weight: torch.Tensor, hessian: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes such that a linear with the weights `levels[codes] * scales` gives nearly the same outputs.

    The inputs with the most energy are rounded first, since later ones have fewer columns left to make up for their errors.
    Scales are fixed beforehand, so the order is free.

    weight: (out, in). hessian: `X X^T`, (in, in). levels: (codes,). scales: (out, in).

    Returns: (out, in) int64.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    # Row j of the factor is what the inverse's row j is once the columns before it are done (section 3.3, step 3).
    factor = torch.linalg.cholesky(damped_inverse(hessian[order][:, order]), upper=True)
    # Transposed, so that a column lies in one piece of memory.
    left, scale = (matrix.double().T[order].contiguous() for matrix in (weight, scales.clamp(min=1e-30)))
    ascending, ranked = levels.double().sort()
    borders = (ascending[1:] + ascending[:-1]) / 2
    ranks = torch.empty(left.shape, dtype=torch.int64, device=left.device)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            ranks[j] = torch.bucketize(left[j] / scale[j], borders)
            errors[j - start] = (left[j] - ascending[ranks[j]] * scale[j]) / factor[j, j]  # eq. 2
            left[j:stop] -= factor[j, j:stop, None] * errors[j - start]  # eq. 3
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return ranked[ranks[order.argsort()].T]


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The position of the nearest level, element by element. levels: (codes,), in any order."""
    ascending, order = levels.sort()
    return order[torch.bucketize(values.contiguous(), (ascending[1:] + ascending[:-1]) / 2)]
