"""Forwards for classes that this package does not import."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache


class StandIn:
    """The base of a forward for a class of another package; `stand_in` makes of the two the subclass that runs it.

    facts: what the forward has to know of the module beyond its attributes; part of the class, so that a module
    needs no attribute of ours and undoing leaves no trace.
    """

    facts: Hashable = None

    def __reduce_ex__(self, protocol):
        # the class has no name to be found under, what it was made of has
        return _new, (*type(self).__bases__, self.facts), self.__dict__


def stand_in(forward: type[StandIn], base: type, facts: Hashable = None) -> type:
    """The subclass of `base`, and with its name, that computes by `forward`; the same one for the same arguments."""
    return _stand_in(forward, base, facts)


@cache
def _stand_in(forward: type[StandIn], base: type, facts: Hashable) -> type:
    return type(
        base.__name__,
        (forward, base),
        {"__module__": forward.__module__, "__doc__": forward.__doc__, "facts": facts},
    )


def _new(forward: type[StandIn], base: type, facts: Hashable):
    kind = stand_in(forward, base, facts)
    return kind.__new__(kind)
