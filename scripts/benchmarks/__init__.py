"""What scripts/bench measures: Closeout beside its peers and its limits, in one run on private servers."""
