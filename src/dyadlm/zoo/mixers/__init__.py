"""Layers that mix tokens and stand in no library in a form that is causal and runs on a CPU; one family each."""
