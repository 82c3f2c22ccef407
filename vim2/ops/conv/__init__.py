"""Depth-wise convolutions, each with the SiLU that follows."""
