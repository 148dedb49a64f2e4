"""KinetiCLIP: CLIP as a video recogniser, from file to score."""

__version__ = "0.1.0"
