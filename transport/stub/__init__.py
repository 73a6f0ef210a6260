# SPDX-License-Identifier: Apache-2.0
"""The device process: one small process per VM that is the PCI device, and outlives the mediator.

``core`` decides without a socket; ``process`` is the trio around it; ``messages`` is what it and the mediator say to each
other (docs/wire.md section 5); ``keeper`` is a second process, which answers QEMU when this one has died; ``launch`` is for
the mediator: the command line, and a link.
"""
