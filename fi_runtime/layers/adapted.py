import torch

from fi_runtime.layers.linear import Linear


class AdaptedLinear(Linear):
    """A projection to which each row's adapter adds (x A^T) B^T (Hu et al., 2021).

    The A of all adapters lie below W, so that one product makes y and all that the B are for; of
    that, each row keeps its own adapter's. So adapters are read once for a batch, whichever of them
    it uses, and shapes do not depend on which.

    It may be several projections joined, its parts, of which each has an A and a B.

    Args:
        weight: W, (out, in).
        bias: (out,).
        a: (parts * ranks, in), the ranks of all adapters one after another in each part.
        b: of each run of parts of one size: (parts, ranks, size).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: list[torch.Tensor],
    ) -> None:
        if bias is not None:
            bias = torch.cat((bias, bias.new_zeros(len(a))))
        super().__init__(torch.cat((weight, a)), bias)
        self._outputs = len(weight)
        self._b = b

    def adapted(self, product: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        """The projection with what adapters add: (rows, out), a part of ``product``.

        Args:
            product: with ``weight`` and ``bias``: (rows, out + parts * ranks); overwritten.
            others: (rows, ranks), true where a rank is not of the row's adapter; None: no row has
                one.
        """
        y, low = product[:, : self._outputs], product[:, self._outputs :]
        if others is None:
            return y
        # Filled, not multiplied: what is infinite in one adapter's rank is no other row's business.
        low = low.view(len(low), -1, others.shape[1]).masked_fill_(others.unsqueeze(1), 0.0)
        part = column = 0
        for b in self._b:
            parts, _, size = b.shape
            end = column + parts * size
            run = y[:, column:end].view(len(y), parts, size)
            run.transpose(0, 1).baddbmm_(low[:, part : part + parts].transpose(0, 1), b)
            part, column = part + parts, end
        return y
