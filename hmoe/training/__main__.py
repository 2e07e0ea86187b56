"""`python -m hmoe.training` is `hmoe train`, for launchers that start a module."""

import sys

from hmoe_cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
