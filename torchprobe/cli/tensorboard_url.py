"""Whether TensorBoard can read a URL, asked before it is started: it would show an empty page and say nothing."""

from __future__ import annotations

from importlib.util import find_spec

from torchprobe.cli.errors import CommandError
from torchprobe.writers.places import protocol_of

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def check_readable(url: str) -> None:
    """Raise CommandError, saying what to install or what the store answers, unless there is a run at or below it."""
    protocol = protocol_of(url)
    if protocol == "gs" and find_spec("tensorboard_data_server") is not None:
        return  # whose reader knows gs:// by itself
    from tensorboard.backend.event_processing import io_wrapper
    from tensorboard.compat import tf

    try:
        tf.io.gfile.isdir(url)  # raises what the next line would hide
        found = next(iter(io_wrapper.GetLogdirSubdirectories(url)), None)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol)
        fix = f"Run: pip install fsspec {package}" if package else "It reads s3://, gs://, az:// and what fsspec knows"
        raise CommandError(f"TensorBoard cannot read {protocol}:// here ({_line(error)}). {fix}") from error
    except Exception as error:  # stores have exceptions of their own
        raise CommandError(f"'{url}' cannot be read: {_line(error)}") from error
    if found is None:
        raise CommandError(f"no run is recorded in '{url}' (it holds no TensorBoard event file)")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
