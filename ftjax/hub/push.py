"""Uploads a finished folder to the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from ftjax.errors import UserError


def push_folder(folder: Path, repo_id: str, *, private: bool = True, commit_message: str = "Upload from ftjax") -> str:
    """Upload every file of `folder` into the model repository `repo_id`, which is created if missing.

    After an interrupted push, the next one skips what was uploaded. The token is that of every Hugging Face tool (HF_TOKEN,
    `hf auth login`).

    Args:
        private: make the repository private. An existing public repository is then refused.

    Returns the repository's address. Raises UserError if the upload fails; the folder stays unchanged.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder}: expected a folder with files to push; found {'an empty one' if folder.is_dir() else 'none'}"
        )
    if get_token() is None:
        raise _failed(folder, repo_id, private, "no Hugging Face token was found. Run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="ftjax")
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.model_info(address.repo_id).private is False:
            raise UserError(
                f"{repo_id}: this repository exists and is public, and the push is to be private. Ask for a public push, make "
                f"the repository private at {address}/settings, or choose another name"
            )
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=commit_message)
    except RepositoryNotFoundError:  # also the Hub's answer if the token may not write there
        reason = "the Hub knows no such place for your token. Check the name before the `/`, and `hf auth whoami`"
    except HfHubHTTPError as error:
        reason = _answer(error)
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set, so nothing may be sent. Unset it"
    # A failed transfer of a large file raises RuntimeError; the Hub's client refuses a card with ValueError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        reason = _answer(cause) if isinstance(cause, HfHubHTTPError) else f"the upload broke off ({cause})"
    else:
        return str(address)
    raise _failed(folder, repo_id, private, reason)


def _answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = f"the Hub answered {status} ({error.server_message or error.response.reason_phrase})"
    if status == 401:
        return f"{said}: the token is not valid. Run `hf auth login` again"
    if status == 403:
        return f"{said}: the token may not write there. It needs the role `write`: https://huggingface.co/settings/tokens"
    return said


def _failed(folder: Path, repo_id: str, private: bool, reason: str) -> UserError:
    command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])])
    return UserError(
        f"{repo_id}: not pushed: {reason}. {folder} is complete on this machine; to push it later:\n  {command}\n"
        "What has been uploaded is not sent again."
    )
