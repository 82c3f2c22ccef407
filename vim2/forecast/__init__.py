"""Multivariate forecasting with TSM2: data, protocol, baselines, training. docs/forecasting.md is the guide.

This package needs pandas (`pip install "vim2[forecast]"`); the model alone, `vim2.TSM2`, does not.
"""

import importlib
from typing import TYPE_CHECKING

from ..command.errors import UserError

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .forecaster import Forecaster
    from .prediction import predict
    from .training import fit

__all__ = ["Forecaster", "UserError", "evaluate", "fit", "predict"]

_MODULES = {"Forecaster": "forecaster", "evaluate": "evaluation", "fit": "training", "predict": "prediction"}


def __getattr__(name: str):
    """Imported when first asked for, so that the command line can say that pandas is missing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    try:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError('vim2.forecast needs pandas: pip install "vim2[forecast]", or pip install pandas.') from None
