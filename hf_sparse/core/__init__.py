"""What a sparse attention method is: its configuration, its layer, and the list of the methods there are."""
