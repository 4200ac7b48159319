# SPDX-License-Identifier: Apache-2.0
"""Files of a repository on the Hugging Face Hub: fetched, sent in one commit, and what to do where either fails."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>\S+))?")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
_CLIENTS = "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"  # of versions of huggingface_hub
_SIGN_IN = "sign in with `hf auth login`, set HF_TOKEN, or pass token="


def split_repository(source: Any) -> tuple[str, str | None] | None:
    """("user/repo", revision or None) of "user/repo" or "user/repo@revision"; None for what can only be a path."""
    found = _REPOSITORY.fullmatch(source) if isinstance(source, str) else None
    if found is None or source.startswith((".", "~")) or source.endswith(".safetensors"):
        return None
    return found["repo"], found["revision"]


def cached(source: str) -> tuple[str, str] | None:
    """(user, name) of a repository whose files in the Hub's cache `source` leads to."""
    found = _SNAPSHOT.search(Path(source).as_posix() + "/")
    return (found[1], found[2]) if found else None


def named_on_hub(source: str) -> str:
    """The repository on the Hub that a model was loaded from; "" for a place on this disk."""
    in_cache = cached(source)
    if in_cache:
        return "/".join(in_cache)
    return source if split_repository(source) is not None and not Path(source).exists() else ""


def fetch(repo_id: str, filename: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """One file, downloaded to the Hub's cache unless it is there already: a file in the cache is whole.

    Raises as `explained` says.
    """
    with explained("download", repo_id, revision, filename):
        return Path(hf_hub_download(repo_id, filename, revision=revision, token=token))


def open_repository(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None) -> tuple[str, str]:
    """Make the repository, and a branch in it, where they are not there yet.

    Returns the full id ("user/repo", also where the user was left out) and the commit that `revision` is at.
    Raises ValueError where a private one is asked for and it is there and public, else as `explained` says.
    """
    with explained("upload", repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            if revision is None or revision.startswith("refs/"):
                raise
            api.create_branch(repo_id, branch=revision)
            info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise ValueError(
            f"private=True, but the repository {repo_id} is there already and public; nothing was uploaded. Make it"
            " private in its settings, or choose another name"
        )
    return repo_id, str(info.sha)


def send(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    *,
    message: str,
    revision: str | None,
    parent: str,
    create_pr: bool = False,
    delete: Sequence[str] = (),
) -> CommitInfo:
    """Upload files, by their path in the repository, as one commit on `parent`: before it nothing can be seen.

    Not `upload_folder`, which makes several commits of a large folder. What large files were uploaded before an
    interruption need not be again. Raises as `explained` says, and where `revision` has moved on from `parent`.
    """
    operations = [CommitOperationAdd(path, str(file)) for path, file in sorted(files.items())]
    gone = [CommitOperationDelete(path, is_folder=False) for path in delete]
    with explained("upload", repo_id, revision):
        return api.create_commit(
            repo_id,
            [*operations, *gone],
            commit_message=message,
            revision=revision,
            parent_commit=parent,
            create_pr=create_pr,
        )


@contextmanager
def explained(verb: str, repo_id: str, revision: str | None = None, filename: str | None = None) -> Iterator[None]:
    """Turns errors of the Hub's client into ours, which say what to do; each is raised `from` the original.

    Raises FileNotFoundError where there is no such repository, revision or file, or a private one that the token may
    not see; PermissionError for gated repositories and tokens that are missing, wrong or may not write;
    ConnectionError without a network or where the server broke off; RuntimeError where someone else has changed the
    repository in between. Other errors pass as they are.
    """
    where = repo_id + (f"@{revision}" if revision else "")
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f'{repo_id!r} is no repository id, expected "user/repo": {error}') from error
    except GatedRepoError as error:
        raise PermissionError(
            f"cannot {verb} {where}: the repository is gated. Ask for access on its page at {_page(error, repo_id)},"
            f" and once it is granted {_SIGN_IN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"cannot {verb} {where}: there is no repository {repo_id} at {_page(error, repo_id)}, or it is private and"
            f" the token given may not see it (or none was given). Check the name; for a private one {_SIGN_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"cannot {verb} {where}: {repo_id} has no branch, tag or commit {revision!r}"
        ) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"cannot {verb} {where}: no token was found; {_SIGN_IN}") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"cannot {verb} {where}: HF_HUB_OFFLINE is set; unset it to use the network") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(verb, where) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"cannot {verb} {where}: the repository has no file {filename}") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            raise _unreachable(verb, where, error.response.status_code) from error
        message = _refusal(error, verb, where)
        if message is None:
            raise
        kind = PermissionError if error.response.status_code in (401, 403) else RuntimeError
        raise kind(message) from error
    except (OSError, RuntimeError) as error:  # the client wraps what befalls an upload in a RuntimeError
        if isinstance(error, FileNotFoundError | PermissionError) or not _is_of_transport(error):
            raise
        raise _unreachable(verb, where) from error
    except Exception as error:
        if not _is_of_transport(error):  # httpx's errors have no base in common with Python's own
            raise
        raise _unreachable(verb, where) from error


def _refusal(error: HfHubHTTPError, verb: str, where: str) -> str | None:
    status = error.response.status_code
    if status == 401:
        return f"cannot {verb} {where}: the token is missing or wrong (401); {_SIGN_IN}"
    if status == 403:
        may = "write to it: make one with write access" if verb == "upload" else "read it"
        return f"cannot {verb} {where}: the token given may not {may}, at {_host(error)}/settings/tokens (403)"
    if status == 413:
        return f"cannot {verb} {where}: the server takes no file of this size (413); save in smaller shards"
    if status in (409, 412):
        return f"cannot {verb} {where}: someone else changed it in between ({status}); run the same again"
    return None


def _unreachable(verb: str, where: str, status: int | None = None) -> ConnectionError:
    """status: of an answer, where there was one."""
    rest = "; nothing of it is visible yet, and whole files are not uploaded again" * (verb == "upload")
    state = "cannot be reached, or broke off. Check the network and run the same again"
    if status == 429:
        state = "limits how often one may ask (429). Wait some minutes and run the same again"
    elif status is not None:
        state, rest = f"failed ({status}). Look whether it took effect, else run the same again", ""
    return ConnectionError(f"cannot {verb} {where}: {constants.ENDPOINT} {state}{rest}")


def _is_of_transport(error: BaseException | None) -> bool:
    """Whether a connection failed, or broke off, as the client of HTTP or a socket said somewhere in the chain."""
    while error is not None:
        of_client = type(error).__module__.split(".")[0] in _CLIENTS
        if isinstance(error, ConnectionError | TimeoutError) or (of_client and not hasattr(error, "response")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _host(error: HfHubHTTPError) -> str:
    url = error.response.request.url
    return f"{url.scheme}://{url.netloc.decode() if isinstance(url.netloc, bytes) else url.netloc}"


def _page(error: HfHubHTTPError, repo_id: str) -> str:
    return f"{_host(error)}/{repo_id}"
