"""Runs on other machines: Slurm through submitit, and Ray (docs/cluster.md)."""
