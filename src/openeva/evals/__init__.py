"""Evaluations: `run(task, loaders) -> {metric: value}`; one file each."""
