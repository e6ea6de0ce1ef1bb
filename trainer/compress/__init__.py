"""Compression: shorter sequences, fewer bits, fewer weights; each goes with every strategy."""
