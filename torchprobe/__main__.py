"""`python -m torchprobe` is the same as `torchprobe`."""

from torchprobe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
