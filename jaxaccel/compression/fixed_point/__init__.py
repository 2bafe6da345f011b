"""QFX: networks in the fixed-point arithmetic of an FPGA, trained with learned binary points.

What it makes cheaper: inference in hardware that is built for the network. All tensors are words of few bits with a
binary point that is fixed (`FixedPoint`), and training runs on the very numbers that the hardware computes: casts with
its rounding and overflow modes, exact products and sums, accumulators as narrow as declared. The point of each tensor
is a parameter (`trainable_cast`). Weights with at most K ones (`k_hot`) need no multipliers.

    f = calibrate(params, word=4)                               # start
    y = apply_fn(quantize_params(params, f, word=4), x)         # train params and f together
    formats = freeze(f, word=4)                                 # then integers only: to_int, qdot, requantise

When to use it: FPGAs and ASICs, 3 to 8 bits, where bits must be the same in software and hardware. When not: serving on
GPU or TPU, where scales need not be powers of two: see `jaxaccel.compression.weight_only`.

Source: Dai et al., Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs, arXiv 2401.17544. No
code is published. The arithmetic is that of ap_fixed, bit for bit; the gradient of the binary point, its start, and the
choice of integers with K ones are reconstructed, as the modules say.
"""

from jaxaccel.compression.fixed_point.batch_norm import fold_batch_norm, qbatchnorm
from jaxaccel.compression.fixed_point.calibration import calibrate
from jaxaccel.compression.fixed_point.casting import cast, from_int, to_int
from jaxaccel.compression.fixed_point.dot import exact_matmul, qdot
from jaxaccel.compression.fixed_point.formats import FixedPoint, Format, add_format, dot_format, multiply_format
from jaxaccel.compression.fixed_point.hls import export_hls
from jaxaccel.compression.fixed_point.integer import int_forward
from jaxaccel.compression.fixed_point.layers import BinaryPoint, QBatchNorm, QConv, QDense, QInput, QRelu
from jaxaccel.compression.fixed_point.matrices import FixedPointMatrix, fixed_point_matrices, int8_weights
from jaxaccel.compression.fixed_point.multiplier_free import Cost, adders, count_ones, csd, csd_digits, k_hot
from jaxaccel.compression.fixed_point.networks import (
    QMean,
    QResidual,
    QSequential,
    calibrate_layers,
    set_mode,
    weight_integers,
)
from jaxaccel.compression.fixed_point.operators import qadd, qmean, qmul, requantise
from jaxaccel.compression.fixed_point.spec import Node, Spec
from jaxaccel.compression.fixed_point.trainable import (
    binary_point,
    frac_labels,
    freeze,
    quantize_params,
    trainable_cast,
)

__all__ = [
    "BinaryPoint",
    "Cost",
    "FixedPoint",
    "FixedPointMatrix",
    "Format",
    "Node",
    "QBatchNorm",
    "QConv",
    "QDense",
    "QInput",
    "QMean",
    "QRelu",
    "QResidual",
    "QSequential",
    "Spec",
    "add_format",
    "adders",
    "binary_point",
    "calibrate",
    "calibrate_layers",
    "cast",
    "count_ones",
    "csd",
    "csd_digits",
    "dot_format",
    "exact_matmul",
    "export_hls",
    "fixed_point_matrices",
    "fold_batch_norm",
    "frac_labels",
    "freeze",
    "from_int",
    "int8_weights",
    "int_forward",
    "k_hot",
    "multiply_format",
    "qadd",
    "qbatchnorm",
    "qdot",
    "qmean",
    "qmul",
    "quantize_params",
    "requantise",
    "set_mode",
    "to_int",
    "trainable_cast",
    "weight_integers",
]
