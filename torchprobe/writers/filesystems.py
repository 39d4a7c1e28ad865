"""The file system that a URL names, by way of fsspec."""

from __future__ import annotations

from typing import Any

from torchprobe.run_directory import protocol_of

# s3fs else keeps listings, in which another process's files are missing.
_NO_CACHE: dict[str, dict[str, Any]] = {"s3": {"use_listings_cache": False}}


def filesystem_of(url: str, argument: str = "log_dir=") -> Any:
    """fsspec's file system for a URL. argument: what the URL was given as, for messages.

    Raises ValueError for a URL of an unknown kind, ImportError for one whose package is not installed.
    """
    protocol = protocol_of(url)
    try:
        import fsspec
    except ImportError as error:
        raise _not_installed(url, argument, "fsspec is not installed") from error
    try:
        return fsspec.filesystem(protocol, **_NO_CACHE.get(protocol, {}))
    except ImportError as error:
        raise _not_installed(url, argument, str(error).rstrip(".")) from error
    except ValueError as error:
        raise ValueError(
            f"{argument}{url!r}: fsspec knows no {protocol!r}: use s3://, gs://, az:// or the like"
        ) from error


def _not_installed(url: str, argument: str, reason: str) -> ImportError:
    return ImportError(
        f"{argument}{url!r} needs a package for {protocol_of(url)}:// ({reason}). "
        "pip install 'torchprobe[remote]' brings fsspec, and s3fs for s3://"
    )
