"""`python -m hmoe.conversion` is `hmoe convert`."""

import sys

from .command import main


sys.exit(main())
