"""Operators: the only place that knows about devices and kernels."""

from .conv.causal import causal_conv_silu
from .conv.depthwise import depthwise_conv_silu
from .conv.directional import directional_conv_silu
from .norm.layer_norm import layer_norm, patch_merging_norm
from .norm.norm_gate import norm_gate
from .norm.weighted_average import weighted_average, weighted_average_norm
from .scan.mamba_signature import selective_scan_fn
from .scan.operator import selective_scan_jit_flops
from .scan.orders import BIDIRECTIONAL, CROSS_SCAN, FORWARD
from .scan.projected_scan import projected_scan
from .scan.selective_scan import selective_scan

__all__ = [
    "BIDIRECTIONAL",
    "CROSS_SCAN",
    "FORWARD",
    "causal_conv_silu",
    "depthwise_conv_silu",
    "directional_conv_silu",
    "layer_norm",
    "norm_gate",
    "patch_merging_norm",
    "projected_scan",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_jit_flops",
    "weighted_average",
    "weighted_average_norm",
]
