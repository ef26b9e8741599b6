"""Let the programs of a kernel come while the last ones of the kernel before still run.

No program of a kernel comes before all of the kernel before have called `take_over` or ended, and these have waited for
all earlier work. So a kernel may read, before it calls `take_over` itself, what was there when the kernel before it was
launched, which for all but the first of a call are the arguments of the call; everything else comes after. A kernel
that is launched without `early`, be it ours or anybody's, begins when all before it has ended, and in a recorded graph
the same order holds.
"""

import functools

import torch
import triton
import triton.language as tl


def early() -> dict[str, bool]:
    """Return what to launch a kernel with that calls `take_over(EARLY)` or `stay(EARLY)`.

    Its programs may then be there before the kernel that was launched before has ended: NVIDIA's programmatic dependent
    launch, from Hopper on.
    """
    return {"EARLY": True, "launch_pdl": True} if _launches_early() else {"EARLY": False}


def _launches_early() -> bool:
    if torch.version.hip is not None or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return _is_hopper(torch.cuda.current_device())


@functools.cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def take_over(EARLY: tl.constexpr):
    """Wait for the end of the kernel that was launched before, and let the programs of the next one come.

    So what a kernel reads before it calls this function must be there before the kernel that was launched before."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def stay(EARLY: tl.constexpr):
    """Wait, in one program at its end, for the kernel that was launched before and whose results nobody has read.

    What comes after this kernel then comes after both. The kernel before must call `take_over`: so those before it have
    ended, and what they wrote can be read without waiting."""
    if EARLY and tl.program_id(0) == 0:
        tl.extra.cuda.gdc_wait()
