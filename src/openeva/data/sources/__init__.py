"""Data formats behind one contract (`base.py`); one file each."""
