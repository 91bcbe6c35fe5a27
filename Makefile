# `make run` and `make test` need only python3 and make: they build .venv on the first call.
PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin
STAMP   := .venv/.installed

.PHONY: help run docs test check lab play pool language mergekit bench vision export clean-nbs save readme
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

run: $(STAMP) ## execute the book and print its pages to _book/
	$(BIN)/python -m subspace_nb.book run

docs: $(STAMP) ## the book as a static site in _docs/, from the outputs kept in its notebooks
	$(BIN)/python -m subspace_nb.site

# one thread for each of the notebooks and test files side by side: torch processes that share cores slow each other down
test: $(STAMP) ## execute every notebook's assertions, then tests/
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS) --do-print --flags "$$($(BIN)/python -c 'from subspace_nb.book import has_gpu; print("cuda"*has_gpu())')"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile tests

mergekit: .mergekit/.installed ## mergekit in an environment of its own; `make test` then compares with it
.mergekit/.installed:
	$(PYTHON) -m venv .mergekit
	.mergekit/bin/python -m pip install --quiet --disable-pip-version-check 'mergekit==0.1.5' 'torch>=2.4,<2.14'
	touch $@

check: $(STAMP) ## do modules, notebooks and README still fit together?
	$(BIN)/python -m subspace_nb.book check

lab: $(STAMP) ## open JupyterLab on nbs/
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=nbs

play: $(STAMP) ## the playground alone, in a browser, on loopback
	$(BIN)/python -m subspace_nb.app

pool: $(STAMP) ## make the embedded experts again
	$(BIN)/python -m subspace_nb.zoo_build

language: $(STAMP) ## train the eight text experts into the cache, and merge them; resumes
	$(BIN)/python -m subspace_nb.zoo_build language
	$(BIN)/python -m subspace_nb.language

bench: $(STAMP) ## time and measure memory: boosting, TSV-M and isotropic merging, ESM, HO-GSVD, every method beside plain SVDs and, where installed, mergekit and fusion-bench
	for part in boost rivals esm hogsvd cost memory; do $(BIN)/python benchmarks/$$part.py || exit 1; done

vision: $(STAMP) ## what is missing of the table of all methods; resumes
	$(BIN)/python -m subspace_nb.vision
	$(BIN)/python -m subspace_nb.vision --costs

export: $(STAMP) ## notebooks to modules
	$(BIN)/nbdev-export

clean-nbs: $(STAMP) ## strip what should not be stored in notebooks
	$(BIN)/nbdev-clean

save: $(STAMP) ## execute notebooks in place: make save NB="00_spectra index"; none named: all
	$(BIN)/python -m subspace_nb.book save $(NB)

readme: $(STAMP) ## README.md from nbs/index.ipynb
	$(BIN)/python -m subspace_nb.book readme
