"""One config a table of evidence."""
