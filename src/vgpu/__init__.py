# SPDX-License-Identifier: Apache-2.0
"""GPU virtualisation for virtual machines: one host GPU, many VMs, no driver in the guest.

The five rooms (``transport``, ``gpu``, ``shim``, ``actors``, ``supervision``) lie at the top of the
checkout and appear here through links. ARCHITECTURE.md says who may import whom.
"""

__version__ = "0.1.0"
