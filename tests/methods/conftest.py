"""Where the tests of a method's Triton kernels run: as those of the operators do."""

import runpy
from pathlib import Path

_of_operators = runpy.run_path(str(Path(__file__).parents[1] / "ops" / "conftest.py"))
interpreter = _of_operators["interpreter"]
pytest_pycollect_makemodule = _of_operators["pytest_pycollect_makemodule"]
