"""Deprecated: `python -m hmoe.training.placement` is `hmoe convert place`."""

import sys
import warnings

from hmoe_cli import main


if __name__ == "__main__":
    warnings.warn(f"{__doc__} Use that.", FutureWarning, stacklevel=1)
    sys.exit(main(["convert", "place", *sys.argv[1:]]))
