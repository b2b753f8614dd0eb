# make demo | test | lint | bench: each sets up what it needs in .venv, from the exact pins in constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
TEST_WORKERS ?= 2
DEMO_OUT ?= demo-out
BENCH_OUT ?= bench-out
GOALS_OUT ?= goals-out
FIRST_GPU_OUT ?= first-gpu-out
# Each compiles kernels of its own, which takes longer than to run them.
GPU_WORKERS ?= 4
GPU_TESTS := tests/test_triton_kernels.py tests/test_attention_hopper.py tests/test_call_blocks.py \
	tests/test_flex_backend.py tests/test_fa4_backend.py tests/test_efficiency.py tests/test_tune.py \
	tests/test_synthetic.py
# For a torchvision that was built for another torch; what its installation leaves there is removed.
TORCHVISION_FIT := ./pipelines/demo/torchvision_fit
# The first interpreter that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

LOWEST := .venv-lowest
LOWEST_DIFFUSERS := 0.38.0
LOWEST_TRANSFORMERS := 4.57.1
LOWEST_READY := $(LOWEST)/.installed-$(LOWEST_DIFFUSERS)-$(LOWEST_TRANSFORMERS)

.PHONY: help demo test test-gpu memcheck-gpu test-lowest lint bench bench-gpu first-gpu goals-gpu \
	bench-static soak clean

help:
	@echo "make demo          generate dense and sparse videos with a small model and compare them"
	@echo "make test          run the tests (no GPU needed)"
	@echo "make test-gpu      run the tests that need a GPU"
	@echo "make memcheck-gpu  run the kernels on small problems under NVIDIA's compute-sanitizer"
	@echo "make test-lowest   run the tests of models with the oldest supported diffusers and transformers"
	@echo "make lint          ruff and mypy"
	@echo "make bench         time sparse against dense attention on this machine"
	@echo "make bench-gpu     the same on a GPU at the sizes of Wan and HunyuanVideo, and causal up to 256k tokens"
	@echo "make first-gpu     a first look at an H100 or H200: results and times in under eight minutes, and goals reached"
	@echo "make goals-gpu     measure on a GPU what this package wants to reach, and say what it does"
	@echo "make bench-static  compile every kernel for every GPU target and print what the compiler made"
	@echo "make soak          kill every program 200 times at random moments, and look at what is left (an hour)"

.PHONY: new-enough
new-enough:
	@$(if $(PYTHON),$(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "xattn-video needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }

$(READY): pyproject.toml constraints.txt | new-enough
	@echo "Installing into $(VENV), once. This takes some minutes, and pip prints nothing while all is well."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,test,lint]'
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCHVISION_FIT)
	@rm -rf $(TORCHVISION_FIT)/build $(TORCHVISION_FIT)/*.egg-info
	@touch $@

demo: $(READY)
	$(BIN)/xattn-video demo --out $(DEMO_OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

# Without this a machine whose torch sees no GPU would skip every test and end well.
.PHONY: gpu
gpu: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "torch sees no GPU here; xattn-video doctor says more" >&2; exit 2; }

# In an environment that is there already, torch with CUDA in it: make READY= BIN=/path/to/bin test-gpu
test-gpu: gpu
	$(BIN)/python -m pytest -m gpu -n $(GPU_WORKERS) --dist worksteal $(GPU_TESTS)

# Memory of its own for every tensor, so that an access beside one is seen.
memcheck-gpu: gpu
	@command -v compute-sanitizer >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt nvidia-cuda-sanitizer-api
	PATH="$$PATH:$$(echo $(CURDIR)/$(VENV)/lib/python*/site-packages/nvidia/cu13/bin)" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest -m gpu -k small_problems tests/test_triton_kernels.py

# The oldest diffusers brings its own range of huggingface_hub, so the pins of what belongs together are left out.
$(LOWEST_READY): pyproject.toml constraints.txt | new-enough
	$(PYTHON) -m venv $(LOWEST)
	grep -viE '^(diffusers|transformers|huggingface_hub|tokenizers|accelerate|peft|httpx|httpcore|h11|typer)' constraints.txt \
		> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(LOWEST)/constraints.txt diffusers==$(LOWEST_DIFFUSERS) transformers==$(LOWEST_TRANSFORMERS) \
		--editable '.[all,test]'
	@touch $@

# What builds models; diffusers' pipelines first, the longest.
LOWEST_TESTS := tests/test_diffusers*.py tests/test_cli_generate.py tests/test_transformers.py tests/test_video_qa.py \
	tests/test_watcher*.py tests/test_positions.py tests/test_asking.py tests/test_demo.py tests/test_first_token.py \
	tests/test_needle.py tests/test_story_quality.py tests/test_harness.py

test-lowest: $(LOWEST_READY)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(TEST_WORKERS) $(LOWEST_TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/xattn-video bench

# Without the venv, bench-gpu and goals-gpu need the command line's packages first: /path/to/bin/pip install '.[cli]'
bench-gpu: gpu
	$(BIN)/python -m xattn_video_pipelines.cli bench --device cuda --full --record --plot $(BENCH_OUT)

# Without the venv, from a checkout that is not installed: make READY= BIN=/path/to/bin first-gpu
first-gpu: gpu
	$(BIN)/python -m xattn_video_eval.first_gpu --out $(FIRST_GPU_OUT)

# Under 5 minutes on an H200.
goals-gpu: gpu
	$(BIN)/python -m xattn_video_pipelines.cli bench --device cuda --goals --rounds 3 --record --out $(GOALS_OUT)

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak
	XATTN_VIDEO_FUZZ=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) tests/test_fuzz_files.py

bench-static: $(READY)
	$(BIN)/python -m xattn_video_eval.studies.static_evidence

clean:
	rm -rf $(VENV) $(LOWEST) $(DEMO_OUT) $(BENCH_OUT) $(GOALS_OUT) $(FIRST_GPU_OUT) .mypy_cache .pytest_cache .ruff_cache
