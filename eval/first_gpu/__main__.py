"""`python3 -m xattn_video_eval.first_gpu`, see command.py."""

import sys

from xattn_video_eval.first_gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
