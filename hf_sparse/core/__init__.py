"""Define what a sparse attention method is: its configuration, its layer, its cache, and the list of all methods."""
