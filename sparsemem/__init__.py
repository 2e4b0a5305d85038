"""Neural networks with millions of memory rows: sparse access memory for PyTorch."""

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.reading import Hit
from sparsemem.layers.memory_layer import MemoryLayer
from sparsemem.memory.episode import Episode
from sparsemem.models.base import Access, Cell, MemoryModel
from sparsemem.models.captured import captured
from sparsemem.models.controller import LSTMController
from sparsemem.models.dnc import DNC, DNCCell
from sparsemem.models.lstm import LSTM, LSTMCell
from sparsemem.models.memory_lstm import MemoryLSTM, MemoryLSTMCell
from sparsemem.models.ntm import NTM, NTMCell
from sparsemem.models.sam import SAM, SAMCell
from sparsemem.models.sdnc import SDNC, SDNCCell
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD, clip_grad_norm

__all__ = [
    "DNC",
    "LSTM",
    "NTM",
    "SAM",
    "SDNC",
    "Access",
    "Cell",
    "DNCCell",
    "Episode",
    "Hit",
    "LSTMCell",
    "LSTMController",
    "MemoryBank",
    "MemoryLSTM",
    "MemoryLSTMCell",
    "MemoryLayer",
    "MemoryModel",
    "NTMCell",
    "RowAdagrad",
    "RowAdam",
    "RowAdamW",
    "RowSGD",
    "SAMCell",
    "SDNCCell",
    "captured",
    "clip_grad_norm",
]
