"""Features in: readers of the released layouts, the content-addressed store, the audit."""
