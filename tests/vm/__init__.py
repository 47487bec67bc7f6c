# SPDX-License-Identifier: GPL-2.0-or-later
"""The test world: a virtual machine that boots a Debian kernel with umem.ko.

``python -m tests.vm run --kernel 6.1 -- COMMAND...`` is the way in; see
`harness` for what a command finds inside, `klog` for what makes a kernel log
bad, `hosts` and `guest` for what the tests inside the machine use.
"""
