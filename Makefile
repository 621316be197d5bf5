# The paper's run, or the toy set's where DATA is not given. `make -n TARGET` prints what would run.
DATA    ?= data/toy
override DATA := $(patsubst ./%,%,$(DATA:%/=%))
NAME    := $(notdir $(abspath $(DATA)))
OUT     ?= out/$(NAME)
INTO    ?= $(OUT)/tables.md
PRESET  ?= $(if $(filter data/toy,$(DATA)),toy,voc)
SEED    ?= 0
SEEDS   ?= 0 1 2
ROWS    ?= transcam no-noise noise-x1 noise-x2
FURTHER ?= transcam noise-x1
PYTHON  ?= .venv/bin/python

ENV     := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
TOY     := $(if $(filter data/toy,$(DATA)),data/toy/toy.json)
START   := $(if $(GPUS),$(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=$(GPUS),$(PYTHON))
COMMON  := --data $(DATA) --out $(OUT) --preset $(PRESET) --seed $(SEED) $(if $(DEVICE),--device $(DEVICE)) \
           $(if $(FRESH),--fresh)
SCRATCH := $(if $(FROM_SCRATCH),--from-scratch)
WEIGHTS := $(SCRATCH) $(if $(CONFORMER),--pretrained $(CONFORMER))
BACK    := $(SCRATCH) $(if $(RESNET38),--resnet38 $(RESNET38)) $(if $(BACKBONE),--backbone $(BACKBONE)) \
           $(if $(BACKBONE_WEIGHTS),--backbone-weights $(BACKBONE_WEIGHTS))
PICK    := $(if $(IDS),--ids $(IDS),--first 4)

.NOTPARALLEL:
.PHONY: help train cams psa seg eval show sheets figures tables report results check coco test bench clean

help:
	@echo "make train cams psa seg eval   image labels to segmenter on the toy set, then the table"
	@echo "make test                      the tests, on the CPU"
	@echo "  train     classifier                      -> OUT/classifier.pth"
	@echo "  cams      seeds                           -> OUT/cams/"
	@echo "  psa       affinity labels, net, walk, CRF -> OUT/affinity_labels/, affinitynet.pth, pseudo_labels/"
	@echo "  seg       segmenter and its masks of val  -> OUT/segmentation/"
	@echo "  eval      one table of all stages         -> OUT/results.json"
	@echo "  show      one picture of all stages       -> OUT/show.png, of IDS or the first four"
	@echo "  report    a page to look through          -> OUT/report.html"
	@echo "  results   train, cams, eval of each of ROWS (losses of Table 5) and SEEDS, psa and seg too of those in FURTHER"
	@echo "            -> OUT/rows/ROW-seedN/, then the tables -> INTO"
	@echo "  tables    the paper's, of these runs      -> INTO"
	@echo "  figures   the paper's, of these runs      -> OUT/figures/"
	@echo "  sheets    best, middle and worst photos   -> OUT/sheets/"
	@echo "  check     what in DATA would break a stage"
	@echo "  coco      makes DATA, with train2014, val2014 and annotations in it, a data set"
	@echo "  clean     deletes out/ with all results, data/toy and .venv"
	@echo "  bench     plain forms against ours: seconds, memory, bytes; BENCH_FLAGS=--quick"
	@echo "DATA=$(DATA) OUT=$(OUT) PRESET=$(PRESET) PYTHON=$(PYTHON)"
	@echo "SEED=$(SEED) (of one run) SEEDS='$(SEEDS)' ROWS='$(ROWS)' FURTHER='$(FURTHER)' INTO=$(INTO)"
	@echo "CONFORMER=FILE RESNET38=FILE: ImageNet weights; FROM_SCRATCH=1 BACKBONE=resnet50 BACKBONE_WEIGHTS=FILE DEVICE=cpu GPUS=2"
	@echo "WARM_START=FILE: results trains one TransCAM classifier from it first (preset warm), and every row starts from that"
	@echo "JOBS=4: results runs so many rows at a time, each with its own log.txt, where the card has room"
	@echo "FRESH=1: make every stage of the target anew, also those that are done"
	@echo "More flags: TRAIN_FLAGS CAMS_FLAGS (bnr.py train, cams) LABELS_FLAGS AFFINITY_FLAGS WALK_FLAGS (psa.py labels,"
	@echo "train, walk) SEG_FLAGS PREDICT_FLAGS (segment.py train, predict) SHOW_FLAGS (report.py show) RESULTS_FLAGS (results.py)"
	@echo "WARM_FLAGS (bnr.py train of the warm start)"

# pydensecrf2 is compiled with the newest Cython: the one that its isolated build pins fails on Python 3.13.
.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check cython setuptools wheel numpy
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements.txt
	touch $@

data/toy/toy.json: | $(ENV)
	$(PYTHON) prepare.py toy --root data/toy

train: $(ENV) $(TOY)
	$(START) bnr.py train $(COMMON) $(WEIGHTS) $(TRAIN_FLAGS)

cams: $(ENV) $(TOY)
	$(START) bnr.py cams $(COMMON) $(CAMS_FLAGS)

psa: $(ENV) $(TOY)
	$(PYTHON) psa.py labels $(COMMON) $(LABELS_FLAGS)
	$(START) psa.py train $(COMMON) $(BACK) $(AFFINITY_FLAGS)
	$(START) psa.py walk $(COMMON) $(WALK_FLAGS)

seg: $(ENV) $(TOY)
	$(START) segment.py train $(COMMON) $(BACK) $(SEG_FLAGS)
	$(START) segment.py predict $(COMMON) $(PREDICT_FLAGS)

eval: $(ENV) $(TOY)
	$(PYTHON) evaluate.py $(COMMON)

show: $(ENV) $(TOY)
	$(PYTHON) segment.py predict $(COMMON) $(PREDICT_FLAGS) --split train $(PICK)
	$(PYTHON) report.py show $(COMMON) $(PICK) $(SHOW_FLAGS)

sheets: $(ENV) $(TOY)
	$(PYTHON) report.py sheets $(COMMON)

figures: $(ENV) $(TOY)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check matplotlib
	$(PYTHON) report.py figures $(COMMON) --seeds $(SEEDS)
	$(if $(TOY),$(PYTHON) tests/walkthrough.py docs/walkthrough.md $(DATA) $(OUT))

tables: $(ENV) $(TOY)
	$(PYTHON) report.py tables $(COMMON) --seeds $(SEEDS) --into $(INTO)

report: $(ENV) $(TOY)
	$(PYTHON) report.py page $(COMMON) --seeds $(SEEDS)

results: $(ENV) $(TOY)
	$(PYTHON) results.py $(COMMON) --rows $(ROWS) --seeds $(SEEDS) --further $(FURTHER) $(RESULTS_FLAGS) \
	  --into $(INTO) $(if $(GPUS),--gpus $(GPUS)) $(if $(JOBS),--jobs $(JOBS)) \
	  $(if $(WARM_START),--warm-start $(WARM_START)) --warm-flags="$(WARM_FLAGS)" \
	  --train-flags="$(WEIGHTS) $(TRAIN_FLAGS)" --cams-flags="$(CAMS_FLAGS)" \
	  --labels-flags="$(LABELS_FLAGS)" --affinity-flags="$(BACK) $(AFFINITY_FLAGS)" --walk-flags="$(WALK_FLAGS)" \
	  --seg-flags="$(BACK) $(SEG_FLAGS)" --predict-flags="$(PREDICT_FLAGS)"

check: $(ENV) $(TOY)
	$(PYTHON) prepare.py check --data $(DATA)

coco: $(if $(TOY),,$(ENV))
	@test -z "$(TOY)" || { echo "error: make coco needs DATA=DIR, with train2014, val2014 and annotations"; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check pycocotools
	$(PYTHON) prepare.py coco --root $(DATA)

test: $(ENV)
	$(PYTHON) -m pytest -rs tests

bench: $(ENV)
	$(PYTHON) tests/benchmark.py $(BENCH_FLAGS)

clean:
	rm -rf out data/toy .venv
