"""The model, its data, its optimizer and its training: loop, checkpoints, metrics."""
