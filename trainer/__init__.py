"""What is trained, and the training of it: model, data, optimizer, loop, checkpoints."""
