# SPDX-License-Identifier: Apache-2.0
"""The PCI device that QEMU sees: the vfio-user protocol, configuration space, registers, and a server.

``messages`` and ``machine`` are the protocol without a socket; ``pci`` and ``registers`` the device
without a protocol; ``device`` joins BARs and registers; ``server`` puts both on a unix socket.
docs/vfio-user.md and docs/registers.md are the prose.
"""
