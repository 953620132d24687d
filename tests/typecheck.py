"""The checker of annotations in tests: beartype, with ints accepted as floats (PEP 484's numeric tower)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
