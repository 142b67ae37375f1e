# `make demo` and `make test` create .venv from the pinned versions of constraints.txt, then run; the stamps in .venv
# remember what is installed, so that a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean

demo: $(VENV)/demo.stamp
	$(BIN)/lowbit demo --out out

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: the pinned versions need Python 3.11 or newer; use make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $$(grep '^torch==' constraints.txt)
	touch $@

NATIVE := setup.py $(wildcard src/lowbit/kernels/*.cpp src/lowbit/kernels/*.h)

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(INSTALL) -e '.[onnx]'
	touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(INSTALL) -e '.[fpga,onnx,openvino,plot,tensor,train,dev]'
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) out build
