"""The one normalisation of losses that average over a count."""

from torch import Tensor


def local_ratio(numerator: Tensor, count: Tensor, eps: float) -> Tensor:
    """numerator / (count + eps), of this process alone; numbers, or several losses' as vectors.

    Losses take such a function so that training on several processes can pass one that counts over all of
    them: a global batch then gives one and the same loss however many processes share it.
    """
    return numerator / (count + eps)
