"""Leave the folder out without kvpress, which has an environment of its own (`make kvpress`)."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("kvpress") else ["test_*.py"]
