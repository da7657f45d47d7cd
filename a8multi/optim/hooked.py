"""``step()`` without what torch wraps around it, while nobody looks.

torch.optim.Optimizer wraps the ``step`` of every class for step hooks and a label in profiles. That is a sixth of the
host's time for a step of many small tensors, or more: docs/decisions/0023-step-without-its-wrapper.md.

torch.compile leaves a step as it is: of tables for native calls it has nothing to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch.optim import optimizer as _torchs

_Step = TypeVar("_Step", bound=Callable[..., Any])

# All of this is private to torch. What is not there any more counts as if somebody looked.
_profiled: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)
_OWN = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_OF_ALL = [getattr(_torchs, name, True) for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")]


def hooked_if_watched(step: _Step) -> _Step:
    """An optimizer's ``step`` that runs without gradients, and in torch's wrapper if there are hooks or a profiler.

    Who looks on otherwise misses the label: an ExecutionTraceObserver by itself, or Kineto's profiles on demand.
    """

    @wraps(step)
    def bare(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(False):
            return step(*args, **kwargs)

    hooked = torch.optim.Optimizer.profile_hook_step(bare)

    @wraps(step)
    def run(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # A subclass with a step of its own, which calls this one, is in torch's wrapper already.
        inner = type(self).step is not run
        watched = _profiled() or any(_OF_ALL) or any(getattr(self, name, True) for name in _OWN)
        return _uncompiled(hooked if watched and not inner else bare)(self, *args, **kwargs)

    run.hooked = True  # type: ignore[attr-defined]  # so torch marks those that it has wrapped
    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # nor is `run` a part of what is compiled
    return cast(_Step, run)


@cache  # made at the first step, for it imports the compiler; so does torch when an optimizer is built
def _uncompiled(step: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compiler.disable(step))
