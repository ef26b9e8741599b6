"""Hold all that knows the folder of an adapter: its files, its card, its report, and the Hub."""
