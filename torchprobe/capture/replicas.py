"""Copies of a model that DataParallel makes at every call, one a device, and runs in threads of their own.

Our hooks and marks are copied with it, and several threads would share them: hooks look for this mark and leave.
"""

from __future__ import annotations

REPLICA = "_is_replica"
"""Key in the __dict__ of such a copy. Looked up in place: a function of ours would be a frame that Dynamo compiles."""
