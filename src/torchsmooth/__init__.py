"""Train smooth, then compress with one line, with no fine-tuning.

>>> import torch, torchsmooth
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> model = torchsmooth.smooth_(model, torchsmooth.NuclearNorm(strength=1e-3))
>>> loss = model(torch.randn(8, 64)).square().mean() + torchsmooth.penalty_loss(model)  # in the training loop
>>> report = torchsmooth.svd_compress_(model, ratio=0.7)  # after it
"""

from importlib.metadata import PackageNotFoundError, version

from . import functional
from .adaptive import Constrained
from .attach import attach_
from .attention import LowRankMultiheadAttention
from .batchnorm import recalibrate_batchnorm_
from .checkpoint import load_compressed_
from .checkpoint_files import compress_checkpoint
from .compress import restore_dense_, svd_compress_
from .folding import FoldingReport, fold_batchnorm_
from .layer_types import register_layer
from .loss import penalty_loss
from .lowrank import LowRankLinear
from .lowrank_conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .lowrank_embedding import LowRankEmbedding
from .lowrank_transposed import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .penalties import FirstDerivative, NuclearNorm, NuclearRatio, SecondDerivative
from .plan import CompressionPlan
from .planning import plan_compression, sweep
from .plotting import plot_weights
from .rank_tail import RankTail
from .recurrent import LowRankGRU, LowRankLSTM, LowRankRNN
from .recurrent_cells import LowRankGRUCell, LowRankLSTMCell, LowRankRNNCell
from .registry import is_penalized, register_penalty, remove_penalties, smooth_
from .report import CompressionReport
from .schedules import StrengthSchedule
from .spectra import Spectrum, plot_spectra, spectrum
from .tucker import TuckerConv2d
from .tuning import TuningReport, tune_

try:
    __version__ = version("torchsmooth")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CompressionPlan",
    "CompressionReport",
    "Constrained",
    "FirstDerivative",
    "FoldingReport",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankGRU",
    "LowRankGRUCell",
    "LowRankLSTM",
    "LowRankLSTMCell",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankRNN",
    "LowRankRNNCell",
    "NuclearNorm",
    "NuclearRatio",
    "RankTail",
    "SecondDerivative",
    "Spectrum",
    "StrengthSchedule",
    "TuckerConv2d",
    "TuningReport",
    "attach_",
    "compress_checkpoint",
    "fold_batchnorm_",
    "functional",
    "is_penalized",
    "load_compressed_",
    "penalty_loss",
    "plan_compression",
    "plot_spectra",
    "plot_weights",
    "recalibrate_batchnorm_",
    "register_layer",
    "register_penalty",
    "remove_penalties",
    "restore_dense_",
    "smooth_",
    "spectrum",
    "svd_compress_",
    "sweep",
    "tune_",
]
