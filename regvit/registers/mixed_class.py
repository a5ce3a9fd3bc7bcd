"""A module that behaves otherwise while it is of a class made from its own: no hook, no wrapper, no new name.

`mix(module, Mixin)` puts the mixin before the module's own class, in place, and `unmix(module, Mixin)` takes it away. Unlike a hook,
the new class is seen by what guards compiled code, and by exporters; unlike a wrapper, it changes no name in the state dict.
"""

from __future__ import annotations

from functools import cache

from torch import nn


class Mixed:
    """Base of all mixins."""

    mixin: type[Mixed]
    plain: type[nn.Module]

    def __reduce_ex__(self, _: object) -> tuple:
        mixins, plain = [], type(self)
        while issubclass(plain, Mixed):
            mixins.append(plain.mixin)
            plain = plain.plain
        return _blank, (plain, *reversed(mixins)), self.__dict__


def mix(module: nn.Module, mixin: type[Mixed], **attributes: object) -> None:
    """Puts `mixin` before the module's own class; the attributes are set on the module."""
    for name, value in attributes.items():
        setattr(module, name, value)
    module.__class__ = _mixed_class(mixin, type(module))


def unmix(module: nn.Module, kind: type[Mixed]) -> None:
    """Takes the mixin that was put on last away where it is of this kind; other modules are left alone."""
    if issubclass(getattr(type(module), "mixin", nn.Module), kind):
        module.__class__ = type(module).plain


@cache
def _mixed_class(mixin: type[Mixed], plain: type[nn.Module]) -> type[nn.Module]:
    """A class of the name of `plain`, in which what the mixin defines comes first."""
    return type(plain.__name__, (mixin, plain), {"mixin": mixin, "plain": plain, "__module__": plain.__module__})


def _blank(made: type[nn.Module], *mixins: type[Mixed]) -> nn.Module:
    """A module of such a class with nothing in it yet, for copies and pickles; the last mixin comes first."""
    for mixin in mixins:
        made = _mixed_class(mixin, made)
    return made.__new__(made)
