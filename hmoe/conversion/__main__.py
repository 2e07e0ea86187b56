"""`python -m hmoe.conversion` is `hmoe convert`."""

import sys

from .run import main


sys.exit(main())
