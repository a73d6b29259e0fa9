PYTHON ?= python3
EXEC = $(PYTHON) tools/host.py exec

demo:  ## set everything up, run the bundled workflows, leave pictures under output/demo
	$(PYTHON) tools/host.py demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(DEPTH),--depth "$(DEPTH)") $(if $(DEPTH_IS),--depth-is $(DEPTH_IS))

test:  ## every test but the slow ones, the browser's included
	$(PYTHON) tools/host.py test $(ARGS)

quick:  ## the mathematics, the files and the rooms: under two minutes
	$(EXEC) -m pytest -n auto --maxprocesses 4 --dist loadfile tests/techniques tests/formats tests/test_rooms.py tests/scenes tests/patches/test_networks.py $(ARGS)

test-full:  ## the slow ones too
	$(MAKE) test ARGS='-m "slow or not slow" $(ARGS)'
	$(EXEC) tools/bad_values.py
	$(EXEC) tools/soak.py

test-readers:  ## files of 200 random stacks opened by GIMP and Krita, where they are on PATH, and psd-tools
	$(EXEC) -m pytest tests/formats/readers.py $(ARGS)

check:  ## style, types, and files that are generated
	$(EXEC) -m ruff check .
	$(EXEC) -m ruff format --check .
	$(MAKE) types
	$(EXEC) tools/papers.py --check

types:  ## mypy on techniques, formats and networks
	mkdir -p output/types && ln -sfn "$(CURDIR)" output/types/strata && $(EXEC) -m mypy

serve:  ## open ComfyUI with this pack for a person
	$(PYTHON) tools/host.py serve $(if $(PORT),--port $(PORT))

run:  ## make run W=workflows/layers_roundtrip.json ARGS="--out pictures"
	$(EXEC) tools/run.py "$(W)" $(ARGS)

figures:  ## measure every number of README and docs again (several hours: some train), and record what PAPERS.md lists (an hour)
	$(EXEC) tools/figures.py $(ARGS)
	$(if $(ARGS),,$(EXEC) tools/record_calls.py)

mutants:  ## change the code in one place at a time, and see whether a test notices
	$(EXEC) tools/mutants.py $(ARGS)

bench:  ## time and memory against plain ways of doing the same
	$(EXEC) tools/bench.py $(ARGS)

gpu:  ## on a machine with CUDA: the tests on the card, and models of published width with random weights; ARGS=--small anywhere
	$(EXEC) tools/gpu.py $(ARGS)

mini:  ## train the mini family from nothing and write its files; goes on where it was stopped
	for what in autoencoder decoder classifier diffusion inpaint transparency transparent_decoder adapter dreamlayer dreamlayer_apart; do $(EXEC) -m training $$what || exit 1; done
	$(EXEC) -m training publish
	for what in rgba_autoencoder flux_fill flux_fill_large layeringdiff; do $(EXEC) -m training $$what || exit 1; done
	$(EXEC) -m training publish
	for what in latent_composition back_to_front back_to_front_real; do $(EXEC) -m training $$what || exit 1; done
	$(EXEC) -m training publish
	$(EXEC) -m training flux_adapter
	$(EXEC) -m training publish
	$(EXEC) -m training judge

.PHONY: demo test quick test-full test-readers check types serve run figures mutants bench gpu mini
