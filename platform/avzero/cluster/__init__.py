"""Ray: a local cluster for one machine, or a connection to one that runs elsewhere."""
