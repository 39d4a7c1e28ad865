"""From device values to host records: step buffers, transfers, the drain thread."""
