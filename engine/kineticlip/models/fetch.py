"""Weights fetched from a URL or the Hugging Face hub into the caches that open_clip shares."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from tqdm import tqdm

from kineticlip.runtime.files import write_whole

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 4.0  # seconds; the hub's own client retries for 23 s before it gives up
DOWNLOAD_TIMEOUT = 30.0  # seconds that a server may be silent in the middle
BLOCK = 1 << 20


def fetch_from_hub(repository: str, filenames: tuple[str, ...]) -> Path | str:
    """The first of the files, from the local cache or the hub; else why there is none."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    # HTTPError: of the client that the hub uses, httpx now and requests in earlier versions.
    broken = (OSError, errors.HFValidationError, errors.HTTPError)  # type: ignore[attr-defined]

    try:
        for filename in filenames:
            cached = hub.try_to_load_from_cache(repository, filename)
            if isinstance(cached, str):
                return Path(cached)
        if hub.constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        unreachable = why_unreachable(hub.hf_hub_url(repository, filenames[0]))
        if unreachable:
            return unreachable
        for filename in filenames:
            try:
                return Path(hub.hf_hub_download(repository, filename))
            except errors.EntryNotFoundError:
                continue
    except broken as error:
        return _brief(error)
    return f"{repository} has none of {', '.join(filenames)}"


def fetch_url(url: str, *, timeout: float = DOWNLOAD_TIMEOUT) -> Path | str:
    """The file behind a URL, from open_clip's cache or downloaded into it; else why not.

    timeout: seconds until a silent server counts as gone; of this request, not of the process,
    which open_clip's own function leaves without one. Raises UserError where the cache cannot be
    written.
    """
    target = Path("~/.cache/clip").expanduser() / os.path.basename(url)
    wanted = checksum_in(url)
    if target.is_file():
        if _sha256(target).startswith(wanted):
            return target
        log.warning("%s: its checksum is not that of %s; fetching it again", target, url)
    unreachable = why_unreachable(url)
    if unreachable:
        return unreachable
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, write_whole(target) as part:
            _copy(response, part)
            if not _sha256(part).startswith(wanted):
                raise _Broken("the file that came has another checksum than its URL names")
    except (_Broken, OSError) as error:
        return f"{urllib.parse.urlsplit(url).hostname}: {_brief(error)}"
    return target


def checksum_in(url: str) -> str:
    """The SHA-256 that a URL of published weights names, or the beginning of it; "" for none."""
    *_, folder, name = url.split("/")
    if re.fullmatch(r"[0-9a-f]{64}", folder):  # OpenAI's
        return folder
    named = re.search(r"-([0-9a-f]{8})\.\w+$", name)  # open_clip's own releases
    return named[1] if named else ""


class _Broken(Exception):
    """A download that ended before its end, or with other bytes."""


def _copy(response: http.client.HTTPResponse, part: Path) -> None:
    promised = int(response.headers.get("Content-Length") or 0)
    count = 0
    with part.open("wb") as file, tqdm(total=promised or None, unit="B", unit_scale=True) as bar:
        while block := _read(response):
            file.write(block)
            count += len(block)
            bar.update(len(block))
    if promised and count != promised:
        raise _Broken(f"the connection ended after {count} of {promised} bytes")


def _read(response: IO[bytes]) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:  # not one of writing the file
        raise _Broken(_brief(error)) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def why_unreachable(url: str) -> str | None:
    """One quick request, so that a machine without a network answers in seconds."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD"), timeout=CONNECT_TIMEOUT
        ).close()
    except urllib.error.HTTPError:
        return None  # it answers; the client that downloads knows what the status means
    except OSError as error:
        return f"{host}: {getattr(error, 'reason', error)}"
    return None


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
