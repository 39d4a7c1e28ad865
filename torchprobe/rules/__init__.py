"""What is wrong with a run, said when it begins and when it ends: rules over host records, and what an alert does."""
