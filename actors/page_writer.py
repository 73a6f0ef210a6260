# SPDX-License-Identifier: Apache-2.0
"""All device pages of a host: who has one, what the GPU was like last, and writing it all down.

State of the telemetry actor and used by nobody else; what waits (measuring) says so. It must never keep a page that
nobody can read, for pages are what the GPU is measured for.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import trio

from vgpu.gpu.sampling import UNKNOWN_SAMPLE, GpuSample, PatientSampler, Sampler

from . import ActorError
from .messages import MarkVm, SessionUse, VmRecord
from .page_lease import PageLease
from .vm_page import Description, VmPage, VmSituation

# Processes of this host that have the page of one VM.
LEASES_PER_VM = 256
# A VM's share of memory may be changed while its programs run.
LIMITS_SECONDS = 5.0
# How long "calls are held back" shows after it was last said.
RATE_LIMITED_SECONDS = 5.0


class NoPage(ActorError):
    """The VM's device page cannot be had; the message says why."""


@attrs.define(eq=False)
class _Lent:
    """The page of a VM for processes of this host."""

    page: VmPage
    leases: list[PageLease] = attrs.Factory(list)

    @property
    def is_wanted(self) -> bool:
        self.leases = [lease for lease in self.leases if not lease.is_released]
        return bool(self.leases)


@attrs.define(eq=False)
class PageWriter:
    """Pages by VM."""

    description: Description | None = None
    sample: GpuSample = UNKNOWN_SAMPLE
    work: dict[int, int] = attrs.Factory(dict)  # GPU time by worker, as it was measured with
    _sampler: PatientSampler | None = None
    _uses: tuple[SessionUse, ...] = ()
    _measured_at: float = float("-inf")
    _inside_since: dict[tuple[int, int], float] = attrs.Factory(
        dict
    )  # by worker, and records before the call
    _devices: dict[str, VmPage] = attrs.Factory(dict)
    _lent: dict[str, _Lent] = attrs.Factory(dict)
    _limits: dict[str, int] = attrs.Factory(dict)
    _limits_at: float = float("-inf")
    _quarantined: set[str] = attrs.Factory(set)
    _limited_at: dict[str, float] = attrs.Factory(dict)

    # -- who has a page

    @property
    def is_wanted(self) -> bool:
        """May anybody read a page?"""
        self._forget_unread()
        return bool(self._devices or self._lent)

    def attach(self, vm: str, bar1_fd: int) -> None:
        """Write the page at the start of that BAR1 from now on. The descriptor stays the caller's.

        Raises:
            OSError: it is no BAR1; the VM then has none.
        """
        self.detach(vm)
        self._devices[vm] = VmPage.at_start_of(bar1_fd)

    def detach(self, vm: str) -> None:
        """The VM's device has gone."""
        page = self._devices.pop(vm, None)
        if page is not None:
            page.close()

    def lease(self, vm: str) -> PageLease:
        """The VM's page for one process of this host.

        Raises:
            NoPage: too many have it, or the GPU is not known yet.
            OSError: no descriptor is left.
        """
        if self.description is None:
            raise NoPage("nobody can say yet what GPU this is")
        self._forget_unread()
        lent = self._lent.get(vm) or _Lent(VmPage.of_its_own())
        try:
            if len(lent.leases) >= LEASES_PER_VM:
                raise NoPage(f"{LEASES_PER_VM} processes have the page of {vm}")
            lease = PageLease(lent.page.open_reader(), self.description.driver_version)
        except BaseException:
            if vm not in self._lent:
                lent.page.close()
            raise
        lent.leases.append(lease)
        self._lent[vm] = lent
        return lease

    def _forget_unread(self) -> None:
        for vm in [vm for vm, lent in self._lent.items() if not lent.is_wanted]:
            self._lent.pop(vm).page.close()

    def close(self) -> None:
        """Stop writing every page, and say so to those who hold a lease."""
        for lent in self._lent.values():
            for lease in lent.leases:
                lease.ended.set()
            lent.page.close()
        for page in self._devices.values():
            page.close()
        self._lent.clear()
        self._devices.clear()

    # -- what is in it

    def know(self, description: Description, sampler: Sampler) -> None:
        """What GPU it is, and who measures it."""
        self.description = description
        self._sampler = PatientSampler(sampler)

    def mark(self, message: MarkVm) -> None:
        """Note what the VM is to see of how it is treated."""
        if message.quarantined:
            self._quarantined.add(message.vm)
        elif message.quarantined is not None:
            self._quarantined.discard(message.vm)
        if message.rate_limited:
            self._limited_at[message.vm] = trio.current_time()
        else:
            self._limited_at.pop(message.vm, None)

    def age(self) -> float:
        """Seconds since the GPU was measured; infinite if it never was."""
        return trio.current_time() - self._measured_at

    async def measure(self, uses: tuple[SessionUse, ...]) -> GpuSample:
        """Measure the GPU, and remember what its sessions used by now. Waits for the sensors, for a bounded time."""
        if self._sampler is None:
            raise NoPage("nobody can say yet what GPU this is")
        self.work = self._work(uses)
        self.sample = await self._sampler.sample(self.work)
        self._uses = uses
        self._measured_at = trio.current_time()
        return self.sample

    def _work(self, uses: tuple[SessionUse, ...]) -> dict[int, int]:
        """GPU time by worker. One that has been in the same call since an earlier look (the software GPU computes there)
        has worked so long, and counts it only afterwards."""
        now = trio.current_time()
        inside = [(use.info.worker_pid, use.records) for use in uses if use.in_call]
        self._inside_since = {call: self._inside_since.get(call, now) for call in inside}
        work = {use.info.worker_pid: use.gpu_ns for use in uses}
        for (pid, _), since in self._inside_since.items():
            work[pid] += int((now - since) * 1e9)
        return work

    @property
    def are_limits_old(self) -> bool:
        """Is it time to ask again what share of the memory each VM has?"""
        is_new = any(vm not in self._limits for vm in (*self._devices, *self._lent))
        return is_new or trio.current_time() - self._limits_at > LIMITS_SECONDS

    def know_limits(self, vms: Iterable[VmRecord]) -> None:
        """The registered VMs, with their shares of the memory."""
        known = {vm.name: vm.memory_limit_bytes for vm in vms}
        # A VM that nobody registered has the whole card, and is not asked about each time.
        self._limits = dict.fromkeys((*self._devices, *self._lent), 0) | known
        self._limits_at = trio.current_time()

    def know_limit(self, vm: VmRecord) -> None:
        """One VM's share has been changed."""
        self._limits[vm.name] = vm.memory_limit_bytes

    def write_all(self) -> None:
        """Write every page."""
        if self.description is None:
            return
        pages = [*self._devices.items(), *((vm, lent.page) for vm, lent in self._lent.items())]
        for vm, page in pages:
            page.write(self.description, self.sample, self._situation(vm))

    def _situation(self, vm: str) -> VmSituation:
        limited_at = self._limited_at.get(vm)
        return VmSituation(
            tuple(use for use in self._uses if use.info.vm == vm),
            self._limits.get(vm, 0),
            vm in self._quarantined,
            limited_at is not None and trio.current_time() - limited_at < RATE_LIMITED_SECONDS,
        )
