"""Operators: the only place that knows about devices and kernels."""

from .depthwise_conv import depthwise_conv_silu
from .directional_conv import directional_conv_silu
from .layer_norm import layer_norm, patch_merging_norm
from .norm_gate import norm_gate
from .projected_scan import projected_scan
from .selective_scan import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn
from .weighted_average import weighted_average, weighted_average_norm

__all__ = [
    "BIDIRECTIONAL",
    "CROSS_SCAN",
    "FORWARD",
    "depthwise_conv_silu",
    "directional_conv_silu",
    "layer_norm",
    "norm_gate",
    "patch_merging_norm",
    "projected_scan",
    "selective_scan",
    "selective_scan_fn",
    "weighted_average",
    "weighted_average_norm",
]
