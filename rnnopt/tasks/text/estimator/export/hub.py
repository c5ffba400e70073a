"""Classifiers on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from rnnopt.errors import InputError
from rnnopt.tasks.text.encoder.loading import HUB_FILES, HUB_ID, first_line, silence

_WANTED = [*HUB_FILES, "README.md"]


def fetch(name: str | os.PathLike[str], revision: str | None, token: str | None) -> Path:
    """The folder of a classifier: a local one, or of the hub, from the cache if it is there.

    Args:
        name: a folder, or ``owner/name``.
        revision: a branch, a tag or a commit; None for the main branch.
        token: of the hub; None for the one that is logged in.

    Raises:
        InputError: there is neither such a folder nor such a model that could be had.
    """
    if Path(name).is_dir():
        return Path(name)
    if not HUB_ID.fullmatch(os.fspath(name)):
        raise InputError(
            f"there is no folder {name}; give one that TextClassifier.save wrote, or a model's "
            "name on huggingface.co, such as owner/name"
        )
    import huggingface_hub

    try:
        with silence():
            return Path(
                huggingface_hub.snapshot_download(
                    os.fspath(name), revision=revision, token=token, allow_patterns=_WANTED
                )
            )
    except Exception as error:  # the client raises errors of its own, of requests and of httpx
        raise InputError(
            f"{name} is neither a folder nor a model that could be had from the hub "
            f"({first_line(error)}); check its name, the revision and, if it is private, the token"
        ) from error


def push(folder: Path, name: str, private: bool, token: str | None, message: str) -> str:
    """Put a folder on the hub, as a new commit.

    Args:
        folder: that `rnnopt.tasks.text.estimator.folder.save` wrote.
        name: ``owner/name``; made if it is not there.
        private: whether only the owner sees it, if it is made.
        token: of the hub; None for the one that is logged in.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the hub refuses, or can't be reached.
    """
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name!r} is no name on the hub; give owner/name")
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        with silence():
            api.create_repo(name, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # as above
        raise InputError(
            f"{name} could not be put on the hub ({first_line(error)}); log in with `hf auth "
            "login`, or give a token that may write there"
        ) from error
    return str(done.commit_url)
