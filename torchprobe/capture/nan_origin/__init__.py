"""Where NaN and inf come from: a check at every step, and closer looks after it saw some."""
