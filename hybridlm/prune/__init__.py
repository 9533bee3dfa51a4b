"""Score, plan, cut, mask: pure functions over parameter trees, by axis names only."""
