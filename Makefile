# SPDX-License-Identifier: GPL-2.0-or-later
#
# Every entry point of the project.  `make help` lists them.  What is made goes
# to build/ and .venv/; nothing but Debian packages is installed on the machine.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# What make test takes, and what can be asked for by KERNEL= besides: the newest
# of Debian, and one of ours that looks for bugs.  On 5.10 the driver is only built.
KERNELS := 6.1 6.12
MORE_KERNELS := 5.10 newest debug
# What the caller did not choose: one kernel for make vm and make demo, both
# for make module and make test.
KERNEL ?=
MEM ?= 4G
CPUS ?= 2
NAME ?= vm
CMD ?=
# Of the long runs; without SEED each takes another one, and prints it.
SECONDS ?= 600
SEED ?=
MOVES ?= 200

ACCEL ?= kvm
FLAGS ?=
GUEST_MEM ?= 256M
RATE ?= 1gbit
DELAY ?= 0.2ms
ROUNDS ?= 5
QUICK ?=
BENCH ?=

ONE_KERNEL := $(or $(KERNEL),6.1)
THE_KERNELS := $(or $(KERNEL),$(KERNELS))
PY := .venv/bin/python
STAMPS := build/stamps
VM = $(PY) -m tests.vm run

bad_kernel := $(filter-out $(KERNELS) $(MORE_KERNELS),$(KERNEL))
$(if $(bad_kernel),$(error KERNEL=$(bad_kernel) is not one of: $(KERNELS) $(MORE_KERNELS)))

# How many times as long as elsewhere a test may take.
DEBUG_SLOW := 5
export UMEM_SLOW ?= $(if $(filter debug,$(KERNEL)),$(DEBUG_SLOW),1)

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28

# ---- what everything else needs: each step has a stamp, each is skipped when done

$(STAMPS)/apt: scripts/setup-apt.sh scripts/lib.sh
	@scripts/setup-apt.sh

$(STAMPS)/venv: pyproject.toml scripts/setup-venv.sh | $(STAMPS)/apt
	@scripts/setup-venv.sh

$(STAMPS)/vm-image: scripts/make-vm-image.sh $(STAMPS)/venv $(STAMPS)/guest $(STAMPS)/qemu-10.0
	@scripts/make-vm-image.sh

$(STAMPS)/guest: scripts/setup-guest.sh scripts/extract-vmlinux.py $(wildcard tests/guest/*) | $(STAMPS)/apt
	@scripts/setup-guest.sh

$(STAMPS)/qemu-10.0: scripts/setup-qemu10.sh | $(STAMPS)/apt
	@scripts/setup-qemu10.sh

$(STAMPS)/checkpatch: scripts/setup-checkpatch.sh | $(STAMPS)/apt
	@scripts/setup-checkpatch.sh

$(STAMPS)/shapes: scripts/setup-shapes.sh | $(STAMPS)/apt
	@scripts/setup-shapes.sh

$(STAMPS)/machine-qemu: scripts/setup-machine-qemu.sh | $(STAMPS)/qemu-10.0
	@scripts/setup-machine-qemu.sh

$(STAMPS)/bench-guest: scripts/setup-bench-guest.sh $(wildcard bench/migration/guest/*) bench/migration/rawtcp.c | $(STAMPS)/apt
	@scripts/setup-bench-guest.sh

$(STAMPS)/packaging: scripts/setup-packaging.sh | $(STAMPS)/apt
	@scripts/setup-packaging.sh

$(STAMPS)/kernel-%: scripts/setup-kernel.sh | $(STAMPS)/apt
	@scripts/setup-kernel.sh $*

$(STAMPS)/kernel-newest: | $(STAMPS)/toolchain

$(STAMPS)/kernel-debug: scripts/setup-debug-kernel.sh scripts/debug-kernel.config | $(STAMPS)/apt
	@scripts/setup-debug-kernel.sh

$(STAMPS)/toolchain: scripts/setup-toolchain.sh | $(STAMPS)/apt
	@scripts/setup-toolchain.sh

.PHONY: setup
setup: $(STAMPS)/venv $(KERNELS:%=$(STAMPS)/kernel-%) $(STAMPS)/vm-image $(STAMPS)/guest $(STAMPS)/qemu-10.0 ## get packages, .venv, test kernels, QEMU 10 and the inner guest

.PHONY: machine-qemu
machine-qemu: $(STAMPS)/machine-qemu ## build a QEMU for the test machine in which KVM works better (Documentation/testing.rst)

.PHONY: module
module: $(THE_KERNELS:%=module-%) ## build umem.ko for the test kernels, or for KERNEL=6.1|6.12

ALL_MODULES := $(patsubst %,module-%,$(KERNELS) $(MORE_KERNELS))
.PHONY: $(ALL_MODULES)
$(ALL_MODULES): module-%: $(STAMPS)/kernel-%
	@scripts/build-module.sh $*

.PHONY: vm
vm: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## run CMD='...' in the test VM, a shell without CMD (KERNEL= MEM= CPUS=)
	@$(VM) --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) --name $(NAME) \
		$(if $(value CMD),--shell-command '$(subst ','\'',$(value CMD))')

.PHONY: demo
demo: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## migrate a running guest in the test VM (ACCEL=kvm|tcg FLAGS=-n GUEST_MEM= KERNEL= RATE= DELAY=)
	@$(VM) --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) --name demo --tty -- \
		python -m tests.vm.demo --accel $(ACCEL) --guest-mem $(GUEST_MEM) \
		--rate $(RATE) --delay $(DELAY) $(if $(FLAGS),--flags="$(FLAGS)")

# ---- tests

RUN_TESTS = $(PY) scripts/run_tests.py $(foreach k,$(THE_KERNELS),--kernel $(k)) --mem $(MEM) --cpus $(CPUS)

.PHONY: test
test: setup $(STAMPS)/checkpatch $(STAMPS)/packaging $(THE_KERNELS:%=module-%) ## lint and every test; T=path::name runs one (KERNEL=6.1|6.12)
	@$(RUN_TESTS) $(if $(T),--only "$(T)",lint unit harness vm)

.PHONY: test-unit
test-unit: $(STAMPS)/venv $(STAMPS)/guest ## tests that need no VM
	@$(RUN_TESTS) unit

.PHONY: test-harness
test-harness: $(STAMPS)/vm-image module-6.1 ## tests of the test VM itself
	@$(RUN_TESTS) harness

.PHONY: test-driver
test-driver: $(STAMPS)/vm-image $(THE_KERNELS:%=module-%) ## tests of the driver, in the VM (KERNEL=)
	@$(RUN_TESTS) driver

LONG_RUN = $(PY) -m tests.vm run --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) --name $@ \
	--timeout $$(($(SECONDS) + 900)) --env UMEM_$(1)_SECONDS=$(SECONDS) \
	$(if $(SEED),--env UMEM_$(1)_SEED=$(SEED)) -- python -m pytest -v -s $(2)

.PHONY: fuzz-driver
fuzz-driver: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## random calls of the driver, in the VM (SECONDS= SEED= KERNEL=)
	@$(call LONG_RUN,FUZZ,tests/driver/test_fuzz.py)

.PHONY: stress-driver
stress-driver: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## everything at once on an area, in the VM (SECONDS= SEED= KERNEL=)
	@$(call LONG_RUN,STRESS,tests/driver/test_stress.py::test_everything_at_once)

.PHONY: test-migration
test-migration: $(STAMPS)/vm-image $(THE_KERNELS:%=module-%) ## tests of whole migrations, in the VM (KERNEL=)
	@$(RUN_TESTS) migration

.PHONY: test-chaos
test-chaos: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## a guest moved again and again while something breaks each time (MOVES= SEED= KERNEL=)
	@$(VM) --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) --name $@ \
		--timeout $$(($(MOVES) * 120 + 600)) -- python -m tests.migration.chaos $(MOVES) $(SEED)

.PHONY: test-shapes
test-shapes: $(STAMPS)/vm-image $(STAMPS)/shapes module-$(ONE_KERNEL) ## pre-copy, compression, RAM blocks, many VMs, page sizes, three hosts, a vhost-user disk, a balloon, too little memory, the daemon under systemd (KERNEL=)
	@$(PY) scripts/run_tests.py --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) shapes

.PHONY: test-debug-kernel
test-debug-kernel: ## tests of the driver on a kernel with KASAN, lockdep, kmemleak and fault injection, built once
	@$(MAKE) test-driver KERNEL=debug UMEM_SLOW=$(DEBUG_SLOW)

.PHONY: test-kernels
test-kernels: $(STAMPS)/kernel-5.10 $(STAMPS)/kernel-newest ## tests of the driver on Debian's newest kernel, and a build on 5.10
	@scripts/lint.sh more-kernels
	@$(MAKE) test-driver KERNEL=newest

.PHONY: bench
bench: $(STAMPS)/vm-image $(STAMPS)/bench-guest $(STAMPS)/machine-qemu module-$(ONE_KERNEL) ## measure whole migrations against QEMU's own, in the VM (QUICK=1 KERNEL= CPUS= BENCH='--settings ... --contenders ... --rounds N')
	@$(PY) -m bench.migration.run --kernel $(ONE_KERNEL) --cpus $(CPUS) $(if $(QUICK),--quick) $(BENCH)

.PHONY: bench-native
bench-native: $(STAMPS)/vm-image $(STAMPS)/bench-guest ## measure the page lanes against raw TCP and QEMU's, here: no VM, no driver (BENCH='--link-us 400 --link-gbit 10')
	@$(PY) -m bench.native --qemu build/qemu-10.0/qemu-system-x86_64 $(BENCH)

.PHONY: bench-fault
bench-fault: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## measure page faults against userfaultfd, in the VM (KERNEL= CPUS= ROUNDS=)
	@$(PY) -m bench.fault.run --kernel $(ONE_KERNEL) --mem $(MEM) --cpus $(CPUS) --rounds $(ROUNDS)

.PHONY: bench-dirty
bench-dirty: $(STAMPS)/vm-image module-$(ONE_KERNEL) ## measure the log of writes, in the VM (KERNEL= CPUS= ROUNDS=)
	@$(PY) -m bench.dirty.run --kernel $(ONE_KERNEL) --cpus $(CPUS) --rounds $(ROUNDS)

.PHONY: lint
lint: $(STAMPS)/venv $(STAMPS)/checkpatch $(STAMPS)/packaging $(KERNELS:%=$(STAMPS)/kernel-%) ## ruff, mypy, shellcheck, W=1, sparse, checkpatch, coccinelle, dkms ...
	@scripts/lint.sh

.PHONY: docs
docs: $(STAMPS)/venv ## render Documentation/ into build/docs
	@scripts/check-docs.sh

.PHONY: man
man: $(STAMPS)/venv ## write the man pages into build/man
	@$(PY) scripts/make_man.py build/man

# Asks for no more than the environment in PREFIX: a host that stays is no place to build.
.PHONY: install
install: ## units, user, udev rules, man pages, completion of a host that stays (DESTDIR= PREFIX=/opt/umem)
	@scripts/install-host.sh

.PHONY: clean
clean: ## remove what was built here; keeps what was downloaded and unpacked
	@rm -rf build/kmod build/lint build/vm build/test build/bench build/man $(STAMPS)/vm-image
	@find pyumem tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: ## remove build/ and .venv: the next make starts from nothing
	@rm -rf build .venv pyumem.egg-info
