# The paper's run, or the toy set's where DATA is not given. `make -n TARGET` prints what would run.
DATA    ?= data/toy
override DATA := $(patsubst ./%,%,$(DATA:%/=%))
OUT     ?= out/$(notdir $(abspath $(DATA)))
PRESET  ?= $(if $(filter data/toy,$(DATA)),toy,voc)
SEED    ?= 0
SEEDS   ?= 0 1 2
PYTHON  ?= .venv/bin/python

ENV     := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
TOY     := $(if $(filter data/toy,$(DATA)),data/toy/toy.json)
COMMON  := --data $(DATA) --out $(OUT) --preset $(PRESET) --seed $(SEED) $(if $(DEVICE),--device $(DEVICE))
SCRATCH := $(if $(FROM_SCRATCH),--from-scratch)
START   := $(SCRATCH) $(if $(CONFORMER),--pretrained $(CONFORMER)) $(if $(PARTIAL),--partial) $(if $(ARCH),--arch $(ARCH)) \
           $(if $(CROP),--crop $(CROP)) $(if $(LONG_SIDE),--long-side $(LONG_SIDE)) $(if $(EPOCHS),--epochs $(EPOCHS))
PICK    := $(if $(IDS),--ids $(IDS)) --first $(if $(IDS),$(words $(IDS)),4)
BACK    := $(SCRATCH) $(if $(RESNET38),--resnet38 $(RESNET38)) $(if $(BACKBONE),--backbone $(BACKBONE))

# Runs of `make results`, made where their results.json is missing; ROW is that of the run in hand.
ROWS    ?= transcam no-noise noise-x1 noise-x2
FURTHER ?= transcam noise-x1
RUNS    := $(foreach s,$(SEEDS),$(foreach r,$(ROWS),$(OUT)/rows/$r-seed$s/results.json)) $(OUT)/rows/untrained-seed0/results.json
ROW      = $(firstword $(subst -seed, ,$*))
FLAGS_transcam  := --loss transcam
FLAGS_no-noise  := --loss bnr --noise none
FLAGS_noise-x1  := --loss bnr --noise 1
FLAGS_noise-x2  := --loss bnr --noise 2
FLAGS_untrained := --epochs 0

.NOTPARALLEL:
.PHONY: help train cams psa seg eval show results check coco test bench clean

help:
	@echo "make train cams psa seg eval   image labels to segmenter on the toy set, then the table"
	@echo "make test                      the tests, on the CPU"
	@echo "  train     classifier                      -> OUT/classifier.pth"
	@echo "  cams      seeds                           -> OUT/cams/"
	@echo "  psa       affinity labels, net, walk, CRF -> OUT/pseudo_labels/"
	@echo "  seg       segmenter and its masks of val  -> OUT/segmentation/"
	@echo "  eval      one table of all stages         -> OUT/results.json"
	@echo "  show      one picture of all stages       -> OUT/show.png, of IDS or the first four"
	@echo "  results   all that for ROWS of Table 5 and SEEDS, FURTHER rows through psa and seg -> OUT/rows/, README's tables"
	@echo "  check     what in DATA would break a stage"
	@echo "  coco      makes DATA, with train2014, val2014 and annotations in it, a data set"
	@echo "  bench     plain forms against ours: seconds, memory, bytes; BENCH_FLAGS=--quick"
	@echo "DATA=$(DATA) OUT=$(OUT) PRESET=$(PRESET) SEED=$(SEED) SEEDS='$(SEEDS)' PYTHON=$(PYTHON)"
	@echo "CONFORMER=FILE RESNET38=FILE: ImageNet weights; FROM_SCRATCH=1 PARTIAL=1 BACKBONE=resnet50 DEVICE=cpu"
	@echo "ARCH=small CROP=224 LONG_SIDE='140 280' EPOCHS=10: of the classifier"
	@echo "TRAIN_FLAGS CAMS_FLAGS LABELS_FLAGS AFFINITY_FLAGS WALK_FLAGS SEG_FLAGS PREDICT_FLAGS: more flags of a script"

# pydensecrf2 is compiled with the newest Cython: the one that its isolated build pins fails on Python 3.13.
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check cython setuptools wheel numpy
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements.txt
	touch $@

data/toy/toy.json: | $(ENV)
	$(PYTHON) data.py toy --root data/toy

train: $(ENV) $(TOY)
	$(PYTHON) bnr.py train $(COMMON) $(START) $(TRAIN_FLAGS)

cams: $(ENV) $(TOY)
	$(PYTHON) bnr.py cams $(COMMON) $(CAMS_FLAGS)

psa: $(ENV) $(TOY)
	$(PYTHON) psa.py labels $(COMMON) $(LABELS_FLAGS)
	$(PYTHON) psa.py train $(COMMON) $(BACK) $(AFFINITY_FLAGS)
	$(PYTHON) psa.py walk $(COMMON) $(WALK_FLAGS)

seg: $(ENV) $(TOY)
	$(PYTHON) segment.py train $(COMMON) $(BACK) $(SEG_FLAGS)
	$(PYTHON) segment.py predict $(COMMON) $(PREDICT_FLAGS)

eval: $(ENV) $(TOY)
	$(PYTHON) data.py eval $(COMMON)

show: $(ENV) $(TOY)
	$(PYTHON) segment.py predict $(COMMON) $(PREDICT_FLAGS) --split train $(PICK)
	$(PYTHON) bnr.py show $(COMMON) $(PICK)

results: $(ENV) $(RUNS)
	$(PYTHON) data.py report $(COMMON) --rows transcam no-noise noise-x1 noise-x2 untrained --seeds $(sort 0 1 2 $(SEEDS)) --readme README.md

$(OUT)/rows/%/results.json:
	$(if $(FLAGS_$(ROW)),,$(error no row $(ROW): ROWS are of transcam no-noise noise-x1 noise-x2))
	$(MAKE) train cams $(if $(filter $(FURTHER),$(ROW)),psa seg) eval OUT=$(@D) SEED=$(lastword $(subst -seed, ,$*)) \
	  TRAIN_FLAGS="$(TRAIN_FLAGS) $(FLAGS_$(ROW))" CAMS_FLAGS="$(CAMS_FLAGS) --plain $(if $(filter $(FURTHER),$(ROW)),,--split train)"
	$(PYTHON) bnr.py show $(COMMON) --out $(@D) --first 24

check: $(ENV) $(TOY)
	$(PYTHON) data.py check --data $(DATA)

coco: $(if $(TOY),,$(ENV))
	@test -z "$(TOY)" || { echo "error: make coco needs DATA=DIR, a folder with train2014, val2014 and annotations"; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check pycocotools
	$(PYTHON) data.py coco --root $(DATA)

test: $(ENV)
	$(PYTHON) -m pytest -rs tests

bench: $(ENV)
	$(PYTHON) tests/benchmark.py $(BENCH_FLAGS)

clean:
	rm -rf out data/toy .venv
