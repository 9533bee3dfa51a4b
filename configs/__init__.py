"""One file an experiment: its header says the command, the cost and what to expect."""
