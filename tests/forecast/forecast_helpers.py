"""Small series and options for these tests."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ["--horizon", "12", "--lookback", "48", "--d-model", "4", "--d-state", "2", "--device", "cpu", "--lr", "2e-3"]
TINY += ["--members", "2", "--epoch-steps", "4"]


def environment() -> dict[str, str]:
    """For a tool in a process of its own: the package of this checkout, and one thread."""
    return {**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"}


def make_frame(rows: int = 400, start: str = "2024-01-01", step: str = "h", seed: int = 0) -> pd.DataFrame:
    """Three hourly series with a daily season, and a column that is known ahead."""
    t, noise = np.arange(rows), np.random.default_rng(seed).normal(size=(3, rows))
    promotion = (t % 50 < 5).astype(float)
    return pd.DataFrame(
        {
            "date": pd.date_range(start, periods=rows, freq=step),
            "north": 10 + 3 * np.sin(2 * np.pi * t / 24) + 0.3 * noise[0],
            "south": np.cos(2 * np.pi * t / 24) + 2 * promotion + 0.1 * noise[1],
            "level": 100 + np.cumsum(noise[2]),
            "promotion": promotion,
        }
    )


def ahead(frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """The series with twelve further rows of which only the promotions are known."""
    frame = make_frame(412) if frame is None else frame
    frame.loc[400:, ["north", "south", "level"]] = np.nan
    return frame


def write_csv(path: Path, frame: pd.DataFrame | None = None, **options) -> Path:
    (make_frame() if frame is None else frame).to_csv(path, index=False, **options)
    return path


def shared_data(name: str) -> Path:
    """A file of the real data beside the checkout, or in $VIM2_DATA; the test is skipped where there is none."""
    folder = Path(os.environ.get("VIM2_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "forecast" / name
    if not path.exists():
        pytest.skip(f"{path} is not here: set VIM2_DATA to the folder that holds forecast/{name}")
    return path
