"""Benchmarks of what is no model: forecasters, detectors, and the arena of trainings. The scripts here are commands."""
