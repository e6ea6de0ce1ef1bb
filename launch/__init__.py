"""The commands, one file each, without training logic."""
