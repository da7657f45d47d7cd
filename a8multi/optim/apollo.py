"""APOLLO with quantised moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .adafactor import Adafactor8bit
from .checks import check_number
from .elementwise import check_betas
from .roster import Group

# The constructor's name of an option and the groups'. ``betas`` and ``eps`` become several.
_IN_GROUPS = {
    **{name: f"apollo_{name}" for name in ("rank", "update_proj_gap", "scale_type", "scale", "factorize")},
    "enable_fira": "enable_fira_for_apollo",
}
NAMES = (*_IN_GROUPS, "betas", "eps")


def in_groups(options: Mapping[str, Any]) -> Group:
    """Options of APOLLO8bit as its groups hold them: under the names of Adafactor8bit, which may be given too.

    Raises:
        ValueError: ``betas`` or ``eps`` are not valid.
    """
    kept: Group = {}
    for name, value in options.items():
        if name == "betas":
            check_betas(value, 2)
            kept.update(zip(("beta1", "beta2"), value, strict=True))
        elif name == "eps" and not isinstance(value, (tuple, list)):
            check_number("eps", value, 0.0, least_open=True)
            kept.update(eps=(value, 0.0), apollo_eps=value)
        else:
            kept[_IN_GROUPS.get(name, name)] = value
    return kept


class APOLLO8bit(Adafactor8bit):
    r"""APOLLO: the gradient itself, each channel scaled as Adam would scale it in a random projection to a low rank.

    With :math:`R = P G` the projection of a matrix's smaller dimension to ``rank``, and :math:`\tilde R` Adam's update
    of R: each channel j of the larger dimension moves by

    .. math::
        p_j \leftarrow p_j (1 - lr\, \lambda) - lr\, \sqrt{scale}\, \frac{|\tilde R_j|}{|R_j|}\, G_j

    and the norm of the whole step may grow by ``fira_margin`` from one step to the next. Parameters of one dimension
    follow AdamW. :class:`Adafactor8bit` with ``apollo_rank`` does the same with Adafactor's options.

    Args:
        params: parameters or groups, float32, bfloat16 or float16. Embeddings and heads are better off in a group with
            ``rank=0`` (they follow AdamW then): ``a8multi.build_param_groups(model, "apollo")`` does that. The options
            of a group have the names below; ``param_groups`` keeps them under those of :class:`Adafactor8bit`.
        lr: learning rate, >= 0. The paper trains with 1e-2, ten times what AdamW would get.
        rank: of the projection; 256 for models of a billion parameters, 1 with ``scale_type="tensor"`` and
            ``scale=128`` for APOLLO-Mini.
        update_proj_gap: steps after which another random projection is drawn, >= 1; 200 as in the authors' code. The
            moments are kept, as in the paper.
        scale_type: "channel" or "tensor": one scale for each channel, or for the whole matrix.
        scale: factor of the step, under a root.
        betas: decays of the moments of R, each in [0, 1). The defaults of betas and eps are AdamW's.
        eps: added to the root of the second moment, which is 2 sqrt(rank) times the paper's where it is projected, > 0.
        weight_decay: >= 0, decoupled.
        fira_margin: by how much the norm of the step may grow, >= 0.
        factorize: keep R's second moment as row and column means.
        enable_fira: limit the growth of that norm, as the paper does.
        options: as of :class:`Adafactor8bit`, such as ``first_moment``, ``quantize`` or ``seed``.

    Raises:
        ValueError: naming the parameter that is not valid.

    State: for an m x n matrix, m <= n, two codes for each of the rank x n elements of R (1.5 bytes with the nf4 first
    moment), so 0.2 bytes a parameter for rank 256 of m = 2048.

    Differences from the paper: the random matrix is made of sums of 16 bits, which every device draws alike, and
    matrices of one size share it; tensors of more than two dimensions are projected as the most compact matrix of the
    same memory order. Bits are not promised to be equal across devices: the product is the framework's.

    Source: Zhu et al. 2024, arXiv:2412.05270, Algorithm 1; limiter: Chen et al. 2024, arXiv:2410.01623, section 3.3.

    Example:
        >>> optimizer = a8multi.APOLLO8bit(model.parameters(), lr=1e-2, rank=256)
    """

    _named: ClassVar = {kept: name for name, kept in (*_IN_GROUPS.items(), ("eps", "apollo_eps"))}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale_type: str = "channel",
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fira_margin: float = 0.01,
        factorize: bool = False,
        *,
        enable_fira: bool = True,
        **options: Any,
    ) -> None:
        check_number("eps", eps, 0.0, least_open=True)
        # Adafactor without what is its own: what is not projected follows AdamW.
        adam = {
            "d": 0.0,
            "relative_step": False,
            "scale_parameter": False,
            "scale_weight_decay": False,
            "factored": False,
            "block_size": 128,
            "first_moment": "int8",
        }
        apollo = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale_type": scale_type,
            "scale": scale,
            "betas": betas,
            "eps": eps,
            "factorize": factorize,
            "enable_fira": enable_fira,
        }
        super().__init__(
            params, lr, weight_decay=weight_decay, fira_margin=fira_margin, **{**adam, **in_groups(apollo), **options}
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, as torch.optim.Optimizer does; its options have the constructor's names.

        Raises:
            ValueError: for an option that is not valid, or parameters that are complex, sparse or not floating.
        """
        super().add_param_group(in_groups(param_group) if isinstance(param_group, dict) else param_group)
