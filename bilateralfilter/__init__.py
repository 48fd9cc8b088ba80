"""Bilateral filter and dense CRF on the permutohedral lattice, for CPU and GPU; compiled on first use."""

from .crf import DenseCRF
from .filter import bilateral_filter
from .lattice import Lattice

__all__ = ["DenseCRF", "Lattice", "bilateral_filter"]
