"""Operators along the last axis: LayerNorm, the gate behind a scan, and the weighted average in front of a mixer."""
