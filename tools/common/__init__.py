"""What the commands in tools/ share. Each imports it before anything else.

On a CPU that other programs use as well, OpenMP's threads would burn the time in which they wait for one another, and a
step take 2 to 20 times as long, unless they are told to sleep. OpenMP reads this once, when PyTorch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
