"""What a hub's clients mean by their errors, in words and with the cure; told by name and status, without the client."""

import re
from collections.abc import Iterator

LOGIN = "log in (`hf auth login`) or set HF_TOKEN"
UNREACHED = (
    "the hub cannot be reached, or refuses for a while, and the cache does not hold it: check network and proxy, name a "
    "mirror in HF_ENDPOINT, or try again later"
)
BY_STATUS = {
    401: f"the hub asks who you are: {LOGIN}; names that are wrong it answers alike",
    403: f"its owner gives access on request: accept the terms on its page, then {LOGIN}",
    429: f"the hub was asked too often from here: wait some minutes, or {LOGIN}",
}
BY_NAME = {  # the first that is there
    "GatedRepoError": BY_STATUS[403],
    "RevisionNotFoundError": "it has no such revision: correct it, or leave it out for the newest",
    "RemoteEntryNotFoundError": "the repository has no file {file}",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the cache does not hold it: unset it, or fill the cache elsewhere",
    "LocalEntryNotFoundError": UNREACHED,
    "ConnectionError": UNREACHED,
    "RepositoryNotFoundError": f"the hub has no such repository, or a private one: correct the name, or {LOGIN}",
}


def why(error: BaseException) -> str:
    """In the words above what went wrong; where it is none of these, the first line of the error itself, with what to check."""
    errors = list(_behind(error))
    names = {kind.__name__ for each in errors for kind in type(each).__mro__}
    names.update(re.findall(r"\((\w+)\)$", str(error)))  # `datasets` names in brackets what it does not hand on
    answer = next((each.response for each in errors if getattr(each, "response", None) is not None), None)
    status = getattr(answer, "status_code", 0)
    if status in BY_STATUS and "GatedRepoError" not in names:
        return BY_STATUS[status]
    if status >= 500:
        return f"the hub fails (status {status}): try again later"
    file = str(getattr(answer, "url", "")).rpartition("/")[2]
    known = next((words.format(file=file) for name, words in BY_NAME.items() if name in names), None)
    return known or f"{str(error).strip().partition(chr(10))[0].rstrip('.')}; check its name, the network, and a login"


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those by which it came about."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
