"""Runs jobs under SLURM: submits and requeues them, and gives a folder to one of them."""
