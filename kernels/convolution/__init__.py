"""Short causal depthwise convolution, usually with SiLU, which stops at document starts."""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require, require_order
from kernels.choose import takes_triton
from kernels.convolution.reference import ShortConvolution, behind


@checked
def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, "D"] | None = None,
    *,
    document: Int[Tensor, "B T"] | None = None,
    initial_state: Float[Tensor, "B U D"] | None = None,
    has_silu: bool = True,
) -> Float[Tensor, "B T D"]:
    """SiLU of a causal depthwise convolution plus bias; taps that reach into another document count as zero.

    initial_state: the U = W - 1 tokens before the row, of the document of its first token; None is zeros.

    Raises ValueError for an argument of the wrong shape or dtype.
    """
    require(x.shape[1] > 0, "x", "at least one token", tuple(x.shape))
    require_order("document", document)
    require(weight.dtype == x.dtype, "weight", f"dtype {x.dtype}, as x", weight.dtype)
    if bias is not None:
        require(bias.dtype == x.dtype, "bias", f"dtype {x.dtype}, as x", bias.dtype)
    if initial_state is not None:
        expected = (x.shape[0], weight.shape[1] - 1, x.shape[2])
        require(initial_state.shape == expected, "initial_state", expected, tuple(initial_state.shape))
        require(
            initial_state.dtype == x.dtype, "initial_state", f"dtype {x.dtype}, as x", initial_state.dtype
        )
    if takes_triton("convolution", x):
        from kernels.convolution.triton import short_convolution_triton

        return short_convolution_triton(
            x, weight, bias, document=document, initial_state=initial_state, has_silu=has_silu
        )
    if initial_state is not None:
        x, document = behind(initial_state, x, document)
        out = ShortConvolution.apply(x, weight, bias, document, has_silu)
        assert isinstance(out, Tensor), f"{type(out)=}"
        return out[:, initial_state.shape[1] :]
    out = ShortConvolution.apply(x, weight, bias, document, has_silu)
    assert isinstance(out, Tensor), f"{type(out)=}"
    return out
