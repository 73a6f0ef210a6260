# SPDX-License-Identifier: Apache-2.0
"""Errors of every protocol in this room.

ProtocolError
├── LocalProtocolError     our own code asked for something the protocol forbids: a bug
└── RemoteProtocolError    the peer broke the rules: count it, answer if possible, hang up
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Root of the tree."""


class LocalProtocolError(ProtocolError):
    """This process asked for something the protocol does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol does not allow; the message says what and where."""
