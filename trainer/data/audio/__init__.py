"""Speech: audio files read, and turned into features."""
