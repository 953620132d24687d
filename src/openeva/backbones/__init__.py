"""Image encoders behind one contract (`base.py`); one file per family."""
