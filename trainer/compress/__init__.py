"""Compression: shorter sequences, fewer bits, fewer weights; each works with every strategy."""
