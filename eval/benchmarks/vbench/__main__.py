"""`python -m xattn_video_eval.benchmarks.vbench`."""

import sys

from xattn_video_eval.benchmarks.vbench.command import main

if __name__ == "__main__":
    sys.exit(main())
