# SPDX-License-Identifier: Apache-2.0
"""The PTX executor: reads what nvcc and NVRTC write and runs it on NumPy arrays, all threads in lockstep.

    module = load_ptx(text)
    instance = module.instantiate(AddressSpace())
    instance.launch("kernel", grid=(4, 1, 1), block=(256, 1, 1), params=packed)

DESIGN.md beside this file tells the way of a kernel, how exact its numbers are, and what is refused.
"""

from .errors import AssertFailure as AssertFailure
from .errors import BarrierDeadlock as BarrierDeadlock
from .errors import LaunchError as LaunchError
from .errors import LaunchInterrupted as LaunchInterrupted
from .errors import PtxError as PtxError
from .errors import Trap as Trap
from .errors import UnsupportedPtx as UnsupportedPtx
from .module import GlobalVariable as GlobalVariable
from .module import Instance as Instance
from .module import Kernel as Kernel
from .module import LaunchResult as LaunchResult
from .module import Module as Module
from .module import Param as Param
from .module import load_ptx as load_ptx
