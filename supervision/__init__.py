# SPDX-License-Identifier: Apache-2.0
"""Supervision in the manner of Erlang/OTP, over `vgpu.actors`.

General layout: `_spec` what a supervisor is told, `_plan` and `_intensity` the decisions (pure), `_backoff` when to
try again, `_supervisor` the actor that carries it out, `_report` what it says, `_watchdog` deadlines (pure).
"""

from vgpu.actors import CountChildren as CountChildren
from vgpu.actors import DeleteChild as DeleteChild
from vgpu.actors import RestartChild as RestartChild
from vgpu.actors import StartChild as StartChild
from vgpu.actors import TerminateChild as TerminateChild
from vgpu.actors import WhichChildren as WhichChildren
from vgpu.actors import open_system as open_system

from ._backoff import Backoff as Backoff
from ._backoff import RetrySchedule as RetrySchedule
from ._backoff import WaitJittered as WaitJittered
from ._intensity import IntensityWindow as IntensityWindow
from ._plan import ChildView as ChildView
from ._plan import Plan as Plan
from ._plan import plan_exit as plan_exit
from ._plan import plan_restart as plan_restart
from ._plan import should_restart as should_restart
from ._report import CrashReport as CrashReport
from ._report import ReportContext as ReportContext
from ._report import render_report as render_report
from ._spec import AddChild as AddChild
from ._spec import AutoShutdown as AutoShutdown
from ._spec import ChildError as ChildError
from ._spec import ChildKind as ChildKind
from ._spec import ChildSpec as ChildSpec
from ._spec import GetChildSpec as GetChildSpec
from ._spec import Restart as Restart
from ._spec import ShutdownMode as ShutdownMode
from ._spec import SpecError as SpecError
from ._spec import Strategy as Strategy
from ._spec import SupervisorSpec as SupervisorSpec
from ._supervisor import Supervisor as Supervisor
from ._watchdog import Deadlines as Deadlines
from ._watchdog import Health as Health
from ._watchdog import HealthChange as HealthChange
from ._watchdog import HeartbeatLimits as HeartbeatLimits
from ._watchdog import Heartbeats as Heartbeats
from ._watchdog import Overdue as Overdue
