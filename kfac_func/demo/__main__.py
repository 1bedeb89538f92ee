"""Entry point of `python -m kfac_func.demo`."""

from __future__ import annotations

import sys

from kfac_func.demo.run import main

if __name__ == "__main__":
    sys.exit(main())
