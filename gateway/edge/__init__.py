"""The endpoints' proxy. Its data path is compiled where `native.py` has done that for these very sources."""

from . import native

native.lead(__path__)
