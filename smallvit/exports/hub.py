"""Sending a folder to the Hugging Face Hub, by its own client: to huggingface.co, or where HF_ENDPOINT says."""

from __future__ import annotations

from pathlib import Path

from smallvit.errors import InputError, first_line

MESSAGE = "Model exported by smallvit"


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Send a folder's files to a repository OWNER/NAME, which is created if it is not there; returns its address.

    Raises:
        InputError: nobody is logged in, or the Hub cannot be reached or refuses. The folder stays.
    """
    from huggingface_hub import HfApi, errors, get_token

    try:
        if get_token() is None:
            raise errors.LocalTokenNotFoundError
        api = HfApi(library_name="smallvit")
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=MESSAGE)
        return str(url)
    except errors.LocalTokenNotFoundError:
        reason = "nobody is logged in; run hf auth login, or set HF_TOKEN"
    except errors.HFValidationError:
        reason = "expected OWNER/NAME, of letters, digits, '-', '_' and '.'"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {401: "the token is not valid", 403: "the token may not write there"}.get(status, first_line(error))
    except Exception as error:  # its HTTP library's, the disk's
        reason = f"no answer from the Hub: {first_line(error)}"
    raise InputError(f"--push {repository}: {reason} (what was exported stays in {folder})")
