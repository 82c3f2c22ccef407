"""Models for runtimes other than PyTorch. docs/export.md is the guide.

ONNX needs the packages onnx and onnxscript (`pip install "vim2[export]"`), which are imported when first used.
"""

from .forecaster import ForecasterModule
from .hub import export_timm
from .onnx import export_onnx, onnx_translations
from .pt2 import export_program, export_pt2

__all__ = ["ForecasterModule", "export_onnx", "export_program", "export_pt2", "export_timm", "onnx_translations"]
