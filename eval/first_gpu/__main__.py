"""`python3 -m eval.first_gpu`, see command.py."""

import sys

from eval.first_gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
