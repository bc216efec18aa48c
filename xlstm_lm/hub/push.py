"""Put an export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def check_repository_name(repository: str) -> None:
    """Refuse a name that the hub would.

    Raises:
        ValueError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {error} Give a name such as somebody/my-model.") from error


def push(folder: Path, repository: str) -> str:
    """Create the repository where it is not there yet, and upload the folder. Returns its address.

    Raises:
        ValueError: nobody is logged in, the hub refuses, or cannot be reached; says how to push later.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an export of xlstm-lm")
    except Exception as error:  # the HTTP library that the client uses, and so its errors, changes between versions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"The export is complete in {folder}, but it could not be pushed to {repository} ({reason}). Log in with "
            f"'hf auth login', see to the network, then push it:  hf upload {repository} {folder}"
        ) from error
    return str(address)
