# SPDX-License-Identifier: Apache-2.0
"""Actors on trio: bounded mailboxes, addresses that survive restarts, reasons for every end.

General layout: `_mailbox` is the inbox, `_incarnation` one life of an actor, `_actor` the base class to write
against, `_ref` the address others hold, `_registry` names, `_system` the owner of all, `_trace` the hooks,
`_stuck` the detector of stuck handlers, `_tree` the snapshot for the admin tool. `testing` has probes. Supervisors are
in `vgpu.supervision`.
"""

from ._actor import Actor as Actor
from ._actor import ActorSpec as ActorSpec
from ._actor import shielded as shielded
from ._exit import ASKED as ASKED
from ._exit import AUTO_SHUTDOWN as AUTO_SHUTDOWN
from ._exit import Crashed as Crashed
from ._exit import ExitReason as ExitReason
from ._exit import Killed as Killed
from ._exit import NoActor as NoActor
from ._exit import Normal as Normal
from ._exit import Shutdown as Shutdown
from ._exit import is_abnormal as is_abnormal
from ._handlers import handles as handles
from ._incarnation import Incarnation as Incarnation
from ._mailbox import Mailbox as Mailbox
from ._mailbox import MailboxStatistics as MailboxStatistics
from ._mailbox import Policy as Policy
from ._messages import ChildCounts as ChildCounts
from ._messages import ChildInfo as ChildInfo
from ._messages import CountChildren as CountChildren
from ._messages import DeleteChild as DeleteChild
from ._messages import Down as Down
from ._messages import Exit as Exit
from ._messages import Request as Request
from ._messages import RestartChild as RestartChild
from ._messages import StartChild as StartChild
from ._messages import TerminateChild as TerminateChild
from ._messages import WhichChildren as WhichChildren
from ._ref import DEFAULT_ASK_SECONDS as DEFAULT_ASK_SECONDS
from ._ref import Ref as Ref
from ._reply import Reply as Reply
from ._stuck import StuckHandler as StuckHandler
from ._stuck import StuckKind as StuckKind
from ._system import ActorSystem as ActorSystem
from ._system import DeadLetter as DeadLetter
from ._system import Startable as Startable
from ._system import SystemStatistics as SystemStatistics
from ._system import open_system as open_system
from ._trace import Tracer as Tracer
from ._trace import current_subject as current_subject
from ._tree import ActorSnapshot as ActorSnapshot
from ._tree import ActorState as ActorState
from ._tree import render_tree as render_tree
from .errors import ActorError as ActorError
from .errors import ActorGone as ActorGone
from .errors import AskTimeout as AskTimeout
from .errors import InternalError as InternalError
from .errors import MailboxClosed as MailboxClosed
from .errors import MailboxFull as MailboxFull
from .errors import NameTaken as NameTaken
from .errors import Refused as Refused
from .errors import StartFailed as StartFailed
from .errors import SystemFailed as SystemFailed
from .errors import UnknownMessage as UnknownMessage
