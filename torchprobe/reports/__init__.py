"""What a recorded run says, for a person: read, summarised, shown in a terminal or on a page. Knows no torch."""
