"""avzero: a distributed experiment platform for audio-visual generalised zero-shot learning."""

__version__ = "0.1.0"

DEFAULT_STORE = ".avzero/store"
"""Where a command looks that is told nothing else."""
