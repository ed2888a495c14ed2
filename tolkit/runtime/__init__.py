"""Running a model on table rows fetched when they are needed."""

from tolkit.runtime.generation import Generation, GenerationStatistics
from tolkit.runtime.sampling import GenerateSpec
from tolkit.runtime.session import Session, load_session

__all__ = ["GenerateSpec", "Generation", "GenerationStatistics", "Session", "load_session"]
