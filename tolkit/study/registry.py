"""All studies, by the name the command gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tolkit.errors import UsageError
from tolkit.study.alpha import AlphaStudy
from tolkit.study.bits import BitsStudy
from tolkit.study.decode import DecodeStudy
from tolkit.study.drop import DropStudy
from tolkit.study.pareto import ParetoStudy
from tolkit.study.pruning import PruningStudy
from tolkit.study.rank import RankStudy
from tolkit.study.spectrum import SpectrumStudy
from tolkit.study.study import Study

__all__ = ["STUDIES", "study_named"]

_ALL: tuple[Study, ...] = (
    AlphaStudy(),
    BitsStudy(),
    RankStudy(),
    DropStudy(),
    SpectrumStudy(),
    PruningStudy(),
    ParetoStudy(),
    DecodeStudy(),
)
STUDIES: Mapping[str, Study] = MappingProxyType({study.name: study for study in _ALL})


def study_named(name: str) -> Study:
    """The study; UsageError names all there are."""
    if name not in STUDIES:
        raise UsageError(f"study: {name!r} is none, expected one of {', '.join(STUDIES)}")
    return STUDIES[name]
