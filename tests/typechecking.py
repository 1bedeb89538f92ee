"""The run-time type checker of the test suite, used by `make test` through jaxtyping's import hook."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype with the numeric tower: an int is a float, as for static type checkers."""
