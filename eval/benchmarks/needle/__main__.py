"""`python -m xattn_video_eval.benchmarks.needle`."""

import sys

from xattn_video_eval.benchmarks.needle.command import main

if __name__ == "__main__":
    sys.exit(main())
