"""Makes comparison.py importable from the folders below."""
