"""openeva: EVA (arXiv 2211.07636) as a tool."""

__version__ = "0.1.0"
