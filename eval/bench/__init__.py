"""How fast sparse attention is beside dense attention, after a correctness gate."""

from typing import TYPE_CHECKING

from xattn_video.fronts import lazy

if TYPE_CHECKING:
    from xattn_video_eval.bench.cases import DTYPES as DTYPES
    from xattn_video_eval.bench.cases import GPU_CASES as GPU_CASES
    from xattn_video_eval.bench.cases import Case as Case
    from xattn_video_eval.bench.cases import make_inputs as make_inputs
    from xattn_video_eval.bench.command import bench as bench
    from xattn_video_eval.bench.demo_tensors import load_demo_qkv as load_demo_qkv
    from xattn_video_eval.bench.dense_kernels import Problem as Problem
    from xattn_video_eval.bench.dense_kernels import dense_candidates as dense_candidates
    from xattn_video_eval.bench.dense_kernels import reason_of as reason_of
    from xattn_video_eval.bench.dense_kernels import relative_error as relative_error
    from xattn_video_eval.bench.dense_kernels import sampled_truth as sampled_truth
    from xattn_video_eval.bench.goals import EXTRA_MIB as EXTRA_MIB
    from xattn_video_eval.bench.goals import HOPPER_TFLOPS as HOPPER_TFLOPS
    from xattn_video_eval.bench.goals import OF_IDEAL as OF_IDEAL
    from xattn_video_eval.bench.goals import PLAIN_TFLOPS as PLAIN_TFLOPS
    from xattn_video_eval.bench.goals import SELECTION_SHARE as SELECTION_SHARE
    from xattn_video_eval.bench.settings import BenchSettings as BenchSettings
    from xattn_video_eval.bench.timing import median_seconds as median_seconds
    from xattn_video_eval.bench.timing import peak_extra_mb as peak_extra_mb
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "cases": ["DTYPES", "GPU_CASES", "Case", "make_inputs"],
            "command": ["bench"],
            "demo_tensors": ["load_demo_qkv"],
            "dense_kernels": ["Problem", "dense_candidates", "reason_of", "relative_error", "sampled_truth"],
            "goals": ["EXTRA_MIB", "HOPPER_TFLOPS", "OF_IDEAL", "PLAIN_TFLOPS", "SELECTION_SHARE"],
            "settings": ["BenchSettings"],
            "timing": ["median_seconds", "peak_extra_mb"],
        },
    )
