# SPDX-License-Identifier: Apache-2.0
"""What a supervisor is told: which children, how to start and stop each, and what to do when one ends.

Values only, checked field by field when they are made: a wrong spec fails where it is written, naming the field
and the value, and never when a child has just died. The words and defaults are OTP's.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import attrs

from vgpu.actors import Actor, Ref, Request

from ._backoff import Backoff

__all__ = [
    "AddChild",
    "AutoShutdown",
    "ChildError",
    "ChildKind",
    "ChildSpec",
    "GetChildSpec",
    "Restart",
    "ShutdownMode",
    "ShutdownTime",
    "SpecError",
    "Strategy",
    "SupervisorSpec",
]

DEFAULT_SHUTDOWN_SECONDS = 5.0
# Long enough for a worker process that pays for cuInit, short enough that a supervisor is not lost in a start.
DEFAULT_START_SECONDS = 30.0


class SpecError(ValueError):
    """A spec that cannot be meant. The message names the spec, the field and the value."""


class ChildError(Exception):
    """A request to a supervisor that its children do not allow: unknown id, id taken, child running."""


class Strategy(enum.Enum):
    """Who is restarted when a child dies."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"
    SIMPLE_ONE_FOR_ONE = "simple_one_for_one"


class Restart(enum.Enum):
    """When a child is restarted: always, after an abnormal end, never."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


class ShutdownMode(enum.Enum):
    """How a child is stopped, where it is not by a number of seconds."""

    BRUTAL_KILL = "brutal_kill"
    INFINITY = "infinity"


class AutoShutdown(enum.Enum):
    """Whether the end of significant children ends the supervisor."""

    NEVER = "never"
    ANY_SIGNIFICANT = "any_significant"
    ALL_SIGNIFICANT = "all_significant"


class ChildKind(enum.Enum):
    """What a child is; supervisors are given the time they need to stop their own children."""

    WORKER = "worker"
    SUPERVISOR = "supervisor"


ShutdownTime: TypeAlias = float | ShutdownMode


def _where(spec: object) -> str:
    label = getattr(spec, "id", getattr(spec, "name", None))
    return f"{type(spec).__name__} {label!r}"


def _refuse(spec: object, field: str, expected: str, value: object) -> SpecError:
    return SpecError(f"{_where(spec)}: {field} must be {expected}, got {value!r}")


def _is_enum(kind: type[enum.Enum]) -> Callable[[object, Any, object], None]:
    choices = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)

    def check(spec: object, field: Any, value: object) -> None:
        if not isinstance(value, kind):
            raise _refuse(spec, field.name, f"one of {choices}", value)

    return check


def _is_bool(spec: object, field: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise _refuse(spec, field.name, "True or False", value)


def _is_label(spec: object, field: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not value or "/" in value:
        raise _refuse(spec, field.name, "a non-empty string without '/'", value)


def _is_name(spec: object, field: attrs.Attribute[str | None], value: object) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _refuse(spec, field.name, "a non-empty string or None", value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _as_arguments(arguments: Iterable[object]) -> tuple[object, ...]:
    return tuple(arguments)


@attrs.frozen
class ChildSpec:
    """One child of a supervisor.

    Raises:
        SpecError: a field is not what it must be.
    """

    id: str = attrs.field(validator=_is_label)
    """Unique among its siblings; the last part of the registered name."""
    start: Callable[..., Actor] = attrs.field()
    """Makes the actor, once for each life: a class or a function."""
    args: tuple[object, ...] = attrs.field(default=(), converter=_as_arguments)
    """Given to `start`."""
    restart: Restart = attrs.field(default=Restart.PERMANENT, validator=_is_enum(Restart))
    shutdown: ShutdownTime = attrs.field()
    """Seconds between the request to stop and the kill, or a mode. Supervisors: infinity, and nothing else."""
    significant: bool = attrs.field(default=False, validator=_is_bool)
    """Whether its end counts for the supervisor's auto_shutdown."""
    name: str | None = attrs.field(default=None, validator=_is_name)
    """Registered name; None: the supervisor's name, a slash, and the id."""
    start_timeout_seconds: float = attrs.field(default=DEFAULT_START_SECONDS)
    """How long `started()` may take; a child that needs longer has failed to start."""
    kind: ChildKind = attrs.field(default=ChildKind.WORKER, validator=_is_enum(ChildKind))

    @shutdown.default
    def _default_shutdown(self) -> ShutdownTime:
        # attrs sets fields in order, and kind comes later: supervisors are made by SupervisorSpec.as_child.
        return DEFAULT_SHUTDOWN_SECONDS

    @start.validator
    def _check_start(self, _: object, value: object) -> None:
        if not callable(value):
            raise _refuse(self, "start", "a callable that makes an Actor", value)

    @shutdown.validator
    def _check_shutdown(self, _: object, value: object) -> None:
        if isinstance(value, ShutdownMode):
            return
        if not _is_number(value) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise _refuse(self, "shutdown", "a number of seconds from 0, or a ShutdownMode", value)

    @start_timeout_seconds.validator
    def _check_start_timeout(self, _: object, value: object) -> None:
        if not _is_number(value) or not isinstance(value, int | float) or value <= 0:
            raise _refuse(self, "start_timeout_seconds", "a number of seconds above 0", value)

    def __attrs_post_init__(self) -> None:
        if self.significant and self.restart is Restart.PERMANENT:
            raise _refuse(self, "significant", "False for a permanent child, which never ends", True)
        if self.kind is ChildKind.SUPERVISOR and self.shutdown is not ShutdownMode.INFINITY:
            raise _refuse(
                self, "shutdown", "INFINITY for a supervisor, which has its own to stop", self.shutdown
            )


def _as_children(children: Iterable[ChildSpec | SupervisorSpec]) -> tuple[ChildSpec, ...]:
    return tuple(child.as_child() if isinstance(child, SupervisorSpec) else child for child in children)


@attrs.frozen
class SupervisorSpec:
    """A supervisor and its children. As a child of another one it can be listed as it is.

    Raises:
        SpecError: a field is not what it must be.
    """

    name: str = attrs.field(validator=_is_label)
    """Registered name at the top; below another supervisor the last part of it."""
    children: tuple[ChildSpec, ...] = attrs.field(default=(), converter=_as_children)
    """Started left to right, stopped right to left. simple_one_for_one: exactly one, the template."""
    strategy: Strategy = attrs.field(default=Strategy.ONE_FOR_ONE, validator=_is_enum(Strategy))
    intensity: int = attrs.field(default=1)
    """Restarts allowed within the period; one more and the supervisor gives up."""
    period_seconds: float = attrs.field(default=5.0)
    auto_shutdown: AutoShutdown = attrs.field(default=AutoShutdown.NEVER, validator=_is_enum(AutoShutdown))
    backoff: Backoff = attrs.field(factory=Backoff)
    """How long to wait before a restart that failed is tried again, and when to give up."""
    restart: Restart = attrs.field(default=Restart.PERMANENT, validator=_is_enum(Restart))
    """Its own restart type, below another supervisor."""
    significant: bool = attrs.field(default=False, validator=_is_bool)
    """Its own significance, below another supervisor."""

    @intensity.validator
    def _check_intensity(self, _: object, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _refuse(self, "intensity", "a whole number from 0", value)

    @period_seconds.validator
    def _check_period(self, _: object, value: object) -> None:
        if not _is_number(value) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise _refuse(self, "period_seconds", "a number of seconds above 0", value)

    @backoff.validator
    def _check_backoff(self, _: object, value: object) -> None:
        if not isinstance(value, Backoff):
            raise _refuse(self, "backoff", "a Backoff", value)

    @children.validator
    def _check_children(self, _: object, value: tuple[object, ...]) -> None:
        seen: set[str] = set()
        for child in value:
            if not isinstance(child, ChildSpec):
                raise _refuse(self, "children", "ChildSpecs and SupervisorSpecs", child)
            if child.id in seen:
                raise _refuse(self, "children", "of different ids", child.id)
            seen.add(child.id)

    def __attrs_post_init__(self) -> None:
        if self.strategy is Strategy.SIMPLE_ONE_FOR_ONE:
            if len(self.children) != 1:
                raise _refuse(
                    self, "children", "exactly one template for simple_one_for_one", len(self.children)
                )
            if self.children[0].name is not None:
                raise _refuse(self, "children", "a template without a fixed name", self.children[0].name)
        for child in self.children:
            self.check_child(child)

    def check_child(self, child: ChildSpec) -> None:
        """Check what a child's spec and this one's must agree on, also for children added later."""
        if child.significant and self.auto_shutdown is AutoShutdown.NEVER:
            raise _refuse(
                self, "auto_shutdown", f"set, as child {child.id!r} is significant", self.auto_shutdown
            )

    def create(self) -> Actor:
        """Make the supervisor; called once for each of its lives."""
        # Here and not above: the supervisor is built from specs.
        from ._supervisor import Supervisor

        return Supervisor(self)

    def as_child(self) -> ChildSpec:
        """This supervisor as the child of another."""
        return ChildSpec(
            id=self.name,
            start=self.create,
            restart=self.restart,
            shutdown=ShutdownMode.INFINITY,
            significant=self.significant,
            # Its own children have limits of their own.
            start_timeout_seconds=math.inf,
            kind=ChildKind.SUPERVISOR,
        )


@attrs.frozen
class AddChild(Request[Ref[Any]]):
    """To any supervisor but a simple_one_for_one: add a child at the end and start it.

    The answer is its reference. Fails with `ChildError` (id taken) or `StartFailed` (the spec is then not kept).
    """

    spec: ChildSpec


@attrs.frozen
class GetChildSpec(Request[ChildSpec]):
    """To any supervisor: the spec of a child, of a dynamic one the template's with its id. Fails with `ChildError`."""

    id: str
