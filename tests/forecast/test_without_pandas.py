import os
import subprocess
import sys

from vim2.forecast.cli import main


def test_help_and_a_clear_error_where_pandas_is_missing(tmp_path):
    """In a process that cannot import pandas, the package and its command line still can be."""
    (tmp_path / "pandas.py").write_text("raise ModuleNotFoundError('No module named pandas', name='pandas')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = "import sys, vim2; from vim2.forecast.cli import main; sys.exit(main(['fit', 'x.csv']))"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 2 and 'pip install "vim2[forecast]"' in result.stderr.splitlines()[-1]
    assert main([]) == 0
