"""Who is kept by strategies that have no population of their own. Knows no genomes' steps."""

from collections.abc import Sequence

from hpc_compress.search import front
from hpc_compress.search.known import Known
from hpc_compress.types import Candidate


def of_front(known: Known, population: Sequence[Candidate], candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The front of the population and the new candidates, the highest score first."""
    assert known.base is not None
    everyone = {candidate.id: candidate for candidate in (*population, *candidates)}
    return by_score(known, front.of(list(everyone.values()), known.base, known.objectives))


def by_score(known: Known, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those that are measured, the highest score first; of equal ones the first by id."""
    scores = {candidate.id: known.score(candidate.measurement) for candidate in candidates if candidate.measurement}
    measured = {candidate.id: candidate for candidate in candidates if candidate.measurement}
    return tuple(measured[id] for id in sorted(scores, key=lambda id: (-scores[id], id)))
