"""`vim2 benchmark`: parameters, FLOPs, times and memory of models, and where the time goes."""
