"""What is wrong with a run, said when it begins and when it ends: each rule is a small class over host records."""
