"""Where records go: an event file, the user's SummaryWriter, JSON lines, memory."""
