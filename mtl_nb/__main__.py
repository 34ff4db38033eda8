"`python -m mtl_nb` is the command `mtl`."
import sys

from .cli import main

sys.exit(main())
