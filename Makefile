# The paper's run, or the toy set's where DATA is not given. `make -n TARGET` prints what would run.
# A path that a shell would not hand on as it stands is refused.
HASH    := \#
special  = $(foreach sign,& ; $$ $(HASH) ' " ` ( ) < > | * ? \ !,$(findstring $(sign),$(value $1)))$(word 2,$(value $1))
$(foreach name,DATA OUT CONFORMER RESNET38 BACKBONE_WEIGHTS,$(if $(strip $(call special,$(name))),\
  $(error $(name) has a blank or a sign that a shell reads: take another name)))
DATA ?= data/toy
override DATA := $(patsubst ./%,%,$(DATA:%/=%))
REAL    := $(or $(realpath $(DATA)),$(abspath $(DATA)))
OUT     ?= out/$(notdir $(REAL))
PRESET  ?= $(if $(filter $(CURDIR)/data/toy,$(REAL)),toy,voc)
SEED    ?= 0
SEEDS   ?= 0 1 2
ROWS    ?= transcam no-noise noise-x1 noise-x2
FURTHER ?= transcam noise-x1
PYTHON  ?= .venv/bin/python
# A switch is on at 1, yes, true; off at 0, no, false or nothing.
on = $(if $(filter-out 0 no false,$($1)),$(if $(filter 1 yes true,$($1)),$2,$(error $1=$($1) is neither 1 nor 0)))
ENV     := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
TOY     := $(if $(filter $(CURDIR)/data/toy,$(REAL)),data/toy/toy.json)
TRAIN   := $(if $(GPUS),$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(GPUS),$(PYTHON))
COMMON  := --data $(DATA) --out $(OUT) --preset $(PRESET) --seed $(SEED) $(if $(DEVICE),--device $(DEVICE)) \
           $(call on,FRESH,--fresh)
SCRATCH := $(if $(FROM_SCRATCH),$(or $(call on,FROM_SCRATCH,--from-scratch),--no-from-scratch))
WEIGHTS := $(SCRATCH) $(if $(CONFORMER),--pretrained $(CONFORMER))
BACK    := $(SCRATCH) $(if $(RESNET38),--resnet38 $(RESNET38)) $(if $(BACKBONE),--backbone $(BACKBONE)) \
           $(if $(BACKBONE_WEIGHTS),--backbone-weights $(BACKBONE_WEIGHTS))
PICK    := $(if $(IDS),--ids $(IDS),--first 4)
LOSS_transcam := --loss transcam
LOSS_no-noise := --loss bnr --noise none
LOSS_noise-x1 := --loss bnr --noise 1
LOSS_noise-x2 := --loss bnr --noise 2

.NOTPARALLEL:
.PHONY: help train cams psa seg eval show report results tables figures check coco test bench clean

help:
	@echo "make train cams psa seg eval   image labels to segmenter on the toy set, then the table; all of it below OUT"
	@echo "make test                      the tests, on the CPU"
	@echo "  train cams psa seg           classifier; seeds; pseudo labels; segmenter and its masks of val"
	@echo "  eval show report             the table; one picture of IDS or the first four; a gallery of all photos"
	@echo "  results                      all of it for each loss of ROWS and SEEDS, then the tables"
	@echo "  tables figures               the paper's, of these runs"
	@echo "  check coco                   what in DATA would break a stage; makes a folder of COCO a data set"
	@echo "  bench clean                  plain forms against ours; deletes out/, data/toy and .venv"
	@echo "DATA=$(DATA) OUT=$(OUT) PRESET=$(PRESET) CONFORMER=FILE RESNET38=FILE"
	@echo "Also: BACKBONE=resnet50 FROM_SCRATCH=1 DEVICE=cpu GPUS=2 SEED=0 FRESH=1 (make again what is done); more flags:"
	@echo "TRAIN_FLAGS CAMS_FLAGS LABELS_FLAGS AFFINITY_FLAGS WALK_FLAGS SEG_FLAGS PREDICT_FLAGS SHOW_FLAGS BENCH_FLAGS"

# pydensecrf2 is compiled with the newest Cython: the one that its isolated build pins fails on Python 3.13.
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check cython setuptools wheel numpy
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements.txt
	touch $@

data/toy/toy.json: | $(ENV)
	$(PYTHON) -m wsss.prepare toy --root data/toy

train: $(ENV) $(TOY)
	$(TRAIN) bnr.py train $(COMMON) $(WEIGHTS) $(TRAIN_FLAGS)
cams: $(ENV) $(TOY)
	$(PYTHON) bnr.py cams $(COMMON) $(CAMS_FLAGS)
psa: $(ENV) $(TOY)
	$(PYTHON) psa.py labels $(COMMON) $(LABELS_FLAGS)
	$(TRAIN) psa.py train $(COMMON) $(BACK) $(AFFINITY_FLAGS)
	$(PYTHON) psa.py walk $(COMMON) $(WALK_FLAGS)
seg: $(ENV) $(TOY)
	$(TRAIN) segment.py train $(COMMON) $(BACK) $(SEG_FLAGS)
	$(PYTHON) segment.py predict $(COMMON) $(PREDICT_FLAGS)
eval: $(ENV) $(TOY)
	$(PYTHON) -m wsss.evaluate $(COMMON)
show: $(ENV) $(TOY)
	$(PYTHON) segment.py predict $(COMMON) $(PREDICT_FLAGS) --split train $(PICK)
	$(PYTHON) -m wsss.report show $(COMMON) $(PICK) $(SHOW_FLAGS)
report: $(ENV) $(TOY)
	$(PYTHON) -m wsss.report gallery $(COMMON)
tables: $(ENV) $(TOY)
	$(PYTHON) -m wsss.report tables $(COMMON) --random-seeds $(SEEDS)
figures: $(ENV) $(TOY)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check matplotlib
	$(PYTHON) -m wsss.report figures $(COMMON) --random-seeds $(SEEDS)
results: $(ENV) $(TOY) $(foreach seed,$(SEEDS),$(foreach row,$(ROWS),row.$(row).$(seed))) tables
row.%: row = $(word 1,$(subst ., ,$*))
row.%: seed = $(word 2,$(subst ., ,$*))
row.%:
	$(MAKE) train cams $(if $(filter $(row),$(FURTHER)),psa seg) eval SEED=$(seed) \
	  OUT=$(OUT)/rows/$(row)-seed$(seed) TRAIN_FLAGS="$(or $(LOSS_$(row)),$(error no row $(row) in Table 5)) $(TRAIN_FLAGS)" \
	  CAMS_FLAGS="$(if $(filter $(row),$(FURTHER)),,--split train) $(CAMS_FLAGS)"
check: $(ENV) $(TOY)
	$(PYTHON) -m wsss.prepare check --data $(DATA)
coco: $(ENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check pycocotools
	$(PYTHON) -m wsss.prepare coco --root $(DATA)
test: $(ENV)
	$(PYTHON) -m pytest -q -rs tests
bench: $(ENV)
	$(PYTHON) tests/scripts/benchmark.py $(BENCH_FLAGS)
clean:
	rm -rf out data/toy .venv
