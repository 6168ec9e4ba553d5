"""Windows of tokens compressed to one entry each: by mean, by a perceptron, or by gates per channel.

Slots are those of `document_windows`; an entry is the compressed key or value of a window.
"""

from jaxtyping import Float, Int
from torch import Tensor

from kernels.arguments import checked, require
from kernels.choose import takes_triton
from kernels.compress.reference import gated_compress_gathered, mlp_compress_gathered
from kernels.document_windows import Windows


@checked
def mean_compress(x: Float[Tensor, "B T G K"], windows: Windows) -> Float[Tensor, "B N G K"]:
    """The mean of the L tokens of each window; anything in slots without one.

    Raises ValueError for an argument of the wrong shape.
    """
    _check("x", x, windows)
    if takes_triton("compress", x):
        from kernels.compress.triton import mean_compress_triton

        return mean_compress_triton(x, windows)
    return windows.gather(x).mean(2)


@checked
def mlp_compress(
    x: Float[Tensor, "B T G K"],
    position_encoding: Float[Tensor, "G L K"],
    first: Float[Tensor, "G F E"],
    second: Float[Tensor, "G K F"],
    windows: Windows,
) -> Float[Tensor, "B N G K"]:
    """second silu(first (x + position_encoding)): a perceptron per head over E = L K channels of a window.

    position_encoding: what is added to each of the L tokens of a window. Anything in slots without a window.
    Native Sparse Attention, arXiv 2502.11089, equation 7.

    Raises ValueError for an argument of the wrong shape.
    """
    _check("x", x, windows)
    heads, dim = x.shape[2:]
    expected = (heads, windows.length, dim)
    require(position_encoding.shape == expected, "position_encoding", expected, position_encoding.shape)
    inner = first.shape[1]
    expected = (heads, inner, windows.length * dim)
    require(first.shape == expected, "first", expected, tuple(first.shape))
    if takes_triton("compress", x):
        from kernels.compress.triton import mlp_compress_triton

        return mlp_compress_triton(x, position_encoding, first, second, windows)
    return mlp_compress_gathered(x, position_encoding, first, second, windows)


@checked
def gated_compress(
    values: Float[Tensor, "B T E"],
    gates: Float[Tensor, "B T E"],
    bias: Float[Tensor, "C E"],
    windows: Windows,
    *,
    position: Int[Tensor, "B T"],
    is_overlapping: bool,
) -> Float[Tensor, "B N K"]:
    """For each window and channel the mean of the values, weighted by softmax(gates + bias) over its tokens.

    bias: one for each of the C tokens of a window. Plain: K = E. Overlapping: E = 2 K; the last K channels of
    a token belong to the entry of its own window, the first K to that of the next one, and the softmax goes
    over these 2 C tokens, or C in the first window of a document. Softmax in float32 at least. Anything in
    slots without a window. The compressors of DeepSeek-V4: overlapping in CSA, plain in HCA.

    Raises ValueError for an argument of the wrong shape.
    """
    _check("values", values, windows)
    expected = (windows.length, values.shape[-1])
    require(bias.shape == expected, "bias", expected, tuple(bias.shape))
    require(not is_overlapping or values.shape[-1] % 2 == 0, "values", "even channels", values.shape[-1])
    if takes_triton("compress", values):
        from kernels.compress.triton import gated_compress_triton

        return gated_compress_triton(
            values, gates, bias, windows, position=position, is_overlapping=is_overlapping
        )
    return gated_compress_gathered(
        values, gates, bias, windows, position=position, is_overlapping=is_overlapping
    )


def _check(name: str, x: Tensor, windows: Windows) -> None:
    require(x.shape[1] > 0, name, "at least one token", tuple(x.shape))
    rows, slots = windows.start.shape
    found = (x.shape[0], max(0, (x.shape[1] - windows.length) // windows.stride + 1))
    require(found == (rows, slots), name, f"{rows} rows of {slots} slots, as the windows", tuple(x.shape))
    require(windows.start.device == x.device, "windows", f"on {x.device}", windows.start.device)
