"""The doors: one command each, no logic of training."""
