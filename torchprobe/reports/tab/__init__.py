"""The Probe tab of TensorBoard. TensorBoard imports this at its start: it must be light, and never raise."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.base_plugin import TBLoader


class ProbeLoader(TBLoader):  # type: ignore[misc]
    """What TensorBoard finds at the entry point `tensorboard_plugins`. A fault costs the tab, and is said."""

    def load(self, context: Any) -> Any:
        """The plugin, or None when it cannot be made, with a warning in TensorBoard's log."""
        try:
            from torchprobe.reports.tab.plugin import ProbePlugin

            return ProbePlugin(context)
        except Exception:
            import logging

            logging.getLogger("tensorboard").warning("torchprobe's Probe tab cannot be shown", exc_info=True)
            return None
