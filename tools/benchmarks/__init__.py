"""What the benchmarks consist of; tools/benchmark.py and the scripts in this folder are their commands."""
