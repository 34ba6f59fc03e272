"""`python -m mesp_ref` is `mesp-ref`."""

import sys

from mesp_ref.cli import main

sys.exit(main())
