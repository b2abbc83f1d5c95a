"""The endpoints' proxy. Its data path is compiled where `native.py` has done that for these very sources."""

from . import native

if native.is_wanted() and (_compiled := native.directory()).is_dir():
    __path__.insert(0, str(_compiled))
