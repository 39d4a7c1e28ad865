"""One concept a file: what a probe captures, its statistic, its tags."""
