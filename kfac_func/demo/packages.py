"""The optional packages of the demo, and the one message that says how to get them."""

from __future__ import annotations

from importlib.util import find_spec

from kfac_func._errors import explain


def require(*packages: str) -> None:
    """Raise ImportError, naming the missing ones and the command that installs them, unless all can be imported.

    >>> require("math")
    >>> require("no_such_package")
    Traceback (most recent call last):
        ...
    ImportError: the demo needs packages that are not installed.
      missing  no_such_package
      options  pip install "kfac_func[demo]"
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            explain(
                "the demo needs packages that are not installed.",
                missing=", ".join(missing),
                options='pip install "kfac_func[demo]"',
            )
        )
