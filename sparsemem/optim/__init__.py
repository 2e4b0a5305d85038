"""Optimisers that step only the rows that a batch touched, and clipping that counts them."""

from sparsemem.optim.adagrad import RowAdagrad
from sparsemem.optim.adam import RowAdam, RowAdamW
from sparsemem.optim.clipping import clip_grad_norm
from sparsemem.optim.sgd import RowSGD

__all__ = ["RowAdagrad", "RowAdam", "RowAdamW", "RowSGD", "clip_grad_norm"]
