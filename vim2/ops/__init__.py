"""Operators: the only place that knows about devices and kernels."""

from .selective_scan import BIDIRECTIONAL, CROSS_SCAN, FORWARD, selective_scan, selective_scan_fn
from .weighted_average import weighted_average

__all__ = ["BIDIRECTIONAL", "CROSS_SCAN", "FORWARD", "selective_scan", "selective_scan_fn", "weighted_average"]
