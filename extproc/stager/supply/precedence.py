"""Which origin a name belongs to: the first, in the order of the settings, that has it or, while it fails, could have it.

Order of events that this guards against: a private origin is down; the next one, a public hub, is asked for the same name; whoever has registered that
name there is served to everybody who trusts the private one. So after a failure only the mirrors of the origin that failed are asked, which the settings
name; and a version that is here is compared with the origin that it came from, and with no other.
"""

import logging
from collections.abc import Sequence

from ...core.artifact import AdapterName
from ...errors import ModelNotFound, OriginFailed
from .listing import Absent, Listing
from .source import Source

log = logging.getLogger(__name__)


class Unanswered(Exception):
    """The origin that may have the name failed, and so did its mirrors: nobody after them may answer. `labels`: theirs, whose content a peer may have."""

    def __init__(self, failure: OriginFailed, labels: frozenset[str]) -> None:
        super().__init__()
        self.failure = failure
        self.labels = labels


class Precedence:
    """All origins of a node."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)

    async def resolve(self, name: AdapterName, came_from: str = "") -> tuple[Source, Listing]:
        """What the origin says whose `name` is; `came_from`: the label of the one that gave the version that is here. Raises ModelNotFound or Unanswered."""
        own = [source for source in self.sources if source.label == came_from]  # none: the settings name that origin no longer
        failed: set[str] = set()
        failure: OriginFailed | None = None
        instead = ""
        for source in own or self.sources:
            if failed and source.mirror_of not in failed:
                continue
            try:
                found = await source.resolve(name)
            except OriginFailed as error:
                log.warning("%s: %s", name, error.message)
                failed.add(source.label)
                if failure is None or (failure.shared and not error.shared):  # one that another node may reach sends the request there
                    failure = error
                continue
            if isinstance(found, Listing):
                return source, found
            if isinstance(found, Absent) and not instead:
                instead = f"; the {source.label} origin has {found.instead}"
        if failure is not None:
            raise Unanswered(failure, frozenset(failed | {source.label for source in self.sources if source.mirror_of in failed}))
        raise ModelNotFound(f"The model `{name}` does not exist: no origin has it{instead}")

    async def mirror(self, source: Source, listing: Listing) -> tuple[Source, Listing] | None:
        """The same content at a mirror of `source`: both listings state the SHA-256 of the weights, and it is equal."""
        for mirror in self.sources:
            if mirror.mirror_of != source.label:
                continue
            try:
                found = await mirror.resolve(listing.name)
            except OriginFailed as error:
                log.warning("%s: %s", listing.name, error.message)
                continue
            if isinstance(found, Listing) and not found.archive and found.weights.sha256 and listing.weights.sha256 and agree(found, listing):
                return mirror, found
        return None


def agree(copy: Listing, listing: Listing) -> bool:
    """Whether the files of a peer or a mirror can be what the origin lists."""
    if listing.archive:
        return True  # nothing can be compared before it is unpacked; the revision is the archive's
    stated = {file.path: file for file in listing.files}
    return all(
        (known := stated.get(file.path)) is not None and known.size in (None, file.size) and known.sha256 in (None, file.sha256) for file in copy.files
    ) and len(copy.files) == len(stated)
