"""One thin file per task: which model, which loss, which metrics."""
