"""`python -m hmoe` is `hmoe`."""

import sys

from hmoe_cli import main


if __name__ == "__main__":
    sys.exit(main())
