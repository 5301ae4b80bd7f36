"""First principal components, batched, without a singular value decomposition."""

from collections.abc import Callable

import torch
from torch import Tensor

from scacam.methods.gradients import Product

__all__ = ["first_component"]

_SEED = 0
_NOISE = 0.01
_FIRST_CHECK = 10
"""Whether the vectors are exact is asked after so many steps, which are enough for most, and then
after every other one: a GPU waits for the answer."""


def first_component(factors: Product) -> Tensor:
    """Project the positions of `G ⊙ A` on their first principal component.

    With `X = U S Vᵀ`, the h·w × C matrix of one image and class, each column centred, this is
    `X v₁ = s₁ u₁`; and `u₁` is the leading eigenvector of the h·w × h·w Gram matrix `X Xᵀ`, which
    is applied to vectors and never formed.

    Args:
        factors: the product to decompose.

    Returns:
        Maps `[N, R, h, w]` of arbitrary sign.
    """
    shape = *factors.weights.shape[:2], *factors.features.shape[2:]
    columns = factors.features.flatten(2)
    mask = None if factors.mask is None else factors.mask.flatten(2)
    # The Gram matrix squares what may be as small as 1e-20: its factors are brought to 1 before.
    height, reach = _magnitudes(columns, (1, 2)), _magnitudes(factors.weights, 2)
    squares = (factors.weights / reach).square() / height

    def masked(rows: Tensor) -> Tensor:
        return rows if mask is None else rows * mask

    def gram(vectors: Tensor) -> Tensor:
        rows = vectors.reshape(*shape[:2], -1)
        rows = masked(rows - rows.mean(2, keepdim=True))
        rows = masked(((rows @ columns.mT) * squares) @ columns / height)
        return (rows - rows.mean(2, keepdim=True)).flatten(0, 1)

    # The sum over the channels is near the leading eigenvector, most often; a random vector is
    # orthogonal to that of no image in practice.
    sums = masked((factors.weights / reach) @ columns / height)
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(columns.shape[2], generator=generator).to(columns)
    sizes = sums.norm(dim=2, keepdim=True) / noise.norm()
    start = sums + torch.where(sizes > 0, _NOISE * sizes, 1) * noise
    values, vectors = _leading_eigenpairs(gram, gram(start))
    return (values.sqrt()[:, None] * vectors).reshape(shape) * (height * reach)[..., None]


def _magnitudes(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """The largest magnitudes over some axes, which stay with size 1; never 0."""
    largest = torch.maximum(values.amax(axes, keepdim=True), -values.amin(axes, keepdim=True))
    return largest.clamp(min=torch.finfo(values.dtype).tiny)


def _leading_eigenpairs(matrix: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues `[M]` and their eigenvectors `[M, n]` of M positive matrices.

    Lanczos with full reorthogonalisation: as exact as a whole eigendecomposition, after some ten
    products instead of one of `n³`.

    Args:
        matrix: applies the matrices to vectors `[M, n]`. One that is not finite harms no other.
        start: `[M, n]`.
    """
    precision = torch.finfo(start.dtype)
    count, size = start.shape
    basis = images = start.new_empty(count, 0, size)
    vectors = start
    scales = torch.zeros_like(start[:, :1])
    while True:
        lengths = vectors.norm(dim=1, keepdim=True)
        # What is left of an image within its own rounding error is no new direction.
        vectors = torch.where(
            lengths > 8 * precision.eps * scales, vectors / lengths.clamp(min=precision.tiny), 0
        )
        basis = torch.cat([basis, vectors[:, None]], 1)
        image = matrix(vectors)
        images = torch.cat([images, image[:, None]], 1)
        scales = torch.maximum(scales, image.norm(dim=1, keepdim=True))
        rest = image[:, None]
        for _ in range(2):  # once is not enough in floating point
            rest = rest - (rest @ basis.mT) @ basis
        vectors = rest[:, 0]
        steps = basis.shape[1]
        is_checked = steps >= _FIRST_CHECK and steps % 2 == 0
        if is_checked or steps == size:
            values, mixtures = torch.linalg.eigh((images @ basis.mT).nan_to_num(0, 0, 0))
            largest, mixture = values[:, -1].clamp(min=0), mixtures[:, None, :, -1]
            residuals = vectors.norm(dim=1) * mixture[:, 0, -1].abs()
            if steps == size or not (residuals > 4 * precision.eps * largest).any():
                return largest, (mixture @ basis)[:, 0]
